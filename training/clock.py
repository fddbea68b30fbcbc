"""How long a run's steps take, and how much time is left."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SideWork:
    """Work that a run does besides its steps, such as evaluations, after some steps and always after the last."""

    every: int  # done after every so many steps; 0: only after the last
    size: float = 1.0  # of one, in any unit
    last_size: float = 1.0  # of the one after the last step
    share: float = 0.0  # assumed cost of a unit, in steps, until one was timed
    compiling: float = 0.0  # extra time of the first one, as a share of the extra time of the first step

    def ahead(self, step: int, total: int) -> tuple[int, float]:
        """How many are still to come after `step`, without that of the step itself, and their total size."""
        if step >= total:
            return 0, 0.0
        before_last = (total - 1) // self.every - step // self.every if self.every else 0
        return before_last + 1, before_last * self.size + self.last_size


class Clock:
    """A stop-watch for steps, without pauses. It does not use the wall clock, which may jump.

    `elapsed` are the seconds of earlier sessions of the same run.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        now = time.monotonic()
        self._start = now - elapsed
        self._lap_start = now
        self._lap_from: int | None = None  # the caller's step at which the lap began
        self._first_seconds = 0.0
        self._steps, self._seconds = 0, 0.0  # all laps
        self._paused: defaultdict[str, list[float]] = defaultdict(list)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, with pauses and earlier sessions, without the time between sessions."""
        return time.monotonic() - self._start

    @property
    def in_laps(self) -> bool:
        """Whether `start_laps` was called."""
        return self._lap_from is not None

    def start_laps(self, step: int) -> None:
        """Begins the first lap at `step`, after the session's first step, which compiled."""
        now = time.monotonic()
        self._first_seconds, self._lap_start, self._lap_from = now - self._lap_start, now, step

    def lap(self, step: int) -> float | None:
        """Seconds per step since the last lap, without pauses; begins the next lap. None if no step was timed."""
        if self._lap_from is None or step <= self._lap_from:
            return None
        now = time.monotonic()
        count, seconds = step - self._lap_from, now - self._lap_start
        self._lap_from, self._lap_start = step, now
        self._steps, self._seconds = self._steps + count, self._seconds + seconds
        return seconds / count

    @contextlib.contextmanager
    def pause(self, work: str = "") -> Iterator[None]:
        """Counts the time inside for `elapsed` but for no lap, and for `left` as one piece of that `work`."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._lap_start += seconds
            self._paused[work].append(seconds)

    def left(self, step: int, total: int, scale: int, side_work: Mapping[str, SideWork]) -> float:
        """Seconds from `step` to the end of a run of `total` steps; there must have been a lap.

        It assumes the average time of steps, without compilation, and of work besides them (`pause`). The cost of work
        that was not done yet is estimated from the steps. `scale`: steps of `start_laps` and `lap` in one of these.
        """
        a_step = self._seconds / self._steps * scale
        compiling = max(0.0, self._first_seconds - a_step / scale)
        seconds = (total - step) * a_step
        for name, work in side_work.items():
            count, size = work.ahead(step, total)
            extra = work.compiling * compiling
            done = self._paused[name]
            if not done:
                seconds += size * work.share * a_step + extra * (count > 0)
            elif len(done) == 1:  # it included compilation
                a_unit = done[0] / work.size
                seconds += size * max(a_unit - extra / work.size, min(a_unit, work.share * a_step))
            else:
                seconds += size * sum(done[1:]) / len(done[1:]) / work.size
        return seconds


def side_work(
    step_tokens: int, val_tokens: int, eval_tokens: int, *, eval_every: int, sample_every: int, save_every: int
) -> dict[str, SideWork]:
    """The work of a run besides its steps, with its likely cost until it was timed.

    A forward pass is a third of a step's arithmetic. The shares of compilation are those of a small model on a CPU.
    `*_every` count real steps, of `step_tokens`. Evaluations in training are on `eval_tokens` of the split (0: all).
    """
    some = min(eval_tokens, val_tokens) if eval_tokens else val_tokens
    last = val_tokens + some % val_tokens  # after the last step both are evaluated
    saves = min(filter(None, (save_every, eval_every)), default=0)  # assumes that each evaluation improves
    return {
        "evaluation": SideWork(eval_every, some, last, share=1 / (3 * step_tokens), compiling=0.15),
        "sample": SideWork(sample_every, compiling=0.7),
        "save": SideWork(saves, compiling=0.4),
    }
