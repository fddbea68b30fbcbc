"""What is redrawn on the terminal, for code that must remove it: another bar, Ctrl-Z, the immediate exit."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_shown: list[Any] = []  # what is on the terminal now: nothing, or the object whose `show` and `hide` draw and remove it
drawing = threading.RLock()  # to write there, or to show or hide a view: Ctrl-C and Ctrl-Z are handled in a thread


def note(view: Any, shown: bool) -> None:
    """Notes that a view is on the terminal now, or no longer."""
    _shown[:] = [view] if shown else []


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Hides the view, because other code draws on the terminal inside."""
    with drawing:
        views = list(_shown)
        for view in views:
            view.hide()
    try:
        yield
    finally:
        with drawing:
            for view in views:
                view.show()


def suspend() -> None:
    """Stops the process, as Ctrl-Z does by default, with the view hidden meanwhile. It works in any thread.

    It sends SIGTSTP and not SIGSTOP, so that the kernel does not stop a process that no shell could wake again.
    """
    with drawing, set_aside():
        set_handler = ctypes.pythonapi.PyOS_setsig  # Python's own needs the main thread, which may be compiling
        set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
        handler = set_handler(signal.SIGTSTP, None)  # the default
        signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)  # to this thread: it has stopped when this returns
        set_handler(signal.SIGTSTP, handler)


def leave() -> None:
    """Restores the terminal before the process ends at once, whatever its other threads do."""
    with contextlib.suppress(OSError):
        if _shown:
            os.write(1, b"\r\n")
        elif os.isatty(2):
            os.write(2, b"\x1b[?25h")  # a download's bar has hidden the cursor
