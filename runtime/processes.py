"""The processes of one run, once `runtime.distributed` has joined them: which one this is, and what all agree on.

The first process alone prints, and writes the small files of a run. With a single process nothing here does anything.
What exchanges something must be called by all of them, in the same order.
"""

import hashlib
import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax._src.distributed import global_state  # `jax.process_index` would wake the backend, whose flags come later
from jax.experimental import multihost_utils

from runtime.errors import UserError

_FOREVER = 10 * 86400 * 1000  # milliseconds; a process that is gone is noticed by its missing heartbeat
_barriers = itertools.count()


def process_id() -> int:
    """The number of this process."""
    return global_state.process_id


def num_processes() -> int:
    """How many processes there are."""
    return global_state.num_processes


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return process_id() == 0


def wait_for_all(what: str) -> None:
    """Go on when all processes have come here, however long that takes; `what` names the place.

    By the service of `jax.distributed`: the devices may be in the middle of a step, whose collectives others must not
    meet.
    """
    if num_processes() > 1:
        global_state.client.wait_at_barrier(f"{what} {next(_barriers)}", timeout_in_ms=_FOREVER)


def by_first(action: Callable[[], object]) -> None:
    """Have the first process do something to files, once all have come here; then all go on."""
    wait_for_all("before")
    if is_first():
        action()
    wait_for_all("done")


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
    """Whether the first of several processes sees something; with a single one nobody looks."""
    return num_processes() > 1 and bool(from_all(np.asarray(is_first() and bool(look())))[0])


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
