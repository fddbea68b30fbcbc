"""Matrix products, and where XLA has to store what it computes, which makes the step fast on a CPU.

XLA's CPU backend computes a cheap value again for each of its users instead of storing it. In the backward pass each
layer's gradient of the residual stream uses those of all later layers, so the work would grow with the square of the
depth. `materialize` prevents that, in programs compiled with `compiler_options`. Nothing here changes a value.

The kind of device that a program is traced for (`Target`) comes from its devices, which need not be here.
"""

from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, NamedTuple

import jax
import jax.extend.backend

from transformer.sharding import partitioned


class Target(NamedTuple):
    """What kind of device a program is for."""

    platform: str  # cpu, tpu, cuda, gpu (not NVIDIA's), ...
    compute_capability: str = ""  # of an NVIDIA GPU


# `with aimed_at(t)`: a context in which `target()` returns t. JAX caches traced programs separately for each value.
aimed_at = jax.make_user_context()


def target_of(devices: Iterable[jax.Device]) -> Target:
    """The kind of these devices, which are all of one kind."""
    device = next(iter(devices))
    told = f"{device.client.platform_version} {device.device_kind}"  # where no GPU is, the version does not tell
    nvidia = device.platform == "gpu" and ("cuda" in told or "NVIDIA" in told)
    return Target("cuda" if nvidia else device.platform, getattr(device, "compute_capability", ""))


def target() -> Target:
    """The target of what is being traced: set by `aimed_at` or `traced_for`, else that of JAX's default devices."""
    return aimed_at.value or target_of(jax.extend.backend.get_backend().local_devices())


def random_key(seed: int) -> jax.Array:
    """The random key of a seed of up to 64 bits. `jax.random.key` reads 32 without x64, and for such seeds is this."""
    key, high = jax.random.key(seed % 2**32), seed >> 32
    return jax.random.fold_in(key, high % 2**32) if high else key


def traced_for(target: Target, function: Callable) -> Callable:
    """The same function, traced with `target` as its target.

    Products of float32 are float32, unless JAX_DEFAULT_MATMUL_PRECISION asks for JAX's bfloat16 (TPU) or TF32 (GPU).
    """

    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        with aimed_at(target), jax.default_matmul_precision(asked or "highest"):
            return function(*args, **kwargs)

    return traced


def jit_for(target: Target, function: Callable, **options: Any) -> Callable:
    """`jax.jit` of `traced_for`, with `compiler_options`."""
    with aimed_at(target):
        return jax.jit(traced_for(target, function), compiler_options=compiler_options(), **options)


def jit_for_inputs(function: Callable, **options: Any) -> Callable:
    """`jit_for` the devices of the first argument's arrays, as the devices are unknown while a module is imported."""
    program = cache(lambda target: jit_for(target, function, **options))

    def where_it_lies(tree: Any) -> Any:
        array = jax.tree.leaves(tree)[0]
        return program(target_of(array.devices()) if isinstance(array, jax.Array) else target())

    @wraps(function)
    def call(tree: Any, *args: Any, **kwargs: Any) -> Any:
        return where_it_lies(tree)(tree, *args, **kwargs)

    call.trace = lambda tree, *args, **kwargs: where_it_lies(tree).trace(tree, *args, **kwargs)  # type: ignore[attr-defined]
    return call


def materialize(x: Any) -> Any:
    """The same arrays, computed once and stored, on a CPU. It does nothing on a GPU or TPU, whose backends decide well.

    Each array gets a barrier of its own: one around a tuple crashes jaxlib 0.12's CPU compiler.
    """
    return jax.tree.map(jax.lax.optimization_barrier, x) if target().platform == "cpu" else x


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit`: on a CPU barriers must stay until operations have been fused, or `materialize` has no effect."""
    return _options_for_cpu() if target().platform == "cpu" else None


@cache
def _options_for_cpu() -> dict[str, Any] | None:
    """Disables two passes: the one that removes barriers, and (from jaxlib 0.12) the one that gives small loops to a
    code generator without barriers. Both names are internal to XLA, so a small program is compiled first; if that
    fails, there are no options, and steps are slower.
    """
    options = {"xla_disable_hlo_passes": "cse_barrier_expander,small-while-loop-hoisting"}
    return options if _compiles(options) else None


def _compiles(options: dict[str, Any]) -> bool:
    """Whether a barrier in a small loop and one outside of it compile with these options."""

    def program(x):
        return materialize(jax.lax.fori_loop(0, 2, lambda i, x: materialize(jax.numpy.sin(x) * i) + 1, x))

    place = jax.sharding.SingleDeviceSharding(jax.extend.backend.get_backend("cpu").local_devices()[0])
    x = jax.ShapeDtypeStruct((2,), "float32", sharding=place)
    try:
        jax.jit(program, compiler_options=options).lower(x).compile()
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
    x = materialize(x)
    return (x.reshape(-1, w.shape[0]) @ w).reshape(*x.shape[:-1], w.shape[1]), (x, w)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """It transposes one operand by a copy: XLA's product of the transposed x and dy takes up to twice as long."""
    x, w = kept
    x_rows, dy_rows = x.reshape(-1, w.shape[0]), materialize(dy).reshape(-1, w.shape[1])
    if w.shape[0] <= w.shape[1]:  # copy the narrower one
        dw = materialize(x_rows.T) @ dy_rows
    else:
        dw = materialize(materialize(dy_rows.T) @ x_rows).T
    return (dy_rows @ w.T).reshape(x.shape), dw


_product.defvjp(_forward, _backward)
