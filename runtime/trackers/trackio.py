"""trackio, with its database in the run's directory. Its own variables (TRACKIO_SPACE_ID, ...) can send it on."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = "transformer"


class TrackioTracker:
    """Begins a run in `trackio/`, or goes on with the one of this name there, but for the steps that it has already."""

    def __init__(
        self, name: str, config: dict[str, Any], workdir: Path, warn: Callable[[str], None], step: int
    ) -> None:
        del warn, step
        directory = (workdir / "trackio").absolute()
        os.environ["TRACKIO_DIR"] = str(directory)  # else a folder in the user's home; it is read at the import
        if getattr(sys.modules.get("trackio.utils"), "TRACKIO_DIR", directory) != directory:  # by another run here
            for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
                del sys.modules[module]
        with contextlib.redirect_stdout(io.StringIO()):  # the console is the run's own
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            watch = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
            self._known = SQLiteStorage.get_max_step_for_run(PROJECT, name) or 0  # logged again, it would be kept twice
            self._run = trackio.init(PROJECT, name=name, config=config, resume="allow", **watch)
        self.where = f"TRACKIO_DIR={directory} trackio show"

    def log(self, row: dict[str, Any], step: int) -> None:
        if step > self._known:
            self._run.log({key: value for key, value in row.items() if value is not None and key != "step"}, step=step)

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        step, text = read()[-1]
        if step > self._known:
            self._run.log({"sample": text}, step=step)

    def finish(self) -> None:
        import trackio  # whose own finish, unlike the run's, is not repeated at the exit

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
