"""A run's directory as a whole: made and proved, locked, put aside."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from runtime.errors import UserError, one_line
from runtime.processes import by_first, is_first, wait_for_all


class WorkdirLock:
    """Holds `workdir/.lock` while a run uses the directory.

    The lock is `flock`'s: the kernel frees it when the process ends in whatever way, so none is ever stale. The
    file names its holder, and stays behind. Of several processes the first holds it for all. On a file system that
    knows no locks the run goes on with a warning.

    Args:
        workdir: an existing directory.
        warn: takes one line when the directory cannot be locked.

    Raises:
        UserError: on entering, when another process holds the lock, or the file is somebody else's.
    """

    def __init__(self, workdir: Path, warn: Callable[[str], None]) -> None:
        self._path = workdir / ".lock"
        self._warn = warn

    def __enter__(self) -> Self:
        where = f"workdir {self._path.parent}"
        if not is_first():
            self._file = open(os.devnull)
            wait_for_all("lock")
            return self
        try:
            self._file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{where}: cannot open .lock ({error.strerror}); use another --workdir") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another run"
            self._file.close()
            raise UserError(f"{where}: in use by {holder}; wait for it to end, or use another --workdir") from None
        except OSError as error:
            self._warn(f"{where}: cannot be locked ({one_line(error)}); start no second run in it")
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        wait_for_all("lock")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def prepare_workdir(path: str | os.PathLike[str]) -> Path:
    """Creates a run's directory, proves that it can be written, and returns its absolute path.

    Raises:
        UserError: it cannot be created or written, or is a file.
    """
    try:
        workdir = Path(path).expanduser().resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(b"probe")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle, or a ~ without a home
        reason = "is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise UserError(f"workdir {path}: {reason}; --workdir must name a directory that can be written") from None
    return workdir


def move_aside(workdir: Path, say: Callable[[str], None]) -> None:
    """Move what an earlier run left in `workdir` to `workdir.old-N` beside it. Its lock stays, for we hold it."""
    by_first(partial(_move_aside, workdir, say))


def _move_aside(workdir: Path, say: Callable[[str], None]) -> None:
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
