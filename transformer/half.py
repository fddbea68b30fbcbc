"""Matrix products in half precision: operands in bfloat16, sums and results in float32, and everything else in float32.

TPUs do this with float32 by default (`jax.default_matmul_precision`). This is for CPUs: AMX and AVX512-BF16 multiply
bfloat16 two to five times as fast as float32, while all other arithmetic is slower there in bfloat16 than in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from transformer.sharding import partitioned
from transformer.xla import jit_for_inputs, materialize, target

# `with rounded_before(True)`: a context in which the weights that `half_dot_general` gets come from `round_weights`.
rounded_before = jax.make_user_context(False)


def round_weights(params: dict[str, Any], *, rows: int) -> dict[str, Any]:
    """The weights of `nnx.Linear`s rounded to bfloat16, once for all products with so many rows, as these read them.

    A CPU multiplies one row in float32, see `_one_row`, and so keeps what is rounded. The other arrays stay the same
    ones: a program that returned them would copy them. Of shapes it gives shapes.
    """
    kernels = {name: value for name, value in params.items() if name.endswith(".kernel")}
    abstract = isinstance(next(iter(kernels.values()), None), jax.ShapeDtypeStruct)
    rounded = _round.trace(kernels, rows=rows).out_info if abstract else _round(kernels, rows=rows)  # type: ignore[attr-defined]
    return {**params, **rounded}


@partial(jit_for_inputs, static_argnames="rows")
def _round(kernels: dict[str, jax.Array], *, rows: int) -> dict[str, jax.Array]:
    of_one_row = rows == 1 and target().platform == "cpu"
    return {n: _rounded(w) if of_one_row else materialize(w.astype(jnp.bfloat16)) for n, w in kernels.items()}


def half_dot_general(x: jax.Array, w: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`half_product` for an `nnx.Linear`, whose other arguments say nothing new."""
    if rounded_before.value and _one_row(x):
        return materialize(_rounded(x) @ w)
    return half_product(x, w)


@jax.custom_vjp
def half_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [in, out], both rounded to bfloat16; sums and result are float32. So are its gradients."""
    return _half_forward(x, w)[0]


def _half_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x_rows, w_half = _in_rows(_merged(x)), _in_rows(w)
    if _one_row(x):
        return materialize(_rounded(x) @ _rounded(w)), (x_rows, w_half)
    y = jnp.tensordot(x_rows, w_half, 1, preferred_element_type=jnp.float32)
    return materialize(y).reshape(*x.shape[:-1], w.shape[1]), (x_rows, w_half)


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
    return materialize(dx).reshape(*dy.shape[:-1], w_half.shape[0]), materialize(dw)


half_product.defvjp(_half_forward, _half_backward)


def _one_row(x: jax.Array) -> bool:
    """Whether x is one row for a CPU, where XLA has no product of it in bfloat16: it would convert w each time."""
    return x.size == x.shape[-1] and target().platform == "cpu"


def _rounded(x: jax.Array) -> jax.Array:
    """To the numbers of bfloat16, in float32: their products are the same."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def _merged(x: jax.Array) -> jax.Array:
    """[..., n] as [rows, n], if rows and tokens may be merged."""
    return x if partitioned() else x.reshape(-1, x.shape[-1])


def _in_rows(x: jax.Array) -> jax.Array:
    """x in bfloat16, on a CPU stored row by row: XLA's CPU backend converts any other operand back to float32."""
    x = x.astype(jnp.bfloat16)
    if target().platform != "cpu":
        return x
    return materialize(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))
