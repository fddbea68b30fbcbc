"""Hashes that show whether what was written is still what is there: of a JSON object, and of a directory's files."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"  # the key under which an object carries the hash of all its others
FILE_LIST = "files.sha256"  # as `sha256sum --check` reads it
LARGEST = 64 * 2**20  # bytes of a JSON object that is read at all: some hundred thousand arrays


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its seal."""
    return {**values, SEAL: _hash_of(values)}


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a file, without its seal.

    Raises:
      ValueError: the file is missing, too large, no JSON object, or the seal does not fit; says which.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("is too large")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error) if str(error) == "is too large" else "is not JSON") from error
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError("carries no seal")
    if values.pop(SEAL) != _hash_of(values):
        raise ValueError("does not fit its seal")
    return values


def _hash_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_file_list(directory: Path, besides: Collection[str]) -> None:
    """List the hash of every file under `directory`, but for `besides`."""
    lines = [f"{hash_of}  {name}\n" for name, hash_of in _hash_files(directory, besides).items()]
    (directory / FILE_LIST).write_text("".join(lines), encoding="utf-8")


def changed_files(directory: Path, besides: Collection[str]) -> list[str] | None:
    """Files that are not as the list has them, those included that only the list or only the directory knows.

    None where there is no list. A list that is damaged itself disagrees with what is there.
    """
    try:
        text = (directory / FILE_LIST).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    listed = {line[66:]: line[:64] for line in text.splitlines()}
    found = _hash_files(directory, besides)
    return sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))


def _hash_files(directory: Path, besides: Collection[str]) -> dict[str, str]:
    hashes = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in besides and name != FILE_LIST:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
