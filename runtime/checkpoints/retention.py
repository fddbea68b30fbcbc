"""Which of a run's checkpoints is the newest, the best, which are kept, and how the other directories are named."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Mark(NamedTuple):
    """What decides whether a checkpoint is kept: how much of the data was read, and the loss, if evaluated."""

    position: int
    val_loss: float | None
    val_tokens: int = 0  # the loss was computed on so many first tokens of the validation split; 0: on all


def newest_first(marks: Mapping[int, Mark]) -> list[int]:
    """Steps by position, then by number, highest first."""
    return sorted(marks, key=lambda step: (marks[step].position, step), reverse=True)


def best_first(marks: Mapping[int, Mark]) -> list[int]:
    """Steps by validation loss, then those without one, the newest first.

    A loss counts as missing if it was computed on other tokens than the newest loss, because the two do not compare.
    """
    newest = newest_first(marks)
    tokens = next((marks[step].val_tokens for step in newest if marks[step].val_loss is not None), 0)
    compared = [step for step in newest if marks[step].val_loss is not None and marks[step].val_tokens == tokens]
    best = sorted(compared, key=lambda step: (marks[step].val_loss, step))
    return best + [step for step in newest if step not in best]


def superfluous(marks: Mapping[int, Mark], keep: int) -> list[int]:
    """The steps that need not be kept: neither one of the newest `keep`, nor the best for its number of tokens."""
    stay = set(newest_first(marks)[:keep])
    for tokens in {mark.val_tokens for mark in marks.values()}:
        evaluated = {s: m for s, m in marks.items() if m.val_loss is not None and m.val_tokens == tokens}
        stay |= set(best_first(evaluated)[:1])
    return [step for step in marks if step not in stay]


# --- Directories of unfinished, replaced or damaged checkpoints ---------------------------------------------------
# A kill may leave them behind. Checkpoints come and go by a rename, which is atomic: a directory that is named by a
# step alone is always complete.

UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of one that is being written
REPLACED = ".replaced"  # ends the name of one that is kept until its replacement is complete
DAMAGED = ".damaged-"  # this and a number end the name of one that was set aside
DELETED = "deleted"  # the directory of checkpoints that are being deleted


def tidy_up(directory: Path) -> None:
    """Remove what a kill has left of unfinished saves; Orbax would do so in the background, which may be too late."""
    finish_replacing(directory)
    for path in directory.glob(f"*{UNFINISHED}*"):
        if re.fullmatch(rf"\d+{re.escape(UNFINISHED)}.*", path.name, re.ASCII):
            shutil.rmtree(path, ignore_errors=True)


def finish_replacing(directory: Path) -> None:
    """Remove replaced checkpoints; bring back those whose replacement was never completed."""
    for old in directory.glob(f"*{REPLACED}"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)
        else:
            old.rename(old.with_suffix(""))


def strangers(directory: Path) -> list[str]:
    """Names that neither a checkpoint nor a directory of those above has; hidden files are ignored."""
    ours = rf"(0|[1-9]\d*)({UNFINISHED}.*|{REPLACED}|{DAMAGED}\d+)?|{DELETED}|\..*"
    names = (entry.name for entry in directory.iterdir())
    return sorted(name for name in names if not re.fullmatch(ours, name, re.ASCII | re.DOTALL))
