"""Stories, or any text of some megabytes, with a tokenizer learned from it: ten minutes, whatever the machine.

python main.py tokenizer --dataset=FILE --vocab_size=4096 --out=tokenizers/stories
python main.py --config=configs/stories.py --config.dataset=FILE
python main.py sample --workdir=runs/stories

A model of three million parameters in the shape of gpt-oss, so that `export` gives its class; configs/chat.py goes on
from it. On two cores of an AMD EPYC (Zen 5), 36 MB of Wikipedia, in float32: 1,941 steps, 1.74 bits per byte (seed 0).
Shape and rates are shakespeare_gptoss.py's, enlarged by rule; other sizes were not tried.
"""

from configs import shakespeare_gptoss


def get_config():
    config = shakespeare_gptoss.get_config()
    config.num_heads = 6
    config.embedding_dim = 192
    config.mlp_dim = 512
    config.context_len = 256
    config.sliding_window = 128
    config.tokenizer = "tokenizers/stories"
    config.val_fraction = 0.05
    config.max_steps = 0
    config.max_seconds = 570  # the rest is start and compilation
    config.eval_every = 500
    config.eval_tokens = 20_000
    config.save_every = 500
    return config
