"""Text to tokens: find the files, cut them into splits, encode each split by itself, and cache the tokens."""

import functools
import glob
import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from corpus import fetch
from corpus.dataset import SPLITS, Dataset, Say, Split, Wanted, cached, ends_of_splits
from corpus.formats import Source, is_named_so
from corpus.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, UnknownCharacters, build_tokenizer
from runtime.errors import UserError, one_line
from runtime.files import read_json, size_of
from runtime.processes import num_processes
from runtime.screen.text import nearest

MANY_SYMBOLS = 20_000  # different characters; a text with more is a poor choice for the `char` tokenizer
HOW_TO_GO_ON = "set config.unknown_characters to replace or drop, or give the text that the run began with"
LARGEST_OF_SEVERAL = 2**30  # bytes; each of several processes reads the whole text, and takes a multiple of it
MANY_BYTES = 10_000_000  # encoding more takes long enough that a line says so first


def load_text(wanted: Wanted) -> Dataset:
    """Finds the text, cuts it into the splits in their order, and encodes each, or takes its tokens from the cache.

    The byte tokenizer cuts the files' bytes; for others a text is UTF-8 without a byte order mark, cut by characters.
    Several files, each decompressed, are joined in sorted order, with a newline between. Raises UserError if the text
    cannot be read, is not plain, empty, too short, or does not fit the tokenizer, or if that cannot be loaded.
    """
    dataset, vocabulary, say = wanted.dataset, wanted.vocabulary, wanted.say
    paths = find_files(dataset, wanted.data_dir, say)
    if num_processes() > 1 and (size := sum(map(size_of, paths))) > LARGEST_OF_SEVERAL:
        problem = f"{size:,} bytes of text are too much for each of several processes"
        raise UserError(f"config.dataset: {dataset}: {problem}; make shards with `main.py prepare`, which they share")
    files = [_read(path) for path in paths]
    by_bytes = (vocabulary.name if vocabulary else wanted.tokenizer) == "byte"
    text = b"\n".join(files) if by_bytes else "\n".join(map(decode_text, paths, files))
    if not any(files) or not text:
        raise UserError(f"config.dataset: {dataset} has 0 characters; give a file with text in it")
    if vocabulary is None:
        vocabulary = new_tokenizer(wanted.tokenizer, wanted.data_dir, say, "" if by_bytes else text)
    elif isinstance(vocabulary, CharTokenizer) and (strange := set(text) - set(vocabulary.symbols)):
        text = _without(text, strange, vocabulary, wanted)
    ends = [len(text)] if wanted.whole else ends_of_splits(len(text), wanted.val_fraction, wanted.test_fraction)
    names = ["whole text"] if wanted.whole else [f"{word} split" for word in SPLITS.values()]
    splits, say_once = [], functools.cache(say)  # one warning, not one a split, if the cache cannot be written
    for name, (start, end) in zip(names, pairwise([0, *ends]), strict=True):
        if name == "test split" and not wanted.test_fraction:
            continue
        splits.append(_encode(text[start:end], vocabulary, wanted.cache, say_once))
        found = f"{dataset} has {splits[-1].num_tokens} in the {name}"
        splits[-1].require_length(0 if wanted.whole else wanted.context_len, found)
    train, val, test = splits * 3 if wanted.whole else [*splits, None][:3]
    return Dataset(train, val, test, vocabulary, hashlib.sha256(b"\n".join(files)).hexdigest())


def _without(text: str, strange: set[str], vocabulary: CharTokenizer, wanted: Wanted) -> str:
    """The text without the characters that the vocabulary lacks. Raises UserError if they are refused."""
    choice, dataset = wanted.unknown_characters, wanted.dataset
    if choice == "refuse":
        try:
            vocabulary.encode(text)
        except UnknownCharacters as error:
            raise UserError(f"config.dataset: {dataset}: {error}; {HOW_TO_GO_ON}") from error
    instead = None if choice == "drop" else vocabulary.replacement
    how = "dropped" if choice == "drop" else f"replaced by {instead!r}"
    wanted.say(f"{dataset}: {len(strange)} different characters, which the vocabulary lacks, are {how}")
    return text.translate(dict.fromkeys(map(ord, strange), instead))


def find_files(dataset: str, data_dir: Path, say: Say) -> list[Path]:
    """The files that a named data set, a path or a glob stands for, in sorted order. Raises UserError if none.

    Of a directory they are those below it whose names end as files of texts do, but for hidden ones.
    """
    if dataset in fetch.DATASETS:
        return [fetch.obtain(fetch.DATASETS[dataset], data_dir, "config.dataset", say)]
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
    if name == "char" and (count := len(set(text))) > MANY_SYMBOLS:
        say(f"warning: the text has {count:,} different characters; config.tokenizer=byte has 256")
    environment = dict(os.environ)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(fetch.tiktoken_cache(name, data_dir, say))
    try:
        return build_tokenizer(name, text)
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
