"""Weights in files that other programs read and write: safetensors, and PyTorch checkpoints (reading only)."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runtime.errors import StorageError, UserError, one_line
from runtime.files import open_regular, read_json, replacing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights that are divided into several files


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """All arrays of a directory's weights, in one file, or else in the files of an index. UserError if damaged."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return read_safetensors(directory / WEIGHTS)[0]
    index = read_json(directory / INDEX)
    if not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{directory / INDEX}: holds no weight_map; fetch it again")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(map(str, index["weight_map"].values()))):
        arrays |= read_safetensors(directory / Path(name).name)[0]
    return arrays


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of one file, in their own types, and its metadata.

    Raises UserError if the file is missing or damaged, or has numbers of a type that numpy lacks.
    """
    with _opened(path) as file:
        arrays = {}
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            try:
                arrays[name] = file.get_tensor(name)
            except (AttributeError, TypeError):
                kind = file.get_slice(name).get_dtype()
                raise UserError(f"{path}: {name} is of type {kind}; fetch it in float32 or bfloat16") from None
        return arrays, file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} if there is no such file. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        open_regular(path).close()  # a pipe, for which the library would wait
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); fetch it again, as safetensors") from error


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that PyTorch saved. Nothing but tensors is unpickled.

    Raises UserError if PyTorch is not installed, or if the file is missing, damaged, or holds something else.
    """
    try:
        import torch  # here, because nothing else needs it
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch; pip install torch") from None
    try:
        with open_regular(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as tensors alone ({one_line(error)}); save a state_dict") from error
    fits = lambda name, value: isinstance(name, str) and isinstance(value, torch.Tensor)
    if not isinstance(state, dict) or not all(fits(*item) for item in state.items()):
        raise UserError(f"{path}: holds no state_dict of tensors; save model.state_dict()")
    whole = {name: value.detach() for name, value in state.items()}  # numpy has no bfloat16 like torch's
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in whole.items()}


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to write into, which is renamed to `path` at the end.

    Raises UserError if `path` exists already, StorageError if it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out={path}: already exists; name a new directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as made:
            made.mkdir()
            yield made
    except (OSError, SafetensorError) as error:
        raise StorageError(f"--out={path}: {one_line(error)}; make room, or name another directory") from error


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Arrays and metadata, whose values become JSON unless they are text."""
    save_file(dict(arrays), path, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    path.chmod(0o644)  # the library makes it readable for the owner only
