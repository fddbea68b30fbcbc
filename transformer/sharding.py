"""The mesh of devices and who holds what on it. Today: every device a replica, the batch split over them."""

import jax
import numpy as np
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


def share_out(x_XMN: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Give each device an equal part of a stack of matrices, so that work on the stack is done once, not everywhere.

    The stack is padded with zero matrices to a multiple of the devices; cut the result back to the first X. Without a
    mesh, or on one device, nothing changes.
    """
    if mesh is None or mesh.size == 1:
        return x_XMN
    padding = -x_XMN.shape[0] % mesh.size
    x_XMN = jax.numpy.pad(x_XMN, ((0, padding), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(x_XMN, batch_sharded(mesh))
