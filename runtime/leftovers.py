"""The names under which a checkpoint is not, or no longer, one of the run's, and what a kill may leave under them.

Everything happens by a rename, which is whole or has not been: a directory that is named like a step is never on its
way in or out.
"""

import re
import shutil
from pathlib import Path

UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of one that is being written
REPLACED = ".replaced"  # ends the name of one that waits for the one that replaces it
DAMAGED = ".damaged-"  # and a number end the name of one that was set aside
DELETED = "deleted"  # the directory of those that are being deleted


def empty_trash(directory: Path) -> None:
    """Delete what has been thrown away; what cannot be deleted now is left for the next time."""
    shutil.rmtree(directory / DELETED, ignore_errors=True)


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
