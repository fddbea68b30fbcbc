"""Several processes that train one model find each other, and none outlives the others for long.

They are connected by `jax.distributed`, whose service runs in the first process. It reads by itself what SLURM, Open
MPI, Kubernetes (indexed jobs, with the `kubernetes` package) and TPU pods say of the others; elsewhere three flags do.
"""

import importlib.util
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax

from runtime.errors import ExpectedError, Interrupted, LostPeerError, UserError, one_line
from runtime.files import expected_error
from runtime.processes import is_first, joined_state, num_processes, process_id
from runtime.signals import exit_at_once

_SIZES = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}  # set by launchers
DEVICES = Path("/dev")
_LINGER = 2.0  # seconds that the first process stays after an error: when it ends, JAX aborts the others at once
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|coordination service|socket closed", re.IGNORECASE)


def launched() -> bool | None:
    """Whether a launcher has started several processes; None on a TPU, where only JAX can tell.

    Its library alone makes no TPU: it is also there to compile for one. Nor does /dev/accel, a folder, of other makers.
    """
    for present, size in _SIZES.items():
        if present in os.environ:
            return os.environ.get(size, "1") != "1"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        return True
    chips = any(DEVICES.glob("accel[0-9]*")) or any(DEVICES.glob("vfio/[0-9]*"))
    return None if chips and importlib.util.find_spec("libtpu") else False


@contextmanager
def joined(
    coordinator: str | None, count: int | None, number: int | None, seconds: int, say: Callable[[str], None]
) -> Iterator[None]:
    """Joins the processes of a run, as a launcher or the three explicit values describe them.

    An error inside ends the process at once: JAX would wait for the others, and they for this one. It has to be entered
    before JAX's backend is first used; if `jax.distributed` is initialised already, it is used as it is.

    Args:
      coordinator, count, number: HOST:PORT of the first process, the number of processes, and which one this is; all
        None if a launcher says so.
      seconds: how long to wait for the others to start, and later for a heartbeat of each.

    Raises UserError if the three values, or the launcher's variables, are incomplete or impossible.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": number}
    if missing := [flag for flag, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise UserError(f"{missing[0]}: missing; give all of {', '.join(given)}, or none where a launcher tells")
    elif not re.fullmatch(r".+:\d{1,5}", coordinator or ""):
        raise UserError(f"--coordinator: expected HOST:PORT of process 0, as node1:1234; got {coordinator!r}")
    elif not (count and number is not None and 0 <= number < count):
        raise UserError(f"--process_id: {number} is not from 0 to {(count or 0) - 1}; number {count} processes so")
    if not jax.distributed.is_initialized() and (coordinator or launched() is not False):
        _connect(coordinator, count, number, seconds, say)
    try:
        yield
    except Interrupted:  # all stop together, in order
        raise
    except BaseException as error:
        if num_processes() == 1:
            raise
        _leave(error)


def _connect(
    coordinator: str | None, count: int | None, number: int | None, seconds: int, say: Callable[[str], None]
) -> None:
    if joined_state() is None:
        raise UserError(f"jax {jax.__version__}: does not tell one process from another; install another version of it")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if number in (0, None):
        where = f" at {coordinator}" if coordinator else ""
        say(f"waiting for the other processes{where}, {seconds} s at most")
    who = "the others" if number in (0, None) else f"process 0 or others of the {count}"
    nobody_came = LostPeerError(
        f"--coordinator: {coordinator or 'from the launcher'}: {who} did not come within {seconds} s; look at their "
        "output, start all with the same address, and config.peer_seconds says how long to wait"
    )
    patience = threading.Timer(seconds, exit_at_once, [nobody_came])
    patience.daemon = True
    patience.start()  # JAX itself would abort, with a stack trace
    try:
        jax.distributed.initialize(
            *(coordinator, count, number),
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, RuntimeError) as error:
        alone = isinstance(error, ValueError) or "must be called before" in str(error)  # no cluster, or as a notebook's
        if coordinator or launched() or not alone:
            raise UserError(
                f"--coordinator: {coordinator or 'as the launcher or TPU says'}, and JAX cannot join the processes: "
                f"{one_line(error)}; give a free port of process 0's host, and --num_processes and --process_id"
            ) from error
    finally:
        patience.cancel()


@contextmanager
def peers_alive() -> Iterator[None]:
    """Ends this process with one line if the devices report inside that another process is lost."""
    try:
        yield
    except Exception as error:
        end_if_a_peer_is_lost(error)
        raise


def end_if_a_peer_is_lost(error: Exception) -> None:
    """Ends this process with one line if the error says that another process is lost."""
    known = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    if known and num_processes() > 1 and _LOST.search(str(error)):
        exit_at_once(
            LostPeerError(
                f"process {process_id()}: another process is gone ({one_line(error, 120)}); see what it said, then "
                "start all again: the same command goes on from the last checkpoint"
            )
        )


def _leave(error: BaseException) -> NoReturn:
    """Print the error as `main` would, and end the process."""
    sys.stdout.flush()
    expected = expected_error(error) if isinstance(error, OSError) else error
    if not isinstance(expected, ExpectedError):
        traceback.print_exc()
        exit_at_once(1)
    if is_first():
        time.sleep(_LINGER)  # the others may be about to print the same
        exit_at_once(expected)
    exit_at_once(type(expected)(f"process {process_id()}: {expected}"))
