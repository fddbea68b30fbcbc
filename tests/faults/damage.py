"""Ways in which a file of a checkpoint or a run can be damaged, and a small run's worth of checkpoints to damage."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from runtime.checkpoints.integrity import SEAL, seal
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


# --- Whole run directories ------------------------------------------------------------------------------------------

PLACED = ("directory", "pipe", "device", "holes", "link to a file", "link to a directory", "link to nothing")
_ODD = [
    *(None, True, -1, 0, 0.5, 1e308, -1e308, 2**31, 10**39, 10**60, "", "x", "\ud800", "\0", "x" * 10_000),
    *([], {}, [[]], [None], {"": {}}, [0] * 3, [1e308] * 2),
]


def put_in_place(path: Path, kind: str, outside: Path) -> None:
    """What lies where a file or a directory should lie; links lead to `outside`, a directory with a file `mine`."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "holes":
        path.touch()
        os.truncate(path, 10**12)
    else:
        ends = {"device": Path("/dev/zero"), "link to a file": outside / "mine", "link to a directory": outside}
        path.symlink_to(ends.get(kind, outside / "nothing"))


def odd_value(rng: random.Random) -> Any:
    """Something that JSON can hold and nobody expects."""
    value = rng.choice(_ODD)
    for _ in range(rng.choice([0] * 12 + [40, 80, 500])):
        value = [value]
    return value


def damage_json(value: Any, rng: random.Random) -> Any:
    """The value, changed somewhere: a part becomes another, goes, comes, or takes another's place."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return odd_value(rng)
    changed = dict(value) if isinstance(value, dict) else list(value)
    keys = list(changed) if isinstance(changed, dict) else range(len(changed))
    at, how = rng.choice(keys), rng.random()
    if how < 0.6:
        changed[at] = damage_json(changed[at], rng)
    elif how < 0.75:
        del changed[at]
    elif how < 0.9:
        changed[at] = changed[rng.choice(keys)]
    elif isinstance(changed, dict):
        changed[rng.choice(["", "new", "step", "__class__", "x" * 300])] = odd_value(rng)
    else:
        changed.insert(0, odd_value(rng))
    return changed


def damage_content(path: Path, rng: random.Random) -> None:
    """A file that is still JSON, or JSON lines, with something odd in it; the seal of a checkpoint's is made anew."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(damage_json(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines) + "\n")
    elif path.name == "samples.txt":
        path.write_text(text.replace("step 1", rng.choice(["step " + "9" * 5000, "step ١", "step -1", "step 1e9"])))
    else:
        value = damage_json(json.loads(text), rng)
        sealed = path.name == "metadata" and isinstance(value, dict) and value.pop(SEAL, None)
        path.write_text(json.dumps(seal(value) if sealed else value))


def damage_run(workdir: Path, outside: Path, rng: random.Random) -> str:
    """Damage one thing in a run's directory; says what was done."""
    files = [path for path in files_of(workdir) if path.name != ".lock"]
    small = [path for path in files if path.parent == workdir and path.suffix in (".json", ".jsonl", ".txt")]
    metas = [path for path in files if path.name == "metadata"]
    how = rng.random()
    if how < 0.4:
        path = rng.choice(small * 2 + metas)
        damage_content(path, rng)
        done = "odd content"
    elif how < 0.7:
        path, done = rng.choice(rng.choice([small, files])), rng.choice(KINDS)
        damage(path, done, rng)
    else:
        directories = [path for path in workdir.rglob("*") if path.is_dir()]
        path, done = rng.choice(rng.choice([small, files, directories])), rng.choice(PLACED)
        put_in_place(path, done, outside)
    return f"{path.relative_to(workdir)}: {done}"
