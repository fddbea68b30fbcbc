"""Matrix products in half precision: operands in bfloat16, sums and results in float32, and everything else in float32.

TPUs do this with float32 by default (`jax.default_matmul_precision`). This is for CPUs: AMX and AVX512-BF16 multiply
bfloat16 two to five times as fast as float32, while all other arithmetic is slower there in bfloat16 than in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from transformer.sharding import partitioned
from transformer.xla import settle, target


def half_dot_general(x: jax.Array, w: jax.Array, dimension_numbers: Any = None, **options: Any) -> jax.Array:
    """`dot_general` of operands rounded to bfloat16, with sums and result in float32; the same for its gradients."""
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
    # XLA would fold a transposition of the result into the product, which its CPU backend then could not run.
    return settle(dx).reshape(*dy.shape[:-1], w_half.shape[0]), settle(dw)


_half_product.defvjp(_half_forward, _half_backward)


def _merged(x: jax.Array) -> jax.Array:
    """[..., n] as [rows, n], if rows and tokens may be merged."""
    return x if partitioned() else x.reshape(-1, x.shape[-1])


def _in_rows(x: jax.Array) -> jax.Array:
    """x in bfloat16, on a CPU stored row by row: XLA's CPU backend converts any other operand back to float32."""
    x = x.astype(jnp.bfloat16)
    if target().platform != "cpu":
        return x
    return settle(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))
