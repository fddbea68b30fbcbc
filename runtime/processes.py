"""The processes of one run, once `runtime.distributed` has joined them: which one this is, and where all wait.

Only the first process prints and writes the small files of a run. This module does not import JAX, so that
`main.py --help` is fast. What the processes have to agree on is in `runtime.multihost`.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

_FOREVER = 10 * 86400 * 1000  # milliseconds; a process that is gone is noticed by its missing heartbeat
_barriers = itertools.count()
_one_command: list[bool] = []


def runs_one_command() -> None:
    """Says that this process runs one command, and nothing else as a notebook or a test would."""
    _one_command.append(True)


def is_one_command() -> bool:
    """Whether the process has said so."""
    return bool(_one_command)


def joined_state() -> Any:
    """What `jax.distributed` knows of the processes; None before it is imported.

    `jax.process_index` would start the backend, whose flags are set later. This is private to JAX: if a version lacks
    it, a single process goes on without it, and `runtime.distributed` refuses several.
    """
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def process_id() -> int:
    """The number of this process."""
    return joined.process_id if (joined := joined_state()) else 0


def num_processes() -> int:
    """How many processes there are."""
    return joined.num_processes if (joined := joined_state()) else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return process_id() == 0


def wait_for_all(what: str) -> None:
    """Wait, however long it takes, until all processes are here; `what` names the place.

    The service of `jax.distributed` does it and not the devices, which may be in the middle of a step.
    """
    if num_processes() > 1:
        joined_state().client.wait_at_barrier(f"{what} {next(_barriers)}", timeout_in_ms=_FOREVER)


def by_first(action: Callable[[], object]) -> None:
    """The first process does something to files, once all are here; then all go on."""
    wait_for_all("before")
    if is_first():
        action()
    wait_for_all("done")
