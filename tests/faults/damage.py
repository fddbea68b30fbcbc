"""Ways in which a file of a checkpoint can be damaged, and a small run's worth of checkpoints to damage."""

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from runtime.checkpoints.manager import Checkpoints

PLACE = SingleDeviceSharding(jax.devices()[0])
KINDS = ("delete", "empty", "half", "flip", "zeros", "swap")


def damage(path: Path, kind: str, rng: random.Random) -> bool:
    """Damage a file, and say whether that has changed anything."""
    data = path.read_bytes()
    new, at = bytearray(data), rng.randrange(max(1, len(data)))
    if kind == "delete":
        path.unlink()
        return True
    if kind == "empty":
        new = bytearray()
    elif kind == "half":
        new = new[: len(new) // 2]
    elif kind == "flip" and data:
        new[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        new[at : at + 64] = bytes(len(new[at : at + 64]))
    elif kind == "swap":
        new[at : at + 2] = new[at : at + 2][::-1]
    path.write_bytes(new)
    return new != data


def flip_bits(path: Path, number: int, rng: random.Random) -> list[tuple[Path, int]]:
    """Places for single-bit flips, evenly drawn from all bits of the array files below a checkpoint's directory."""
    files = [file for item in ("params", "rest") for file in sorted((path / item).rglob("d/*"))]
    return [
        (file, rng.randrange(8 * file.stat().st_size))
        for file in rng.choices(files, [f.stat().st_size for f in files], k=number)
    ]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file's content, by name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in files_of(directory)}


def trees(seed: int) -> tuple[Any, Any]:
    """Parameters, and what else a state has."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"w": normal(37, 29), "b": normal(5), "half": normal(11).astype(jnp.bfloat16)}
    return params, ({"mu": normal(37, 29), "count": jnp.int32(seed)}, jnp.zeros((13, 7)))


def small_run(workdir: Path) -> Path:
    """Two checkpoints, 5 and 10, of `trees(5)` and `trees(10)`."""
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, *trees(step), {"config": {}}, None)
    return workdir


def copy_of(workdir: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(workdir, target))


def bits(tree: Any) -> list[tuple[np.dtype, bytes]]:
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]
