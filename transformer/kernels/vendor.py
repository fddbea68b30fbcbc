"""The hardware's own kernels: cuDNN's for NVIDIA GPUs, Splash for TPUs.

Shapes: B batch, T time, N query heads, K key/value heads, H head_dim.
"""

import math
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp

from transformer.xla import target

# --- cuDNN: NVIDIA ------------------------------------------------------------------------------------------------
# The public jax.nn.dot_product_attention rounds lse to bfloat16 and passes no gradient through it; so this calls the
# functions behind it.


def _cudnn() -> Any:
    """The functions behind it, which may be missing; they shall ask what is compiled for, and not what is here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def check(least: str) -> bool:
        numbers = lambda text: tuple(map(int, filter(None, text.split("."))))
        return numbers(target().compute_capability) >= numbers(least)

    cudnn.check_compute_capability = check
    return cudnn


def document_bias(document_BT: jax.Array | None, window: int, dtype: Any) -> tuple[jax.Array | None, int | None]:
    """What is added to the scores so that causal attention sees only its own document, [B, 1, T, S], or None.

    Beside it, the window that is left to cuDNN: a bias holds it, too. cuDNN knows packed sequences, but wants to be
    told how many there are at most.
    """
    if document_BT is None:
        return None, window or None
    at = jnp.arange(document_BT.shape[1])
    seen_BTS = document_BT[:, :, None] == document_BT[:, None, :]
    if window:
        seen_BTS &= at[:, None] - at < window
    return jnp.where(seen_BTS, 0, _cudnn().get_large_negative_number(dtype)).astype(dtype)[:, None], None


def cudnn_forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window):
    cudnn = _cudnn()
    bias, window = document_bias(document_BT, window, q_BTNH.dtype)
    return cudnn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        bias,
        scale=1 / math.sqrt(q_BTNH.shape[-1]),
        mask_type=cudnn.MaskType.CAUSAL,
        sliding_window_length=window,
        return_residual=True,
    )


def cudnn_backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window):
    cudnn = _cudnn()
    rule = cudnn._dot_product_attention_bwd_rule
    modified = "score_mod" in signature(rule).parameters  # from jax 0.12 on; neither form is a public interface
    others: dict[str, Any] = {"score_mod": None, "cudnn_version": None} if modified else {"is_training": True}
    bias, window = document_bias(document_BT, window, q_BTNH.dtype)
    nothing = jnp.zeros(0, q_BTNH.dtype)
    added = [nothing if bias is None else bias, *[nothing] * 6]  # then lengths, offsets, page tables
    return rule(
        scale=1 / math.sqrt(q_BTNH.shape[-1]),
        seed=0,
        dropout_rate=0.0,
        variadic_args=(bias is not None, False),  # there is one; its gradient is not wanted
        mask_type=cudnn.MaskType.CAUSAL,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=window,
        return_residual=False,
        res=(q_BTNH, k_BTKH, v_BTKH, *added, *([()] if modified else []), lse_BNT, out_BTNH),
        grad_output=dout_BTNH,
        **others,
    )[:3]


# --- Splash: TPU --------------------------------------------------------------------------------------------------
# Its own sinks are not used, because before jax 0.12 it sums their gradient in the dtype of the output. `interpret` is
# Pallas's own: True, or the parameters of its interpreter of a TPU's memories, to run the kernels on a CPU.

SPLASH_BLOCKS = (512, 256, 128)  # the largest that divides T is used; large trainers use the first


def _splash(T: int, N: int, window: int, interpret: Any):
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
    """The kernel's documents, and [B, heads, T, H] of each array; q is scaled, because the kernel does not scale."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    scaled_BTNH = (q_BTNH / math.sqrt(q_BTNH.shape[-1])).astype(q_BTNH.dtype)
    segments = None if document_BT is None else lib.SegmentIds(document_BT, document_BT)
    return segments, [x.swapaxes(1, 2) for x in (scaled_BTNH, *others)]


def _exact_products(dtype: Any) -> Any:
    """A context without a precision for bfloat16, whose products are exact: asked for one, a TPU's compiler fails."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else asked)


def splash_forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window, interpret=False):
    kernel = _splash(*q_BTNH.shape[1:3], window, interpret)
    segments, layout = _splash_layout(document_BT, q_BTNH, k_BTKH, v_BTKH)
    with _exact_products(q_BTNH.dtype):
        out_BNTH, (lse_BNT,) = jax.vmap(kernel)(*layout, segments)
    return out_BNTH.swapaxes(1, 2), lse_BNT


def splash_backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window, interpret=False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib

    kernel = _splash(*q_BTNH.shape[1:3], window, interpret)

    def backward(q_NTH, k_KTH, v_KTH, out_NTH, dout_NTH, lse_NT, segments):
        kept = (q_NTH, k_KTH, v_KTH, segments, None, out_NTH, lse_NT, kernel.dq_mask_info, kernel.dkv_mask_info)
        return lib._splash_attention_bwd(res=kept, do=dout_NTH, **kernel.kwargs)[3:6]

    segments, layout = _splash_layout(document_BT, q_BTNH, k_BTKH, v_BTKH, out_BTNH, dout_BTNH)
    with _exact_products(q_BTNH.dtype):
        dq_BTNH, dk_BTKH, dv_BTKH = (x.swapaxes(1, 2) for x in jax.vmap(backward)(*layout, lse_BNT, segments))
    return (dq_BTNH / math.sqrt(q_BTNH.shape[-1])).astype(q_BTNH.dtype), dk_BTKH, dv_BTKH
