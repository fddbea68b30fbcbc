"""Causal self-attention with sinks by kernels that never hold a [T, S] array whole, and the choice between them.

No kernel here knows sinks. They are added around it, exactly, from what every flash kernel keeps for its backward pass:
its output, and the logarithm of each row's sum of exponentials.

Shapes: B batch, T time, S key time, N query heads, K key/value heads, G = N / K, H head_dim.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp

from transformer.attention import MASKED, visible
from transformer.plain import attend_plain
from transformer.sharding import by_heads

KERNEL_NAMES = ("auto", "plain", "chunked", "cudnn", "splash")

# Tokens from which "auto" takes chunks where no kernel of the device's own runs: on a CPU they save time (measured),
# elsewhere they are thought to cost some, and save the memory.
LONG_ON_CPU = 256
LONG = 1024


class Kernel(NamedTuple):
    """Causal softmax attention without sinks, scores q·k / sqrt(H), each query seeing its last `window` keys (0: all).

    Of those only the keys of its own document, where `document_BT` is not None.

    forward: (q_BTNH, k_BTKH, v_BTKH, document_BT, window) -> out_BTNH in the dtype backward wants, float32 lse_BNT.
    backward: (q, k, v, document, out, lse, dout, window) -> dq, dk, dv in the dtypes of q, k, v. Takes probabilities as
      exp(score - lse) and the softmax's correction as sum(dout * out), like FlashAttention-2 (arXiv:2307.08691,
      algorithm 2): so it differentiates whatever softmax `out` and `lse` describe, one with sinks too.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sink_N: jax.Array | None,
    window: int,
    kernel: str = "auto",
    document_BT: jax.Array | None = None,
) -> jax.Array:
    """What `attend` gives for T tokens that see each other causally, [B, T, N, H] in the dtype of v.

    Args:
      sink_N: the sinks' logits in float32, or None.
      window: how many keys a query sees, itself included; 0 is all.
      kernel: one of KERNEL_NAMES.
      document_BT: a number for each token's document, across whose border nothing is seen; None: all is one.

    Raises:
      ValueError: `attention_kernel: <why>` when a kernel asked for by name cannot run here.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT):
        _, T, N, H = q_BTNH.shape
        name = choose(kernel, T, N, k_BTKH.shape[2], H, q_BTNH.dtype, document_BT is not None)
        if name == "plain":
            return attend_plain(q_BTNH, k_BTKH, v_BTKH, sink_N, window, document_BT)
        return attend_by(KERNELS[name], window, q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT)

    return by_heads(attend, q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT)


# --- The choice ---------------------------------------------------------------------------------------------------


def choose(kernel: str, T: int, N: int, K: int, H: int, dtype: Any, documents: bool = False) -> str:
    """The kernel to take, never "auto": for that the fastest that runs here.

    Raises:
      ValueError: as `causal_attention`.
    """
    if kernel != "auto":
        if problem := obstacle(kernel, T, N, K, H, dtype, documents):
            raise ValueError(f"attention_kernel: {problem}")
        return kernel
    fast = {"tpu": "splash", "cuda": "cudnn"}.get(platform())
    long = LONG_ON_CPU if platform() == "cpu" else LONG
    slow = "chunked" if long <= T else "plain"
    if fast is None or dtype != jnp.bfloat16:
        return slow
    if problem := obstacle(fast, T, N, K, H, dtype, documents):
        _warn_once(f"attention_kernel: {problem}; taken instead: {slow}")
        return slow
    return fast


def obstacle(kernel: str, T: int, N: int, K: int, H: int, dtype: Any, documents: bool = False) -> str:
    """What keeps a kernel from running on these sizes on this machine, or "" ("auto" always finds one that runs).

    `documents`: it has to keep documents apart.
    """
    here = platform()
    if kernel == "splash":
        if here != "tpu":
            return f"splash needs a TPU, and this is {here}; use auto"
        if T % SPLASH_BLOCKS[-1]:
            return f"splash needs a multiple of {SPLASH_BLOCKS[-1]} tokens, not {T}; use auto"
    elif kernel == "cudnn":
        if here != "cuda":
            return f"cudnn needs an NVIDIA GPU, and this is {here}; use auto"
        capability = jax.local_devices()[0].compute_capability
        if float(capability) < 8:
            return f"cudnn needs compute capability 8.0 (Ampere), and this GPU has {capability}; use auto"
        if dtype != jnp.bfloat16:
            return f"cudnn computes in bfloat16, not {jnp.dtype(dtype)}; set dtype to bfloat16, or use auto"
        if documents:
            return "cudnn does not keep documents apart here; use auto, or set mask_documents to False"
    else:
        return ""
    return _misfit(kernel, T, N, K, H, jnp.dtype(dtype))


@cache
def _misfit(kernel: str, T: int, N: int, K: int, H: int, dtype: Any) -> str:
    """What the installed library has against a kernel of its own (none of them is a stable interface), or "".

    Nothing is compiled or run: its shapes are worked out, forward and backward.
    """

    def forward_and_backward(*qkv):
        out, pull_back = jax.vjp(partial(attend_by, KERNELS[kernel], 0, sink_N=None, document_BT=None), *qkv)
        return pull_back(out)

    array = lambda heads: jax.ShapeDtypeStruct((1, T, heads, H), dtype)
    try:
        jax.eval_shape(forward_and_backward, array(N), array(K), array(K))
    except Exception as error:  # whatever this or a later version raises
        return f"{kernel} does not fit: {' '.join(str(error).split())}; use auto"
    return ""


def platform() -> str:
    """Of the default device: cpu, tpu, cuda, rocm, ..."""
    backend = jax.extend.backend.get_backend()
    return "cuda" if backend.platform == "gpu" and "cuda" in backend.platform_version else backend.platform


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# --- Sinks around a kernel ----------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_by(kernel: Kernel, window: int, q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT):
    """Attention as in `attend`, by a kernel.

    With lse = log sum exp(s), sinks make it lse' = log(exp(lse) + exp(sink)) and the output out' = out exp(lse - lse').
    Given out' and lse', the kernel's backward pass differentiates that softmax; what is left for the sinks is
    dsink = -sum over rows of exp(sink - lse') (dout' · out').
    """
    return _forward(kernel, window, q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT)[0]


def _forward(kernel: Kernel, window: int, q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT):
    out_BTNH, lse_BNT = kernel.forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window)
    if sink_N is not None:
        total_BNT = jnp.logaddexp(lse_BNT, sink_N[:, None])
        kept_BTN1 = jnp.exp(lse_BNT - total_BNT).swapaxes(1, 2)[..., None]
        out_BTNH, lse_BNT = (out_BTNH * kept_BTN1).astype(out_BTNH.dtype), total_BNT
    return out_BTNH.astype(v_BTKH.dtype), (q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT, out_BTNH, lse_BNT)


def _backward(kernel: Kernel, window: int, kept, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, sink_N, document_BT, out_BTNH, lse_BNT = kept
    gradients = kernel.backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window)
    if sink_N is None:
        return *gradients, None, None
    sink_share_BNT = jnp.exp(sink_N[:, None] - lse_BNT)
    return *gradients, -jnp.einsum("BNT,BNT->N", sink_share_BNT, _rowsum(dout_BTNH, out_BTNH)), None


attend_by.defvjp(_forward, _backward)


def _rowsum(dout_BTNH: jax.Array, out_BTNH: jax.Array) -> jax.Array:
    """dout · out, [B, N, T], float32."""
    return jnp.einsum("BTNH,BTNH->BNT", dout_BTNH.astype(jnp.float32), out_BTNH.astype(jnp.float32))


# --- Chunked: plain JAX, on any device ----------------------------------------------------------------------------
# FlashAttention-2 over blocks of queries and of the keys that they see: what lies outside is never computed. In loops,
# since XLA runs unrolled blocks all at once and keeps their scores for the backward pass, a [T, S] array again.
# Shapes: I blocks of C tokens.

BLOCK = 128  # tokens; 64 and 256 were no faster on a CPU


def _in_blocks(x: jax.Array, K: int) -> jax.Array:
    """[B, T, N, ...] as [I, B, K, G, C, ...], with as few zeros at the end as equal blocks allow."""
    B, T, N, *rest = x.shape
    blocks = -(-T // BLOCK)
    x = jnp.pad(x, [(0, 0), (0, -T % blocks)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, blocks, -1, K, N // K, *rest), (1, 2), (0, 4))


def _from_blocks(x_IBKGC: jax.Array, T: int) -> jax.Array:
    """[B, T, N, ...] from [I, B, K, G, C, ...]."""
    blocks, B, K, G, C, *rest = x_IBKGC.shape
    return jnp.moveaxis(x_IBKGC, (0, 4), (1, 2)).reshape(B, blocks * C, K * G, *rest)[:, :T]


def _document_blocks(document_BT: jax.Array | None) -> jax.Array | None:
    """[I, B, C]."""
    return None if document_BT is None else _in_blocks(document_BT[:, :, None], 1)[:, :, 0, 0]


def _block_scores(
    q_BKGCH: jax.Array, k_BKSH: jax.Array, document_IBC: jax.Array | None, i: jax.Array, j: jax.Array, window: int
) -> jax.Array:
    """[B, K, G, C, S]: the scores of queries of block i and keys of block j."""
    C, H = q_BKGCH.shape[-2:]
    scores_BKGCS = jnp.einsum("BKGCH,BKSH->BKGCS", q_BKGCH, k_BKSH, preferred_element_type=jnp.float32) / math.sqrt(H)
    mask_BCS = visible((i * C + jnp.arange(C))[None], j * C + jnp.arange(C), window)
    if document_IBC is not None:
        mask_BCS = mask_BCS & (document_IBC[i][:, :, None] == document_IBC[j][:, None])
    return jnp.where(mask_BCS[:, None, None], scores_BKGCS, MASKED)


def _loop_over_keys(i: jax.Array, C: int, window: int, step: Callable, start: Any) -> Any:
    """step(j, carry) for each block of keys that queries of block i see. The last is their own: no row ends empty."""
    first = jnp.maximum(i * C - window + 1, 0) // C if window else 0
    return jax.lax.fori_loop(first, i + 1, step, start)


def _chunked_forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window):
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    document_IBC = _document_blocks(document_BT)
    q_IBKGCH = _in_blocks(q_BTNH, K)
    k_IBKSH, v_IBKSH = (_in_blocks(x, K)[:, :, :, 0] for x in (k_BTKH, v_BTKH))
    blocks, *BKGC, H = q_IBKGCH.shape

    def block(i):
        def step(j, carry):
            top_BKGC1, total_BKGC1, out_BKGCH = carry
            scores_BKGCS = _block_scores(q_IBKGCH[i], k_IBKSH[j], document_IBC, i, j, window)
            higher_BKGC1 = jnp.maximum(top_BKGC1, scores_BKGCS.max(-1, keepdims=True))
            weights_BKGCS = jnp.exp(scores_BKGCS - higher_BKGC1)
            rescale_BKGC1 = jnp.exp(top_BKGC1 - higher_BKGC1)  # 0 where all before was masked
            values_BKGCH = jnp.einsum(
                "BKGCS,BKSH->BKGCH", weights_BKGCS.astype(v_BTKH.dtype), v_IBKSH[j], preferred_element_type=jnp.float32
            )
            total_BKGC1 = total_BKGC1 * rescale_BKGC1 + weights_BKGCS.sum(-1, keepdims=True)
            return higher_BKGC1, total_BKGC1, out_BKGCH * rescale_BKGC1 + values_BKGCH

        nothing = jnp.full((*BKGC, 1), MASKED), jnp.zeros((*BKGC, 1)), jnp.zeros((*BKGC, H))
        top_BKGC1, total_BKGC1, out_BKGCH = _loop_over_keys(i, BKGC[-1], window, step, nothing)
        return out_BKGCH / total_BKGC1, (top_BKGC1 + jnp.log(total_BKGC1))[..., 0]

    out_IBKGCH, lse_IBKGC = jax.lax.map(block, jnp.arange(blocks))
    return _from_blocks(out_IBKGCH, T), _from_blocks(lse_IBKGC, T).swapaxes(1, 2)


def _chunked_backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window):
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    document_IBC = _document_blocks(document_BT)
    q_IBKGCH, dout_IBKGCH = (_in_blocks(x, K) for x in (q_BTNH, dout_BTNH))
    k_IBKSH, v_IBKSH = (_in_blocks(x, K)[:, :, :, 0] for x in (k_BTKH, v_BTKH))
    lse_IBKGC1, mean_IBKGC1 = (
        _in_blocks(x_BNT.swapaxes(1, 2), K)[..., None] for x_BNT in (lse_BNT, _rowsum(dout_BTNH, out_BTNH))
    )
    C, H = q_IBKGCH.shape[-2:]
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block(dkv, i):
        def step(j, carry):
            dq_BKGCH, dk_IBKSH, dv_IBKSH = carry
            scores_BKGCS = _block_scores(q_IBKGCH[i], k_IBKSH[j], document_IBC, i, j, window)
            probs_BKGCS = jnp.exp(scores_BKGCS - lse_IBKGC1[i])
            dprobs_BKGCS = product("BKGCH,BKSH->BKGCS", dout_IBKGCH[i], v_IBKSH[j])
            dscores_BKGCS = (probs_BKGCS * (dprobs_BKGCS - mean_IBKGC1[i])).astype(q_BTNH.dtype)
            return (
                dq_BKGCH + product("BKGCS,BKSH->BKGCH", dscores_BKGCS, k_IBKSH[j]),
                dk_IBKSH.at[j].add(product("BKGCS,BKGCH->BKSH", dscores_BKGCS, q_IBKGCH[i])),
                dv_IBKSH.at[j].add(product("BKGCS,BKGCH->BKSH", probs_BKGCS.astype(v_BTKH.dtype), dout_IBKGCH[i])),
            )

        dq_BKGCH, *dkv = _loop_over_keys(i, C, window, step, (jnp.zeros(q_IBKGCH.shape[1:]), *dkv))
        return tuple(dkv), dq_BKGCH

    zeros = jnp.zeros(k_IBKSH.shape), jnp.zeros(v_IBKSH.shape)
    (dk_IBKSH, dv_IBKSH), dq_IBKGCH = jax.lax.scan(block, zeros, jnp.arange(len(q_IBKGCH)))
    dq_BTNH = _from_blocks(dq_IBKGCH, T) / math.sqrt(H)
    dk_BTKH = _from_blocks(dk_IBKSH[:, :, :, None], T) / math.sqrt(H)
    dv_BTKH = _from_blocks(dv_IBKSH[:, :, :, None], T)
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype)


# --- cuDNN: NVIDIA ------------------------------------------------------------------------------------------------
# The public jax.nn.dot_product_attention rounds lse to bfloat16 and lets no gradient through it; its insides do not.


def _cudnn_forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # here: what may be missing must not stop the rest

    return cudnn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        scale=1 / math.sqrt(q_BTNH.shape[-1]),
        mask_type=cudnn.MaskType.CAUSAL,
        sliding_window_length=window or None,
        return_residual=True,
    )


def _cudnn_backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    rule = cudnn._dot_product_attention_bwd_rule
    modified = "score_mod" in signature(rule).parameters  # from jax 0.12 on; neither form is promised
    others: dict[str, Any] = {"score_mod": None, "cudnn_version": None} if modified else {"is_training": True}
    unused = [jnp.zeros(0, q_BTNH.dtype)] * 7  # bias, lengths, offsets, page tables
    return rule(
        scale=1 / math.sqrt(q_BTNH.shape[-1]),
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=cudnn.MaskType.CAUSAL,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=window or None,
        return_residual=False,
        res=(q_BTNH, k_BTKH, v_BTKH, *unused, *([()] if modified else []), lse_BNT, out_BTNH),
        grad_output=dout_BTNH,
        **others,
    )[:3]


# --- Splash: TPU --------------------------------------------------------------------------------------------------
# It has sinks of its own, but sums their gradient in the dtype of the output.

SPLASH_BLOCKS = (512, 256, 128)  # the largest that divides T; the first is what large trainers use


def _splash(T: int, N: int, window: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    size = next(size for size in SPLASH_BLOCKS if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": size for name in names}
    mask = lib.LocalMask((T, T), (window - 1, 0), 0) if window else lib.CausalMask((T, T))
    return lib.make_splash_mha(
        lib.MultiHeadMask([mask] * N),
        block_sizes=lib.BlockSizes(**blocks),
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _splash_layout(document_BT, q_BTNH, *others) -> tuple[Any, list[jax.Array]]:
    """The documents for the kernel, and [B, heads, T, H] of each, q scaled: the kernel does not scale the scores."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    scaled_BTNH = (q_BTNH / math.sqrt(q_BTNH.shape[-1])).astype(q_BTNH.dtype)
    segments = None if document_BT is None else lib.SegmentIds(document_BT, document_BT)
    return segments, [x.swapaxes(1, 2) for x in (scaled_BTNH, *others)]


def _splash_forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window, interpret=False):
    kernel = _splash(*q_BTNH.shape[1:3], window, interpret)
    segments, layout = _splash_layout(document_BT, q_BTNH, k_BTKH, v_BTKH)
    out_BNTH, (lse_BNT,) = jax.vmap(kernel)(*layout, segments)
    return out_BNTH.swapaxes(1, 2), lse_BNT


def _splash_backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window, interpret=False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib

    kernel = _splash(*q_BTNH.shape[1:3], window, interpret)

    def backward(q_NTH, k_KTH, v_KTH, out_NTH, dout_NTH, lse_NT, segments):
        kept = (q_NTH, k_KTH, v_KTH, segments, None, out_NTH, lse_NT, kernel.dq_mask_info, kernel.dkv_mask_info)
        return lib._splash_attention_bwd(res=kept, do=dout_NTH, **kernel.kwargs)[3:6]

    segments, layout = _splash_layout(document_BT, q_BTNH, k_BTKH, v_BTKH, out_BTNH, dout_BTNH)
    dq_BTNH, dk_BTKH, dv_BTKH = (x.swapaxes(1, 2) for x in jax.vmap(backward)(*layout, lse_BNT, segments))
    return (dq_BTNH / math.sqrt(q_BTNH.shape[-1])).astype(q_BTNH.dtype), dk_BTKH, dv_BTKH


KERNELS = {
    "chunked": Kernel(_chunked_forward, _chunked_backward),
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
    "splash": Kernel(_splash_forward, _splash_backward),
}
