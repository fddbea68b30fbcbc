"""Arrays that are computed once from a text and cached on disk, each with a hash of its bytes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from corpus.dataset import Say
from runtime.files import open_regular, replacing


def cached(path: Path, dtype: np.dtype, make: Callable[[], np.ndarray], say: Say = print) -> np.ndarray:
    """The array that `make` gives, 1-D and of type `dtype`, memory-mapped from `path` once it was written there.

    The file is NumPy's, followed by the sha256 of the array's bytes, which NumPy does not read. A damaged file is made
    again, and `say` gets a line; one without a hash, of an earlier version, is made again silently.
    """
    values = _load(path, np.dtype(dtype), say)
    if values is None:
        values = make()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished, unfinished.open("wb") as file:
                np.save(file, values)
                file.write(hashlib.sha256(values).digest())
            values = np.load(path, mmap_mode="r")
        except OSError as error:
            say(f"warning: {path.parent} cannot be written ({error.strerror}); what was worked out stays in memory")
    return np.asarray(values)  # keeps the map but drops the memmap class, whose slices cost several times as much


def _load(path: Path, dtype: np.dtype, say: Say) -> np.ndarray | None:
    try:
        with open_regular(path) as file:
            values = np.load(path, mmap_mode="r")
            file.seek(values.offset + values.nbytes)
            kept = file.read()
        if values.dtype != dtype or values.ndim != 1:
            raise ValueError
        if kept == hashlib.sha256(values).digest():
            return values
        if kept:
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, EOFError, ValueError):
        say(f"warning: {path} is damaged; making it again")
    return None
