"""enwik8 by bytes, in the usual 90/5/5 million split: the shakespeare recipe at a size for one GPU.

python main.py --config=configs/enwik8.py
python main.py eval --workdir=runs/enwik8 --split=test

Made for a GPU, where it has not been timed yet.
"""

from configs import shakespeare


def get_config():
    config = shakespeare.get_config()
    config.num_blocks = 6
    config.num_heads = 6
    config.embedding_dim = 384
    config.mlp_dim = 1536
    config.context_len = 256

    config.dataset = "enwik8"
    config.tokenizer = "byte"
    config.val_fraction = 0.05
    config.test_fraction = 0.05

    config.lr = 0.006
    config.muon_lr = 0.02
    config.muon_momentum_warmup_steps = 300

    config.batch_size = 64
    config.max_steps = 10_000
    config.eval_every = 1000
    config.eval_tokens = 500_000
    config.save_every = 1000
    return config
