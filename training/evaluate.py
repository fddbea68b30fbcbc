"""Exact loss over a split, for validation during a run, for the `eval` command and for benchmarks."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from corpus.dataset import Split
from corpus.tokenizer import Tokenizer
from input_pipeline import eval_batches
from runtime.multihost import from_all, put
from training import cost
from training.loss import token_losses
from training.step import make_eval_step
from transformer.config import TransformerConfig
from transformer.model import Params, Transformer, model_of, params_of
from transformer.sharding import DATA, FSDP, batch_sharded, is_data_parallel
from transformer.xla import target_of, traced_for

LOGITS = 2**30  # bytes of the logits of a batch, where they are wanted whole


class Evaluator:
    """Exact loss over a split: every token but the first is predicted once, in non-overlapping windows."""

    TOKENS = 4096  # the least size of a batch, if it needs no more memory than a step or than ROOM
    ROOM = 2**28  # bytes that are always available

    def __init__(self, model_config: TransformerConfig, mesh: Mesh, batch_size: int):
        self._context_len = model_config.context_len
        self._rows = batch_size * self._batches_at_once(model_config, mesh, batch_size)
        self.tokens_at_once = self._rows * model_config.context_len
        self._place = batch_sharded(mesh)
        self._step = make_eval_step(model_config, mesh)
        alone = mesh.devices.flat[0].platform == "cpu" and not is_data_parallel(mesh)  # see make_eval_step
        self._in_flight = 0 if alone else 2  # two keep the devices busy, and a signal waits for no more

    def _batches_at_once(self, model_config: TransformerConfig, mesh: Mesh, batch_size: int) -> int:
        """How many training batches to evaluate at once, because small ones would leave the devices idle.

        It depends only on config and mesh, since the bits of a loss depend on the size of the batches.
        """
        parts = mesh.shape[DATA] * mesh.shape[FSDP]
        one_block = dataclasses.replace(model_config, num_blocks=1, remat="none")  # nothing is kept for a backward pass

        def need(config: TransformerConfig, rows: int) -> int:  # of a training step, as it was estimated at first
            of = cost.activation_bytes(config, max(1, rows // parts))
            return of["kept"] + 5 * of["block"] // 4 + 2 * of["logits"]

        limit = max(self.ROOM, need(model_config, batch_size))
        most = max(1, self.TOKENS // (batch_size * self._context_len))
        return next((n for n in range(most, 1, -1) if need(one_block, n * batch_size) <= limit), 1)

    def traced(self, params: Params) -> Any:
        """The program for one batch, to be compiled; of `params` only shapes and shardings are read."""
        batch_BT1 = jax.ShapeDtypeStruct((self._rows, self._context_len + 1), jnp.int32, sharding=self._place)
        return self._step.trace(params, batch_BT1)

    def __call__(
        self, params: Params, split: Split, max_tokens: int = 0, check: Callable[[], None] = lambda: None
    ) -> tuple[float, int]:
        """Mean loss in nats per token, and the number of these tokens: a fixed prefix of about `max_tokens`; 0: all.

        `check` is called between batches, and may raise to stop.
        """
        sums: list[list[float]] = []  # loss and tokens of each batch, on this process's devices
        in_flight: deque[tuple[jax.Array, jax.Array]] = deque()
        for batch in eval_batches(split, self._context_len, self._rows, max_tokens):
            check()
            in_flight.append(self._step(params, put(batch, self._place)))
            if len(in_flight) > self._in_flight:
                sums.append([_own_sum(x) for x in in_flight.popleft()])
        sums += [[_own_sum(x) for x in of_batch] for of_batch in in_flight]
        total, tokens = (sum(of_batches.tolist()) for of_batches in from_all(np.array(sums)).sum(axis=0).T)
        return total / tokens, int(tokens)


def log_probs(model: Transformer, split: Split, rows: int) -> Iterator[np.ndarray]:
    """Log-probabilities, in nats, of every token of a split but the first, in order: float32 [n] at a time.

    Each is predicted in the same window as by an `Evaluator`; at most `rows` windows are read at once.
    """
    of_batch = token_log_probs(model)
    rows = max(1, min(rows, LOGITS // (4 * model.config.context_len * model.config.vocab_size)))
    for batch in eval_batches(split, model.config.context_len, rows):
        yield np.asarray(of_batch(batch))[batch[:, 1:] >= 0]


def token_log_probs(model: Transformer) -> Callable[[np.ndarray], jax.Array]:
    """A function of a batch [B, T + 1] that gives each target's log-probability [B, T]; one below 0 means nothing."""

    def of_batch(params: Params, batch_BT1: jax.Array) -> jax.Array:
        logits_BTV = model_of(model.config, params)(jnp.maximum(batch_BT1[:, :-1], 0))
        return -token_losses(logits_BTV, batch_BT1[:, 1:])

    params = params_of(model)
    on = target_of(jax.tree.leaves(params)[0].devices())
    return partial(jax.jit(traced_for(on, of_batch)), params)


def bits_per_byte(loss: float, num_tokens: int, split: Split, tokenizer: Tokenizer) -> float | None:
    """A loss in nats per token as bits per byte of UTF-8, which is comparable across tokenizers; None without text.

    `num_tokens` were predicted, at the split's start; the very first token, which was not, counts too if it is text.
    """
    num_bytes = split.bytes_of(num_tokens + split.unpredicted, tokenizer)
    first = split.unpredicted and min(split.bytes_of(1, tokenizer), 1)  # an end-of-text token has no bytes
    return loss / math.log(2) * (num_tokens + first) / num_bytes if num_bytes else None


def _own_sum(x: jax.Array) -> float:
    """The sum of the part that this process counts of an array over the devices of all processes."""
    parts = [np.zeros(0, x.dtype), *(s.data for s in x.addressable_shards if s.replica_id == 0)]
    return np.concatenate(parts).sum(dtype=np.float64)
