"""Causal attention in plain JAX, for any device, that never has a whole [T, S] array in memory.

FlashAttention-2 over blocks of queries and of the keys that they see; other blocks are never computed. The blocks run
in loops: XLA would run unrolled ones all at once and save their scores for the backward pass, a [T, S] array again.

Shapes: B batch, T time, S key time, N query heads, K key/value heads, G = N / K, H head_dim; I blocks of C tokens.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from transformer.attention import MASKED, visible


def rowsum(dout_BTNH: jax.Array, out_BTNH: jax.Array) -> jax.Array:
    """dout · out, [B, N, T], float32."""
    return jnp.einsum("BTNH,BTNH->BNT", dout_BTNH.astype(jnp.float32), out_BTNH.astype(jnp.float32))


BLOCK = 128  # tokens; 64 and 256 were no faster on a CPU


def _in_blocks(x: jax.Array, K: int) -> jax.Array:
    """[B, T, N, ...] as [I, B, K, G, C, ...], padded with as few zeros as equal blocks need."""
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
    """step(j, carry) for each block of keys that queries of block i see. The last is their own, so no row is empty."""
    first = jnp.maximum(i * C - window + 1, 0) // C if window else 0
    return jax.lax.fori_loop(first, i + 1, step, start)


def chunked_forward(q_BTNH, k_BTKH, v_BTKH, document_BT, window):
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
            rescale_BKGC1 = jnp.exp(top_BKGC1 - higher_BKGC1)  # 0 if all keys so far were masked
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


def chunked_backward(q_BTNH, k_BTKH, v_BTKH, document_BT, out_BTNH, lse_BNT, dout_BTNH, window):
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    document_IBC = _document_blocks(document_BT)
    q_IBKGCH, dout_IBKGCH = (_in_blocks(x, K) for x in (q_BTNH, dout_BTNH))
    k_IBKSH, v_IBKSH = (_in_blocks(x, K)[:, :, :, 0] for x in (k_BTKH, v_BTKH))
    lse_IBKGC1, mean_IBKGC1 = (
        _in_blocks(x_BNT.swapaxes(1, 2), K)[..., None] for x_BNT in (lse_BNT, rowsum(dout_BTNH, out_BTNH))
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
