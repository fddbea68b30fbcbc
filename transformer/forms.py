"""Forms of attention that can be switched on: what a sink's logit is, and what is done to the output of each head.

Shapes: B batch, T time, N query heads, K key/value heads, H head_dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

# logit: a learned number per head (gpt-oss, arXiv:2508.10925). zero: the constant 0, softmax off by one. key: a learned
# key per key head, whose value is zero (arXiv:2410.10781). True and False are what logit and none were called.
SINKS = ("none", "logit", "zero", "key")
GATES = ("none", "head", "channel")
_OLD_SINKS = {"true": "logit", "1": "logit", "false": "none", "0": "none"}


def sink_name(value: Any) -> Any:
    """The form of a sink that a config names, by its present name; what is no name stays as it is."""
    return _OLD_SINKS.get(str(value).lower(), value) if isinstance(value, str | bool) else value


def key_sink(q_BTNH: jax.Array, key_KH: jax.Array) -> jax.Array:
    """The logit of a sink with a key, [B, T, N] in float32: q·key / sqrt(H).

    Queries are those before rotation: a sink stands at no position.
    """
    B, T, N, H = q_BTNH.shape
    K = len(key_KH)
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    return jnp.einsum("BTKGH,KH->BTKG", q_BTKGH, key_KH).reshape(B, T, N) / math.sqrt(H)


def gated(y_BTNH: jax.Array, gate_BTX: jax.Array) -> jax.Array:
    """Each head's output times a sigmoid of what the token itself asks for (arXiv:2505.06708).

    X is N for one number per head, N H for one per channel.
    """
    return y_BTNH * jax.nn.sigmoid(gate_BTX).reshape(*y_BTNH.shape[:3], -1)


def exclusive(y_BTNH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Each head's output without its component along the token's own value (arXiv:2603.09078): y - (y·v) v / (v·v)."""
    B, T, N, H = y_BTNH.shape
    v_BTKH = v_BTKH.astype(jnp.float32)
    v_BTKH = v_BTKH * jax.lax.rsqrt((v_BTKH * v_BTKH).sum(-1, keepdims=True) + 1e-12)
    y_BTKGH, v_BTK1H = y_BTNH.astype(jnp.float32).reshape(B, T, v_BTKH.shape[2], -1, H), v_BTKH[:, :, :, None]
    own_BTKG1 = (y_BTKGH * v_BTK1H).sum(-1, keepdims=True)
    return (y_BTKGH - own_BTKG1 * v_BTK1H).reshape(B, T, N, H).astype(y_BTNH.dtype)
