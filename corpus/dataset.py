"""An encoded corpus: its splits as tokens, and the tokenizer that made them."""

import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from corpus.shards import ShardedTokens
from corpus.tokenizer import Tokenizer
from runtime.errors import UserError
from runtime.files import open_regular, replacing

Say = Callable[[str], None]

SPLITS = {"train": "training", "val": "validation", "test": "test"}
ORDERS = ("shuffle", "sequential", "random")
UNKNOWN_CHARACTERS = ("refuse", "replace", "drop")

COUNTED_AT_ONCE = 2**24  # tokens


@dataclass(frozen=True)
class Wanted:
    """Which data set, and how it is to be read: the config's keys, and flags, of these names.

    Attributes:
        dataset: a named data set, a file, a directory, or a glob of files.
        tokenizer: a name or a directory; unused where `vocabulary`, an earlier run's own tokenizer, is given.
        val_fraction, test_fraction: parts of the text, read as decimals: 0.1 is exactly a tenth. No test split if 0.
        context_len: each split must hold context_len + 1 tokens; with `whole` each is the whole text, of two or more.
        shard_tokens: where shards are made, from how many tokens on one is full.
        unknown_characters: what to do with characters that `vocabulary` lacks: "refuse", "replace" or "drop"; "" where
            it can lack none, as it is made of the text.
        train_shards: how many shards of a named set are fetched to train on.
        text_column, skip_bad_rows: of rows, which column is read, and whether those without a text are left out.
        chat: whether that column holds conversations.
    """

    dataset: str
    tokenizer: str
    _: KW_ONLY
    data_dir: Path
    val_fraction: float
    test_fraction: float
    context_len: int = 0
    shard_tokens: int = 2**27
    whole: bool = False
    unknown_characters: str = "refuse"
    train_shards: int = 1
    text_column: str = "text"
    skip_bad_rows: bool = False
    chat: bool = False
    vocabulary: Tokenizer | None = None
    say: Say = print

    @classmethod
    def of(cls, settings: Any, **own: Any) -> Self:
        """By a config, or by flags, where `own` do not say otherwise."""
        names = {field.name for field in fields(cls)} & {*settings} - own.keys()
        return cls(**{name: getattr(settings, name) for name in names}, **own)

    @property
    def cache(self) -> Path:
        """Where what was worked out is kept."""
        return self.data_dir / ".cache"


