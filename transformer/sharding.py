"""The mesh of devices, and the one table of how arrays are split over it.

The rows of a batch are divided explicitly (`jax.shard_map` over data and fsdp, with all-gathers of fsdp's parameters
where they are used and reduce-scatters of their gradients). Along sequence and tensor, XLA partitions the program by
the constraints that `constrain` and `by_heads` put on its activations.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"  # the batch is split, everything else is whole on every device
FSDP = "fsdp"  # the batch is split, and so are optimizer and parameters, which are gathered where they are used
SEQUENCE = "sequence"  # activations are split by tokens, for long contexts
TENSOR = "tensor"  # heads, hidden widths and the vocabulary are split
AXES = (DATA, FSDP, SEQUENCE, TENSOR)  # devices of the last axis are neighbours: it communicates the most
ROWS = (DATA, FSDP)  # devices that differ in one of these take different rows of a batch

# Which mesh axes split which axis of an array. An axis that is not in the table, or that its mesh axes do not divide,
# is whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ROWS,
    "tokens": (SEQUENCE,),
    "width": (FSDP,),  # the residual stream's axis in parameters; in activations it is whole
    "query_heads": (TENSOR,),
    "key_heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}
PARAMETERS = {  # pattern of the name -> axes; a parameter that matches none (bias, norm, sink) is whole everywhere
    r"embedding\.embedding": ("vocab", "width"),
    r"positions\.embedding": ("", "width"),
    r"blocks\.\d+\.attention\.(query|gate)\.kernel": ("width", "query_heads"),
    r"blocks\.\d+\.attention\.(key|value)\.kernel": ("width", "key_heads"),
    r"blocks\.\d+\.attention\.out\.kernel": ("query_heads", "width"),
    r"blocks\.\d+\.mlp\.(gate|up)\.kernel": ("width", "mlp"),
    r"blocks\.\d+\.mlp\.down\.kernel": ("mlp", "width"),
    r"head\.kernel": ("width", "vocab"),
}
ACTIVATIONS = {  # by the suffix of their names
    "BTD": ("rows", "tokens", ""),
    "BTF": ("rows", "tokens", "mlp"),
    "BTV": ("rows", "tokens", "vocab"),
    "ICD": ("", "tokens", ""),  # chunks of tokens
}


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in "data=2,fsdp=4"; -1 means all devices that are left, and "" all devices on data.

    Raises ValueError, `mesh: <what is wrong>; <what would be right>`.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else [f"{DATA}=-1"]:
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes:
            wrong = f"{name!r} stands there twice" if name in sizes else f"unknown axis {name!r}"
            raise ValueError(f"mesh: {wrong}; name each of {', '.join(AXES)} at most once, as {DATA}=2,{FSDP}=4")
        if not re.fullmatch("-1|[1-9][0-9]{0,8}", number):
            raise ValueError(f"mesh: {name} must be a whole number from 1, or -1 for the devices left, got {number!r}")
        sizes[name] = int(number)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh: only one axis can take the devices that are left, got {text!r}")
    return sizes


def mesh_sizes(text: str, num_devices: int) -> dict[str, int]:
    """The size of each of AXES, 1 for those that `text` leaves out.

    Raises ValueError as `parse_mesh` does, or if the product is not the number of devices.
    """
    sizes = parse_mesh(text)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    left = num_devices // fixed if -1 in sizes.values() and num_devices % fixed == 0 else 1
    result = {axis: left if sizes.get(axis) == -1 else sizes.get(axis, 1) for axis in AXES}
    if math.prod(result.values()) != num_devices:
        there = f"there {'is 1' if num_devices == 1 else f'are {num_devices}'}"
        raise ValueError(
            f"mesh: {text!r} needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices and {there}; "
            f"change it, or on a CPU cpu_devices"
        )
    return result


def make_mesh(text: str = "", *, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of these devices with all of AXES, by `parse_mesh`'s text.

    On a TPU, linked devices are neighbours; of several slices, between which the network is slow, only data takes more
    than one (of GPUs' hosts any axis may). Raises ValueError as `mesh_sizes` does, or if the slices do not divide data.
    """
    sizes, slices = mesh_sizes(text, len(devices)), len({getattr(device, "slice_index", 0) for device in devices})
    shape, split = tuple(sizes.values()), {"allow_split_physical_axes": True}
    if slices == 1 or (devices[0].platform == "gpu" and sizes[DATA] % slices):
        grid = create_device_mesh(shape, devices, **split)
    elif sizes[DATA] % slices:
        raise ValueError(f"mesh: data={sizes[DATA]} on {slices} TPU slices; make it a multiple of their number")
    else:
        between = (slices, *[1] * (len(AXES) - 1))
        grid = create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), between, devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def is_data_parallel(mesh: Mesh) -> bool:
    """Whether every device holds all parameters and takes rows of its own."""
    return mesh.shape[DATA] == mesh.size


