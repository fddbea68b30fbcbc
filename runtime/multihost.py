"""What all processes of one run agree on or exchange; each function is to be called by all, in the same order.

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
    """What each process has [...], one after the other: [processes, ...], bit for bit. Shapes must be equal.

    Travels between devices, which must not be at work on a step.
    """
    if num_processes() == 1:
        return values[None]
    data = np.frombuffer(values.tobytes(), np.uint8)  # JAX would make 32 bits of 64
    return np.asarray(multihost_utils.process_allgather(data)).view(values.dtype).reshape(-1, *values.shape)


def put(array: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """An array that all processes have, on the devices of all of them."""
    if num_processes() == 1:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def seen_by_first(look: Callable[[], object]) -> bool:
    """Process 0's answer to whether it sees something, for all processes; false when there is only one."""
    return num_processes() > 1 and bool(from_all(np.asarray(is_first() and bool(look())))[0])


def asked_of_any(asked: bool) -> bool:
    """Whether one of all processes says yes."""
    return bool(from_all(np.asarray(asked)).any())


def require_same(value: object, what: str) -> None:
    """Refuse to go on where processes differ in a value, told by what `repr` writes of it.

    Raises:
      UserError: it is not the same in all of them.
    """
    hashes = from_all(np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8))
    others = np.flatnonzero((hashes != hashes[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"{what}: not the same in process {others[0]} as in process 0; start all with the same command "
            "where they see the same files"
        )


def reached_stop(call: int) -> bool:
    """Whether all processes have agreed to stop at this call: a notice to one of them is passed on to the others.

    Args:
      call: how often this was called, so that all of them stop at the same.
    """
    return multihost_utils.reached_preemption_sync_point(call)
