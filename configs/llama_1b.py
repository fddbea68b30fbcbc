"""The shape of Llama 3.2 1B, with GPT-2's vocabulary, on ten billion tokens of FineWeb.

python main.py --config=configs/llama_1b.py --config.mesh="data=16"
python main.py export --workdir=runs/llama_1b --out=exported

1.08 billion parameters, steps of a million tokens. Made for a cluster, where it has not been trained yet: its rates are
those of configs/gpt2_124m.py made smaller, not tuned. The first loss to expect is ln 50257 = 10.825. `main.py plan`
says what it takes.
"""

from configs import gpt2_124m


def get_config():
    config = gpt2_124m.get_config()
    config.num_blocks = 16
    config.num_heads = 32
    config.num_kv_heads = 8
    config.embedding_dim = 2048
    config.mlp_dim = 8192
    config.context_len = 2048
    config.mlp = "swiglu"
    config.mlp_bias = False
    config.rope_theta = 500_000.0
    config.qkv_bias = False
    config.attention_out_bias = False
    config.attention_sink = "none"
    config.sliding_window = 0

    config.train_shards = 103

    config.lr = 0.001
    config.muon_lr = 0.01

    config.remat = "dots"
    config.max_steps = 9500
    config.save_every = 250
    return config
