"""Which kernel causal self-attention uses, and sinks for kernels without them.

The kernels of `chunked` and `vendor` have no sinks. Sinks are added to them, exactly, from what every flash kernel
saves for its backward pass: its output, and the logarithm of each row's sum of exponentials.

Shapes: B batch, T time, S key time, N query heads, K key/value heads, G = N / K, H head_dim.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.kernels.chunked import chunked_backward, chunked_forward, rowsum
from transformer.kernels.plain import attend_plain
from transformer.kernels.vendor import SPLASH_BLOCKS, cudnn_backward, cudnn_forward, splash_backward, splash_forward
from transformer.sharding import by_heads
from transformer.xla import target

KERNEL_NAMES = ("auto", "plain", "chunked", "cudnn", "splash")

# From so many tokens on "auto" takes chunks if no kernel for the device runs: on a CPU they save time (measured),
# elsewhere they save memory and probably cost some time.
LONG_ON_CPU = 256
LONG = 1024


class Kernel(NamedTuple):
    """Causal softmax attention without sinks, scores q·k / sqrt(H); window and document are `causal_attention`'s.

    forward: (q_BTNH, k_BTKH, v_BTKH, document_BT, window) -> out_BTNH in the dtype backward needs, float32 lse_BNT.
    backward: (q, k, v, document, out, lse, dout, window) -> dq, dk, dv in the dtypes of q, k, v. It computes
      probabilities as exp(score - lse) and the softmax's correction as sum(dout * out), like FlashAttention-2
      (arXiv:2307.08691, algorithm 2), so it differentiates any softmax that `out` and `lse` describe, also with sinks.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sink: jax.Array | None,
    window: int,
    kernel: str = "auto",
    document_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal `attend` of T tokens among themselves: [B, T, N, H] in the dtype of v.

    Raises ValueError, `attention_kernel: <why>`, if a kernel asked for by name cannot run here.

    Args:
      sink: the sinks' logits in float32 by head [N], or by row and head [B, T, N]; or None.
      window: how many keys a query sees, itself included; 0 is all.
      kernel: one of KERNEL_NAMES.
      document_BT: the number of each token's document, outside of which it sees nothing; None: one document.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, sink, document_BT):
        _, T, N, H = q_BTNH.shape
        name = choose(kernel, T, N, k_BTKH.shape[2], H, q_BTNH.dtype, document_BT is not None)
        if name == "plain":
            return attend_plain(q_BTNH, k_BTKH, v_BTKH, sink, window, document_BT)
        return attend_by(KERNELS[name], window, q_BTNH, k_BTKH, v_BTKH, sink, document_BT)

    return by_heads(attend, q_BTNH, k_BTKH, v_BTKH, sink, document_BT)


# --- The choice ---------------------------------------------------------------------------------------------------


def choose(kernel: str, T: int, N: int, K: int, H: int, dtype: Any, documents: bool = False) -> str:
    """The kernel to use; for "auto" the fastest one that runs here. Raises ValueError as `causal_attention` does."""
    if kernel != "auto":
        if problem := obstacle(kernel, T, N, K, H, dtype, documents):
            raise ValueError(f"attention_kernel: {problem}")
        return kernel
    here = target().platform
    fast = {"tpu": "splash", "cuda": "cudnn"}.get(here)
    long = LONG_ON_CPU if here == "cpu" else LONG
    slow = "chunked" if long <= T else "plain"
    if fast is None or dtype != jnp.bfloat16:
        return slow
    if problem := obstacle(fast, T, N, K, H, dtype, documents):
        _warn_once(f"attention_kernel: {problem}; taken instead: {slow}")
        return slow
    return fast


