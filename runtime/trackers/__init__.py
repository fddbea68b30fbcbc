"""Services that take a run's numbers beside its own files, if they are switched on. None can stop a run.

A new tracker is a class in a file of its own, as `WandbTracker` is one, a line in `TRACKERS`, and the name of its
directory in `runtime.workdir.DIRECTORIES`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import one_line
from runtime.trackers.tensorboard import TensorboardTracker
from runtime.trackers.trackio import TrackioTracker
from runtime.trackers.wandb import WandbTracker


class Tracker(Protocol):
    """Receives what a run logs, or raises anything, which switches it off. Its directory in `workdir` has its name.

    It is made with the arguments of `Trackers`, but for the names; `warn` takes at most one line from it.
    """

    where: str  # tells people where to look

    def log(self, row: dict[str, Any], step: int) -> None:
        """The numbers of one logged step."""

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        """There is a new sample: `read` gives all samples so far, with their steps, the newest last."""

    def finish(self) -> None:
        """Ends the run: uploads what is left, in half a minute at most."""


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
}


class Trackers:
    """Those of a run, of each of `names`. One that fails is off for the rest of the run, and `warn` takes a line.

    `step` is the last that was logged before; later ones that a killed session logged are logged again.
    """

    def __init__(
        self,
        names: Iterable[str],
        name: str,
        config: dict[str, Any],
        workdir: Path,
        warn: Callable[[str], None],
        step: int = 0,
    ) -> None:
        self._warn = warn
        self._running: dict[str, Tracker] = {}
        for tracker in names:
            try:
                self._running[tracker] = TRACKERS[tracker](name, config, workdir, warn, step)
            except Exception as error:
                install = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
                warn(f"{tracker} is off for this run ({one_line(error)}{install})")
        self.where = {tracker: running.where for tracker, running in self._running.items()}

    def log(self, row: dict[str, Any], step: int) -> None:
        self._each(lambda tracker: tracker.log(row, step))

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        self._each(lambda tracker: tracker.samples(read))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._running[name]
                self._warn(f"{name} failed and is off for the rest of this run ({one_line(error)})")
