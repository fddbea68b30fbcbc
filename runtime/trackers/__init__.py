"""Services that take a run's numbers beside its own files, if they are switched on. None can stop a run.

A new tracker is a file with a maker as `start_wandb` is one, and a line in `TRACKERS`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import one_line
from runtime.trackers.service import Tracker
from runtime.trackers.tensorboard import start_tensorboard
from runtime.trackers.trackio import start_trackio
from runtime.trackers.wandb import start_wandb

TRACKERS: dict[str, Callable[..., Tracker]] = {
    "wandb": start_wandb,
    "tensorboard": start_tensorboard,
    "trackio": start_trackio,
}


def start(
    tracker: str, *, name: str, config: dict[str, Any], workdir: Path, warn: Callable[[str], None], step: int = 0
) -> Tracker:
    """Starts a tracker of `TRACKERS` for the run `name`, or goes on with what it has; a null tracker where it cannot.

    Its files are in a directory of its name in `workdir`. `warn` takes at most one line from here, and one for the rest
    of the run. `step` is the last one that was logged before; others that come after it may have been logged by a
    session that was killed, and are logged again.
    """
    try:
        return TRACKERS[tracker](name=name, config=config, workdir=workdir, warn=warn, step=step)
    except Exception as error:
        install = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        warn(f"{tracker} is off for this run ({one_line(error)}{install})")
        return Tracker()


class Trackers:
    """Those of a run: of each of `names`, with the settings that `start` takes."""

    def __init__(self, names: Iterable[str], **settings: Any) -> None:
        self._trackers = {name: start(name, **settings) for name in names}
        self.where = {name: tracker.where for name, tracker in self._trackers.items() if tracker.where}

    def log(self, row: dict[str, Any], step: int) -> None:
        for tracker in self._trackers.values():
            tracker.log(row, step)

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        for tracker in self._trackers.values():
            tracker.samples(read)

    def finish(self) -> None:
        for tracker in self._trackers.values():
            tracker.finish()
