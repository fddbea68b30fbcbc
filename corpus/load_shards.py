"""Corpora that are already tokenized: a directory that `prepare` made, or .bin shards from elsewhere, as a Dataset.

Only headers and samples are read here; a run maps what its batches need. A prepared directory holds `index.json` (the
shards of each split, their numbers of tokens and sha256, the bytes of their text), `tokenizer.json`, and the shards.
"""

import glob
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dataset import (
    COUNTED_AT_ONCE,
    SPLITS,
    Dataset,
    Say,
    Split,
    Wanted,
    cached,
    check_length,
    count_bytes,
    ends_of_splits,
    splits_by_name,
)
from corpus.fetch import NAMES, SHARD_SETS, shard_paths
from corpus.load_text import find_files, new_tokenizer
from corpus.shards import Shard, ShardedTokens, is_shard, read_shard, sample_hash
from corpus.tokenizer import OWN, Tokenizer, is_called, tokenizer_from_dict
from runtime.errors import UserError, one_line
from runtime.files import read_json

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
PROGRESS_FILE = ".progress.json"  # stands in for the index until the corpus is complete
FORMAT = "transformer-jax corpus 1"
_NOT_MIXED = "shards of two tokenizers cannot be mixed: give one's"


def holds_shards(dataset: str, tokenizer: str) -> bool:
    """Whether `config.dataset` names tokens and not text: a named set, a directory with an index or shards, .bin files.

    With the byte tokenizer, which takes any file as it is, a .bin file holds tokens only if it has a shard's header.
    """
    if dataset in NAMES:
        return dataset in SHARD_SETS
    path = Path(dataset).expanduser()
    if path.is_dir():
        return any((path / name).exists() for name in (INDEX_FILE, PROGRESS_FILE)) or any(path.glob("*.bin"))
    if not dataset.endswith(".bin"):
        return False
    paths = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
    return tokenizer != "byte" or any(map(is_shard, paths))


def load_shards(wanted: Wanted) -> Dataset:
    """Loads a corpus of tokens, as `load_text` loads one of text.

    A directory's index, or else the names of files and folders (`val/0.bin`), says which shards are held out. If none
    is for validation, that split is cut off the end of the training tokens, and so is a test split. With `whole` each
    split is all shards, those to train on first. Where no index has them, the bytes of the held-out splits are counted
    once, and those of the training split unknown. `Dataset.sha256` covers `sample_hash` and the index's numbers.
    Raises UserError if a shard is damaged or missing, does not fit the tokenizer or the others, or if a split is short.
    """
    dataset, data_dir, say = wanted.dataset, wanted.data_dir, wanted.say
    root = Path(dataset).expanduser()
    if root.is_dir() and not (root / INDEX_FILE).exists() and (root / PROGRESS_FILE).exists():
        raise UserError(f"config.dataset: {dataset} is not finished; run the `prepare` command that began it again")
    index = read_index(root) if (root / INDEX_FILE).exists() else None
    if index:
        paths = []
    elif dataset in SHARD_SETS:
        paths = shard_paths(dataset, wanted.train_shards, data_dir, say)
    else:
        paths = sorted(root.glob("*.bin")) if root.is_dir() else find_files(dataset, data_dir, say)
    folders = {root} if index else {path.parent for path in paths}
    vocabulary = _vocabulary(wanted, folders)
    size = vocabulary.vocab_size
    shards = {name: _indexed(root, index["splits"].get(name, {})) if index else [] for name in SPLITS}
    for path, name in zip(paths, splits_by_name(paths) if paths else (), strict=True):
        shards[name].append(read_shard(path, size))
    files = [shard for part in shards.values() for shard in part]
    if kinds := sorted({shard.dtype.name for shard in files} - {files[0].dtype.name}):
        other = next(shard for shard in files if shard.dtype.name == kinds[0])
        both = f"{files[0].path} has {files[0].dtype.name} tokens and {other.path} {kinds[0]}"
        raise UserError(f"config.dataset: {both}; {_NOT_MIXED}")
    sample = sample_hash(files, size)
    identity = json.dumps([index and index["splits"], index and index["fingerprint"], sample], sort_keys=True)
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    folder = os.path.commonpath([shard.path.parent.absolute() for shard in files])
    named = lambda shards: tuple(os.path.relpath(shard.path, folder) for shard in shards)
    if wanted.whole:
        split = Split(ShardedTokens(files, size), None, named(files))
        check_length(split, 0, f"{dataset} has {split.num_tokens:,} in all")
        return Dataset(split, split, split, vocabulary, sha256)
    tokens = {name: ShardedTokens(part, size, scattered=name == "train") for name, part in shards.items() if part}
    if not shards["train"]:
        raise UserError(f"config.dataset: {dataset} has no shard to train on, by their names; add some")
    if not shards["val"]:
        tokens |= _cut(shards["train"], size, wanted.val_fraction, 0.0 if shards["test"] else wanted.test_fraction)
    splits = {}
    for name, part in tokens.items():
        whole = len(part) == sum(shard.num_tokens for shard in shards[name])
        known = index["splits"][name]["bytes"] if index and whole else None
        if known is None and name != "train":
            fractions = f"{wanted.val_fraction} {wanted.test_fraction}"
            key = f"{sample} {name} {len(part)} {fractions} {vocabulary.fingerprint}"
            known = _num_bytes(part, vocabulary, wanted.cache, key, say)
        splits[name] = Split(part, known, named(shards[name]))
        check_length(splits[name], wanted.context_len, f"{dataset} has {len(part):,} in the {SPLITS[name]} split")
    return Dataset(splits["train"], splits["val"], splits.get("test"), vocabulary, sha256)


