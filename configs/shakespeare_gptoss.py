"""Tiny shakespeare by characters in the shape of gpt-oss, one expert a block, so that `export` gives its class.

python main.py --config=configs/shakespeare_gptoss.py
python main.py export --workdir=runs/shakespeare_gptoss --out=exported

A little over two minutes on two cores of an Intel Xeon with AVX-512, start and exact evaluation included; validation
loss 1.5549 (seed 0) in nats per character.
"""

from configs import shakespeare


def get_config():
    config = shakespeare.get_config()
    config.mlp = "swiglu_clamped"
    config.mlp_bias = True
    config.mlp_dim = 344
    config.qk_norm = "none"
    config.qkv_bias = True
    config.attention_out_bias = True
    config.sliding_window = 32
    config.window_pattern = "LG"

    config.lr = 0.002  # without QK-norm the rates that serve shakespeare.py are too high
    config.muon_lr = 0.007
    config.max_steps = 1600
    return config
