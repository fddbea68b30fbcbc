"""Detects damage to checkpoints: fingerprints of arrays, a hash in each JSON object, the hashes of files.

Fingerprints are computed on the device that holds an array, so only a few bytes of each array are transferred. They are
two sums of the array's 32-bit words modulo 2^32. A sum of integers does not depend on its order, and so not on how
many devices share the array. Any change within one word, such as a single bit, is certain to change the second sum,
whose terms are bijections of their words. Other damage goes unnoticed with a probability of about 2^-64.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError, one_line
from runtime.files import read_file, read_object

Fingerprints = dict[str, list]  # path of a leaf -> [shape, dtype, sixteen hexadecimal digits], as JSON reads it

_WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an entry; eight bytes are two words
_GOLDEN = 0x9E3779B1  # odd, and near 2^32 over the golden ratio, which moves neighbouring indices far apart


def fingerprints(tree: Any) -> Fingerprints:
    """Shape, dtype and fingerprint of every array of a tree, by its path: `0/mu/blocks.0.mlp.up.kernel`.

    A path is the same for a tree of tuples and named tuples, and for one of lists and dictionaries, which Orbax returns
    for a checkpoint that is read without a target.
    """
    leaves = paths_of(tree)
    sums = jax.device_get(_all_sums(list(leaves.values())))
    return {
        path: [*signature(leaf), "".join(f"{int(word):08x}" for word in words)]
        for (path, leaf), words in zip(leaves.items(), sums, strict=True)
    }


def paths_of(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree, by its path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def signature(leaf: Any) -> list:
    """[shape, dtype] of an array or a `jax.ShapeDtypeStruct`."""
    return [list(leaf.shape), np.dtype(leaf.dtype).name]


def require_same_kind(where: str, stored: Fingerprints, tree: Any) -> None:
    """Raises UserError if a checkpoint has other arrays than `tree`; it names the first one that differs, in `where`.

    Orbax itself would silently cast arrays and leave out those that `tree` lacks.
    """
    there = {path: entry[:2] for path, entry in stored.items()}
    here = {path: signature(leaf) for path, leaf in paths_of(tree).items()}
    different = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
    if different:
        describe = lambda entry: f"{entry[1]}{entry[0]}" if entry else "not there"
        was, wanted = (describe(side.get(different[0])) for side in (there, here))
        raise UserError(
            f"{where}{different[0]} is {was} in the checkpoint and {wanted} in this run "
            f"({len(different)} of {len(there)} arrays differ); use the config and the program that wrote it"
        )


@jax.jit
def _all_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sums(leaf) for leaf in leaves]


@jax.jit  # arrays of one shape are traced once
def _sums(x: jax.Array) -> jax.Array:
    """The two sums of an array: [2], uint32."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, _WORD[x.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1  # of each word; no reshape, which would move a sharded array
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    weight = 2 * index + 1  # odd, so that it has an inverse modulo 2^32
    terms = words * weight, _mix(words ^ (weight * jnp.uint32(_GOLDEN)))
    add = lambda sums, more: tuple(a + b for a, b in zip(sums, more, strict=True))
    zeros = (jnp.uint32(0),) * 2  # one reduction of both: of one sum alone XLA's CPU backend would store all terms
    return jnp.stack(jax.lax.reduce(terms, zeros, add, tuple(range(words.ndim))))


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32 bits; every bit of the result depends on every bit of the word (MurmurHash3's finalizer)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


# --- Hashes of a JSON object, and of a directory's files ----------------------------------------------------------

SEAL = "sha256"  # the key of an object's seal: the hash of all its other keys and values
FILE_LIST = "files.sha256"  # as `sha256sum --check` reads it
BOOKKEEPING = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes these last, with times that nobody reads
LARGEST = 64 * 2**20  # bytes of a JSON file: enough for some hundred thousand arrays


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its seal."""
    return {**values, SEAL: _hash_of(values)}


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a file, without its seal.

    Raises ValueError, which says why, if the file is missing, too large or no JSON object, or if the seal is wrong.
    """
    try:
        values = read_object(path, LARGEST)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(one_line(error, 80)) from error
    if SEAL not in values:
        raise ValueError("carries no seal")
    if values.pop(SEAL) != _hash_of(values):
        raise ValueError("does not fit its seal")
    return values


def _hash_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_file_list(directory: Path) -> None:
    """List the hash of every file of a checkpoint."""
    lines = [f"{hash_of}  {name}\n" for name, hash_of in _hash_files(directory).items()]
    (directory / FILE_LIST).write_text("".join(lines), encoding="utf-8")


def changed_files(directory: Path) -> list[str] | None:
    """Files whose hash differs from the list, and files that only the list or only the directory has.

    None if there is no list. If the list itself is damaged, files differ from it.
    """
    try:
        text = read_file(directory / FILE_LIST, LARGEST).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        text = ""
    listed = {line[66:]: line[:64] for line in text.splitlines()}
    found = _hash_files(directory)
    return sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))


def _hash_files(directory: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (*BOOKKEEPING, FILE_LIST):
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
