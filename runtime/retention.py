"""Which of a run's checkpoints is the newest, which the best, and which stay."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mark:
    """What of a checkpoint decides: how much of the data had been read, and the loss where it was evaluated."""

    position: int
    val_loss: float | None


def newest_first(marks: Mapping[int, Mark]) -> list[int]:
    """Steps by position; equal positions by number."""
    return sorted(marks, key=lambda step: (marks[step].position, step), reverse=True)


def best_first(marks: Mapping[int, Mark]) -> list[int]:
    """Steps by validation loss; behind them those without one, the newest first."""
    losses = {step: mark.val_loss for step, mark in marks.items() if mark.val_loss is not None}
    others = {step: mark for step, mark in marks.items() if mark.val_loss is None}
    return sorted(losses, key=lambda step: (losses[step], step)) + newest_first(others)


class Retention:
    """Orbax's preservation policy: stay shall the newest `keep`, the best, and whatever has no mark.

    `marks` is read at each decision, so that its owner may change it.
    """

    def __init__(self, marks: Mapping[int, Mark], keep: int):
        self._marks, self._keep = marks, keep

    def superfluous(self, steps: Iterable[int]) -> list[int]:
        """Those of the steps that need not stay."""
        ours = {step: self._marks[step] for step in steps if step in self._marks}
        evaluated = {step: mark for step, mark in ours.items() if mark.val_loss is not None}
        stay = {*newest_first(ours)[: self._keep], *best_first(evaluated)[:1]}
        return [step for step in ours if step not in stay]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        superfluous = self.superfluous(info.step for info in checkpoints)
        return [info.step not in superfluous for info in checkpoints]
