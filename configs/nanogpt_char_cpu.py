"""nanoGPT's character recipe for a CPU, in this project's terms: no sinks, AdamW alone, random windows.

python main.py --config=configs/nanogpt_char_cpu.py

Two minutes on two cores of an Intel Xeon with AVX-512; validation loss 1.9026 (seed 0), and the same in PyTorch
from the same weights on the same batches. (nanoGPT itself estimates 1.8857 from 20 random batches.)
"""

from configs import nanogpt_char


def get_config():
    config = nanogpt_char.get_config()
    config.num_blocks = 4
    config.num_heads = 4
    config.embedding_dim = 128
    config.mlp_dim = 512
    config.context_len = 64
    config.dropout = 0.0
    config.batch_size = 12
    config.max_steps = 2000
    config.lr_warmup_ratio = 0.05
    return config
