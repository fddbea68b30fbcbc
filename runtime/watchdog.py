"""Ends a run that hangs: a collective whose peer is gone, a disk that no longer answers."""

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from runtime.errors import HungError
from runtime.processes import num_processes, process_id
from runtime.signals import attempt, exit_at_once

_TICKS = 8  # checks during the time that a step may take


class Watchdog:
    """If no step finishes in time, writes every thread's stack to `workdir/hang-TIME.txt` and ends the process.

    It watches from the first `beat` on, except in `pause`, in a thread of its own; it cannot act while another thread
    hangs and holds the interpreter. Time is counted in the thread's own ticks, so a process that was stopped (Ctrl-Z)
    or a machine that slept does not count as hung. A step, or a save, may take so many `seconds`; 0 switches it off.
    """

    def __init__(self, workdir: Path, seconds: float) -> None:
        self._workdir, self._seconds = workdir, seconds
        self._watching = False
        self._quiet = 0  # ticks since the last beat
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """A step has finished: watch from here on."""
        self._quiet, self._watching = 0, True

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The code inside may take any time."""
        watching, self._watching = self._watching, False
        try:
            yield
        finally:
            self._quiet, self._watching = 0, watching

    def _watch(self) -> None:
        while self._seconds and not self._ended.wait(self._seconds / _TICKS):
            self._quiet = self._quiet + 1 if self._watching else 0
            if self._quiet >= _TICKS:
                self._end()

    def _end(self) -> None:
        who = f"-{process_id()}" if num_processes() > 1 else ""  # all write in the same second
        path = self._workdir / f"hang-{time.strftime('%Y%m%d-%H%M%S')}{who}.txt"

        def write() -> None:
            with suppress(OSError), path.open("x") as file:
                faulthandler.dump_traceback(file, all_threads=True)

        attempt(write, seconds=5)  # the disk may be what hangs
        exit_at_once(
            HungError(
                f"{path}: no step was finished in {self._seconds:g} s, what each thread was doing is in this file; the "
                "same command goes on from the last checkpoint, config.watchdog_seconds=0 waits for ever"
            )
        )
