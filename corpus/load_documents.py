"""What a config's dataset is: tokens, a text, or documents, of which shards are made as `prepare` does it."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from corpus.chat import load_conversations
from corpus.dataset import Dataset, Wanted, tell_names
from corpus.fetch import DATASETS
from corpus.formats import Source
from corpus.load_shards import INDEX_FILE, holds_shards, load_shards, read_index
from corpus.load_text import find_files, load_text, new_tokenizer
from corpus.prepare import SHARDS_DEPEND_ON, prepare
from corpus.tokenizer import check_tokenizer_name
from runtime.errors import StorageError, UserError
from runtime.files import replacing
from runtime.processes import num_processes
from runtime.screen import live
from runtime.screen.console import Console


def load_dataset(wanted: Wanted) -> Dataset:
    """Tokens by `load_shards`, rows and directories by `load_documents`, conversations by `load_conversations`, else
    a text by `load_text`. Raises UserError as they do, and if no tokenizer has the wanted name.
    """
    dataset = wanted.dataset
    if wanted.vocabulary is None:
        check_tokenizer_name(wanted.tokenizer)
    if wanted.chat:
        return load_conversations(wanted)
    if holds_shards(dataset, wanted.tokenizer):
        return load_shards(wanted)
    if dataset not in DATASETS:
        paths = find_files(dataset, wanted.data_dir, wanted.say)
        if Path(dataset).expanduser().is_dir() or any(Source(path).has_rows for path in paths):
            return load_documents(wanted, paths)
    return load_text(wanted)


def load_documents(wanted: Wanted, paths: list[Path]) -> Dataset:
    """The shards that `prepare` makes of a directory or of files of rows, in the cache, where they are kept."""
    dataset, vocabulary = wanted.dataset, wanted.vocabulary
    if num_processes() > 1:
        raise UserError(f"config.dataset: {dataset} is for one process; make shards of it with `main.py prepare`")
    if vocabulary is None and wanted.tokenizer != "char":
        vocabulary = new_tokenizer(wanted.tokenizer, wanted.data_dir, wanted.say)
    name = vocabulary.name if vocabulary else "char"
    wanted = replace(wanted, tokenizer=name, vocabulary=vocabulary)
    chosen = {key: getattr(wanted, key) for key in (*SHARDS_DEPEND_ON, "skip_bad_rows")}
    stats = [path.stat() for path in paths]
    files = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    key = [files, chosen, vocabulary and vocabulary.fingerprint, wanted.unknown_characters]
    out = wanted.cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}-shards"
    if not (out / INDEX_FILE).exists():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as unfinished, live.set_aside():
                prepare(replace(wanted, say=lambda line: None), unfinished, len(os.sched_getaffinity(0)), Console())
        except OSError as error:
            if not (out / INDEX_FILE).exists():  # by another process, which was faster
                problem = f"{out.parent}: {error.strerror}, no place for shards of {dataset}"
                raise StorageError(f"{problem}; set config.data_dir to one that can be written") from error
    if Source(paths[0]).has_rows:
        tell_names(paths, wanted.say)
    if bad := read_index(out)["bad_rows"]:
        wanted.say(f"warning: {dataset} has {bad:,} bad rows, which are left out")
    try:
        return load_shards(replace(wanted, dataset=str(out)))
    except UserError as error:
        raise UserError(str(error).replace(str(out), dataset)) from error
