"""Preparing a corpus gives the tokens of its texts, whatever the threads and wherever it was killed."""

import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import ROOT, assert_one_line, data_of, make_text, refusal
from tiktoken_ext import openai_public

import main
from corpus import files as corpus_files
from corpus import prepare as prepare_module
from corpus.dataset import Wanted
from corpus.files import TextFiles, tasks_of
from corpus.formats import Source
from corpus.prepare import Output, prepare
from corpus.shards import read_shard
from corpus.tokenizer import TiktokenTokenizer
from runtime.errors import StorageError
from runtime.files import read_json, write_json
from runtime.screen.console import Console

EOT = 300


def small_bpe(eot: int = EOT) -> TiktokenTokenizer:
    """Every byte and merges that reach over spaces and newlines, under GPT-2's pattern."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    merges = [b" a", b"\n\n", b"  ", b" l", b" la", b"he", b"ro", b" t", b".\n", b"A ", b" 1"]
    ranks |= {merge: 256 + i for i, merge in enumerate(merges)}
    return TiktokenTokenizer(
        tiktoken.Encoding(
            "small", pat_str=pattern("gpt2"), mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot}
        )
    )


@cache
def pattern(name: str) -> str:
    """The pattern of one of tiktoken's encodings, which is had without its vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, load, lambda *args, **kwargs: {})
        return openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


@pytest.fixture
def bpe(monkeypatch) -> TiktokenTokenizer:
    """A tokenizer "gpt2" that needs no download."""
    tokenizer = small_bpe()
    monkeypatch.setattr(prepare_module, "new_tokenizer", lambda *_: tokenizer)
    return tokenizer


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """Texts of several sizes, one empty, and tasks small enough that most are cut."""
    monkeypatch.setattr(TextFiles, "step", 700)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, sentences in enumerate((90, 3, 0, 40)):
        (folder / f"{i}.txt").write_text(make_text(sentences, seed=i), encoding="utf-8")
    return folder


SETTINGS = Wanted(
    *("", "gpt2"), data_dir=Path(), val_fraction=0.2, test_fraction=0.1, shard_tokens=900, unknown_characters=""
)


def run(dataset: Path | str, out: Path, wanted: Wanted = SETTINGS, threads: int = 1) -> dict:
    prepare(replace(wanted, dataset=str(dataset), data_dir=out.parent / "data"), out, threads, Console())
    return read_json(out / "index.json")


def texts_of(folder: Path) -> list[str]:
    return [text for path in sorted(folder.glob("*.txt")) if (text := path.read_text(encoding="utf-8"))]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != ".lock"}


def tokens_in(out: Path, index: dict) -> np.ndarray:
    """All tokens of the shards, in the order of the corpus, read by numpy alone."""
    names = [shard["file"] for split in ("train", "val", "test") for shard in index["splits"][split]["shards"]]
    return np.concatenate([np.fromfile(out / name, np.uint16, offset=1024) for name in names])


def whole(out: Path, tokenizer: str, **more) -> tuple[np.ndarray, object]:
    """All tokens of a prepared directory, and the data set."""
    data = data_of(out, tokenizer, data_dir=out, val_fraction=0.3, test_fraction=0, context_len=2, **more)
    splits = [split for split in (data.train, data.val, data.test) if split]
    return np.concatenate([split.tokens[0 : split.num_tokens] for split in splits]), data


# --- The tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["char", "byte"])
@pytest.mark.parametrize("val", [0.1, 0.0])
def test_one_text_gives_the_tokens_that_it_gives_unprepared(tmp_path, monkeypatch, name, val):
    monkeypatch.setattr(TextFiles, "step", 150)
    text = tmp_path / "text.txt"
    text.write_text(make_text(50))
    run(
        text, tmp_path / "out", replace(SETTINGS, tokenizer=name, val_fraction=val, test_fraction=0.0, shard_tokens=400)
    )
    given = dict(data_dir=tmp_path, val_fraction=val or 0.2, test_fraction=0.0, context_len=4)
    plain = data_of(str(text), name, **given)
    data = data_of(tmp_path / "out", name, **given)
    for a, b in ((data.train, plain.train), (data.val, plain.val)):
        np.testing.assert_array_equal(a.tokens[0 : a.num_tokens], b.tokens)
        assert a.num_bytes == (b.num_bytes if val or b is plain.val else None)
    assert data.tokenizer.to_dict() == plain.tokenizer.to_dict()


@pytest.mark.parametrize("name", ["char", "byte"])
def test_texts_without_an_end_token_are_joined_by_newlines(corpus, tmp_path, name):
    index = run(corpus / "*.txt", tmp_path / "out", replace(SETTINGS, tokenizer=name))
    tokens, data = whole(tmp_path / "out", name)
    assert data.tokenizer.decode(tokens) == "\n".join(texts_of(corpus))
    assert sum(split["bytes"] for split in index["splits"].values()) == len(tokens)
    assert (index["documents"], index["empty_documents"]) == (3, 1)


