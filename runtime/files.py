"""Writing and reading the small files of a run's directory. Of several processes only the first writes them."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from runtime.errors import StorageError, UserError, one_line
from runtime.processes import is_first

PROGRAM = Path(__file__).parent.parent  # where main.py lies: a clone, or the folder of an installed package
INSTALLED = not (PROGRAM / "pyproject.toml").exists()
MAKE_ROOM = "make room, then run the same command again"


def user_cache() -> Path:
    """The user's folder for what can be made again: compiled programs and, for an installed copy, data sets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer-jax"


def room(directory: Path, need: int | None = None) -> str:
    """For messages: how much space the disk of a directory has left, and how much is needed if that is known."""
    megabytes = lambda size: f"{size / 1e6:,.1f} MB"
    needed = "" if need is None else f"need {megabytes(need)}, "
    return f"{needed}free {megabytes(shutil.disk_usage(directory).free)}"


def require_room(directory: Path, need: int, what: str) -> None:
    """Refuse to begin writing `what`, of `need` bytes, if the disk would not take it.

    Raises:
      StorageError: it is read-only, or has too little space.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise StorageError(
            f"{directory}: {error.strerror}, no place for {what} ({room(directory, need)}); {MAKE_ROOM}"
        ) from error
    if shutil.disk_usage(directory).free < need:
        raise StorageError(f"{directory}: no space left for {what} ({room(directory, need)}); {MAKE_ROOM}")


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error to raise when the disk did not take the file `path`."""
    return StorageError(f"{path}: {error.strerror} ({room(path.parent)}); {MAKE_ROOM}")


def disk_error(error: OSError) -> StorageError | None:
    """The same for an error that no code expected; None unless it is about a full or a read-only disk."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return None
    return StorageError(f"{error.filename or 'a file'}: {error.strerror}; {MAKE_ROOM}")


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); is {path.parent} the right directory?") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write a file that is never half there.

    Raises:
      StorageError: the disk did not take it.
    """
    if not is_first():
        return
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise storage_error(path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; the file or directory made there becomes `path` at the end, in one step.

    So `path` is never half written. What is left when the writing fails is removed; no two processes share it.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        os.replace(unfinished, path)


@contextlib.contextmanager
def new_file(path: Path, flag: str) -> Iterator[TextIO]:
    """A text file to write what a person asked for by `flag`; each line is there as soon as it is whole.

    Raises:
      UserError: it is there already, or cannot be made.
      StorageError: the disk did not take it.
    """
    try:
        file = path.open("x", encoding="utf-8", buffering=1)
    except FileExistsError as error:
        raise UserError(f"{flag}={path}: is there already; name a new file") from error
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be made ({error.strerror}); name a file that can") from error
    try:
        with file:
            yield file
    except OSError as error:
        raise storage_error(path, error) from error


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file.

    Raises:
      StorageError: the disk did not take it.
    """
    if not is_first():
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise storage_error(path, error) from error


def size_of(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def cut_back(path: Path, size: int, say: Callable[[str], None]) -> None:
    """Cut a file that only grows back to the size it had when a checkpoint was made.

    A file that is shorter has lost something; it is left as it is, and `say` gets a line about it.

    Raises:
      StorageError: the disk did not take it.
    """
    found = size_of(path)
    if not is_first():
        return
    if found > size:
        try:
            os.truncate(path, size)
        except OSError as error:
            raise storage_error(path, error) from error
    elif found < size:
        say(f"{path}: {size - found} bytes that were written before this checkpoint are missing")


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each handed to the operating system at once.

    Numbers that are not finite are written as null, because JSON has no such numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row.

        Raises:
            StorageError: the disk did not take it.
        """
        append_text(self.path, json.dumps(_plain(row), allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All rows but a line that a crash cut short; none when there is no file."""
        rows = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy's and JAX's scalars become Python's, numbers that are not finite None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
