"""The original's model on o200k_base, a vocabulary of 200,019 tokens: context 1024 within 6 GB of memory.

python main.py --config=configs/shakespeare_o200k.py

On two CPU cores an earlier build peaked at 4.53 GB resident (two steps, each with evaluation, sample and checkpoint);
the logits of one batch alone would be 6.6 GB, and their gradient as much. A step of 8 x 1024 tokens took 76 to 84 s
there, beside other work: made for a GPU, where it has not been timed. The first loss to expect is ln 200019 = 12.206.
"""

from configs import shakespeare_gpt2


def get_config():
    config = shakespeare_gpt2.get_config()
    config.tokenizer = "o200k_base"
    config.loss_chunk = 128
    config.remat = "block"
    config.cpu_devices = "1"  # each further one would hold the weights and the optimizer's state once more
    config.eval_tokens = 8192
    return config