def obstacle(kernel: str, T: int, N: int, K: int, H: int, dtype: Any, documents: bool = False) -> str:
    """Why a kernel cannot run with these sizes on `target()`, or "" (always "" for "auto").

    `documents`: it has to keep documents apart.
    """
    here, capability = target()
    if kernel == "splash":
        if here != "tpu":
            return f"splash needs a TPU, and this is {here}; use auto"
        if T % SPLASH_BLOCKS[-1]:
            return f"splash needs a multiple of {SPLASH_BLOCKS[-1]} tokens, not {T}; use auto"
    elif kernel == "cudnn":
        if here != "cuda":
            return f"cudnn needs an NVIDIA GPU, and this is {here}; use auto"
        if float(capability) < 8:
            return f"cudnn needs compute capability 8.0 (Ampere), and this GPU has {capability}; use auto"
        if dtype != jnp.bfloat16:
            return f"cudnn computes in bfloat16, not {jnp.dtype(dtype)}; set dtype to bfloat16, or use auto"
        if documents and T % 2:
            return f"cudnn keeps documents apart in an even number of tokens, not {T}; use auto"
    else:
        return ""
    return _misfit(kernel, capability, T, N, K, H, jnp.dtype(dtype), documents)


@cache
def _misfit(kernel: str, capability: str, T: int, N: int, K: int, H: int, dtype: Any, documents: bool) -> str:
    """Why the installed library refuses a kernel of its own (none of them is a stable interface), or "".

    Nothing is compiled or run: only the shapes are computed, forward and backward. The library asks for the compute
    capability of `target()`, which stands among the arguments for the cache.
    """

    def forward_and_backward(document_BT, *qkv):
        out, pull_back = jax.vjp(partial(attend_by, KERNELS[kernel], 0, sink=None, document_BT=document_BT), *qkv)
        return pull_back(out)

    array = lambda heads: jax.ShapeDtypeStruct((1, T, heads, H), dtype)
    try:
        document_BT = jax.ShapeDtypeStruct((1, T), jnp.int32) if documents else None
        jax.eval_shape(forward_and_backward, document_BT, array(N), array(K), array(K))
    except Exception as error:  # whatever this or a later version raises
        return f"{kernel} does not fit: {' '.join(str(error).split())}; use auto"
    return ""


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# --- Sinks around a kernel ----------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_by(kernel: Kernel, window: int, q_BTNH, k_BTKH, v_BTKH, sink, document_BT):
    """Attention as in `attend`, by a kernel.

    With lse = log sum exp(s), sinks make it lse' = log(exp(lse) + exp(sink)) and the output out' = out exp(lse - lse').
    Given out' and lse', the kernel's backward pass differentiates that softmax; the gradient of the sinks is
    dsink = -sum over rows of exp(sink - lse') (dout' · out').
    """
    return _forward(kernel, window, q_BTNH, k_BTKH, v_BTKH, sink, document_BT)[0]


def _forward(kernel: Kernel, window: int, q_BTNH, k_BTKH, v_BTKH, sink, document_BT):
    out_BTNH, lse_BNT = kernel.forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window)
    if sink is not None:
        total_BNT = jnp.logaddexp(lse_BNT, _by_heads_first(sink))
        kept_BTN1 = jnp.exp(lse_BNT - total_BNT).swapaxes(1, 2)[..., None]
        out_BTNH, lse_BNT = (out_BTNH * kept_BTN1).astype(out_BTNH.dtype), total_BNT
    return out_BTNH.astype(v_BTKH.dtype), (q_BTNH, k_BTKH, v_BTKH, sink, document_BT, out_BTNH, lse_BNT)


def _backward(kernel: Kernel, window: int, kept, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, sink, document_BT, out_BTNH, lse_BNT = kept
    gradients = kernel.backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window)
    if sink is None:
        return *gradients, None, None
    share_BNT, mean_BNT = jnp.exp(_by_heads_first(sink) - lse_BNT), rowsum(dout_BTNH, out_BTNH)
    if sink.ndim == 1:
        return *gradients, -jnp.einsum("BNT,BNT->N", share_BNT, mean_BNT), None
    return *gradients, -(share_BNT * mean_BNT).swapaxes(1, 2), None


def _by_heads_first(sink: jax.Array) -> jax.Array:
    """[N, 1] of sinks [N], [B, N, T] of sinks [B, T, N]."""
    return sink[:, None] if sink.ndim == 1 else sink.swapaxes(1, 2)


attend_by.defvjp(_forward, _backward)


KERNELS = {
    "chunked": Kernel(chunked_forward, chunked_backward),
    "cudnn": Kernel(cudnn_forward, cudnn_backward),
    "splash": Kernel(splash_forward, splash_backward),
}
