"""What keeps a run whole: ways to stop it, a lock so that two never share a workdir, and a check before it starts."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from runtime import live
from runtime.agreement import reached_stop
from runtime.errors import ExpectedError, Interrupted, UserError, one_line
from runtime.processes import is_first, num_processes, wait_for_all

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = "stopping: this step is finished and saved first; once more stops at once and saves nothing"


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop, and the second into an exit at once.

    `signum` is None until a signal came, then its number: the loop looks at it between steps. Python runs a signal
    handler only when the main thread is back from C code, which a compilation can keep for minutes. So the second
    signal is not left to the handler: the interpreter writes every signal's number into a pipe the moment it arrives
    (`signal.set_wakeup_fd`), and a thread that reads the pipe ends the process with status 128 + that number. It
    waits for nothing longer than a second, not even for a terminal that takes no more.

    Handlers can be set in the main thread alone; in any other this does nothing. On a terminal, Ctrl-Z takes the live
    view away before it stops the process.

    Of several processes each hands its signal on to JAX, which makes it known to the others; all stop at the same call
    of `raise_if_set`, and so all must call it equally often.

    Args:
        say: takes one line when the first signal arrives, called from a thread of its own.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.signum: int | None = None
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
            self._old_handlers = {signum: signal.signal(signum, self._request) for signum in _SIGNALS}
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
            if reached_stop(self._calls):
                raise Interrupted(self.signum or signal.SIGTERM)
        elif self.signum is not None:
            raise Interrupted(self.signum)

    def _request(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def _watch(self) -> None:
        """The reader thread: says that the first signal was heard, ends the process at the second."""
        heard = False
        while number := os.read(self._pipe_out, 1):
            signum = number[0]
            if signum == signal.SIGTSTP:
                attempt(live.suspend)
            if signum not in _SIGNALS:
                continue
            if heard:
                exit_at_once(128 + signum)
            heard = True
            self._tell_jax(signal.SIGTERM)
            attempt(partial(self._say, _STOPPING))


def _c_handler(signum: int) -> Callable[[int], object]:
    """The handler that a library has set: JAX's of SIGTERM, which notes that this process is about to be preempted."""
    look_up = ctypes.pythonapi.PyOS_getsig
    look_up.restype, look_up.argtypes = ctypes.c_void_p, [ctypes.c_int]
    address = look_up(signum) or 0
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address > 1 else lambda signum: None  # 0, 1: default, none


def attempt(action: Callable[[], object], seconds: float = 1) -> None:
    """Does it in a thread and waits no longer for it than that: a terminal or a disk may take nothing any more."""
    thread = threading.Thread(target=action, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is about to end, or the machine has no more threads
        action()
    else:
        thread.join(seconds)


def exit_at_once(why: int | ExpectedError) -> NoReturn:
    """End the process from any thread, whatever the others do: a status, or an error's line and its status."""

    def write() -> None:
        live.leave()
        with contextlib.suppress(OSError):
            if isinstance(why, ExpectedError):
                os.write(2, f"error: {why}\n".encode(errors="backslashreplace"))

    attempt(write)
    os._exit(why.status if isinstance(why, ExpectedError) else why)


class WorkdirLock:
    """Holds `workdir/.lock` while a run uses the directory.

    The lock is `flock`'s: the kernel frees it when the process ends in whatever way, so none is ever stale. The
    file names its holder, and stays behind. Of several processes the first holds it for all. On a file system that
    knows no locks the run goes on with a warning.

    Args:
        workdir: an existing directory.
        warn: takes one line when the directory cannot be locked.

    Raises:
        UserError: on entering, when another process holds the lock, or the file is somebody else's.
    """

    def __init__(self, workdir: Path, warn: Callable[[str], None]) -> None:
        self._path = workdir / ".lock"
        self._warn = warn

    def __enter__(self) -> Self:
        where = f"workdir {self._path.parent}"
        if not is_first():
            self._file = open(os.devnull)
            wait_for_all("lock")
            return self
        try:
            self._file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{where}: cannot open .lock ({error.strerror}); use another --workdir") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another run"
            self._file.close()
            raise UserError(f"{where}: in use by {holder}; wait for it to end, or use another --workdir") from None
        except OSError as error:
            self._warn(f"{where}: cannot be locked ({one_line(error)}); start no second run in it")
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        wait_for_all("lock")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def prepare_workdir(path: str | os.PathLike[str]) -> Path:
    """Creates a run's directory, proves that it can be written, and returns its absolute path.

    Raises:
        UserError: it cannot be created or written, or is a file.
    """
    try:
        workdir = Path(path).expanduser().resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(b"probe")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle, or a ~ without a home
        reason = "is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise UserError(f"workdir {path}: {reason}; --workdir must name a directory that can be written") from None
    return workdir
