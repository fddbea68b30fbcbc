"""What a config's dataset is: tokens, a text, or documents, of which shards are made as `prepare` does it."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from corpus import fetch
from corpus.chat import load_conversations
from corpus.dataset import Dataset, Say
from corpus.files import Settings
from corpus.formats import Source
from corpus.load_shards import INDEX_FILE, holds_shards, load_shards, read_index
from corpus.load_text import find_files, load_text, new_tokenizer
from corpus.prepare import prepare
from corpus.tokenizer import Tokenizer, check_tokenizer_name
from runtime.errors import StorageError, UserError
from runtime.files import replacing
from runtime.processes import num_processes
from runtime.screen import live
from runtime.screen.console import Console

SHARD_TOKENS = 2**27
SMALL = 2**24  # bytes of files that are read sooner than worker processes start


def load_dataset(
    dataset: str,
    tokenizer: str,
    *,
    data_dir: Path,
    train_shards: int = 1,
    unknown_characters: str = "refuse",
    text_column: str = "text",
    skip_bad_rows: bool = False,
    chat: bool = False,
    vocabulary: Tokenizer | None = None,
    say: Say = print,
    **settings: Any,
) -> Dataset:
    """What `dataset` names: tokens by `load_shards`, rows and directories by `load_documents`, else by `load_text`.

    With `chat`, it is conversations, by `load_conversations`.
    """
    if vocabulary is None:
        check_tokenizer_name(tokenizer)
    settings |= {"data_dir": data_dir, "vocabulary": vocabulary, "say": say}
    if chat:
        rows = {"text_column": text_column, "skip_bad_rows": skip_bad_rows}
        return load_conversations(dataset, tokenizer, **rows, **settings)
    if holds_shards(dataset, tokenizer):
        return load_shards(dataset, tokenizer, train_shards=train_shards, **settings)
    settings["unknown_characters"] = unknown_characters
    paths = [] if fetch.is_named(dataset) else find_files(dataset, data_dir, say)
    if Path(dataset).expanduser().is_dir() or any(Source(path).has_rows for path in paths):
        return load_documents(dataset, paths, tokenizer, text_column, skip_bad_rows, **settings)
    return load_text(dataset, tokenizer, **settings)


def load_documents(
    dataset: str,
    paths: list[Path],
    tokenizer: str,
    text_column: str,
    skip_bad_rows: bool,
    *,
    data_dir: Path,
    val_fraction: float,
    test_fraction: float,
    vocabulary: Tokenizer | None,
    unknown_characters: str,
    say: Say,
    **settings: Any,
) -> Dataset:
    """The shards that `prepare` makes of a directory or of files of rows, in `data_dir/.cache`, where they are kept."""
    if num_processes() > 1:
        raise UserError(f"config.dataset: {dataset} is for one process; make shards of it with `main.py prepare`")
    if vocabulary is None and tokenizer != "char":
        vocabulary = new_tokenizer(tokenizer, data_dir, say)
    name = vocabulary.name if vocabulary else "char"
    chosen = Settings(name, val_fraction, test_fraction, SHARD_TOKENS, text_column, skip_bad_rows)
    stats = [path.stat() for path in paths]
    files = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    key = [files, dataclasses.asdict(chosen), vocabulary and vocabulary.fingerprint, unknown_characters]
    out = data_dir / ".cache" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}-shards"
    if not (out / INDEX_FILE).exists():
        processes = 1 if sum(stat.st_size for stat in stats) < SMALL else len(os.sched_getaffinity(0))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as unfinished, live.set_aside():
                how = data_dir, processes, Console(), vocabulary, unknown_characters
                prepare(dataset, unfinished, chosen, *how, say=lambda line: None)
        except OSError as error:
            if not (out / INDEX_FILE).exists():  # by another process, which was faster
                problem = f"{out.parent}: {error.strerror}, no place for shards of {dataset}"
                raise StorageError(f"{problem}; set config.data_dir to one that can be written") from error
    if bad := read_index(out)["bad_rows"]:
        say(f"warning: {dataset} has {bad:,} bad rows, which are left out")
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    try:
        return load_shards(str(out), name, data_dir=data_dir, vocabulary=vocabulary, say=say, **fractions, **settings)
    except UserError as error:
        raise UserError(str(error).replace(str(out), dataset)) from error
