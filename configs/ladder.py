"""Models of all sizes by one dial, the depth, so that loss against compute is one curve. Characters, as shakespeare.py.

python main.py --config=configs/ladder.py:DEPTH
python main.py sweep --config=configs/ladder.py:2,3,4,5,6 --seeds=3     (docs/using.md: how the loss falls with FLOPs)

Depth 4 is the model of shakespeare.py. With B sequences a step:

- width 32 depth, heads of 32, an MLP four times as wide: matrices keep their aspect, parameters grow as depth^3.
- tokens 2^18 depth. Parameters^0.37 is the allocation of Kaplan et al. (arXiv:2001.08361). Hoffmann's, in proportion to
  parameters (arXiv:2203.15556), would read the 1.0 million characters 50 times at depth 6; up to four times, which is
  depth 15, repeated text is worth nearly as much as new text (arXiv:2305.16264).
- B in proportion to tokens^0.383, whatever the model's size (arXiv:2505.13738, 2410.21676), rounded to an even number.
- muon_lr 0.01 at depth 4, in proportion to B^0.5, whatever the width: an orthogonalised update times sqrt(out/in) has
  the spectral norm that changes features alike at every width (arXiv:2310.17813). The residual branches have no factor
  for depth, so nothing says that the rate carries over in depth; a sweep at 2, 4 and 6 does not contradict it
  (docs/using.md).
- lr in proportion to B^0.5 (Adam's scaling rule, arXiv:2205.10287) and to width^-0.5. muP (arXiv:2203.03466) wants
  width^0 for embeddings and vectors and width^-1 for the head; one rate trains both here, and this is their geometric
  mean. The head begins at 0, as muP advises.
- weight_decay such that the time in which weights are forgotten, 1 / (muon_lr weight_decay) steps, is the run's
  (arXiv:2405.13698: it is to be kept as the run grows; docs/findings-on-sinks.md: 0.1 at
  depth 4 is the best of three with one seed).
"""

import re

from configs import shakespeare
from runtime.errors import UserError

_TUNED = 4  # the depth of shakespeare.py


def get_config(depth: str = "4"):
    if not re.fullmatch("[1-9][0-9]?", depth):
        raise UserError(f"--config=configs/ladder.py:DEPTH: a whole number from 1 to 99, got {depth[:20]!r}")
    config = shakespeare.get_config()
    layers = int(depth)
    ratio = layers / _TUNED
    config.num_blocks = config.num_heads = layers
    config.head_dim = 32
    config.embedding_dim = 32 * layers
    config.mlp_dim = 4 * config.embedding_dim

    tuned_batch = config.batch_size
    config.batch_size = 2 * round(tuned_batch / 2 * ratio**0.383)
    config.max_steps = round(2**18 * layers / (config.batch_size * config.context_len))
    config.eval_every = config.save_every = -(-config.max_steps // 4)

    noise = (config.batch_size / tuned_batch) ** 0.5
    config.muon_lr = round(0.01 * noise, 5)
    config.lr = round(config.lr * noise * ratio**-0.5, 5)
    config.weight_decay = round(1 / (config.muon_lr * config.max_steps), 4)
    return config
