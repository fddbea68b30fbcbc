"""trackio, with its database in the run's directory. Its own variables (TRACKIO_SPACE_ID, ...) can send it on."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.trackers.service import Service, Tracker

PROJECT = "transformer"


class TrackioTracker(Service):
    """Hands everything to a trackio run, but for the steps up to `known`, which it has: it would keep them twice."""

    known = 0

    def log(self, row: dict[str, Any], step: int) -> None:
        numbers = {key: value for key, value in row.items() if value is not None and key != "step"}
        if step > self.known:
            self.attempt(lambda run: run.log(numbers, step=step))

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        step, text = read()[-1]
        if step > self.known:
            self.attempt(lambda run: run.log({"sample": text}, step=step))

    def finish(self) -> None:
        import trackio  # whose own finish, unlike the run's, is not repeated at the exit

        with contextlib.redirect_stdout(io.StringIO()):  # the console is the run's own
            self.attempt(lambda run: trackio.finish())


def start_trackio(name: str, config: dict[str, Any], workdir: Path, warn: Callable[[str], None], step: int) -> Tracker:
    """Begins a run in `trackio/`, or goes on with the one of this name there."""
    del step
    where = (workdir / "trackio").absolute()
    os.environ["TRACKIO_DIR"] = str(where)  # else a folder in the user's home; it is read at the import
    if getattr(sys.modules.get("trackio.utils"), "TRACKIO_DIR", where) != where:  # by another run of this process
        for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
            del sys.modules[module]
    with contextlib.redirect_stdout(io.StringIO()):
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        watch = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        known = SQLiteStorage.get_max_step_for_run(PROJECT, name)
        run = trackio.init(PROJECT, name=name, config=config, resume="allow", **watch)
    tracker = TrackioTracker("trackio", run, f"TRACKIO_DIR={where} trackio show", warn)
    tracker.known = known or 0
    return tracker