def test_documents_begin_with_the_end_token_and_are_cut_where_no_token_changes(corpus, tmp_path, bpe, capsys):
    index = run(corpus / "*.txt", tmp_path / "out")
    tokens = tokens_in(tmp_path / "out", index)
    want = [np.concatenate([[EOT], bpe.encode(text)]) for text in texts_of(corpus)]
    np.testing.assert_array_equal(tokens, np.concatenate(want))
    sizes = [shard["tokens"] for part in index["splits"].values() for shard in part["shards"]]
    assert len(sizes) > 3 and sum(sizes) == len(tokens) and {*index["splits"]} == {"train", "val", "test"}
    text_bytes = sum(len(text.encode()) for text in texts_of(corpus))
    assert sum(part["bytes"] for part in index["splits"].values()) == text_bytes
    train, val, _ = (part["bytes"] / text_bytes for part in index["splits"].values())
    assert train == pytest.approx(0.7, abs=0.01) and val == pytest.approx(0.2, abs=0.01)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sizes) + 1 and "from 3 documents, 1 empty left out" in lines[-1]


def test_a_text_without_a_place_to_cut_is_cut_between_characters(tmp_path, monkeypatch, bpe):
    monkeypatch.setattr(TextFiles, "step", 70)
    monkeypatch.setattr(corpus_files, "LOOK_FOR_CUT", 20)
    text = tmp_path / "text.txt"
    text.write_text("\ufeff" + "☃😀" * 90, encoding="utf-8")
    files = TextFiles([Source(text)], "gpt2")
    tasks = list(tasks_of(files, SETTINGS, 0))
    assert len(tasks) > 7
    for task, after in zip(tasks, [*tasks[1:], None], strict=True):
        (piece,) = task.pieces
        piece.data.decode()
        assert after is None or next(tasks_of(files, SETTINGS, task.stop)) == after
    index = run(text, tmp_path / "out")
    tokens = tokens_in(tmp_path / "out", index)
    assert tokens[0] == EOT and bpe.decode(tokens[1:]) == "☃😀" * 90  # the mark is gone
    assert sum(split["bytes"] for split in index["splits"].values()) == 90 * 7


def test_large_vocabularies_take_four_bytes_a_token(corpus, tmp_path, monkeypatch):
    tokenizer = small_bpe(eot=70_000)
    monkeypatch.setattr(prepare_module, "new_tokenizer", lambda *_: tokenizer)
    index = run(corpus / "*.txt", tmp_path / "out")
    shard = read_shard(tmp_path / "out" / "train_000000.bin")
    assert shard.dtype == np.uint32 and np.fromfile(shard.path, np.uint32, 1, offset=1024) == [70_000]
    assert np.fromfile(shard.path, np.int32, 3).tolist() == [20240801, 7, shard.num_tokens] and index["eot"] == 70_000


# --- Stopping and going on --------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for a kill: nothing below catches it."""


