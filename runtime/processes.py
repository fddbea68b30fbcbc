"""The processes of one run, once `runtime.distributed` has joined them: which one this is, and where all wait.

The first process alone prints, and writes the small files of a run. With a single process nothing here does anything,
nor imports JAX, for which `main.py --help` need not wait. What all have to agree on is `runtime.multihost`'s.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

_FOREVER = 10 * 86400 * 1000  # milliseconds; a process that is gone is noticed by its missing heartbeat
_barriers = itertools.count()


def _joined() -> Any:
    """What `jax.distributed` knows of the processes; None before anybody has imported it.

    `jax.process_index` would wake the backend, whose flags come later. This is private to JAX: where a version has it
    no longer, a single process goes on without it, and `runtime.distributed` refuses several.
    """
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def can_be_told() -> bool:
    """Whether JAX, once it is imported, tells which of several processes this is."""
    return _joined() is not None


def process_id() -> int:
    """The number of this process."""
    return joined.process_id if (joined := _joined()) else 0


def num_processes() -> int:
    """How many processes there are."""
    return joined.num_processes if (joined := _joined()) else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return process_id() == 0


def wait_for_all(what: str) -> None:
    """Go on when all processes have come here, however long that takes; `what` names the place.

    By the service of `jax.distributed`: the devices may be in the middle of a step, whose collectives others must not
    meet.
    """
    if num_processes() > 1:
        _joined().client.wait_at_barrier(f"{what} {next(_barriers)}", timeout_in_ms=_FOREVER)


def by_first(action: Callable[[], object]) -> None:
    """Have the first process do something to files, once all have come here; then all go on."""
    wait_for_all("before")
    if is_first():
        action()
    wait_for_all("done")
