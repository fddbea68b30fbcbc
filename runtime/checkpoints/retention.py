"""Which of a run's checkpoints is the newest, which the best, which stay, and what the others are called meanwhile."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """Orbax's preservation policy: keeps the newest `keep`, the best, and whatever has no mark.

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


# --- The names under which a checkpoint is not, or no longer, one of the run's ------------------------------------
# What a kill may leave under them. Everything happens by a rename, which is whole or has not been: a directory that is
# named like a step is never on its way in or out.

UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of one that is being written
REPLACED = ".replaced"  # ends the name of one that waits for the one that replaces it
DAMAGED = ".damaged-"  # and a number end the name of one that was set aside
DELETED = "deleted"  # the directory of those that are being deleted


def empty_trash(directory: Path) -> None:
    """Delete what has been thrown away; what cannot be deleted now is left for the next time."""
    shutil.rmtree(directory / DELETED, ignore_errors=True)


def tidy_up(directory: Path) -> None:
    """Remove what a kill has left of saves that were under way; Orbax would do so beside the run, and be late."""
    finish_replacing(directory)
    for path in directory.glob(f"*{UNFINISHED}*"):
        if re.fullmatch(rf"\d+{re.escape(UNFINISHED)}.*", path.name, re.ASCII):
            shutil.rmtree(path, ignore_errors=True)


def finish_replacing(directory: Path) -> None:
    """Remove replaced checkpoints; bring back those whose successor was never completed."""
    for old in directory.glob(f"*{REPLACED}"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)
        else:
            old.rename(old.with_suffix(""))


def place_aside(path: Path) -> Path:
    """Where a damaged checkpoint goes: the first such name that is free."""
    number = 1
    while (place := path.with_name(f"{path.name}{DAMAGED}{number}")).exists():
        number += 1
    return place


def strangers(directory: Path) -> list[str]:
    """Names that neither a checkpoint has nor what this program makes of one; hidden files are nobody's business."""
    ours = rf"(0|[1-9]\d*)({UNFINISHED}.*|{REPLACED}|{DAMAGED}\d+)?|{DELETED}|\..*"
    names = (entry.name for entry in directory.iterdir())
    return sorted(name for name in names if not re.fullmatch(ours, name, re.ASCII | re.DOTALL))


def any_set_aside(directory: Path) -> bool:
    return any(directory.glob(f"*{DAMAGED}*"))
