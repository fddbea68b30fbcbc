"""Corpora that are already tokenized: a directory that `prepare` made, or .bin shards from elsewhere, as a Dataset.

Only headers and samples are read here; a run maps what its batches need. A prepared directory holds `index.json` (the
shards of each split, their numbers of tokens and sha256, the bytes of their text), `tokenizer.json`, and the shards.
"""

import glob
import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dataset import SPLITS, Dataset, Split, Wanted, cached, count_bytes, ends_of_splits, splits_by_name
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
MANY_TOKENS = 2**24  # counting the bytes of more takes long enough that a line says so first
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
    vocabulary = _vocabulary(wanted, {root} if index else {path.parent for path in paths})
    size = vocabulary.vocab_size
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    for name, split in (index["splits"] if index else {}).items():
        for entry in split["shards"]:
            shard, promised = read_shard(root / entry["file"]), entry.get("tokens")
            if shard.num_tokens != promised:
                has = f"has {shard.num_tokens:,} tokens, the index says {promised}"
                raise UserError(f"{shard.path}: {has}; copy it again")
            shards[name].append(shard)
    for path, name in zip(paths, splits_by_name(paths) if paths else (), strict=True):
        shards[name].append(read_shard(path, size))
    files = [shard for part in shards.values() for shard in part]
    kind = files[0].dtype
    if other := next((shard for shard in files if shard.dtype != kind), None):
        both = f"{files[0].path} has {kind.name} tokens and {other.path} {other.dtype.name}"
        raise UserError(f"config.dataset: {both}; {_NOT_MIXED}")
    sample = sample_hash(files, size)
    identity = json.dumps([index and index["splits"], index and index["fingerprint"], sample], sort_keys=True)
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    folder = os.path.commonpath([shard.path.parent.absolute() for shard in files])
    named = lambda shards: tuple(os.path.relpath(shard.path, folder) for shard in shards)
    if wanted.whole:
        split = Split(ShardedTokens(files, size), None, named(files))
        split.require_length(0, f"{dataset} has {split.num_tokens:,} in all")
        return Dataset(split, split, split, vocabulary, sha256)
    tokens = {name: ShardedTokens(part, size, scattered=name == "train") for name, part in shards.items() if part}
    if not shards["train"]:
        raise UserError(f"config.dataset: {dataset} has no shard to train on, by their names; add some")
    if not shards["val"]:
        test_fraction = 0.0 if shards["test"] else wanted.test_fraction
        ends = ends_of_splits(len(tokens["train"]), wanted.val_fraction, test_fraction)
        for name, (start, stop) in zip(SPLITS, pairwise([0, *ends]), strict=True):
            if name != "test" or test_fraction:
                tokens[name] = ShardedTokens(shards["train"], size, start, stop, scattered=name == "train")
    splits = {}
    for name, part in tokens.items():
        whole = len(part) == sum(shard.num_tokens for shard in shards[name])
        known = index["splits"][name]["bytes"] if index and whole else None
        if known is None and name != "train":
            fractions = f"{wanted.val_fraction} {wanted.test_fraction}"
            key = f"{sample} {name} {len(part)} {fractions} {vocabulary.fingerprint}"
            known = _num_bytes(part, vocabulary, wanted, key)
        splits[name] = Split(part, known, named(shards[name]))
        splits[name].require_length(wanted.context_len, f"{dataset} has {len(part):,} in the {SPLITS[name]} split")
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
        if not names:
            raise ValueError("it names no shards")
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard lies outside the directory")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{root / INDEX_FILE}: is no index ({what}); prepare the corpus again") from error
    return index


def _vocabulary(wanted: Wanted, folders: set[Path]) -> Tokenizer:
    """The tokenizer of these shards: the run's own, the one saved beside them, or the one with the wanted name."""
    name, given = wanted.tokenizer, wanted.vocabulary
    saved = [(folder, _saved(folder)) for folder in sorted(folders) if (folder / INDEX_FILE).exists()]
    if not saved:
        if given is None and name == "char":
            why = "such shards do not say which character an id is, and a pickle beside them is never opened"
            raise UserError(f"config.tokenizer: char is not possible, as {why}; prepare the text itself")
        return given or new_tokenizer(name, wanted.data_dir, wanted.say)
    folder, tokenizer = saved[0]
    for other, its in saved[1:]:
        if its.fingerprint != tokenizer.fingerprint:
            both = f"{folder} was prepared with tokenizer {tokenizer.name} and {other} with {its.name}"
            raise UserError(f"config.dataset: {both}, or with others of that name; {_NOT_MIXED}")
    if given is None:
        if is_called(tokenizer, name):
            return tokenizer
        both = f"{folder} was prepared with {tokenizer.name}, this config has {name}"
        own = folder if tokenizer.name == OWN else tokenizer.name
        raise UserError(f"config.tokenizer: {both}; set config.tokenizer={own}")
    same = given.fingerprint == tokenizer.fingerprint  # or else each id must at least stand for the same bytes
    if not same and (given.eot != tokenizer.eot or given.pieces[: tokenizer.vocab_size] != tokenizer.pieces):
        another = f"another vocabulary ({tokenizer.name}, {tokenizer.vocab_size:,} tokens)"
        problem = f"{folder} was prepared with {another} than the run's ({given.name}, {given.vocab_size:,})"
        raise UserError(f"config.dataset: {problem}; prepare the corpus with the run's tokenizer")
    return given


def _saved(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared directory."""
    index, path = read_index(folder), folder / TOKENIZER_FILE
    try:
        tokenizer = tokenizer_from_dict(read_json(path))
        if tokenizer.fingerprint != index["fingerprint"]:
            raise ValueError("is not the index's tokenizer")
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}; prepare the corpus again") from error
    return tokenizer


def _num_bytes(tokens: ShardedTokens, tokenizer: Tokenizer, wanted: Wanted, key: str) -> int:
    """The bytes of the text that the tokens stand for; counted once and cached."""

    def count() -> np.ndarray:
        if len(tokens) > MANY_TOKENS:
            wanted.say(f"counting the bytes of {len(tokens):,} tokens, once")
        return np.array([count_bytes(tokens, len(tokens), tokenizer)], np.int64)

    path = wanted.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bytes.npy"
    return int(cached(path, np.int64, count, wanted.say)[0])
