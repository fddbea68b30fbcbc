"""Matrix products in half precision: operands in bfloat16, sums and results in float32, and everything else in float32.

What TPUs do with float32 by default (`jax.default_matmul_precision`), for CPUs: AMX and AVX512-BF16 multiply bfloat16
two to five times as fast as float32, while all other arithmetic in bfloat16 is slower there than in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from transformer.sharding import partitioned
from transformer.xla import settle, target


def half_dot_general(x: jax.Array, w: jax.Array, dimension_numbers: Any = None, **options: Any) -> jax.Array:
    """`dot_general` of operands that are rounded to bfloat16, with sums and result in float32; so are its gradients."""
    del dimension_numbers, options  # those of an `nnx.Linear`
    return _half_product(x, w)


@jax.custom_vjp
def _half_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return _half_forward(x, w)[0]


def _half_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x_rows, w_half = _in_rows(_merged(x)), _in_rows(w)
    y = jnp.tensordot(x_rows, w_half, 1, preferred_element_type=jnp.float32)
    return settle(y).reshape(*x.shape[:-1], w.shape[1]), (x_rows, w_half)


def _half_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_rows, w_half = kept
    dy_rows = _in_rows(_merged(dy))
    dx = jnp.tensordot(dy_rows, _in_rows(w_half.T), 1, preferred_element_type=jnp.float32)
    if x_rows.ndim == 2:
        dw = jnp.matmul(_in_rows(x_rows.T), dy_rows, preferred_element_type=jnp.float32)
    else:
        rows = list(range(x_rows.ndim - 1))
        dw = jnp.tensordot(x_rows, dy_rows, (rows, rows), preferred_element_type=jnp.float32)
    # A transposition of a result, folded into its product, would make one that XLA's CPU backend cannot run.
    return settle(dx).reshape(*dy.shape[:-1], w_half.shape[0]), settle(dw)


_half_product.defvjp(_half_forward, _half_backward)


def _merged(x: jax.Array) -> jax.Array:
    """[..., n] as [rows, n], where rows and tokens may be merged."""
    return x if partitioned() else x.reshape(-1, x.shape[-1])


def _in_rows(x: jax.Array) -> jax.Array:
    """In bfloat16, stored row by row on a CPU: XLA's CPU backend converts any other operand to float32 again."""
    x = x.astype(jnp.bfloat16)
    if target().platform != "cpu":
        return x
    return settle(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))
