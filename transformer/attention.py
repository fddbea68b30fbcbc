"""Causal attention with learned sinks, rotary positions, and the key/value cache.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, G = N / K queries a key head serves,
H head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.dense import settle

MASKED = float(np.finfo(np.float32).min)  # stands for minus infinity and, unlike it, never makes a NaN


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, sink_N: jax.Array | None = None
) -> jax.Array:
    """Softmax attention in which every row may also put weight on a learned sink.

    Row t of head n: p_ts = exp(s_ts) / (exp(sink_n) + sum over visible s' of exp(s_ts')), with s = q·k / sqrt(H).
    The sink's own probability is thrown away, so a head can attend to nothing (StreamingLLM, arXiv:2309.17453; as a
    logit per head: gpt-oss, arXiv:2508.10925). Without a sink it is the usual softmax.

    Scores and softmax are float32 whatever the inputs are.

    Args:
      mask_BTS: true where a query may see a key; B and T may be 1. Every row must see at least one key.
      sink_N: the sinks' logits, or None.

    Returns:
      [B, T, N, H] in the dtype of v.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    # The largest score only keeps exp() in range; its gradient cancels exactly.
    top_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
    sink_KG11 = None if sink_N is None else sink_N.astype(jnp.float32).reshape(K, N // K, 1, 1)
    if sink_KG11 is not None:
        top_BKGT1 = jnp.maximum(top_BKGT1, jax.lax.stop_gradient(sink_KG11))
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    if sink_KG11 is not None:
        total_BKGT1 = total_BKGT1 + jnp.exp(sink_KG11 - top_BKGT1)
    probs_BKGTS = (weights_BKGTS / total_BKGT1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def visible(query_BT: jax.Array, key_S: jax.Array, window: int) -> jax.Array:
    """The causal mask [B, T, S] from the positions of queries and keys.

    A query sees keys that are not after it and, when `window` > 0, of those only the last `window` (itself included).
    """
    distance_BTS = query_BT[..., None] - key_S
    mask_BTS = distance_BTS >= 0
    return mask_BTS & (distance_BTS < window) if window else mask_BTS


class LayerCache(NamedTuple):
    """Keys and values of one layer, by position: row b holds its own text from index 0 on."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def cache_write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, position_BT: jax.Array) -> LayerCache:
    """Put new keys and values at their positions."""
    row_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
    return LayerCache(
        cache.k_BSKH.at[row_B1, position_BT].set(k_BTKH.astype(cache.k_BSKH.dtype)),
        cache.v_BSKH.at[row_B1, position_BT].set(v_BTKH.astype(cache.v_BSKH.dtype)),
    )


# --- Rotary positions ---------------------------------------------------------------------------------------------


class Yarn(NamedTuple):
    """How YaRN stretches rotary positions to a longer context (arXiv:2309.00071, section 3).

    Dimensions that turn more than `beta_fast` times within the original context are kept, those that turn fewer than
    `beta_slow` times are slowed by `factor`, and a ramp lies between; `truncate` rounds the ramp's ends to whole
    dimensions. Queries and keys are scaled by `attention_factor`; 0 means the paper's 0.1 ln(factor) + 1.
    Llama 3 (arXiv:2407.21783) does the same with a ramp over turns instead of dimensions, and scales nothing.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    ramp_over_turns: bool = False


def rope_frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> tuple[np.ndarray, float]:
    """Radians a position for each of the head_dim / 2 planes (RoFormer, arXiv:2104.09864), and the scale of q and k."""
    plane = np.arange(0, head_dim, 2, dtype=np.float64)
    frequency = theta ** (-plane / head_dim)
    if yarn is None:
        return frequency.astype(np.float32), 1.0

    def plane_turning(times: float) -> float:
        """The (fractional) plane that turns this many times within the original context."""
        return head_dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    if yarn.ramp_over_turns:
        turns = yarn.original_context * frequency / (2 * math.pi)
        ramp = (yarn.beta_fast - turns) / (yarn.beta_fast - yarn.beta_slow)
    else:
        low, high = plane_turning(yarn.beta_fast), plane_turning(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (plane / 2 - low) / max(high - low, 0.001)
    slowed = np.clip(ramp, 0, 1)
    frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
    return frequency.astype(np.float32), yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1.0


def rotation(position_BT: jax.Array, frequency: np.ndarray, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] of position x frequency, in float32; `scale` multiplies both."""
    angle_BT1H = (position_BT[..., None].astype(jnp.float32) * frequency)[:, :, None]
    return settle((jnp.cos(angle_BT1H) * scale, jnp.sin(angle_BT1H) * scale))


def rotate(x_BTNH: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each plane (x_i, x_{i + H/2}) by its `rotation`, in float32; [B, T, N, H] in the dtype of x."""
    cos, sin = turn
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
