"""How long a run's steps take, and how much longer all of it will."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Beside:
    """Work that a run does beside its steps, after some of them and always after the last.

    Args:
      every: after how many steps; 0: after the last alone.
      size: how large one is, in a unit of the caller's choice.
      last_size: how large the one after the last step is.
      share: assumed cost of a unit, in steps, until one was timed.
      compiling: extra time of the first one, as a share of the extra time of the first step.
    """

    every: int
    size: float = 1.0
    last_size: float = 1.0
    share: float = 0.0
    compiling: float = 0.0

    def ahead(self, step: int, total: int) -> tuple[int, float]:
        """How many come after `step`, that of the step itself not counted, and their size in all."""
        if step >= total:
            return 0, 0.0
        before_last = (total - 1) // self.every - step // self.every if self.every else 0
        return before_last + 1, before_last * self.size + self.last_size


class Clock:
    """A stop-watch for steps, which leaves pauses out. It never sees the wall clock, which may jump.

    Args:
        elapsed: seconds already spent by earlier sessions of the same run.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        now = time.monotonic()
        self._start = now - elapsed
        self._lap_start = now
        self._lap_from: int | None = None  # where the lap began, in the caller's steps
        self._first_seconds = 0.0
        self._steps, self._seconds = 0, 0.0  # all laps
        self._paused: defaultdict[str, list[float]] = defaultdict(list)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, pauses and earlier sessions included, the time between sessions not."""
        return time.monotonic() - self._start

    @property
    def in_laps(self) -> bool:
        """Whether `start_laps` was called."""
        return self._lap_from is not None

    def start_laps(self, step: int) -> None:
        """The session's first step is done, `step` steps are: it compiled, so that laps begin here."""
        now = time.monotonic()
        self._first_seconds, self._lap_start, self._lap_from = now - self._lap_start, now, step

    def lap(self, step: int) -> float | None:
        """Seconds a step since the last lap, without pauses; begins the next lap. None where no step was timed."""
        if self._lap_from is None or step <= self._lap_from:
            return None
        now = time.monotonic()
        count, seconds = step - self._lap_from, now - self._lap_start
        self._lap_from, self._lap_start = step, now
        self._steps, self._seconds = self._steps + count, self._seconds + seconds
        return seconds / count

    @contextlib.contextmanager
    def pause(self, work: str = "") -> Iterator[None]:
        """What runs inside counts for `elapsed` but for no lap; `left` takes it for one of that `work`."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._lap_start += seconds
            self._paused[work].append(seconds)

    def left(self, step: int, total: int, scale: int, beside: Mapping[str, Beside]) -> float:
        """Seconds from `step` to the end of a run of `total` steps, once there was a lap.

        Steps go on as they went on average, compilation apart; so does what was done beside them (`pause`). What was
        not done yet is reckoned from the steps.

        Args:
          scale: the steps of `start_laps` and `lap` to one of these.
          beside: the work of each name.
        """
        a_step = self._seconds / self._steps * scale
        compiling = max(0.0, self._first_seconds - a_step / scale)
        seconds = (total - step) * a_step
        for name, work in beside.items():
            count, size = work.ahead(step, total)
            extra = work.compiling * compiling
            done = self._paused[name]
            if not done:
                seconds += size * work.share * a_step + extra * (count > 0)
            elif len(done) == 1:  # which compiled too
                a_unit = done[0] / work.size
                seconds += size * max(a_unit - extra / work.size, min(a_unit, work.share * a_step))
            else:
                seconds += size * sum(done[1:]) / len(done[1:]) / work.size
        return seconds


def beside(
    step_tokens: int, val_tokens: int, eval_tokens: int, *, eval_every: int, sample_every: int, save_every: int
) -> dict[str, Beside]:
    """What a run does beside its steps, with what it is likely to take before it was timed.

    A forward pass is a third of a step's arithmetic. The shares of compilation are a small model's on a CPU.

    Args:
      step_tokens: tokens of a real step; `*_every` are such steps.
      val_tokens, eval_tokens: tokens of the validation split, and of the part of it that is taken in training; 0: all.
    """
    some = min(eval_tokens, val_tokens) if eval_tokens else val_tokens
    saves = min(filter(None, (save_every, eval_every)), default=0)  # as if each evaluation improved
    return {
        "evaluation": Beside(eval_every, some, val_tokens, share=1 / (3 * step_tokens), compiling=0.15),
        "sample": Beside(sample_every, compiling=0.7),
        "save": Beside(saves, compiling=0.4),
    }