def most_parts(mesh: Mesh) -> tuple[int, int]:
    """Into how many parts the mesh splits the parameters, and a batch's residual stream, if all sizes are divisible."""
    sizes = mesh.shape
    return sizes[FSDP] * sizes[TENSOR], sizes[DATA] * sizes[FSDP] * sizes[SEQUENCE]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices that take different rows."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


# --- How arrays are split -----------------------------------------------------------------------------------------


def spec_of(axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How an array with these axes (see RULES) and sizes is split. ValueError if one mesh axis would split two axes."""
    used = [name for axis in axes for name in RULES.get(axis, ())]
    if len(used) != len(set(used)):
        raise ValueError(f"{axes}: two axes of one array are split by one axis of the mesh")
    return PartitionSpec(*(_splitting(axis, size, mesh.shape) for axis, size in zip(axes, shape, strict=True)))


def _splitting(axis: str, size: int, mesh_shape: Mapping[str, int]) -> str | tuple[str, ...] | None:
    """The mesh axes that split an axis of that size."""
    names = tuple(name for name in RULES.get(axis, ()) if mesh_shape[name] > 1)
    if not names or size % math.prod(mesh_shape[name] for name in names):
        return None
    return names if len(names) > 1 else names[0]


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of a parameter, () for one that is whole everywhere."""
    return next((axes for pattern, axes in PARAMETERS.items() if re.fullmatch(pattern, name)), ())


def param_spec(name: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How a parameter is split."""
    axes = axes_of(name)
    return spec_of(axes, shape, mesh) if axes else PartitionSpec()


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a training state or of a part of it, abstract or real.

    An array under a parameter's name with its rank (the parameter, its momentum, its moments) is split as the
    parameter; all others are whole everywhere.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = str(getattr(path[-1], "key", "")) if path else ""
        spec = param_spec(name, leaf.shape, mesh) if len(axes_of(name)) == leaf.ndim else ()
        while spec and spec[-1] is None:  # as JAX writes the specs of results; otherwise a step is compiled twice
            spec = spec[:-1]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def undivided(params: Mapping[str, Any], activations: Mapping[str, int], mesh: Mesh) -> list[str]:
    """The axes that the mesh would split if it divided them, in words: "vocab 65 (tensor 8)".

    `params` are arrays or shapes by name, `activations` sizes of axes that only activations have, or that they count in
    other units, such as heads.
    """
    sizes = {(axis, size) for name, p in params.items() for axis, size in zip(axes_of(name), p.shape, strict=False)}
    result = []
    for axis, size in sorted(sizes | set(activations.items())):
        names = [name for name in RULES.get(axis, ()) if mesh.shape[name] > 1]
        if names and _splitting(axis, size, mesh.shape) is None:
            result.append(f"{axis} {size} ({', '.join(f'{name} {mesh.shape[name]}' for name in names)})")
    return result


def whole(x: jax.Array, mesh: Mesh) -> jax.Array:
    """An array that is split as `shardings_of` says, made whole on every device."""
    return x if is_data_parallel(mesh) else jax.jit(jnp.copy, out_shardings=replicated(mesh))(x)


# --- Rows: data and fsdp ------------------------------------------------------------------------------------------


def on_rows(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each group of devices that shares rows, `jax.shard_map` over ROWS and over axes of size 1."""
    names = {axis for axis in AXES if axis in ROWS or mesh.shape[axis] == 1}
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def rows_specs(params: Mapping[str, Any], mesh: Mesh) -> dict[str, PartitionSpec]:
    """The parameters' specs for `on_rows`, which name fsdp alone."""
    of_fsdp = lambda name: FSDP if name == FSDP else None
    return {name: PartitionSpec(*map(of_fsdp, param_spec(name, p.shape, mesh))) for name, p in params.items()}


def sum_over(axes: Sequence[str], tree: Any, mesh: Mesh) -> Any:
    """The sum over these axes, inside `on_rows`; sums over axes of size 1 would not compile with axes left to XLA."""
    names = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return jax.lax.psum(tree, names) if names else tree


def part_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter as the model gets it: inside `on_rows` only a part of those of blocks (`run_blocks`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if FSDP not in mesh.manual_axes or not name.startswith("blocks."):
        return shape
    spec = param_spec(name, shape, mesh) or (None,) * len(shape)
    return tuple(size // mesh.shape[FSDP] if split == FSDP else size for size, split in zip(shape, spec, strict=True))


def _width_axis(name: str) -> int | None:
    return axes_of(name).index("width") if "width" in axes_of(name) else None


def is_part(name: str, x: jax.Array, width: int) -> bool:
    """Whether a device holds only a part of a parameter; `width` is the residual stream's."""
    axis = _width_axis(name)
    return axis is not None and x.shape[axis] != width


def gather_parameter(name: str, x: jax.Array, width: int, dtype: Any) -> jax.Array:
    """A parameter gathered over fsdp, in the dtype of the arithmetic; its gradient is scattered again."""
    return _gather(_width_axis(name), jnp.dtype(dtype).name, x) if is_part(name, x, width) else x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axis: int, dtype: str, x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x.astype(dtype), FSDP, axis=axis, tiled=True)


def _gather_backward(axis: int, dtype: str, kept: None, dx: jax.Array) -> tuple[jax.Array]:
    del dtype, kept  # gradients are summed in float32, as in data parallelism
    return (jax.lax.psum_scatter(dx.astype(jnp.float32), FSDP, scatter_dimension=axis, tiled=True),)


_gather.defvjp(lambda axis, dtype, x: (_gather(axis, dtype, x), None), _gather_backward)


def is_gather(*_: Any, **parts: Any) -> bool:
    """Whether an operation is `gather_parameter`, the gather that rematerialisation repeats instead of saving."""
    return "call_jaxpr" in parts and any(each.primitive.name == "all_gather" for each in parts["call_jaxpr"].eqns)


# --- Along a row: sequence and tensor -----------------------------------------------------------------------------


def _left_to_xla() -> dict[str, int]:
    """The mesh axes, with their sizes, along which XLA partitions the program that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.auto_axes if mesh.shape[axis] > 1}


def partitioned() -> bool:
    """Whether XLA partitions the program that is being traced; then axes that it splits must not be merged."""
    return bool(_left_to_xla())


def constrain(x: jax.Array, suffix: str) -> jax.Array:
    """The same activation, split by its suffix in ACTIVATIONS along the axes that are left to XLA."""
    free = _left_to_xla()
    if not free:
        return x
    sizes = dict.fromkeys(AXES, 1) | free
    names = (_splitting(axis, size, sizes) for axis, size in zip(ACTIVATIONS[suffix], x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*names))


def by_heads(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sink: jax.Array | None,
    document_BT: jax.Array | None,
) -> jax.Array:
    """`attend(q, k, v, sink, document)` [B, T, N, H]; each device takes whole sequences of some of the heads.

    An all-to-all before it joins tokens that are split over the sequence axis, and one after it splits them again
    (Ulysses, arXiv:2309.14509), so kernels need not know of meshes. Heads are split over tensor and sequence, as far as
    these divide them; key heads are repeated if they are too few.
    """
    free = _left_to_xla()
    if not free:
        return attend(q_BTNH, k_BTKH, v_BTKH, sink, document_BT)
    N, K, shares = q_BTNH.shape[2], k_BTKH.shape[2], 1
    names: list[str] = []
    for axis in (TENSOR, SEQUENCE):
        if axis in free and N % (shares * free[axis]) == 0:
            names, shares = [*names, axis], shares * free[axis]
    k_BTKH, v_BTKH = (jnp.repeat(x, math.lcm(K, shares) // K, axis=2) for x in (k_BTKH, v_BTKH))
    heads = PartitionSpec(None, None, tuple(names) or None)
    sinks = None if sink is None else PartitionSpec(*[None] * (sink.ndim - 1), tuple(names) or None)
    documents = None if document_BT is None else PartitionSpec()
    in_specs = (heads, heads, heads, sinks, documents)
    mapped = jax.shard_map(attend, in_specs=in_specs, out_specs=heads, axis_names=set(free), check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, sink, document_BT)
