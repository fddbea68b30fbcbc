"""What heads attend to, and how much of it goes to their sinks: measured exactly, outside of training.

Shapes: L layers, B batch, T query time, S key time, N query heads, K key/value heads, G = N / K, H head_dim.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corpus.dataset import Split
from runtime.files import MetricsFile
from transformer.attention import MASKED, sink_rows, visible
from transformer.config import Execution, TransformerConfig
from transformer.model import Attention, Params, Transformer, model_of, params_of


def sink_shares(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    """The share of its attention that each head gives to its sink, averaged over all positions: [L, N], float32.

    At one position: exp(sink) / (exp(sink) + sum over visible s' of exp(s_ts')), which `attention.attend` discards.
    Raises ValueError if the model has no sinks.
    """
    return _shares(_unrolled(model.config), params_of(model), tokens_BT, (0, 2))


def sink_shares_by_position(model: Transformer, tokens_T: jax.Array) -> jax.Array:
    """The same by position, averaged over a layer's heads: [T, L]. Raises ValueError as `sink_shares`."""
    return _shares(_unrolled(model.config), params_of(model), tokens_T[None], (0, 1)).T


def attention_maps(model: Transformer, tokens_T: jax.Array) -> jax.Array:
    """All attention probabilities of one text, float32 [L, N, T, 1 + T]: the sink's (0 if none), then each key's."""
    return _maps(_unrolled(model.config), params_of(model), tokens_T)


@partial(jax.jit, static_argnums=(0, 3))
def _shares(config: TransformerConfig, params: Params, tokens_BT: jax.Array, over: tuple[int, ...]) -> jax.Array:
    """The sinks' shares of each layer, averaged over these axes of [B, N, T]."""
    if not config.has_sinks:
        raise ValueError("attention_sink: the model has none")
    seen = _look(config, params, tokens_BT)
    return jnp.stack([jnp.exp(log_sink_BNT).mean(over) for _, log_sink_BNT in seen])


@partial(jax.jit, static_argnums=0)
def _maps(config: TransformerConfig, params: Params, tokens_T: jax.Array) -> jax.Array:
    seen = _look(config, params, tokens_T[None])
    both = [jnp.concatenate([log_sink_BNT[..., None], log_keys_BNTS], -1) for log_keys_BNTS, log_sink_BNT in seen]
    return jnp.exp(jnp.concatenate(both))


def _unrolled(config: TransformerConfig) -> TransformerConfig:
    """The same model with unrolled blocks, which can be replaced, and a kernel that takes texts of any length."""
    return dataclasses.replace(config, **dataclasses.asdict(Execution(dtype=config.dtype)))


def _look(config: TransformerConfig, params: Params, tokens_BT: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Log-probabilities of keys [B, N, T, S] and of the sink [B, N, T] for each layer of the running model.

    All scores are in memory at once, so texts may have some thousand tokens.
    """
    seen: list[tuple[jax.Array, jax.Array]] = []

    def watch(attention: Attention):
        def attend(x_BTD, where, place):
            q_BTNH, k_BTKH, _, sink = attention.project(x_BTD, where)
            seen.append(_log_probabilities(q_BTNH, k_BTKH, sink, attention.window, where.document_BT))
            return attention(x_BTD, where, place)

        return attend

    model = model_of(config, params)
    for block in model.blocks:
        block.attention = watch(block.attention)
    model.hidden(tokens_BT)
    return seen


def _log_probabilities(
    q_BTNH: jax.Array, k_BSKH: jax.Array, sink: jax.Array | None, window: int, document_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores_BNTS = scores_BKGTS.reshape(B, N, T, T)
    mask_BNTS = visible(jnp.arange(T)[None], jnp.arange(T), window)[:, None]
    if document_BT is not None:
        mask_BNTS = mask_BNTS & (document_BT[:, None, :, None] == document_BT[:, None, None])
    sink_BNT = jnp.float32(-jnp.inf) if sink is None else sink_rows(sink, 1)[:, 0, ..., 0]
    total_BNT = jnp.logaddexp(jax.nn.logsumexp(jnp.where(mask_BNTS, scores_BNTS, MASKED), -1), sink_BNT)
    log_keys_BNTS = jnp.where(mask_BNTS, scores_BNTS - total_BNT[..., None], -jnp.inf)
    return log_keys_BNTS, sink_BNT - total_BNT


# --- Over a run: measured at each evaluation, kept in `sinks.jsonl` -----------------------------------------------

TOKENS = 1024  # the first tokens of the validation split, always the same


def stretch(split: Split, context_len: int) -> np.ndarray:
    """The text to measure on, at most TOKENS tokens in whole windows: int32 [B, T]."""
    T = min(context_len, TOKENS, split.num_tokens)
    B = min(TOKENS, split.num_tokens) // T
    return np.asarray(split.tokens[: B * T], np.int32).reshape(B, T)


def read_shares(
    path: Path, model_config: TransformerConfig, warn: Callable[[str], None] = lambda text: None
) -> tuple[list[int], np.ndarray]:
    """The steps and shares [E, L, N] of `sinks.jsonl`; rows that are not this model's are left out."""
    shape = (model_config.num_blocks, model_config.num_heads)
    steps, shares = [], []
    for row in MetricsFile(path).read(warn):
        try:
            shares_LN, step = np.array(row["shares"], np.float64), int(row["step"])
        except (KeyError, TypeError, ValueError):
            continue
        if shares_LN.shape == shape and np.isfinite(shares_LN).all():
            steps.append(step)
            shares.append(shares_LN)
    return steps, np.array(shares).reshape(-1, *shape)


class SinkLog:
    """A run's file of shares: one JSON object on each line with `step`, `tokens`, and `shares` by layer and head."""

    def __init__(self, path: Path, split: Split) -> None:
        self._file, self._split = MetricsFile(path), split

    def append(self, model: Transformer, row: dict[str, Any]) -> None:
        """Measure `model`, on one device, at the step and tokens of the metrics' `row`. Raises StorageError."""
        shares_LN = np.asarray(sink_shares(model, jnp.asarray(stretch(self._split, model.config.context_len))))
        shares = [[round(float(share), 7) for share in layer] for layer in shares_LN]
        self._file.append({"step": row["step"], "tokens": row["tokens"], "shares": shares})
