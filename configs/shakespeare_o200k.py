"""The original's model on o200k_base, a vocabulary of 200,019 tokens: context 1024 within 6 GB of memory.

python main.py --config=configs/shakespeare_o200k.py
"""

from ml_collections import ConfigDict

from configs import shakespeare_gpt2


def get_config() -> ConfigDict:
    config = shakespeare_gpt2.get_config()
    config.tokenizer = "o200k_base"
    config.batch_size = 1
    config.accumulation_steps = 8  # the other recipe's batch of 8, a sequence at a time
    config.loss_chunk = 128
    config.eval_tokens = 8192
    return config
