"""Matrix products, and where XLA has to store what it computes: what makes the step fast on a CPU.

XLA's CPU backend would rather compute a cheap value again for each of its users than store it. In the backward pass
each layer's gradient of the residual stream is a user of all later layers' ones, so that the work would grow with the
square of the depth. `settle` stops that, in programs compiled with `compiler_options`. Nothing here changes a value.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import jax

from transformer.sharding import partitioned


def settle(x: Any) -> Any:
    """The same arrays, computed once and stored; on a GPU or TPU, which decide well themselves, nothing is done.

    Each array gets a barrier of its own: one around a tuple ends the process in jaxlib 0.12's CPU compiler.
    """
    return jax.tree.map(jax.lax.optimization_barrier, x) if jax.default_backend() == "cpu" else x


@lru_cache
def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit`: on a CPU barriers must last until operations have been fused, or `settle` does nothing.

    Two passes are left out: the one that removes barriers, and (from jaxlib 0.12) the one that hands small loops to a
    code generator that knows no barriers. Both names are internal to XLA, so a small program is compiled first; where
    that fails there are no options, and steps are slower.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {"xla_disable_hlo_passes": "cse_barrier_expander,small-while-loop-hoisting"}
    return options if _compiles(options) else None


def _compiles(options: dict[str, Any]) -> bool:
    """Whether a barrier in a small loop and one outside compile under these options."""

    def program(x):
        return settle(jax.lax.fori_loop(0, 2, lambda i, x: settle(jax.numpy.sin(x) * i) + 1, x))

    try:
        jax.jit(program, compiler_options=options).lower(jax.ShapeDtypeStruct((2,), "float32")).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit_at_first_call(function: Callable, **options: Any) -> Callable:
    """`jax.jit` with `compiler_options`, for a module's functions: while it is imported no device is there to ask."""
    program = lru_cache(lambda: jax.jit(function, compiler_options=compiler_options(), **options))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return program()(*args, **kwargs)

    return call


def dot_general(x: jax.Array, w: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """x [..., in] times w [in, out], for the `dot_general` of an `nnx.Linear`: [..., out]."""
    if jax.default_backend() == "cpu" and not partitioned():  # it merges rows and tokens
        return _product(x, w)
    return jax.lax.dot_general(x, w, dimension_numbers, **options)


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = settle(x)
    return (x.reshape(-1, w.shape[0]) @ w).reshape(*x.shape[:-1], w.shape[1]), (x, w)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """With rows first, XLA's product of the transposed x and dy takes up to twice as long as on a transposed copy."""
    x, w = kept
    x_rows, dy_rows = x.reshape(-1, w.shape[0]), settle(dy).reshape(-1, w.shape[1])
    if w.shape[0] <= w.shape[1]:  # the narrower one is copied
        dw = settle(x_rows.T) @ dy_rows
    else:
        dw = settle(settle(dy_rows.T) @ x_rows).T
    return (dy_rows @ w.T).reshape(x.shape), dw


_product.defvjp(_forward, _backward)
