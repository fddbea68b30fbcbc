"""Text to tokens: find the files, cut them into splits, encode each split by itself, and cache the tokens."""

import functools
import glob
import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from corpus import fetch
from corpus.cache import cached
from corpus.dataset import SPLITS, Dataset, Say, Split, check_length, ends_of_splits
from corpus.formats import Source, is_named_so
from corpus.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    UnknownCharacters,
    build_tokenizer,
    check_tokenizer_name,
)
from runtime.errors import UserError, one_line
from runtime.files import read_json
from runtime.screen.text import nearest

MANY_SYMBOLS = 20_000  # different characters; a text with more is a poor choice for the `char` tokenizer
HOW_TO_GO_ON = "set config.unknown_characters to replace or drop, or give the text that the run began with"
MANY_BYTES = 10_000_000  # encoding more takes long enough that a line says so first


def load_text(
    dataset: str,
    tokenizer: str,
    *,
    data_dir: Path,
    val_fraction: float,
    test_fraction: float,
    context_len: int,
    whole: bool = False,
    unknown_characters: str = "refuse",
    say: Say = print,
    vocabulary: Tokenizer | None = None,
) -> Dataset:
    """Finds the text, cuts it into splits, and encodes each split, or takes its tokens from `data_dir/.cache`.

    The order is training, validation, test. The byte tokenizer takes a file as it is, and the text is cut by bytes. For
    other tokenizers a text is UTF-8 and is cut by characters: a byte order mark at its start is dropped, line ends stay
    as they are. Compressed files are decompressed first. Raises UserError if the text is missing, unreadable, not plain
    text, empty, too short, not UTF-8 or has characters that `vocabulary` lacks; or no tokenizer has this name, or it
    cannot be loaded.

    Args:
        dataset: a named data set, a file, or a glob of files, which are joined in sorted order with a newline between.
        tokenizer: its name; unused where `vocabulary`, an earlier run's own tokenizer, is given.
        val_fraction, test_fraction: parts of the text, read as decimals: 0.1 is exactly a tenth. No test split if 0.
        context_len: each split must hold context_len + 1 tokens; with `whole` each is the whole text, of two or more.
        unknown_characters: what to do with characters that `vocabulary` lacks: "refuse", "replace" or "drop".
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
        vocabulary = new_tokenizer(tokenizer, data_dir, say, "" if by_bytes else text)
    elif isinstance(vocabulary, CharTokenizer) and (strange := set(text) - set(vocabulary.symbols)):
        text = _without(text, strange, vocabulary, unknown_characters, dataset, say)
    ends = [0, len(text)] if whole else [0, *ends_of_splits(len(text), val_fraction, test_fraction)]
    names = ["whole text"] if whole else list(SPLITS.values())[: 3 if test_fraction else 2]
    splits, say_once = [], functools.cache(say)  # one warning, not one a split, if the cache cannot be written
    for name, (start, end) in zip(names, pairwise(ends), strict=False):
        splits.append(_encode(text[start:end], vocabulary, data_dir / ".cache", say_once))
        found = f"{dataset} has {splits[-1].num_tokens} in the {name}" + ("" if whole else " split")
        check_length(splits[-1], 0 if whole else context_len, found)
    sha256 = hashlib.sha256(b"\n".join(files)).hexdigest()
    if whole:
        return Dataset(splits[0], splits[0], splits[0], vocabulary, sha256)
    return Dataset(splits[0], splits[1], splits[2] if test_fraction else None, vocabulary, sha256)


def _without(text: str, strange: set[str], vocabulary: CharTokenizer, choice: str, dataset: str, say: Say) -> str:
    """The text without the characters that the vocabulary lacks. Raises UserError if they are refused."""
    if choice == "refuse":
        try:
            vocabulary.encode(text)
        except UnknownCharacters as error:
            raise UserError(f"config.dataset: {dataset}: {error}; {HOW_TO_GO_ON}") from error
    instead = None if choice == "drop" else vocabulary.replacement
    how = "dropped" if choice == "drop" else f"replaced by {instead!r}"
    say(f"{dataset}: {len(strange)} different characters, which the vocabulary lacks, are {how}")
    return text.translate(dict.fromkeys(map(ord, strange), instead))


def find_files(dataset: str, data_dir: Path, say: Say) -> list[Path]:
    """The files that a named data set, a path or a glob stands for, in sorted order. Raises UserError if none.

    Of a directory they are those below it whose names end as files of texts do, but for hidden ones.
    """
    if fetch.is_named(dataset):
        return [fetch.dataset_path(dataset, data_dir, say)]
    if dataset in fetch.SHARD_SETS:
        raise UserError(f"config.dataset: {dataset} is tokens already; name it as config.dataset, with tokenizer gpt2")
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        return _files_below(Path(path), say)
    if os.path.exists(path):  # before the glob, so that a file called "a[1].txt" can be named
        return [Path(path)]
    paths = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(name)]
    if not paths:
        near, known = nearest(dataset, fetch.NAMES) or ";", ", ".join(fetch.NAMES)
        raise UserError(f"config.dataset: no file {dataset!r}{near} give a file, a glob of files or one of {known}")
    return paths


def _files_below(root: Path, say: Say) -> list[Path]:
    visible = lambda path: not any(part.startswith(".") for part in path.relative_to(root).parts)
    files = [path for path in sorted(root.rglob("*")) if visible(path) and path.is_file()]
    for state in [path for path in files if path.name == "state.json"]:  # of `datasets`: beside its data lie its caches
        listed = read_json(state).get("_data_files") or ()
        names = {item["filename"] for item in listed if isinstance(item, dict) and "filename" in item}
        files = [path for path in files if path.parent != state.parent or not names or path.name in names]
    found = [path for path in files if is_named_so(path)]
    if not found:
        raise UserError(f"config.dataset: {root} has no file that is named as a text; name files, by a glob if need be")
    if others := [path.name for path in files if path not in {*found}]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        say(f"{root}: {len(found)} files; left out by the endings of their names: {', '.join(others[:3])}{more}")
    return found


def _read(path: Path) -> bytes:
    """All that is in a text file, decompressed."""
    data, most = bytearray(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for chunk in Source(path).chunks():
        data += chunk
        if len(data) > most:
            raise UserError(f"config.dataset: {path} does not fit into memory; make shards with `main.py prepare`")
    return bytes(data)


def decode_text(path: Path, data: bytes, start: int = 0) -> str:
    """The bytes of a file from byte `start` on as text, without a byte order mark. Raises UserError if not UTF-8."""
    try:
        text = data.decode("utf-8")
        return text if start else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 at byte {start + error.start} (0x{data[error.start]:02x})"
        raise UserError(f"config.dataset: {problem}; convert it, or set config.tokenizer=byte") from None


def new_tokenizer(name: str, data_dir: Path, say: Say, text: str = "") -> Tokenizer:
    """A tokenizer by name, or from a directory; `char` takes its characters from `text`."""
    if name == "char":
        if (count := len(set(text))) > MANY_SYMBOLS:
            say(f"warning: the text has {count:,} different characters; config.tokenizer=byte has 256")
        return build_tokenizer("char", text)
    if name == "byte":
        return build_tokenizer("byte", "")
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
    """The text's tokens, memory-mapped from a cache file named by the hashes of the text and the vocabulary."""
    data = text if isinstance(text, bytes) else text.encode()

    def tokens() -> np.ndarray:
        if len(data) > MANY_BYTES:
            say(f"encoding {len(data):,} bytes with tokenizer {vocabulary.name}, once")
        return vocabulary.encode_bytes(data) if isinstance(vocabulary, ByteTokenizer) else vocabulary.encode(text)

    path = cache / f"{hashlib.sha256(data).hexdigest()[:32]}-{vocabulary.fingerprint[:32]}.npy"
    return Split(cached(path, vocabulary.dtype, tokens, say), len(data))
