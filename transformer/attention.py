"""Causal attention with learned sinks, and the key/value cache.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, G = N / K queries for each, H head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.xla import materialize

MASKED = float(np.finfo(np.float32).min)  # used instead of minus infinity, which could make NaNs


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, sink: jax.Array | None = None
) -> jax.Array:
    """Softmax attention in which every row may also put weight on a learned sink: [B, T, N, H] in the dtype of v.

    Row t of head n: p_ts = exp(s_ts) / (exp(sink_n) + sum over visible s' of exp(s_ts')), with s = q·k / sqrt(H).
    The sink's own probability is discarded, so a head can attend to nothing (StreamingLLM, arXiv:2309.17453; as a
    logit per head: gpt-oss, arXiv:2508.10925). Without a sink it is the usual softmax. Scores and softmax are float32.

    Args:
      mask_BTS: true where a query may see a key; B and T may be 1. Every row must see at least one key.
      sink: the sinks' logits by head [N], or by row and head [B, T, N]; or None.
    """
    return attend_heads_first(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask_BTS, sink)


def attend_heads_first(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, sink: jax.Array | None = None
) -> jax.Array:
    """`attend` for keys and values with heads before tokens, as in the cache."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    # The largest score only keeps exp() in range; its gradient cancels exactly.
    top_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
    if sink is not None:
        sink_BKGT1 = sink_rows(sink, K)
        top_BKGT1 = jnp.maximum(top_BKGT1, jax.lax.stop_gradient(sink_BKGT1))
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    if sink is not None:
        total_BKGT1 = total_BKGT1 + jnp.exp(sink_BKGT1 - top_BKGT1)
    bits = jnp.finfo(q_BTNH.dtype)  # of all operands, though the cache may keep them in float32
    probs_BKGTS = jax.lax.reduce_precision(weights_BKGTS / total_BKGT1, bits.nexp, bits.nmant).astype(v_BKSH.dtype)
    y_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", probs_BKGTS, v_BKSH)  # heads before tokens, or XLA transposes the values
    return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def sink_rows(sink: jax.Array, K: int) -> jax.Array:
    """The sinks' logits beside scores [B, K, G, T, S], in float32; of those by head, [N], B and T are 1."""
    sink_BTN = sink.astype(jnp.float32).reshape(*(sink.shape if sink.ndim == 3 else (1, 1, -1)))
    B, T, N = sink_BTN.shape
    return sink_BTN.swapaxes(1, 2).reshape(B, K, N // K, T, 1)


def visible(query_BT: jax.Array, key_S: jax.Array, window: int) -> jax.Array:
    """The causal mask [B, T, S] from the positions of queries and keys.

    A query sees the keys up to its own position; if `window` > 0, only the last `window` of them (itself included).
    """
    distance_BTS = query_BT[..., None] - key_S
    mask_BTS = distance_BTS >= 0
    return mask_BTS & (distance_BTS < window) if window else mask_BTS


class LayerCache(NamedTuple):
    """Keys and values of one layer by slot; those of a head are contiguous, as attention reads them."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class Cache(NamedTuple):
    """The keys and values of a batch of texts, padded on the left to end in one slot, or each at a slot of its own."""

    layers: list[LayerCache]
    start_B: jax.Array  # the slot of each text's first token; slots before it are padding
    length: jax.Array  # slots in use: a number, or [B] where each text has its own


def write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, slot: jax.Array) -> LayerCache:
    """Put the keys and values of T tokens into the slots from `slot` on, a number or each text's own [B]."""
    each = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0 if slot.ndim else None, None))
    put = lambda old, new: each(old, new.swapaxes(1, 2).astype(old.dtype), slot, 1)
    return materialize(LayerCache(put(cache.k_BKSH, k_BTKH), put(cache.v_BKSH, v_BTKH)))  # or each reader makes a copy


def visible_slots(cache: Cache, T: int, window: int) -> jax.Array:
    """The mask [B, T, S] for the next T tokens: causal, and without padding."""
    slot_S = jnp.arange(cache.layers[0].k_BKSH.shape[2])
    query_BT = cache.length.reshape(-1, 1) + jnp.arange(T)
    return visible(query_BT, slot_S, window) & (slot_S >= cache.start_B[:, None, None])
