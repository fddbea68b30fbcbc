"""The mesh of devices and who holds what on it. Today: every device a replica, the batch split over them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"  # the mesh axis over which the batch is split


def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh of the first `num_devices` devices (0: all of them) along the data axis."""
    devices = jax.devices()[: num_devices or None]
    return Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


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
