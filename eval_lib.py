"""Exact loss over a split: what validation during a run, the `eval` command and benchmarks share."""

from collections import deque
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from input_pipeline import Split, eval_batches
from transformer.model import Params, TransformerConfig
from transformer.sharding import batch_sharded
from transformer.step import make_eval_step


class Evaluator:
    """Exact loss over a split: every token but the first predicted once, in non-overlapping windows."""

    TOKENS = 4096  # a batch is at least about this large: without a backward pass there is room

    def __init__(self, model_config: TransformerConfig, mesh: Mesh, batch_size: int):
        self._context_len = model_config.context_len
        self._rows = batch_size * max(1, self.TOKENS // (batch_size * self._context_len))
        self._place = batch_sharded(mesh)
        self._step = make_eval_step(model_config, mesh)

    def __call__(
        self, params: Params, split: Split, max_tokens: int = 0, check: Callable[[], None] = lambda: None
    ) -> tuple[float, int]:
        """Mean loss in nats per token, and over how many tokens.

        Args:
          max_tokens: only a fixed prefix of the split, about this long; 0 is all of it.
          check: called between batches; may raise to break off.
        """
        total, tokens = 0.0, 0
        in_flight: deque[tuple[jax.Array, jax.Array]] = deque()

        def collect(at_most: int) -> None:
            nonlocal total, tokens
            while len(in_flight) > at_most:
                losses, counts = jax.device_get(in_flight.popleft())
                total += float(losses.sum(dtype=np.float64))
                tokens += int(counts.sum())

        for batch in eval_batches(split, self._context_len, self._rows, max_tokens):
            check()
            in_flight.append(self._step(params, jax.device_put(batch, self._place)))
            collect(at_most=2)  # keeps the devices busy, and a signal does not wait for the whole split
        collect(at_most=0)
        return total / tokens, tokens
