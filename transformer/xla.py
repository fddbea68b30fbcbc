"""Matrix products, and where XLA has to store what it computes: what makes the step fast on a CPU.

XLA's CPU backend would rather compute a cheap value again for each of its users than store it. In the backward pass
each layer's gradient of the residual stream is a user of all later layers' ones, so that the work would grow with the
square of the depth. `settle` stops that, in programs compiled with `compiler_options`. Nothing here changes a value.

What a program is traced for is a value that comes with its devices (`Target`), which need not be here.
"""

from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, NamedTuple

import jax
import jax.extend.backend

from transformer.sharding import partitioned


class Target(NamedTuple):
    """What kind of device a program is for."""

    platform: str  # cpu, tpu, cuda, gpu (another maker's), ...
    compute_capability: str = ""  # of an NVIDIA GPU


_target = jax.make_user_context()  # JAX keeps what it traced under one value apart from what it traced under another


def target_of(devices: Iterable[jax.Device]) -> Target:
    """The kind of these devices, which are all alike."""
    device = next(iter(devices))
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return Target("cuda" if nvidia else device.platform, getattr(device, "compute_capability", ""))


def target() -> Target:
    """Of what is being traced: as `aimed_at` or `traced_for` says, else the device that JAX takes by itself."""
    return _target.value or target_of(jax.extend.backend.get_backend().local_devices())


def aimed_at(target: Target) -> Any:
    """A context in which `target()` is this one."""
    return _target(target)


def traced_for(target: Target, function: Callable) -> Callable:
    """The same function, aimed at a target whenever it is traced."""

    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with aimed_at(target):
            return function(*args, **kwargs)

    return traced


def jit_for(target: Target, function: Callable, **options: Any) -> Callable:
    """`jax.jit` of `traced_for`, with `compiler_options`."""
    with aimed_at(target):
        return jax.jit(traced_for(target, function), compiler_options=compiler_options(), **options)


def jit_where_it_lies(function: Callable, **options: Any) -> Callable:
    """`jit_for` the devices of the first argument's arrays: while a module is imported no device is there to ask."""
    program = cache(lambda target: jit_for(target, function, **options))

    @wraps(function)
    def call(tree: Any, *args: Any, **kwargs: Any) -> Any:
        array = jax.tree.leaves(tree)[0]
        kind = target_of(array.devices()) if isinstance(array, jax.Array) else target()
        return program(kind)(tree, *args, **kwargs)

    return call


def settle(x: Any) -> Any:
    """The same arrays, computed once and stored; for a GPU or TPU, which decide well themselves, nothing is done.

    Each array gets a barrier of its own: one around a tuple ends the process in jaxlib 0.12's CPU compiler.
    """
    return jax.tree.map(jax.lax.optimization_barrier, x) if target().platform == "cpu" else x


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit`: on a CPU barriers must last until operations have been fused, or `settle` does nothing."""
    return _options_for_cpu() if target().platform == "cpu" else None


@cache
def _options_for_cpu() -> dict[str, Any] | None:
    """Two passes are left out: the one that removes barriers, and (from jaxlib 0.12) the one that hands small loops to
    a code generator that knows no barriers. Both names are internal to XLA, so a small program is compiled first; where
    that fails there are no options, and steps are slower.
    """
    options = {"xla_disable_hlo_passes": "cse_barrier_expander,small-while-loop-hoisting"}
    return options if _compiles(options) else None


def _compiles(options: dict[str, Any]) -> bool:
    """Whether a barrier in a small loop and one outside compile under these options."""

    def program(x):
        return settle(jax.lax.fori_loop(0, 2, lambda i, x: settle(jax.numpy.sin(x) * i) + 1, x))

    place = jax.sharding.SingleDeviceSharding(jax.extend.backend.get_backend("cpu").local_devices()[0])
    try:
        jax.jit(program, compiler_options=options).lower(
            jax.ShapeDtypeStruct((2,), "float32", sharding=place)
        ).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def dot_general(x: jax.Array, w: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """x [..., in] times w [in, out], for the `dot_general` of an `nnx.Linear`: [..., out]."""
    if target().platform == "cpu" and not partitioned():  # it merges rows and tokens
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
