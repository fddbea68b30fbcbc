"""The training set-up of the PyTorch original: GPT-2 tokens, context 1024, Muon and AdamW, one epoch in order.

python main.py --config=configs/shakespeare_gpt2.py

37 steps; made for a GPU, where it has not been timed yet (a step takes 32 s on two CPU cores). The first loss to expect
is ln 50257 = 10.825.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_blocks = 6
    config.num_heads = 8
    config.embedding_dim = 512
    config.mlp_dim = 1024
    config.context_len = 1024

    config.tokenizer = "gpt2"
    config.order = "sequential"

    config.lr = 3e-4
    config.muon_lr = 0.02
    config.schedule = "constant"

    config.batch_size = 8
    config.epochs = 1
    config.log_every = 1
    config.eval_every = 20
    config.save_every = 20
    return config
