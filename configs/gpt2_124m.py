"""GPT-2's size with a modern recipe, in the shape of gpt-oss: rotary positions, sinks, every other layer local.

python main.py --config=configs/gpt2_124m.py --config.mesh="data=8"
python main.py --config=configs/gpt2_124m.py --config.batch_size=64 --config.accumulation_steps=8    # on one GPU
python main.py export --workdir=runs/gpt2_124m --out=exported

123.6 million parameters, 3.1 billion tokens of FineWeb in steps of half a million. Made for GPUs, where it has not been
trained yet: its rates are those of modded-nanogpt's early records, not tuned here. The first loss to expect is
ln 50257 = 10.825; GPT-2's size reaches 3.28 on this validation shard. `main.py plan` says what it takes.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.num_blocks = 12
    config.num_heads = 12
    config.embedding_dim = 768
    config.mlp_dim = 2048  # three matrices of it have the weights of GPT-2's two
    config.context_len = 1024
    config.mlp = "swiglu_clamped"
    config.norm = "rmsnorm"
    config.position = "rope"
    config.qkv_bias = True
    config.attention_out_bias = True
    config.sliding_window = 128
    config.window_pattern = "LG"
    config.output_init = "scaled"
    config.mask_documents = True

    config.dataset = "fineweb"
    config.train_shards = 32
    config.tokenizer = "gpt2"

    config.lr = 0.0036
    config.muon_lr = 0.02
    config.newton_schulz = "polar_express"
    config.muon_momentum_start = 0.85
    config.muon_momentum_warmup_steps = 300
    config.schedule = "constant_linear"
    config.lr_warmup_ratio = 0.02
    config.decay_ratio = 0.4

    config.batch_size = 512
    config.loss_chunk = 8192
    config.max_steps = 6000
    config.eval_tokens = 10_485_760
    config.save_every = 500
    config.sample_prompt = "The"
    return config
