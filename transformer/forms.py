"""Forms of attention that can be switched on: what a sink's logit is, what is done to heads' outputs.

Shapes: B batch, T time, D embedding_dim, N query heads, K key/value heads, H head_dim.
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


def sink_logits(form: str, q_BTNH: jax.Array, sink: Any, key: Any) -> jax.Array | None:
    """The logits of a form of SINKS, as `attend` takes them; `sink` and `key` are the layer's parameters, if any.

    Queries are those before rotation: a sink stands at no position.
    """
    B, T, N, H = q_BTNH.shape
    match form:
        case "logit":
            return sink[...]
        case "zero":
            return jnp.zeros(N, jnp.float32)
        case "key":
            key_KH = key[...]
            q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, len(key_KH), -1, H)
            return jnp.einsum("BTKGH,KH->BTKG", q_BTKGH, key_KH).reshape(B, T, N) / math.sqrt(H)
    return None


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


def first_residual_scalars(layer: int, num_blocks: int) -> jax.Array:
    """What a block multiplies the residual stream by, and the first block's input that it adds to it: nanochat's."""
    depth = layer / max(1, num_blocks - 1)
    return jnp.float32([1.15 - 0.1 * depth, 0.2 - 0.15 * depth])


def scaled_residual(x_BTD: jax.Array, first_BTD: jax.Array, scalars: jax.Array) -> jax.Array:
    """The residual stream with some of what entered the first block."""
    keep, add = scalars.astype(x_BTD.dtype)
    return keep * x_BTD + add * first_BTD