@pytest.mark.parametrize(("every", "tasks"), [(0.0, 1), (0.0, 2), (1e9, 3)])
def test_stopped_at_any_task_it_ends_with_the_same_bytes(corpus, tmp_path, bpe, monkeypatch, every, tasks):
    """Saved at each task, or only with each shard, which takes two."""
    run(corpus / "*.txt", tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "SAVE_EVERY", every)
    add, done = Output.add, []

    def stopping(self, task, result):
        add(self, task, result)
        done.append(task.stop)
        if len(done) % tasks == 0:
            if self._file:
                self._file.write(b"half a task")
            raise Stop

    monkeypatch.setattr(Output, "add", stopping)
    stops = 0
    while not (tmp_path / "out" / "index.json").exists():
        try:
            run(corpus / "*.txt", tmp_path / "out")
        except Stop:
            stops += 1
            assert stops < 30
    assert stops >= 2
    assert (len(done) == len(set(done))) == (every == 0)  # nothing saved is done again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_half_shard_is_written_again(corpus, tmp_path, bpe, monkeypatch, capsys, damage):
    run(corpus / "*.txt", tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "SAVE_EVERY", 0.0)
    add = Output.add

    def stopping(self, task, result):
        add(self, task, result)
        if self._file and len(self._state["splits"]["train"]["shards"]) == 1:
            raise Stop

    monkeypatch.setattr(Output, "add", stopping)
    with pytest.raises(Stop):
        run(corpus / "*.txt", tmp_path / "out")
    monkeypatch.setattr(Output, "add", add)
    (part,) = (tmp_path / "out").glob(".*.part")
    data = part.read_bytes()
    part.unlink()
    if damage != "gone":
        part.write_bytes(data[:-1] if damage == "cut" else data[:1100] + bytes([data[1100] ^ 1]) + data[1101:])
    run(corpus / "*.txt", tmp_path / "out")
    assert f"warning: {part} is damaged or gone" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_in_the_middle_with_two_threads_one_goes_on(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"It was the best of times.\n" * 4_000_000)  # 104 MB: seconds of work
    out, settings = tmp_path / "out", replace(SETTINGS, tokenizer="byte", test_fraction=0.0, shard_tokens=40_000_000)
    flags = ["--tokenizer=byte", "--val_fraction=0.2", "--shard_tokens=40000000", "--threads=2"]
    command = [sys.executable, str(ROOT / "main.py"), "prepare", f"--dataset={text}", f"--out={out}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    progress = out / ".progress.json"
    while not (progress.exists() and read_json(progress)["place"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "index.json").exists(), "it was done too soon"
    assert 0 < read_json(progress)["place"] < 104_000_000
    index = run(text, out, settings)
    tokens = [np.fromfile(path, np.uint16, offset=1024) for path in sorted(out.glob("*.bin"))]
    assert np.concatenate(tokens).astype(np.uint8).tobytes() == text.read_bytes()
    assert index["splits"]["train"]["tokens"] == 83_200_000 and not list(out.glob(".*.part"))


def test_a_full_disk_is_told_and_the_same_command_goes_on(corpus, tmp_path, bpe, monkeypatch):
    run(corpus / "*.txt", tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(StorageError) as caught:
            run(corpus / "*.txt", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    message = str(caught.value)
    assert caught.value.status == 5 and "make room, then run the same command again" in message
    assert str(tmp_path) in message
    assert not list((tmp_path / "out").glob("*.bin")) and not (tmp_path / "out" / "index.json").exists()
    run(corpus / "*.txt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_directory_stays_as_it_is(corpus, tmp_path, bpe, monkeypatch):
    run(corpus / "*.txt", tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(prepare_module, "work", None)
    run(corpus / "*.txt", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    for key, value in {"val_fraction": 0.1, "tokenizer": "byte", "shard_tokens": 7}.items():
        message = refusal(run, corpus / "*.txt", tmp_path / "out", replace(SETTINGS, **{key: value}))
        assert message.startswith(f"--{key}: {tmp_path}/out was begun with {getattr(SETTINGS, key)!r}")
    (corpus / "1.txt").write_text("changed")
    assert "are not the files that" in refusal(run, corpus / "*.txt", tmp_path / "out")


def test_a_tokenizer_that_lies_in_the_directory_stays(corpus, tmp_path, bpe):
    for name, tokenizer in (("other", small_bpe(EOT + 1)), ("same", bpe)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "tokenizer.json", tokenizer.to_dict())
    before = (tmp_path / "other" / "tokenizer.json").read_bytes()
    assert "holds another tokenizer" in refusal(run, corpus, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == before
    assert run(corpus, tmp_path / "same")["fingerprint"] == bpe.fingerprint


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_named(corpus, tmp_path, bpe):
    (corpus / "1.txt").write_bytes(b"x" * 1000 + b"\xff")
    assert "1.txt is not UTF-8 at byte 1000 (0xff)" in refusal(run, corpus / "*.txt", tmp_path / "a")
    (corpus / "1.txt").unlink()
    assert "has 0 bytes" in refusal(run, corpus / "2.txt", tmp_path / "b")
    (corpus / "x.parquet").write_bytes(b"")
    assert "x.parquet, and of text, as " in refusal(run, corpus / "*", tmp_path / "c")
    assert "no file" in refusal(run, corpus / "*.md", tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.tex").write_text("mine")
    assert "holds thesis.tex, which is of something else" in refusal(run, corpus / "*.txt", tmp_path / "e")
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["thesis.tex"]
    assert not any((tmp_path / name).exists() for name in "bcd")  # what was made for nothing is gone again
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / ".progress.json").write_text("{}")
    assert "is damaged" in refusal(run, corpus / "*.txt", tmp_path / "f")
    (corpus / "0.txt").write_text("a")
    tiny = replace(SETTINGS, val_fraction=0.9, test_fraction=0.0)
    assert "leaves nothing to train on" in refusal(run, corpus / "0.txt", tmp_path / "h", tiny)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--dataset: must be given"]),
        (["--dataset=x"], ["--out: must be given"]),
        (["--dataset=x", "--out=y", "--val_fraction=1"], ["--val_fraction: ", "leaves no text to train on"]),
        (["--dataset=x", "--out=y", "--test_fraction=nan"], ["--val_fraction: ", "leaves no text to train on"]),
        (["--dataset=x", "--out=y", "--test_fraction=-1"], ["--test_fraction=-1: -1.0 is not a non-negative number"]),
        (
            ["--dataset=x", "--out=y", "--val_fraction=.5", "--test_fraction=.5"],
            ["--val_fraction: with"],
        ),
        (
            ["--dataset=x", "--out=y", "--shard_tokens=0"],
            ["--shard_tokens=0: 0 is not an integer in the range [1, "],
        ),
        (["--dataset=x", "--out=y", "--threads=-1"], ["--threads=-1: -1 is not"]),
        (["--dataset=x", "--out=y", "--tokenizer=gtp2"], ["--tokenizer: unknown tokenizer", "did you mean gpt2?"]),
        (["--dataset=none*.txt", "--out=y", "--tokenizer=byte"], ["--dataset: no file"]),
        (["--dataset=x", "--out=/proc/y"], ["--out=/proc/y: "]),
    ],
)
def test_flags_are_checked_in_one_line(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["prepare", *flags]) == 2
    assert_one_line(capsys.readouterr().err, *words)
