"""Text to tokens to batches, where a batch is a function of the seed and the step.

Nothing here remembers a position: `Batches(...)(step)` gives the same tokens whenever and wherever it is asked, so a
checkpoint needs only the step, and several processes can each build their own rows.

Steps are micro-steps, counted from 0. A batch is int32 [rows, context_len + 1]: its inputs are `batch[:, :-1]`, its
targets `batch[:, 1:]`. IGNORED (-1) fills what lies beyond the split's end: no target, and as an input it reads as 0.
"""

import difflib
import functools
import glob
import hashlib
import math
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from runtime import fetch
from runtime.errors import UserError, one_line
from runtime.shards import ShardedTokens
from transformer.tokenizer import ByteTokenizer, Tokenizer, UnknownCharacters, build_tokenizer, check_tokenizer_name

S, T = TypeVar("S"), TypeVar("T")
Say = Callable[[str], None]

IGNORED = -1
ORDERS = ("shuffle", "sequential", "random")
MANY_SYMBOLS = 20_000  # characters; more than that is hardly a text to learn by character
MANY_BYTES = 10_000_000  # more than that takes long enough to encode to say so


@dataclass(frozen=True)
class Split:
    """One part of a corpus: `tokens` [num_tokens], memory-mapped where possible, and its text's bytes where known."""

    tokens: np.ndarray | ShardedTokens
    num_bytes: int | None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def num_windows(self, context_len: int) -> int:
        """Windows that together predict each token but the first once; the last one may be short."""
        return -(-(self.num_tokens - 1) // context_len)


@dataclass(frozen=True)
class Dataset:
    """An encoded corpus; `sha256` is that of the file's bytes (of all files, with a newline between)."""

    train: Split
    val: Split
    test: Split | None
    tokenizer: Tokenizer
    sha256: str


def load_dataset(
    dataset: str,
    tokenizer: str,
    *,
    data_dir: Path,
    val_fraction: float,
    test_fraction: float,
    context_len: int,
    say: Say = print,
    vocabulary: Tokenizer | None = None,
) -> Dataset:
    """Finds the text, cuts it into splits, and encodes each apart or takes its tokens from `data_dir/.cache`.

    The order is training, validation, test, cut by characters, or by bytes for the byte tokenizer, which takes any
    file as it is. Otherwise text is UTF-8: a byte order mark at its start is dropped, line ends stay as they are.

    Args:
        dataset: a named data set, a file, or a glob of files, which are joined in sorted order with a newline between.
        tokenizer: a name for `build_tokenizer`; unused where `vocabulary`, an earlier run's own tokenizer, is given.
        val_fraction, test_fraction: parts of the text, read as decimals: 0.1 is exactly a tenth. No test split if 0.
        context_len: each split must hold context_len + 1 tokens.

    Raises:
        UserError: the text is missing, unreadable, empty, too short, not UTF-8 or has characters that `vocabulary`
            lacks; or the tokenizer has no such name or cannot be loaded.
    """
    if vocabulary is None:
        check_tokenizer_name(tokenizer)
    paths = find_files(dataset, data_dir, say)
    files = [_read(path) for path in paths]
    by_bytes = (vocabulary.name if vocabulary else tokenizer) == "byte"
    text = b"\n".join(files) if by_bytes else "\n".join(map(decode_text, paths, files))
    if not any(files) or not text:
        raise UserError(f"config.dataset: {dataset} has 0 characters; give a file with text in it")
    if vocabulary is None:
        vocabulary = new_tokenizer(tokenizer, text, data_dir, say)

    # In binary, 1 - 0.05 - 0.05 of a hundred million would be one short of ninety.
    val, test = Fraction(str(val_fraction)), Fraction(str(test_fraction))
    ends = [0, *(math.floor(len(text) * part) for part in (1 - val - test, 1 - test)), len(text)]
    names = ["training", "validation", "test"] if test else ["training", "validation"]
    splits, say_once = [], functools.cache(say)  # a cache that cannot be written is news but once
    for name, (start, end) in zip(names, pairwise(ends), strict=False):
        try:
            splits.append(_encode(text[start:end], vocabulary, data_dir / ".cache", say_once))
        except UnknownCharacters as error:
            raise UserError(
                f"config.dataset: {dataset} has {len(set(text))} different characters and the run's vocabulary "
                f"{vocabulary.vocab_size}, without {error.characters[0]!a} at character {start + error.positions[0]}; "
                "give the text that the run began with, or another --workdir"
            ) from None
        check_length(splits[-1], context_len, f"{dataset} has {splits[-1].num_tokens} in the {name} split")
    sha256 = hashlib.sha256(b"\n".join(files)).hexdigest()
    return Dataset(splits[0], splits[1], splits[2] if test else None, vocabulary, sha256)


def check_length(split: Split, context_len: int, found: str) -> None:
    """Raises UserError unless a window fits into the split; `found` says how long it is."""
    if split.num_tokens <= context_len:
        raise UserError(
            f"config.context_len: {context_len} needs {context_len + 1} tokens in each split, but {found}; "
            "lower it, or give more text or other fractions"
        )


def find_files(dataset: str, data_dir: Path, say: Say) -> list[Path]:
    """The files that a named data set, a path or a glob stands for, in sorted order. Raises UserError if none."""
    if fetch.is_named(dataset):
        return [fetch.dataset_path(dataset, data_dir, say)]
    if dataset in fetch.SHARD_SETS:
        raise UserError(f"config.dataset: {dataset} is tokens already; name it as config.dataset, with tokenizer gpt2")
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        raise UserError(f"config.dataset: {dataset} is a directory; name a file, or a glob such as {dataset}/*.txt")
    if os.path.exists(path):  # before the glob, so that a file called "a[1].txt" can be named
        return [Path(path)]
    paths = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(name)]
    if not paths:
        guess = difflib.get_close_matches(dataset, fetch.NAMES, n=1)
        hint = f"did you mean {guess[0]}? " if guess else ""
        known = ", ".join(fetch.NAMES)
        raise UserError(f"config.dataset: no file {dataset!r}; {hint}give a file, a glob of files or one of {known}")
    return paths


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"config.dataset: {path} cannot be read: {error.strerror}; check its permissions") from None


