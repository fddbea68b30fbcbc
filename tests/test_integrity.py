"""Fingerprints: any bit that differs shows; how many devices hold an array does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime.checkpoints.integrity import fingerprints

BITS = np.random.default_rng(0).integers(0, 256, 3 * 5 * 8, np.uint8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.float8_e4m3fn, jnp.bool_])
def test_every_single_bit_shows(dtype):
    """Flipped one at a time in a small array, among NaNs, infinities and denormals as they come; no two look alike."""
    dtype = np.dtype(dtype)
    if dtype == jnp.bool_:
        arrays = [jnp.arange(15).reshape(3, 5) == at for at in range(-1, 15)]
    else:
        original = BITS[: 15 * dtype.itemsize]
        flipped = np.repeat(original[None], original.size * 8, axis=0)
        rows = np.arange(original.size * 8)
        flipped[rows, rows // 8] ^= (1 << (rows % 8)).astype(np.uint8)
        arrays = [row.view(dtype).reshape(3, 5) for row in [original, *flipped]]
    found = [fingerprints(jax.device_put(array))[""] for array in arrays]
    assert len({entry[2] for entry in found}) == len(arrays)
    assert all(entry[:2] == [[3, 5], dtype.name] for entry in found)


def test_what_moves_or_vanishes_shows():
    x = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4)
    others = {
        "as it was": x,
        "entries swapped": np.where(x == 1, 2, np.where(x == 2, 1, x)),
        "rows swapped": x[[1, 0, 2]],
        "zeroed": np.zeros_like(x),
        "negated": -x,
        "shifted": np.roll(x, 1),
        "bytes swapped": x.byteswap(),
        "minus zero": np.where(x == 3, -0.0, x),
        "plus zero": np.where(x == 3, 0.0, x),
    }
    found = fingerprints({name: np.asarray(array, np.float32) for name, array in others.items()})
    assert len({entry[2] for entry in found.values()}) == len(others)


def test_a_fingerprint_stays_what_it_is():
    """Checkpoints keep them: another formula would make every checkpoint look damaged."""
    tree = {"a": (jnp.arange(6.0).reshape(2, 3), jnp.array(7, jnp.int32)), "b.c": jnp.array([1.5, -0.0], jnp.bfloat16)}
    assert fingerprints(tree) == {
        "a/0": [[2, 3], "float32", "cba0000095e96e08"],
        "a/1": [[], "int32", "00000007f6b7bbec"],
        "b.c": [[2], "bfloat16", "0001bfc0c46b06c4"],
    }
