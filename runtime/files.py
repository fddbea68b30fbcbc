"""Writing and reading the small files of a run's directory. Of several processes only the first writes them.

The files may come from anybody: only regular files of limited size are opened, and JSON may be nested only so deep.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from runtime.errors import ExpectedError, StorageError, UserError, one_line
from runtime.processes import is_first

PROGRAM = Path(__file__).parent.parent  # where main.py lies: a clone, or the folder of an installed package
INSTALLED = not (PROGRAM / "pyproject.toml").exists()
MAKE_ROOM = "make room, then run the same command again"
LARGEST = 2**28  # bytes of a file that is read whole
LARGEST_LOG = 2**30  # bytes of a file that grows with every logged step
_DEEPEST = 64  # levels of nested objects and lists
_MOST_DIGITS = 40  # of a whole number: more than any of ours has, and few enough for a float


def user_cache() -> Path:
    """The user's folder for compiled programs and, for an installed copy, data sets. UserError if the user has none."""
    return _home("XDG_CACHE_HOME", ".cache") / "transformer-jax"


def data_folder(data_dir: str) -> Path:
    """`config.data_dir`, relative to the clone that this file lies in; for an installed copy to the user's cache."""
    return (user_cache() if INSTALLED else PROGRAM) / data_dir


def user_state() -> Path:
    """The user's folder for the history of typed lines. Raises as `user_cache`."""
    return _home("XDG_STATE_HOME", ".local/state") / "transformer-jax"


def _home(variable: str, usual: str) -> Path:
    try:
        return Path(os.environ.get(variable) or Path.home() / usual)
    except RuntimeError as error:  # a user without a name, in a container
        raise UserError(f"HOME: not set, and the system knows no home of this user; set it, or {variable}") from error


def room(directory: Path, need: int | None = None) -> str:
    """For messages: how much space a directory's disk has left, and how much is needed if that is known."""
    megabytes = lambda size: f"{size / 1e6:,.1f} MB"
    needed = "" if need is None else f"need {megabytes(need)}, "
    return f"{needed}free {megabytes(shutil.disk_usage(directory).free)}"


def require_room(directory: Path, need: int, what: str) -> None:
    """Raises StorageError if the disk is read-only, or has too little space for `what`, of `need` bytes."""
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise StorageError(
            f"{directory}: {error.strerror}, no place for {what} ({room(directory, need)}); {MAKE_ROOM}"
        ) from error
    if shutil.disk_usage(directory).free < need:
        raise StorageError(f"{directory}: no space left for {what} ({room(directory, need)}); {MAKE_ROOM}")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns an OSError, while the file `path` is written, into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror} ({room(path.parent)}); {MAKE_ROOM}") from error


def expected_error(error: OSError) -> ExpectedError | None:
    """The error to raise for one that no code expected; None unless it is of the user's disk, paths or permissions."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG):
        path = error.filename or "a path"
        return UserError(f"{str(path)[:200]}: {error.strerror}; name another one, or change its permissions")
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return None
    return StorageError(f"{error.filename or 'a file'}: {error.strerror}; {MAKE_ROOM}")


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A regular file, to read its bytes. Raises OSError if it cannot be read, or is something else.

    A pipe would be waited for, and a device may never end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return file


def read_file(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file. Raises ValueError if it is larger, and as `open_regular`."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > largest or len(content := file.read(largest + 1)) > largest:
            raise ValueError(f"is too large: more than {largest:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, which may come from anybody.

    Raises ValueError, which says why, if it is not JSON, is nested too deeply, or holds a number of too many digits.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({one_line(error, 80)})") from None
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST):
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [part for parts in inside for part in parts if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError("is nested too deeply")


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"holds a number of {len(digits):,} digits")
    return int(digits)


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError, whose text lacks the path, or OSError if it is missing or damaged."""
    value = parse_json(read_file(path, largest))
    if not isinstance(value, dict):
        raise ValueError("holds no JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises UserError if the file is missing or damaged."""
    with _readable(path):
        return read_object(path)


def read_text(path: Path) -> str:
    """A text file's content; invalid UTF-8 is replaced. Raises as `read_json`."""
    with _readable(path):
        return read_file(path).decode("utf-8", errors="replace")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); is {path.parent} the right directory?") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write a file in one step, so that it is never half written. Raises StorageError if it cannot be written."""
    if is_first():
        with storing(path), replacing(path) as unfinished:  # surrogates: names of files that are no UTF-8
            unfinished.write_text(text, encoding="utf-8", errors="surrogatepass")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which is renamed to `path` at the end, so `path` is never half written.

    If the writing fails, the temporary file or directory is removed. No two processes share one.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        os.replace(unfinished, path)


@contextlib.contextmanager
def new_file(path: Path, flag: str) -> Iterator[TextIO]:
    """A new text file that a person asked for by `flag`, written line by line.

    Raises UserError if it exists or cannot be created, StorageError if it cannot be written.
    """
    try:
        file = path.open("x", encoding="utf-8", buffering=1)
    except FileExistsError as error:
        raise UserError(f"{flag}={path}: is there already; name a new file") from error
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be made ({error.strerror}); name a file that can") from error
    with storing(path), file:
        yield file


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file. Raises StorageError if it cannot be written."""
    if is_first():
        with storing(path), path.open("a", encoding="utf-8") as file:
            file.write(text)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def cut_back(path: Path, size: int, say: Callable[[str], None]) -> None:
    """Cut a file that only grows back to the size that it had when a checkpoint was made.

    A file that is shorter has lost something: it is left as it is, and `say` gets a line about it. Raises StorageError
    if the file cannot be cut.
    """
    found = size_of(path)
    if not is_first():
        return
    if found > size:
        with storing(path):
            os.truncate(path, size)
    elif found < size:
        say(f"{path}: {size - found} bytes that were written before this checkpoint are missing")


class MetricsFile:
    """`metrics.jsonl`: one JSON object on each line. NaN and infinities become null, because JSON lacks them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row, at once. Raises StorageError if it cannot be written."""
        append_text(self.path, json.dumps(plain(row), allow_nan=False) + "\n")

    def read(self, warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
        """All rows but an incomplete last one; [] if there is no file. `warn` gets a line if damaged rows are left out.

        Raises UserError if the file cannot be read.
        """
        with _readable(self.path):
            try:
                *lines, last = read_file(self.path, LARGEST_LOG).split(b"\n")
            except FileNotFoundError:
                return []
        lines += [last] if last.endswith(b"}") else []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # invalid UTF-8 too
                if isinstance(row := parse_json(line), dict):
                    rows.append(plain(row))
        if bad := len(lines) - len(rows):
            warn(f"{self.path}: {bad:,} damaged rows left out")
        return rows


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: scalars of NumPy and JAX become Python's, NaN and infinities None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