def decode_text(path: Path, data: bytes, start: int = 0) -> str:
    """The bytes of a file from byte `start` on as text, without a byte order mark. Raises UserError if not UTF-8."""
    try:
        text = data.decode("utf-8")
        return text if start else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 at byte {start + error.start} (0x{data[error.start]:02x})"
        raise UserError(f"config.dataset: {problem}; convert it, or set config.tokenizer=byte") from None


def new_tokenizer(name: str, text: str | bytes, data_dir: Path, say: Say) -> Tokenizer:
    """A tokenizer by name; `text` is bytes for the byte tokenizer, and matters to `char` alone."""
    if isinstance(text, bytes):
        return build_tokenizer("byte", "")
    if name == "char":
        tokenizer = build_tokenizer("char", text)
        if tokenizer.vocab_size > MANY_SYMBOLS:
            say(f"warning: the text has {tokenizer.vocab_size:,} different characters; config.tokenizer=byte has 256")
        return tokenizer
    environment = dict(os.environ)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(fetch.tiktoken_cache(name, data_dir, say))
    try:
        return build_tokenizer(name, "")
    except (OSError, ValueError) as error:
        raise UserError(f"config.tokenizer: {name} cannot be loaded: {one_line(error)}; use char or byte") from error
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        os.environ.update(environment)


def _encode(text: str | bytes, vocabulary: Tokenizer, cache: Path, say: Say) -> Split:
    """The text's tokens, memory-mapped from a file that the text and the vocabulary name, written if need be."""
    data = text if isinstance(text, bytes) else text.encode()
    path = cache / f"{hashlib.sha256(data).hexdigest()[:32]}-{vocabulary.fingerprint[:32]}.npy"
    tokens = _load_tokens(path, vocabulary.dtype, say)
    if tokens is None:
        if len(data) > MANY_BYTES:
            say(f"encoding {len(data):,} bytes with tokenizer {vocabulary.name}, once")
        tokens = vocabulary.encode_bytes(data) if isinstance(vocabulary, ByteTokenizer) else vocabulary.encode(text)
        try:
            _store_tokens(path, tokens)
            tokens = np.load(path, mmap_mode="r")
        except OSError as error:
            say(f"warning: {cache} cannot be written ({error.strerror}); the encoded text stays in memory")
    # `asarray` keeps the map but drops the memmap class, whose slices cost several times as much.
    return Split(np.asarray(tokens), len(data))


def _load_tokens(path: Path, dtype: np.dtype, say: Say) -> np.ndarray | None:
    """The tokens if they are there; of damage it sees length and type, as reading all would cost what the map saves."""
    try:
        tokens = np.load(path, mmap_mode="r")
        if tokens.dtype != dtype or tokens.ndim != 1:
            raise ValueError
        return tokens
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, EOFError, ValueError):
        say(f"warning: the encoded text {path} is damaged; encoding it again")
        return None


