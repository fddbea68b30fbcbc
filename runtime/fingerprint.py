"""Fingerprints of arrays, made on the device that holds them: a few bytes of each array travel, never the array.

Each array gives two sums of its 32-bit words modulo 2^32. A sum of integers is the same in whatever order it is made,
so it does not depend on how many devices share the array. Whatever changes within one word, a single bit for instance,
changes the second sum for certain, for its terms are bijections of their words. Other damage goes unseen with a chance
of about 2^-64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError

Fingerprints = dict[str, list]  # path of a leaf -> [shape, dtype, sixteen hexadecimal digits], as JSON gives it back

_WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an entry; eight bytes are two words
_GOLDEN = 0x9E3779B1  # odd, and near 2^32 over the golden ratio: indices that follow each other come to lie far apart


def fingerprints(tree: Any) -> Fingerprints:
    """Shape, dtype and fingerprint of every array of a tree, by its path: `0/mu/blocks.0.mlp.up.kernel`.

    A path reads the same whether the tree is made of tuples and named tuples or, as a checkpoint is read without a
    pattern, of lists and dictionaries.
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
    """[shape, dtype] of an array, or of what stands for one."""
    return [list(leaf.shape), np.dtype(leaf.dtype).name]


def require_same_kind(where: str, stored: Fingerprints, tree: Any) -> None:
    """Refuse a checkpoint of other arrays; Orbax would cast, and leave out what nobody asked for, without a word.

    Args:
      where: what an array's path is put behind, to name it.
      stored: of a checkpoint.
      tree: of arrays, or of what stands for them, as this run has them.

    Raises:
      UserError: an array has another shape or dtype, is missing, or is one too many: the first, and both sides.
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
    """The two sums [2] of an array."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, _WORD[x.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1  # of each word; no reshape, which would move a sharded array
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    weight = 2 * index + 1  # odd, so that it has an inverse modulo 2^32
    linear = jnp.sum(words * weight, dtype=jnp.uint32)
    mixed = jnp.sum(_mix(words ^ (weight * jnp.uint32(_GOLDEN))), dtype=jnp.uint32)
    return jnp.stack([linear, mixed])


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the result depends on every bit of the word (MurmurHash3's last)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
