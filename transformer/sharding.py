"""The mesh of devices and who holds what on it. Today: every device a replica, the batch split over them."""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"  # the batch is split, everything else is whole on every device
FSDP, SEQUENCE, TENSOR = "fsdp", "sequence", "tensor"  # nothing is split along these yet: their devices do the same
AXES = (DATA, FSDP, SEQUENCE, TENSOR)  # devices of the last axis are each other's neighbours


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes that "data=2,fsdp=4" names, -1 standing for the devices that are left; "" is all devices on data.

    Raises:
      ValueError: `mesh: <what is wrong>; <what would be right>`.
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
    """The size of each of AXES: those that `text` leaves out are 1, and all of them make up the devices.

    Raises:
      ValueError: as `parse_mesh`, or they do not.
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


def make_mesh(text: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `text` (see `parse_mesh`) makes of these devices (default: all), with all of AXES.

    Raises:
      ValueError: as `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(mesh_sizes(text, len(devices)).values())
    grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)  # on a TPU, neighbours that are linked
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices that take different rows."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def share_out(
    work: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array], mesh: Mesh | None
) -> list[jax.Array]:
    """`work` on stacks [X, M, N] of matrices, each device doing an equal part of every stack; the whole results.

    `work` takes and gives stacks of any length. All results travel in one flat all-gather. Without a mesh, or on one
    device, it is simply called.
    """
    if mesh is None or mesh.size == 1:
        return [work(stack_XMN) for stack_XMN in stacks]

    def on_each_device(*parts: jax.Array) -> list[jax.Array]:
        flat, unravel = ravel_pytree([work(part_XMN) for part_XMN in parts])
        return jax.vmap(unravel)(jax.lax.all_gather(flat, DATA))

    padded = [jnp.pad(stack, ((0, -len(stack) % mesh.size), (0, 0), (0, 0))) for stack in stacks]
    mapped = jax.shard_map(
        on_each_device, mesh=mesh, in_specs=PartitionSpec(DATA), out_specs=PartitionSpec(), check_vma=False
    )
    done = mapped(*padded)
    return [x.reshape(-1, *x.shape[2:])[: len(stack)] for x, stack in zip(done, stacks, strict=True)]
