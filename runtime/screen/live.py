"""Whatever moves on the terminal, for those who must take it away: another bar, Ctrl-Z, the sudden end."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol


class View(Protocol):
    """Lines that are drawn again and again at the foot of the terminal."""

    def hide(self) -> None:
        """Takes the lines away."""

    def show(self) -> None:
        """Draws them, until they are hidden."""


_shown: list[View] = []  # what is on the terminal now: one or none
drawing = threading.RLock()  # held by whoever writes there, or shows or hides a view: Ctrl-C and Ctrl-Z have a thread


def note(view: View, shown: bool) -> None:
    """Notes that a view is on the terminal now, or no more."""
    _shown[:] = [view] if shown else []


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Inside, nothing of ours moves on the terminal: somebody else draws there."""
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
    """What Ctrl-Z does to a program that does not care, with the terminal clean meanwhile. From any thread.

    SIGTSTP is let through here, so that a process nobody could wake again is not stopped, as the kernel wants it.
    """
    with drawing, set_aside():
        set_handler = ctypes.pythonapi.PyOS_setsig  # Python's own is for the main thread, which may be compiling
        set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
        handler = set_handler(signal.SIGTSTP, None)  # the default
        signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)  # to this thread: it has stopped when this returns
        set_handler(signal.SIGTSTP, handler)


def leave() -> None:
    """Leaves the terminal in order before a process ends at once, whatever its other threads do."""
    with contextlib.suppress(OSError):
        if _shown:
            os.write(1, b"\r\n")
        elif os.isatty(2):
            os.write(2, b"\x1b[?25h")  # a bar of a download has hidden the cursor