@dataclass(frozen=True)
class Split:
    """One part of a corpus: `tokens` [num_tokens], memory-mapped where possible, and its text's bytes where known.

    files: the names of its shards, relative to the folder common to all; () if the corpus is text.
    """

    tokens: np.ndarray | ShardedTokens
    num_bytes: int | None
    files: tuple[str, ...] = ()
    unpredicted = 1  # tokens that `bytes_of` counts and that no loss is of: the first

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def num_windows(self, context_len: int) -> int:
        """Windows that together predict each token but the first once; the last one may be short."""
        return -(-(self.num_tokens - 1) // context_len)

    def holds(self, token: int) -> bool:
        """Whether the token occurs in the split."""
        starts = range(0, self.num_tokens, COUNTED_AT_ONCE)
        return any((self.tokens[start : start + COUNTED_AT_ONCE] == token).any() for start in starts)

    def bytes_of(self, num_tokens: int, tokenizer: Tokenizer) -> int:
        """The bytes of text that its first `num_tokens` tokens stand for."""
        if num_tokens == self.num_tokens and self.num_bytes is not None:
            return self.num_bytes
        return count_bytes(self.tokens, num_tokens, tokenizer)

    def require_length(self, context_len: int, found: str) -> None:
        """Raises UserError unless a window fits into it (two tokens if context_len is 0). `found`: its length."""
        if not context_len and self.num_tokens < 2:
            raise UserError(f"config.dataset: {found}, and the first is not predicted; give two tokens or more")
        if self.num_tokens <= context_len:
            problem = f"{context_len} needs {context_len + 1} tokens in each split, but {found}"
            raise UserError(f"config.context_len: {problem}; lower it, or give more text or other fractions")


def count_bytes(tokens: np.ndarray | ShardedTokens, num_tokens: int, tokenizer: Tokenizer) -> int:
    """The bytes of text that the first `num_tokens` of `tokens` stand for; an end-of-text token counts as 0."""
    lengths = np.array([len(piece) for piece in tokenizer.pieces], np.uint16)
    ends = [*range(COUNTED_AT_ONCE, num_tokens, COUNTED_AT_ONCE), num_tokens]
    return sum(int(lengths[tokens[start:end]].sum(dtype=np.int64)) for start, end in pairwise([0, *ends]))


@dataclass(frozen=True)
class Dataset:
    """An encoded corpus; `sha256` is that of the file's bytes (of all files, with a newline between)."""

    train: Split
    val: Split
    test: Split | None
    tokenizer: Tokenizer
    sha256: str


def ends_of_splits(size: int, val_fraction: float, test_fraction: float) -> list[int]:
    """Where each of `SPLITS` ends in a corpus of `size` units; the last end is `size`.

    Fractions are read as decimals: as binary numbers, 1 - 0.05 - 0.05 of a hundred million would be one short of
    ninety million.
    """
    val, test = Fraction(str(val_fraction)), Fraction(str(test_fraction))
    return [math.floor(size * part) for part in (1 - val - test, 1 - test, Fraction(1))]


_WORDS = re.compile(r"(?<![a-z])(?:(val|dev|eval|held.?out)(?:id(?:ation)?|uation)?|(test)(?:ing)?)(?![a-z])")


def splits_by_name(paths: list[Path]) -> list[str]:
    """The split of each file, by its name or else by the folders that it lies in below the one common to all.

    Held out for validation are val, valid, validation, dev, eval, evaluation and heldout, for testing test; whatever
    else is for training, as is what says train. The name says more than its folder, and that more than the one above.
    """
    folder, names = os.path.commonpath([path.parent.absolute() for path in paths]), []
    for path in paths:
        name = "train"
        for word in reversed(Path(os.path.relpath(path.with_suffix(""), folder)).parts):
            if found := _WORDS.search(word.lower()):
                name = "val" if found[1] else "test"
            if found or re.search("(?<![a-z])train(?![a-z])", word.lower()):
                break
        names.append(name)
    return names


def names_of_splits(paths: list[Path]) -> list[str]:
    """The split that each file's name says; "train" of all, if none is named so."""
    names = splits_by_name(paths)
    return names if "train" in names else ["train"] * len(names)


def tell_names(paths: list[Path], say: Say) -> None:
    """A line for each split about the files that are held out for it by their names."""
    for name in ("val", "test"):
        if own := [path.name for path, of in zip(paths, names_of_splits(paths), strict=True) if of == name]:
            say(f"for {SPLITS[name]}, by their names: {', '.join(own[:3])}{' ...' if len(own) > 3 else ''}")


def cached(path: Path, dtype: np.dtype, make: Callable[[], np.ndarray], say: Say = print) -> np.ndarray:
    """The array that `make` gives, 1-D and of type `dtype`, memory-mapped from `path` once it was written there.

    The file is NumPy's, followed by the sha256 of the array's bytes, which NumPy does not read. A damaged file is made
    again, and `say` gets a line; one without a hash, of an earlier version, is made again silently.
    """
    try:
        with open_regular(path) as file:
            values = np.load(path, mmap_mode="r")
            file.seek(values.offset + values.nbytes)
            kept = file.read()
        if values.dtype != dtype or values.ndim != 1:
            raise ValueError
        if kept == hashlib.sha256(values).digest():
            return np.asarray(values)  # the map without the memmap class, whose slices cost several times as much
        if kept:
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, EOFError, ValueError):
        say(f"warning: {path} is damaged; making it again")
    values = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, values)
            file.write(hashlib.sha256(values).digest())
        return np.asarray(np.load(path, mmap_mode="r"))
    except OSError as error:
        say(f"warning: {path.parent} cannot be written ({error.strerror}); what was worked out stays in memory")
        return values
