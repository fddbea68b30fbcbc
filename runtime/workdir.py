"""A run's directory as a whole: create and check it, lock it, move it aside."""

import contextlib
import fcntl
import itertools
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from runtime.errors import UserError, one_line
from runtime.processes import is_first, wait_for_all

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
DIRECTORIES = CHECKPOINTS, "wandb", "tensorboard", "trackio", "profile"  # directories that a run writes to
WEIGHTS = ("auto", "trained", "ema")  # of a checkpoint; ema: their average; auto: that, where there is one
_OLD = re.compile(r"old-\d+")
UNSAVED = ".unsaved"  # a file in `checkpoints`: a run has begun, and none of its checkpoints is complete yet


class WorkdirLock:
    """Holds `workdir/.lock`, in an existing directory, while a run uses it.

    The lock is `flock`'s: the kernel frees it however the process ends, so it is never stale. The file names its holder
    and is not removed. The first of several processes holds it for all. On a file system without locks, `warn` gets a
    line and the run goes on. Entering raises UserError if another process holds the lock or the file cannot be opened.
    """

    def __init__(self, workdir: Path, warn: Callable[[str], None]) -> None:
        self._path = workdir / LOCK
        self._warn = warn

    def __enter__(self) -> Self:
        where = f"workdir {self._path.parent}"
        if not is_first():
            self._file = open(os.devnull)
            wait_for_all("lock")
            return self
        try:
            self._file = open(self._path, "a+", encoding="utf-8", opener=_itself)
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
        if not self._path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
            self._file.close()
            raise UserError(f"{where}: another run was refused here just now, and the directory is gone; try again")
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # for the other processes' `holder`
        wait_for_all("lock")
        return self

    def holder(self) -> str:
        """What the file says of its holder; "" where there is none, as in a directory that is not process 0's."""
        try:
            os.listdir(self._path.parent)  # opening a directory has a client of NFS forget the names that it knew
            return self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _itself(path: str, flags: int) -> int:
    """Opens a file without following a link in its place, and without waiting for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def prepare_workdir(path: str | os.PathLike[str], files: Iterable[str] = (), flag: str = "--workdir") -> Path:
    """Creates a run's directory, checks that it can be written, and returns its absolute path.

    `files` are the names of files that the run will write, `flag` is what names the directory. Raises UserError if the
    directory cannot be created or written, or if under a name that the run writes to there is a link out of it or
    something of another kind.
    """
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(path)):  # a Path has one slash of two left
        raise UserError(f"{flag}={path}: an address and no path; mount what is there, and name the directory")
    try:
        workdir = Path(path).expanduser().resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        for name in (*files, LOCK):
            require_own(workdir, workdir / name, stat.S_ISREG)
        for name in DIRECTORIES:
            require_own(workdir, workdir / name, stat.S_ISDIR)
        for entry in (workdir / CHECKPOINTS).glob("*"):
            require_own(workdir, entry)
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(b"probe")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle, or a ~ without a home
        reason = "is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise UserError(f"{flag}={path}: {reason}; name a directory that can be written") from None
    return workdir


def require_own(workdir: Path, path: Path, is_kind: Callable[[int], bool] = lambda mode: True) -> None:
    """Raises UserError if `path` is a link out of `workdir` (an absolute path without links) or of another kind."""
    if path.is_symlink() and not path.resolve().is_relative_to(workdir):
        raise UserError(f"{path}: a link that leads out of the run's directory; put what it should be in its place")
    if path.exists() and not is_kind(path.stat().st_mode):
        raise UserError(f"{path}: not what a run keeps under this name; move it away")


@contextlib.contextmanager
def removed_if_unused(path: str | os.PathLike[str]) -> Iterator[None]:
    """Removes the directory again if it was created inside, and an error ends the run before it wrote anything."""
    workdir = Path(os.path.expanduser(path))
    was_there = os.path.lexists(workdir)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it does not exist, is not empty, or another run uses it
            if not was_there and is_first() and set(os.listdir(workdir)) <= {LOCK, CHECKPOINTS}:
                lock, checkpoints = workdir / LOCK, workdir / CHECKPOINTS
                with open(lock, "a", opener=_itself) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if checkpoints.exists():
                        (checkpoints / UNSAVED).unlink(missing_ok=True)
                        checkpoints.rmdir()
                    lock.unlink()
                    workdir.rmdir()
        raise


def first_free(prefix: str) -> Path:
    """The first of prefix1, prefix2, ... that does not exist."""
    return next(path for number in itertools.count(1) if not (path := Path(f"{prefix}{number}")).exists())


def move_aside(workdir: Path, say: Callable[[str], None]) -> None:
    """Move what an earlier run left in `workdir` to `workdir.old-N` beside it, except its lock, which we hold.

    If the directory is a mount point, the target is `workdir/old-N`. Checkpoints are moved first and the log of steps
    last, so an interrupted move leaves steps without checkpoints, which is recognised later.
    """
    left = [entry for entry in workdir.iterdir() if entry.name != LOCK and not _OLD.fullmatch(entry.name)]
    left.sort(key=lambda entry: (entry.name != CHECKPOINTS, entry.name == "metrics.jsonl"))
    if not left:
        return
    for prefix in (f"{workdir}.old-", f"{workdir}/old-"):
        target = first_free(prefix)
        try:
            target.mkdir()
            for entry in left:
                entry.rename(target / entry.name)
        except OSError as error:
            problem = error
            with contextlib.suppress(OSError):
                target.rmdir()
            if target.exists():  # something was moved
                break
        else:
            say(f"moved the earlier run to {target}")
            return
    raise UserError(
        f"workdir {workdir}: {problem.filename} cannot be moved aside ({problem.strerror}); move it yourself"
    )