def read_index(root: Path) -> dict[str, Any]:
    """The index of a prepared directory. Raises UserError if it is damaged, or of another format."""
    index = read_json(root / INDEX_FILE)
    try:
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, expected {FORMAT!r}")
        names = [shard["file"] for split in index["splits"].values() for shard in split["shards"]]
        numbers = [*(split["bytes"] for split in index["splits"].values()), index["vocab_size"]]
        strings = [*names, index["tokenizer"], index["fingerprint"]]
        if set(index["splits"]) - set(SPLITS) or "train" not in index["splits"]:
            raise ValueError(f"its splits are {', '.join(index['splits'])}")
        if any(type(number) is not int for number in numbers) or any(type(text) is not str for text in strings):
            raise ValueError("a number or a name in it is of another type")
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard lies outside the directory")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{root / INDEX_FILE}: is no index ({what}); prepare the corpus again") from error
    return index


def _indexed(root: Path, split: dict[str, Any]) -> list[Shard]:
    shards = []
    for entry in split.get("shards", []):
        shard = read_shard(root / entry["file"])
        if shard.num_tokens != (promised := entry.get("tokens")):
            raise UserError(f"{shard.path}: has {shard.num_tokens:,} tokens, the index says {promised}; copy it again")
        shards.append(shard)
    return shards


def _cut(shards: list[Shard], vocab_size: int, val_fraction: float, test_fraction: float) -> dict[str, ShardedTokens]:
    total = sum(shard.num_tokens for shard in shards)
    ends = [0, *ends_of_splits(total, val_fraction, test_fraction)]
    names = list(SPLITS)[: 3 if test_fraction else 2]
    return {name: ShardedTokens(shards, vocab_size, *ends[i : i + 2], name == "train") for i, name in enumerate(names)}


# --- The tokenizer ------------------------------------------------------------------------------------------------


def _vocabulary(wanted: Wanted, folders: set[Path]) -> Tokenizer:
    """The tokenizer of these shards: the run's own, the one saved beside them, or the one with the wanted name."""
    name, given = wanted.tokenizer, wanted.vocabulary
    theirs: dict[str, tuple[Path, Tokenizer]] = {}
    for folder in sorted(folders):
        if (folder / INDEX_FILE).exists():
            index = read_index(folder)
            try:
                tokenizer = tokenizer_from_dict(read_json(folder / TOKENIZER_FILE))
            except ValueError as error:
                raise UserError(f"{folder / TOKENIZER_FILE}: {one_line(error)}; prepare the corpus again") from error
            if tokenizer.fingerprint != index["fingerprint"]:
                raise UserError(f"{folder / TOKENIZER_FILE}: is not the index's tokenizer; prepare the corpus again")
            theirs[tokenizer.fingerprint] = (folder, tokenizer)
    if len(theirs) > 1:
        (first, a), (second, b) = list(theirs.values())[:2]
        both = f"{first} was prepared with tokenizer {a.name} and {second} with {b.name}, or with others of that name"
        raise UserError(f"config.dataset: {both}; {_NOT_MIXED}")
    for folder, tokenizer in theirs.values():
        if given is None and not is_called(tokenizer, name):
            raise UserError(
                f"config.tokenizer: {folder} was prepared with {tokenizer.name}, this config has {name}; "
                f"set config.tokenizer={folder if tokenizer.name == OWN else tokenizer.name}"
            )
        if given is None:
            return tokenizer
        if (
            given.fingerprint != tokenizer.fingerprint
            and (  # then each id must at least stand for the same bytes
                given.eot != tokenizer.eot or given.pieces[: tokenizer.vocab_size] != tokenizer.pieces
            )
        ):
            raise UserError(
                f"config.dataset: {folder} was prepared with another vocabulary ({tokenizer.name}, "
                f"{tokenizer.vocab_size:,} tokens) than the run's ({given.name}, {given.vocab_size:,}); "
                "prepare the corpus with the run's tokenizer"
            )
    if given is not None:
        return given
    if name == "char":
        raise UserError(
            "config.tokenizer: char is not possible, as such shards do not say which character an id is, and a pickle "
            "beside them is never opened; prepare the text itself"
        )
    return new_tokenizer(name, wanted.data_dir, wanted.say)


def _num_bytes(tokens: ShardedTokens, tokenizer: Tokenizer, cache: Path, key: str, say: Say) -> int:
    """The bytes of the text that the tokens stand for; counted once and cached."""

    def count() -> np.ndarray:
        if len(tokens) > COUNTED_AT_ONCE:
            say(f"counting the bytes of {len(tokens):,} tokens, once")
        return np.array([count_bytes(tokens, len(tokens), tokenizer)], np.int64)

    return int(cached(cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bytes.npy", np.int64, count, say)[0])
