"""What a tracker is."""

from collections.abc import Callable, Sequence
from typing import Any

from runtime.errors import one_line


class Tracker:
    """Receives what a run logs. This one drops it.

    `where` tells people where to look, None if nowhere.
    """

    where: str | None = None

    def log(self, row: dict[str, Any], step: int) -> None:
        """The numbers of one logged step."""

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        """There is a new sample: `read` gives all samples so far, with their steps, the newest last."""

    def finish(self) -> None:
        """Ends the run: uploads what is left, in half a minute at most."""


class Service(Tracker):
    """A tracker that hands everything to `run` until the first exception; then it warns once and drops the rest."""

    def __init__(self, name: str, run: Any, where: str, warn: Callable[[str], None]) -> None:
        self.name, self.where = name, where
        self._run, self._warn = run, warn

    def attempt(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            self._warn(f"{self.name} failed and is off for the rest of this run ({one_line(error)})")