def _store_tokens(path: Path, tokens: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_stem(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}")  # no two processes share one
    try:
        np.save(temporary, tokens)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Batches:
    """The training batches of a split that holds a window at least; each is a function of its step.

    Windows of context_len + 1 tokens start every context_len tokens and share their last token with the next one's
    first, so that an epoch predicts every token but the first exactly once. Epochs follow each other without a seam.

    order: "shuffle" permutes the windows anew in each epoch; "sequential" takes them as they stand; "random" draws
    windows that start anywhere, with replacement, so that an epoch is only a number of windows.
    offset: how many more windows (or, below 0, fewer) were read before a step than batches of this size would have:
    other than 0 in a run whose batch size was changed on the way.
    """

    split: Split
    context_len: int
    batch_size: int
    seed: int
    order: Literal["shuffle", "sequential", "random"] = "shuffle"
    offset: int = 0

    def __call__(self, step: int) -> np.ndarray:
        """The batch of a step: int32 [batch_size, context_len + 1]."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """Rows start to stop - 1 of the batch of a step, for a process that feeds only those."""
        number = self.position(step) + np.arange(start, stop)  # of the window, counted from the run's first
        num_windows = self.split.num_windows(self.context_len)
        seed_key = _hash(np.array([self.seed % 2**64], np.uint64), _U0)
        if self.order == "random":
            starts = _hash(number, seed_key) % np.uint64(self.split.num_tokens - self.context_len)
        elif self.order == "sequential":
            starts = number % num_windows * self.context_len
        else:
            epoch, index = np.divmod(number, num_windows)
            starts = permute(index, num_windows, _hash(epoch, seed_key)) * self.context_len
        return _windows(self.split.tokens, starts.tolist(), len(starts), self.context_len)

    def position(self, step: int) -> int:
        """How many windows are read before a step."""
        return self.offset + step * self.batch_size

    def steps(self, epochs: float) -> int:
        """At which step `epochs` epochs end, the last one filled up to a whole batch."""
        windows = Fraction(str(epochs)) * self.split.num_windows(self.context_len)
        return math.ceil((windows - self.offset) / self.batch_size)


def eval_batches(split: Split, context_len: int, batch_size: int, max_tokens: int = 0) -> Iterator[np.ndarray]:
    """Every token of the split but the first, predicted once: int32 [batch_size, context_len + 1] at a time.

    The last batch is filled up with rows of IGNORED. With `max_tokens` above 0, only the first windows, the same each
    time, that together predict at most so many tokens (but one window at least).
    """
    num_windows = split.num_windows(context_len)
    if 0 < max_tokens < split.num_tokens - 1:
        num_windows = min(num_windows, max(1, max_tokens // context_len))
    starts = range(0, num_windows * context_len, context_len)
    for first in range(0, num_windows, batch_size):
        yield _windows(split.tokens, starts[first : first + batch_size], batch_size, context_len)


def _windows(tokens: np.ndarray | ShardedTokens, starts: Sequence[int], num_rows: int, context_len: int) -> np.ndarray:
    """The windows at `starts`; a loop, as it copies whole slices where fancy indexing builds an index per token."""
    batch = np.full((num_rows, context_len + 1), IGNORED, np.int32)
    for row, start in zip(batch, starts, strict=False):
        window = tokens[start : start + context_len + 1]
        row[: len(window)] = window
    return batch


def prefetch(make: Callable[[S], T], of: Iterable[S], size: int = 2) -> Iterator[T]:
    """Yields make(x) for each x, made `size` items before it is asked for.

    No thread: JAX dispatches asynchronously, so while the device works on a step the caller is back here, where `make`
    builds a later batch and starts its transfer.
    """
    ahead: deque[T] = deque()
    for x in of:
        ahead.append(make(x))
        if len(ahead) > size:
            yield ahead.popleft()
    yield from ahead


# Random numbers are hashes of an index: nothing is stored, whatever the size.
_GOLDEN, _MIX1, _MIX2 = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_U0, _U1, _U27, _U30, _U31 = np.array([0, 1, 27, 30, 31], np.uint64)
_ROUND_KEYS = np.array([1, 2, 3], np.uint64)  # each serves two rounds; after only four, neighbours stay related


def permute(index: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """Where each `index` [n] in [0, size) goes under a keyed permutation; `key` is one for all, or one for each.

    An alternating Feistel network in mixed radix (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002):
    index = high * radix + low, radix about sqrt(size); each round adds a hash of one digit to the other, which can be
    undone, so the whole is a bijection. Its range exceeds `size` by less than the radix; an index that lands out there
    goes through again until it is back inside, which keeps it a bijection. `size` may be 1 to 2**62.
    """
    radix = np.uint64(math.isqrt(size - 1) + 1)
    highs = np.uint64(-(-size // int(radix)))
    key = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    high, low = np.divmod(index.astype(np.uint64), radix)
    for round_key in _ROUND_KEYS:
        low = (low + (_hash(high, key + round_key) >> _U1)) % radix  # the shift leaves room for the sum in 64 bits
        high = (high + (_hash(low, key - round_key) >> _U1)) % highs
    result = (high * radix + low).astype(np.int64)
    outside = result >= size
    if outside.any():
        result[outside] = permute(result[outside], size, key[outside])
    return result


def _hash(number: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """64 well-mixed bits of each number and key: SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    z = number.astype(np.uint64) * _GOLDEN + key
    z = (z ^ (z >> _U30)) * _MIX1
    z = (z ^ (z >> _U27)) * _MIX2
    return z ^ (z >> _U31)
