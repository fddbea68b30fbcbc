"""The ways to stop a run: signals that let it finish its step, and the immediate exit."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import NoReturn, Self

import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point

from runtime.errors import ExpectedError, Interrupted
from runtime.multihost import from_all
from runtime.processes import num_processes
from runtime.screen import live

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler sends one some time before it ends a job
_STOPPING = "stopping: this step is finished and saved first; once more stops at once and saves nothing"


def hangup_ignored() -> bool:
    """Whether the run outlives a closed terminal, as nohup asks for."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class StopSignals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request to stop, and the second into an immediate exit.

    SIGUSR1 and SIGUSR2 ask to save, or to stop if `on_warning` is "stop"; a SIGHUP that was ignored stays so. `signum`
    is None until a signal came, then its number; `say` takes one line then, in another thread. Ctrl-Z removes the live
    view first. Outside the main thread this does nothing. Several processes stop at the same call of `raise_if_set`,
    which all must call equally often.

    Python runs a handler only when the main thread returns from C code, such as a compilation of minutes. So it writes
    each signal into a pipe at once (`signal.set_wakeup_fd`), and a thread that reads it ends the process with status
    128 + the second one's number, within a second even if the terminal hangs.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None, on_warning: str = "save") -> None:
        self.signum: int | None = None
        self._stopping = SIGNALS + (WARNINGS if on_warning == "stop" else ())
        self._save_asked = False
        self._say = say
        self._together = num_processes() > 1
        self._calls = 0  # of `raise_if_set`

    def __enter__(self) -> Self:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._pipe_out, self._pipe_in = os.pipe()
            os.set_blocking(self._pipe_in, False)  # a signal must not wait for a full pipe
            self._old_fd = signal.set_wakeup_fd(self._pipe_in, warn_on_full_buffer=False)
            self._tell_jax = _c_handler(signal.SIGTERM) if self._together else lambda signum: None
            ours = [signum for signum in (*SIGNALS, *WARNINGS) if signum != signal.SIGHUP or not hangup_ignored()]
            self._old_handlers = {signum: signal.signal(signum, self._request) for signum in ours}
            if sys.stdout and sys.stdout.isatty() and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                self._old_handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, lambda *_: None)
            self._reader = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            for signum, handler in self._old_handlers.items():
                signal.signal(signum, handler or signal.SIG_DFL)  # None: a handler that Python does not know
            signal.set_wakeup_fd(self._old_fd)
            os.close(self._pipe_in)  # the reader sees the end of the pipe
            self._reader.join()
            os.close(self._pipe_out)

    def raise_if_set(self) -> None:
        """Raises `Interrupted` once a signal came: the way out of an evaluation or a sample."""
        if self._together:
            self._calls += 1
            if reached_preemption_sync_point(self._calls):  # JAX passes a signal to one process on to the others
                raise Interrupted(self.signum or signal.SIGTERM)
        elif self.signum is not None:
            raise Interrupted(self.signum)

    def take_save_request(self) -> bool:
        """Whether a save was requested, in any process, since the last call; all processes must call it."""
        asked, self._save_asked = self._save_asked, False
        return bool(from_all(np.asarray(asked)).any())

    def _request(self, signum: int, _frame: FrameType | None) -> None:
        if signum in self._stopping:
            self.signum = self.signum or signum
        else:
            self._save_asked = True

    def _watch(self) -> None:
        """The reader thread: acknowledges the first signal, and ends the process at the second."""
        heard = False
        while number := os.read(self._pipe_out, 1):
            signum = number[0]
            if signum == signal.SIGTSTP:
                attempt(live.suspend)
            if signum not in self._stopping:
                continue
            if heard:
                exit_at_once(128 + signum)
            heard = True
            self._tell_jax(signal.SIGTERM)
            attempt(partial(self._say, _STOPPING))


def _c_handler(signum: int) -> Callable[[int], object]:
    """The handler that a library has set: for SIGTERM it is JAX's, which notes that the process will be preempted."""
    look_up = ctypes.pythonapi.PyOS_getsig
    look_up.restype, look_up.argtypes = ctypes.c_void_p, [ctypes.c_int]
    address = look_up(signum) or 0
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address > 1 else lambda signum: None  # 0, 1: default, none


def attempt(action: Callable[[], object], seconds: float = 1) -> None:
    """Runs `action` in a thread and waits at most so many seconds for it, because a terminal or a disk may hang."""
    thread = threading.Thread(target=action, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is about to end, or the machine has no more threads
        action()
    else:
        thread.join(seconds)


def exit_at_once(why: int | ExpectedError) -> NoReturn:
    """End the process from any thread, whatever the others do, with a status or with an error's line and status."""

    def write() -> None:
        live.leave()
        with contextlib.suppress(OSError):
            if isinstance(why, ExpectedError):
                os.write(2, f"error: {why}\n".encode(errors="backslashreplace"))

    attempt(write)
    os._exit(why.status if isinstance(why, ExpectedError) else why)
