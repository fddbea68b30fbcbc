"""What the processes of one run exchange or agree on. All of them call each function, in the same order.

With a single process nothing is exchanged.
"""

import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from runtime.errors import UserError
from runtime.processes import is_first, num_processes


def from_all(values: np.ndarray) -> np.ndarray:
    """The values [...] of all processes, [processes, ...], bit for bit. Shapes must be equal.

    The devices exchange them, so no step may be running.
    """
    if num_processes() == 1:
        return values[None]
    data = np.frombuffer(values.tobytes(), np.uint8)  # JAX would convert 64 bits to 32
    return np.asarray(multihost_utils.process_allgather(data)).view(values.dtype).reshape(-1, *values.shape)


def put(array: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, placed on the devices of all of them."""
    if num_processes() == 1:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def seen_by_first(look: Callable[[], object]) -> bool:
    """Process 0's answer for all processes; False, without asking, if there is only one process."""
    return num_processes() > 1 and bool(from_all(np.asarray(is_first() and bool(look())))[0])


def require_same(value: object, what: str) -> None:
    """Raises UserError if the value, compared by its `repr`, is not the same in all processes."""
    hashes = from_all(np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8))
    others = np.flatnonzero((hashes != hashes[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"{what}: not the same in process {others[0]} as in process 0; start all with the same command "
            "where they see the same files"
        )
