"""Text to shards, for `main.py prepare`; it may be killed at any moment and goes on at the next start.

Worker threads encode tasks, and the main thread writes the results in order, so the shards depend on the files and the
settings alone. Its state, written once a second: a position in the corpus, the unfinished shard, the finished ones.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dataset import SPLITS, Say, Wanted
from corpus.encode import Encoded, without_mark, work
from corpus.files import RowFiles, Task, TextFiles, open_corpus, tasks_of
from corpus.load_shards import FORMAT, INDEX_FILE, PROGRESS_FILE, TOKENIZER_FILE, read_index
from corpus.load_text import new_tokenizer
from corpus.shards import header
from corpus.tokenizer import CharTokenizer, Tokenizer, check_tokenizer_name, tokenizer_names
from runtime.errors import UserError
from runtime.files import read_json, storing, write_json
from runtime.screen.console import Console
from runtime.workdir import WorkdirLock, prepare_workdir, removed_if_unused

# Besides the files themselves, and `skip_bad_rows`, which makes no difference up to the first bad row.
SHARDS_DEPEND_ON = ("tokenizer", "val_fraction", "test_fraction", "shard_tokens", "text_column")
SAVE_EVERY = 1.0  # seconds: how much work a kill may cost
BAD_ROWS_SHOWN = 5  # each; those that follow are only counted
MAX_SHARD_TOKENS = 2_000_000_000  # leaves room for one more task below the header's limit of 2**31 - 1


def prepare(wanted: Wanted, out: str | Path, threads: int, console: Console) -> None:
    """Writes the shards and the index of a corpus to `out`, or goes on where an earlier call was stopped.

    A shard ends with the task that brings it to `shard_tokens` or more, or with the last one of its split.
    Raises UserError if the files cannot be used, or `out` holds something else, StorageError if the disk fails.
    """
    vocabulary, say = wanted.vocabulary, wanted.say
    if vocabulary is None:
        check_tokenizer_name(wanted.tokenizer)
        if wanted.tokenizer not in tokenizer_names():  # a directory, whose content may change
            vocabulary = new_tokenizer(wanted.tokenizer, wanted.data_dir, say)
    with removed_if_unused(out), WorkdirLock(out := _own(out), console.warn):
        with console.busy("reading the files"):
            files = open_corpus(wanted)
        source = {key: getattr(wanted, key) for key in SHARDS_DEPEND_ON}
        source["files"] = hashlib.sha256(json.dumps(files.identity).encode()).hexdigest()
        if vocabulary:
            source["tokenizer"] = f"{vocabulary.name} {vocabulary.fingerprint[:12]}"
        if (out / INDEX_FILE).exists():
            index = read_index(out)
            _check_source(out, index.get("source"), source)
            say(_summary(out, index))
            return
        state = _state(out, source, files)
        if vocabulary is None and wanted.tokenizer != "char":
            vocabulary = new_tokenizer(wanted.tokenizer, wanted.data_dir, say)
        tokenizer = vocabulary or _alphabet(wanted, state, files, threads, console)
        kept = out / TOKENIZER_FILE
        if kept.exists() and read_json(kept) != json.loads(json.dumps(tokenizer.to_dict())):
            raise UserError(f"--out={out}: holds another tokenizer; name another directory")
        output = Output(out, state, wanted.shard_tokens, tokenizer.dtype, say)
        if place := state["place"]:
            say(f"going on after {place:,} of {files.size:,} {files.unit}")
        tasks = tasks_of(files, wanted, place)
        results = contextlib.closing(work(tokenizer, tasks, threads, wanted.unknown_characters))
        with contextlib.closing(output), results as encoded, console.progress(files.size, place) as update:
            for task, result in encoded:
                for problem in task.bad[: max(0, BAD_ROWS_SHOWN - state["bad"])]:
                    console.warn(f"{problem}; left out")
                output.add(task, result if state["documents"] else without_mark(tokenizer, result))
                update(task.stop)
            output.finish_shard()
        if not state["splits"]["train"]["tokens"]:
            raise UserError(
                f"config.dataset: {wanted.dataset} leaves nothing to train on; give more text or other fractions"
            )
        index = {
            "format": FORMAT,
            "tokenizer": tokenizer.name,
            **{key: getattr(tokenizer, key) for key in ("fingerprint", "vocab_size", "eot")},
            "documents": state["documents"],
            "empty_documents": state["empty"],
            "bad_rows": state["bad"],
            "splits": {name: split for name, split in state["splits"].items() if split["tokens"]},
            "source": source,
        }
        write_json(out / TOKENIZER_FILE, tokenizer.to_dict())
        write_json(out / INDEX_FILE, index)
        (out / PROGRESS_FILE).unlink(missing_ok=True)
        say(_summary(out, index))


def _own(out: str | os.PathLike[str]) -> Path:
    """The directory, made if it is not there. UserError if it is of something else."""
    place = Path(os.path.expanduser(out))
    begun = any((place / name).exists() for name in (INDEX_FILE, PROGRESS_FILE))
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() and not begun else []
    if others := [name for name in names if not name.startswith(".") and name != TOKENIZER_FILE]:
        raise UserError(f"--out={out}: holds {others[0]}, which is of something else; name another directory")
    return prepare_workdir(out, flag="--out")


def _check_source(out: Path, old: Any, new: dict[str, Any]) -> None:
    if old == new:
        return
    old = old if isinstance(old, dict) else {}
    problem = f"config.dataset: these are not the files that {out} was begun with, or they have changed since"
    if key := next((key for key in new if key != "files" and old.get(key) != new[key]), None):
        problem = f"--{key}: {out} was begun with {old.get(key)!r}, this command has {new[key]!r}"
    raise UserError(f"{problem}; give the same, or another --out")


def _state(out: Path, source: dict[str, Any], files: TextFiles | RowFiles) -> dict[str, Any]:
    """The state that an earlier start left, or a new one."""
    if (out / PROGRESS_FILE).exists():
        state = {"bad": 0} | read_json(out / PROGRESS_FILE)
        keys = {"source", "symbols", "place", "documents", "empty", "bad", "splits", "part"}
        if set(state) != keys:
            raise UserError(f"{out / PROGRESS_FILE}: is damaged; remove {out} and begin again")
        _check_source(out, state["source"], source)
        return state
    splits = {name: {"tokens": 0, "bytes": 0, "shards": []} for name in SPLITS}
    counts = {"place": 0, "documents": 0, "empty": files.empty, "bad": 0}
    return {"source": source, "symbols": None, **counts, "splits": splits, "part": None}


def _alphabet(
    wanted: Wanted, state: dict[str, Any], files: TextFiles | RowFiles, threads: int, console: Console
) -> Tokenizer:
    if state["symbols"] is None:
        wanted.say("collecting the characters, once")
        found: set[str] = set()
        passes = contextlib.closing(work(None, tasks_of(files, wanted, 0), threads))
        with passes as results, console.progress(files.size, 0) as update:
            for task, some in results:
                found |= some
                update(task.stop)
        if len(files.identity) - files.empty > 1 or files.unit == "rows":
            found.add("\n")  # it separates documents
        state["symbols"] = sorted(found)
    return CharTokenizer(state["symbols"])


def _summary(out: Path, index: dict[str, Any]) -> str:
    doing = {"train": "train on", "val": "validate", "test": "test"}
    splits = index["splits"]
    counts = [f"{splits[name]['tokens']:,} tokens to {word}" for name, word in doing.items() if splits.get(name)]
    kinds = {"empty": index["empty_documents"], "bad": index.get("bad_rows", 0)}
    left = "".join(f", {count:,} {kind} left out" for kind, count in kinds.items() if count)
    return f"{out}: {', '.join(counts)}, from {index['documents']:,} documents{left}; --config.dataset={out}"


class Output:
    """The shards of a directory, each `.NAME.part` until it is complete, synced and hashed.

    `state` is what the last start left: all tokens that it counts are on the disk, and it goes on at `place`.
    """

    def __init__(self, out: Path, state: dict[str, Any], shard_tokens: int, dtype: np.dtype, say: Say):
        self._out, self._state, self._shard_tokens, self._dtype, self._say = out, state, shard_tokens, dtype, say
        self._file: Any = None
        if state["part"]:
            self._reopen()
        self.save()

    def add(self, task: Task, result: Encoded) -> None:
        """Write the next task's tokens. Raises StorageError if the disk is full or fails."""
        state = self._state
        if state["part"] and state["part"]["split"] != task.split:
            self.finish_shard()
        if not state["part"]:
            name = f"{task.split}_{len(state['splits'][task.split]['shards']):06}.bin"
            before = {key: state[key] for key in ("place", "documents", "empty", "bad")}
            state["part"] = {"file": name, "split": task.split, "tokens": 0, "bytes": 0, "crc32": 0, "before": before}
            with storing(self._part_path):
                self._file = self._part_path.open("w+b")
                self._file.write(header(0, self._dtype))
        part, data = state["part"], result.tokens.astype(self._dtype).tobytes()
        with storing(self._part_path):
            self._file.write(data)
        part["tokens"] += len(result.tokens)
        part["bytes"] += result.num_bytes
        part["crc32"] = zlib.crc32(data, part["crc32"])
        state["place"] = task.stop
        for key, more in {"documents": result.documents, "empty": result.empty, "bad": len(task.bad)}.items():
            state[key] += more
        if part["tokens"] >= self._shard_tokens:
            self.finish_shard()
        elif time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the state, after the tokens that it counts."""
        if self._file:
            with storing(self._part_path):
                self._file.flush()
        write_json(self._out / PROGRESS_FILE, self._state)
        self._saved = time.monotonic()

    def finish_shard(self) -> None:
        """Give the unfinished shard, if there is one, its header and its name."""
        part, state = self._state["part"], self._state
        if not part:
            return
        path, tokens = self._out / part["file"], part["tokens"]
        if tokens:
            with storing(self._part_path):
                self._file.seek(0)
                self._file.write(header(tokens, self._dtype))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.seek(0)
                sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
                os.replace(self._part_path, path)
            split = state["splits"][part["split"]]
            split["shards"].append({"file": part["file"], "tokens": tokens, "sha256": sha256})
            split |= {key: split[key] + part[key] for key in ("tokens", "bytes")}
            self._say(f"{path}: {tokens:,} tokens of {part['bytes']:,} bytes")
        else:
            self._part_path.unlink()
        self.close()
        state["part"] = None
        self.save()

    def close(self) -> None:
        """Close the file; the next start goes on with it."""
        if self._file:
            with contextlib.suppress(OSError):  # a failed write was reported when it was made
                self._file.close()
            self._file = None

    @property
    def _part_path(self) -> Path:
        return self._out / f".{self._state['part']['file']}.part"

    def _reopen(self) -> None:
        """Go on with the unfinished shard, cut back to what the state counts; start it again if those bytes differ."""
        part = self._state["part"]
        left, crc32 = part["tokens"] * self._dtype.itemsize, 0
        with storing(self._part_path):
            if self._part_path.exists():
                self._file = self._part_path.open("r+b")
                self._file.seek(len(header(0, self._dtype)))
                while left and (data := self._file.read(min(left, 2**20))):
                    left, crc32 = left - len(data), zlib.crc32(data, crc32)
            if self._file and not left and crc32 == part["crc32"]:
                self._file.truncate(self._file.tell())
                return
        self._say(f"warning: {self._part_path} is damaged or gone; that shard is written again")
        self.close()
        self._state |= part["before"] | {"part": None}
