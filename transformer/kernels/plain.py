"""Causal self-attention with sinks that saves its whole [T, T] probabilities for the backward pass: for short texts.

Shapes: B batch, T time, N query heads, K key/value heads, G = N / K, H head_dim. The batched products have contiguous
matrices, which is faster on a CPU: X = B K matrices with R = G T rows, the queries that share a key head.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from transformer.attention import MASKED, sink_rows, visible
from transformer.xla import materialize


def attend_plain(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sink: jax.Array | None,
    window: int,
    document_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal `attend` of T tokens among themselves: [B, T, N, H] in the dtype of v. Args as `causal_attention`."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G = N // K
    q_XRH = materialize(q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H))
    k_XTH, v_XTH = (materialize(x.transpose(0, 2, 1, 3).reshape(B * K, T, H)) for x in (k_BTKH, v_BTKH))
    sink_XR1 = None
    if sink is not None:
        sink_XR1 = jnp.broadcast_to(sink_rows(sink, K), (B, K, G, T, 1)).reshape(B * K, G * T, 1)
    document_XT = None if document_BT is None else jnp.repeat(document_BT, K, axis=0)
    out_XRH = _core(q_XRH, k_XTH, v_XTH, sink_XR1, document_XT, window)
    return materialize(out_XRH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)).reshape(B, T, N, H)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _core(q_XRH, k_XTH, v_XTH, sink_XR1, document_XT, window):
    return _forward(q_XRH, k_XTH, v_XTH, sink_XR1, document_XT, window)[0]


def _forward(q_XRH, k_XTH, v_XTH, sink_XR1, document_XT, window):
    (R, H), T = q_XRH.shape[1:], k_XTH.shape[1]
    scores_XRT = _product("XRH,XTH->XRT", q_XRH, k_XTH) / math.sqrt(H)
    mask_RT = visible(jnp.arange(R) % T, jnp.arange(T), window)
    if document_XT is not None:
        mask_RT = mask_RT & (jnp.tile(document_XT, R // T)[:, :, None] == document_XT[:, None])
    scores_XRT = jnp.where(mask_RT, scores_XRT, MASKED)
    top_XR1 = scores_XRT.max(-1, keepdims=True)
    if sink_XR1 is not None:
        top_XR1 = jnp.maximum(top_XR1, sink_XR1)
    top_XR1 = materialize(top_XR1)
    weights_XRT = materialize(jnp.exp(scores_XRT - top_XR1))
    total_XR1 = weights_XRT.sum(-1, keepdims=True)
    sink_prob_XR1 = None
    if sink_XR1 is not None:
        sink_weight_XR1 = jnp.exp(sink_XR1 - top_XR1)
        total_XR1 = materialize(total_XR1 + sink_weight_XR1)
        sink_prob_XR1 = sink_weight_XR1 / total_XR1
    probs_XRT = materialize(weights_XRT * materialize(1 / total_XR1))
    out_XRH = materialize(_product("XRT,XTH->XRH", probs_XRT.astype(v_XTH.dtype), v_XTH).astype(v_XTH.dtype))
    return out_XRH, (q_XRH, k_XTH, v_XTH, probs_XRT, sink_prob_XR1)


def _backward(window, kept, dout_XRH):
    q_XRH, k_XTH, v_XTH, probs_XRT, sink_prob_XR1 = kept
    dout_XRH = materialize(dout_XRH)
    dprobs_XRT = materialize(_product("XRH,XTH->XRT", dout_XRH, v_XTH))
    mean_XR1 = materialize((probs_XRT * dprobs_XRT).sum(-1, keepdims=True))
    scale = 1 / math.sqrt(q_XRH.shape[-1])
    dscores_XRT = materialize((probs_XRT * (dprobs_XRT - mean_XR1) * scale).astype(q_XRH.dtype))
    dq_XRH = _product("XRT,XTH->XRH", dscores_XRT, k_XTH).astype(q_XRH.dtype)
    dk_XTH = _product("XRT,XRH->XTH", dscores_XRT, q_XRH).astype(k_XTH.dtype)
    dv_XTH = _product("XRT,XRH->XTH", probs_XRT.astype(dout_XRH.dtype), dout_XRH).astype(v_XTH.dtype)
    dsink_XR1 = None if sink_prob_XR1 is None else -sink_prob_XR1 * mean_XR1
    return *materialize((dq_XRH, dk_XTH, dv_XTH)), dsink_XR1, None


_core.defvjp(_forward, _backward)
