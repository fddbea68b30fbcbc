"""The small files of a run's directory, and putting a whole run aside."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import StorageError, UserError, one_line


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); is {path.parent} the right directory?") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that at no moment a half of it is there.

    Raises:
      StorageError: the disk did not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; make room, then run the same command again") from error


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file.

    Raises:
      StorageError: the disk did not take it.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; make room, then run the same command again") from error


def size_of(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def cut_back(path: Path, size: int, say: Callable[[str], None]) -> None:
    """Cut a file that only grows back to the size it had when a checkpoint was made.

    A file that is shorter has lost something; it is left as it is, and `say` gets a line about it.
    """
    found = size_of(path)
    if found > size:
        os.truncate(path, size)
    elif found < size:
        say(f"{path}: {size - found} bytes that were written before this checkpoint are missing")


def move_aside(workdir: Path, say: Callable[[str], None]) -> None:
    """Move what an earlier run left in `workdir` to `workdir.old-N` beside it. Its lock stays, for we hold it."""
    left = [entry for entry in workdir.iterdir() if entry.name != ".lock"]
    if not left:
        return
    number = 1
    while (target := workdir.with_name(f"{workdir.name}.old-{number}")).exists():
        number += 1
    target.mkdir()
    for entry in left:
        entry.rename(target / entry.name)
    say(f"moved the earlier run to {target}")
