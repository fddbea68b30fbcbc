"""A corpus of documents, held in memory, as a Dataset: the same tokens as `prepare` writes of the same files."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from corpus.cache import cached
from corpus.dataset import SPLITS, Dataset, Say, Split, check_length
from corpus.encode import encode, symbols, without_mark
from corpus.fetch import NAMES
from corpus.files import Piece, Settings, open_corpus, tasks_of
from corpus.formats import Source
from corpus.load_shards import holds_shards, load_shards
from corpus.load_text import (
    MANY_BYTES,
    decode_text,
    find_files,
    instead_of_unknown,
    load_text,
    new_tokenizer,
    require_memory,
)
from corpus.tokenizer import CharTokenizer, Tokenizer, check_tokenizer_name


def load_dataset(
    dataset: str,
    tokenizer: str,
    *,
    data_dir: Path,
    train_shards: int = 1,
    unknown_characters: str = "refuse",
    text_column: str = "text",
    skip_bad_rows: bool = False,
    **settings: Any,
) -> Dataset:
    """What `dataset` names: tokens by `load_shards`, rows and directories by `load_documents`, else by `load_text`.

    Args:
        train_shards, unknown_characters, text_column, skip_bad_rows: what some of them take; `settings`: what all do.

    Raises:
        UserError: as these do.
    """
    settings["data_dir"] = data_dir
    if settings.get("vocabulary") is None:
        check_tokenizer_name(tokenizer)
    if holds_shards(dataset, tokenizer):
        return load_shards(dataset, tokenizer, train_shards=train_shards, **settings)
    settings["unknown_characters"] = unknown_characters
    if holds_documents(dataset, data_dir):
        rows = {"text_column": text_column, "skip_bad_rows": skip_bad_rows}
        return load_documents(dataset, tokenizer, **rows, **settings)
    return load_text(dataset, tokenizer, **settings)


def holds_documents(dataset: str, data_dir: Path) -> bool:
    """Whether `config.dataset` names a directory of texts, or a file or a glob of files that hold rows."""
    if dataset in NAMES:
        return False
    is_folder = Path(dataset).expanduser().is_dir()
    return is_folder or any(Source(path).has_rows for path in find_files(dataset, data_dir, lambda line: None))


def load_documents(
    dataset: str,
    tokenizer: str,
    *,
    data_dir: Path,
    val_fraction: float,
    test_fraction: float,
    context_len: int,
    text_column: str = "text",
    skip_bad_rows: bool = False,
    whole: bool = False,
    unknown_characters: str = "refuse",
    say: Say = print,
    vocabulary: Tokenizer | None = None,
) -> Dataset:
    """What `load_text` gives for one text, for documents: rows, or the text files below a directory.

    The end-of-text token stands before each document or, where the tokenizer has none, a newline between them. Rows are
    cut into splits by their number, but for files whose names say of which split they are; text files by their bytes,
    where that changes no token.

    Args:
        text_column: where the text is, in rows.
        skip_bad_rows: rows without a text are counted and left out; otherwise one is an error.
        dataset: a directory, a file or a glob; the others are as in `load_text`.

    Raises:
        UserError: as `load_text`, or a row has no text.
    """
    name = vocabulary.name if vocabulary else tokenizer
    fractions = (0.0, 0.0) if whole else (val_fraction, test_fraction)
    settings = Settings(name, *fractions, 0, text_column, skip_bad_rows)
    files = open_corpus(dataset, settings, data_dir, say)
    if files.unit == "bytes":
        require_memory(files.size, dataset)
        files.step = files.size  # nothing is cut but where a split ends
    parts: dict[str, list[Piece]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    digest, size = hashlib.sha256(), 0
    for task in tasks_of(files, settings, 0):
        bad += task.bad
        for piece in task.pieces:
            digest.update(b"\xff" * piece.begins + piece.data)  # a byte that no UTF-8 has
            parts[task.split].append(_plain(piece, name))
        require_memory(size := size + sum(len(piece.data) for piece in task.pieces), dataset)
    if bad:
        say(f"warning: {len(bad):,} bad rows are left out; the first is {bad[0]}")
    vocabulary = _vocabulary(parts, vocabulary, unknown_characters, dataset, name, data_dir, say)
    splits: dict[str, Split | None] = {}
    for split in SPLITS if not whole else ("train",):
        if split == "test" and not parts["test"]:
            continue
        tokens, num_bytes = _encode(vocabulary, parts[split], split == "train", data_dir / ".cache", say)
        splits[split] = Split(tokens, num_bytes)
        found = f"{dataset} has {len(tokens):,} tokens in the " + ("whole text" if whole else f"{SPLITS[split]} split")
        check_length(splits[split], 0 if whole else context_len, found)
    if whole:
        splits = dict.fromkeys(SPLITS, splits["train"])
    return Dataset(splits["train"], splits["val"], splits.get("test"), vocabulary, digest.hexdigest())


def _plain(piece: Piece, name: str) -> Piece:
    return piece if name == "byte" else piece._replace(data=decode_text(*piece).encode())


def _vocabulary(
    parts: dict[str, list[Piece]],
    given: Tokenizer | None,
    unknown_characters: str,
    dataset: str,
    name: str,
    data_dir: Path,
    say: Say,
) -> Tokenizer:
    """The tokenizer of these documents, in which those characters are put in place that `given`, a run's own, lacks."""
    if name != "char":
        return given or new_tokenizer(name, b"" if name == "byte" else "", data_dir, say)
    pieces = [piece for some in parts.values() for piece in some]
    found = symbols(pieces)
    if given is None:
        return CharTokenizer(sorted(found | ({"\n"} if len(pieces) > 1 else set())))  # which stands between documents
    if strange := found - {*given.symbols}:
        text = next(text for piece in pieces if strange & {*(text := piece.data.decode())})
        instead = instead_of_unknown(text, strange, given, unknown_characters, dataset, say)
        for split, some in parts.items():
            parts[split] = [piece._replace(data=piece.data.decode().translate(instead).encode()) for piece in some]
    return given


def _encode(vocabulary: Tokenizer, pieces: list[Piece], first: bool, cache: Path, say: Say) -> tuple[np.ndarray, int]:
    """The tokens of a split's documents, as `load_text` keeps them, and the bytes of their text."""
    key = hashlib.sha256(bytes([first]))
    for piece in pieces:
        key.update(b"\xff" * piece.begins + piece.data)
    documents = sum(piece.begins and bool(piece.data) for piece in pieces)
    size = sum(len(piece.data) for piece in pieces)
    size += 0 if vocabulary.eot is not None else max(0, documents - first)

    def tokens() -> np.ndarray:
        if size > MANY_BYTES:
            say(f"encoding {size:,} bytes with tokenizer {vocabulary.name}, once")
        encoded = encode(vocabulary, pieces)
        return (without_mark(vocabulary, encoded) if first else encoded).tokens

    path = cache / f"{key.hexdigest()[:32]}-{vocabulary.fingerprint[:32]}.npy"
    return cached(path, vocabulary.dtype, tokens, say), size
