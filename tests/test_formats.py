"""Texts are read as they lie: the same tokens from whatever holds them, and a line for what holds none."""

import bz2
import csv
import gzip
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_line, data_of, make_text
from test_prepare import EOT, SETTINGS, Stop, contents, refusal, run, small_bpe, whole

import main
from corpus import files as corpus_files
from corpus import formats, load_documents
from corpus import prepare as prepare_module
from corpus.files import RowFiles, TextFiles
from corpus.prepare import Output
from runtime.errors import StorageError

TEXTS = [*(f"A row of number {i}.\nand a line\n" * (i % 3) for i in range(11)), "é☃, \"so\"\r\nthey 'say'", "😀"]
FULL = [text for text in TEXTS if text]
WHOLE = replace(SETTINGS, val_fraction=0.0, test_fraction=0.0, shard_tokens=9000)
SPLIT = {"val_fraction": 0.2, "test_fraction": 0.1, "context_len": 4}


@pytest.fixture
def bpe(monkeypatch):
    """A tokenizer "gpt2" that needs no download."""
    tokenizer = small_bpe()
    for module in (prepare_module, load_documents):
        monkeypatch.setattr(module, "new_tokenizer", lambda *_: tokenizer)
    return tokenizer


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def lz4(data: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    stream = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(stream, "lz4") as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lz4": lz4,
}


def json_lines(path: Path, texts: list) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def comma_separated(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])


def parquet(path: Path, texts: list) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"id": range(len(texts)), "text": texts})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=3)


def arrow_ipc(new: str) -> Callable[[Path, list], None]:
    def write(path: Path, texts: list) -> None:
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"id": range(len(texts)), "text": texts})
        with getattr(pytest.importorskip("pyarrow.ipc"), new)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)

    return write


ROWS = {
    ".jsonl": json_lines,
    ".csv": comma_separated,
    ".parquet": parquet,
    ".arrow": arrow_ipc("new_stream"),
    ".feather": arrow_ipc("new_file"),
}


def joined(bpe, texts: list[str]) -> np.ndarray:
    return np.concatenate([np.concatenate([[EOT], bpe.encode(text)]) for text in texts])


def tokens_of(out: Path, index: dict) -> np.ndarray:
    """All tokens of the shards, read by numpy alone."""
    names = [shard["file"] for part in index["splits"].values() for shard in part["shards"]]
    return np.concatenate([np.fromfile(out / name, np.uint16, offset=1024) for name in names])


def ids(split) -> np.ndarray:
    return split.tokens[0 : split.num_tokens]


def all_of(data) -> np.ndarray:
    return np.concatenate([ids(split) for split in (data.train, data.val, data.test) if split])


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "packer"), [(kind, ".gz") for kind in ROWS] + [(".jsonl", ".zst"), (".csv", ".zst"), (".arrow", ".zst")]
)
def test_rows_are_documents_prepared_or_not(tmp_path, bpe, monkeypatch, kind, packer):
    """Tasks of two rows, of which the third begins inside a group of three."""
    monkeypatch.setattr(RowFiles, "step", 2)
    plain, packed = tmp_path / f"rows{kind}", tmp_path / f"rows{kind}{packer}"
    ROWS[kind](plain, TEXTS)
    packed.write_bytes(PACKERS[packer](plain.read_bytes()))
    index = run(plain, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out", index)
    np.testing.assert_array_equal(tokens, joined(bpe, FULL))
    assert (index["documents"], index["empty_documents"], index["bad_rows"]) == (len(FULL), len(TEXTS) - len(FULL), 0)
    given = dict(data_dir=tmp_path, **SPLIT)
    data, again = (data_of(str(path), "gpt2", **given) for path in (plain, packed))
    np.testing.assert_array_equal(all_of(data), tokens)
    assert data.sha256 == again.sha256 and (all_of(again) == tokens).all()
    for name in ("train", "val", "test"):
        split, known = getattr(data, name), index["splits"][name]
        assert (split.num_tokens, split.num_bytes) == (known["tokens"], known["bytes"])
    monkeypatch.setattr(load_documents, "prepare", None)  # what was made is kept
    rows = data_of(str(packed), "gpt2", whole=True, **given)
    assert rows.sha256 == data.sha256 and (ids(rows.train) == tokens).all() and rows.train is rows.val


@pytest.mark.parametrize("name", ["char", "byte"])
def test_rows_without_an_end_token_are_joined_by_newlines(tmp_path, name):
    json_lines(tmp_path / "rows.jsonl", TEXTS)
    run(tmp_path / "rows.jsonl", tmp_path / "out", replace(SETTINGS, tokenizer=name))
    tokens, prepared = whole(tmp_path / "out", name)
    data = data_of(str(tmp_path / "rows.jsonl"), name, data_dir=tmp_path, **SPLIT)
    np.testing.assert_array_equal(all_of(data), tokens)
    assert data.tokenizer.decode(tokens) == "\n".join(FULL)
    assert data.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    assert [s.num_bytes for s in (data.train, data.val, data.test)] == [
        s.num_bytes for s in (prepared.train, prepared.val, prepared.test)
    ]


def test_another_vocabulary_than_the_rows(tmp_path):
    json_lines(tmp_path / "a.jsonl", ["abc", "abba"])
    json_lines(tmp_path / "b.jsonl", ["ab", "aλc"])
    given = dict(data_dir=tmp_path, val_fraction=0.5, test_fraction=0.0, context_len=1)
    known = data_of(str(tmp_path / "a.jsonl"), "char", **given).tokenizer
    strange = dict(vocabulary=known, **given)
    message = refusal(data_of, str(tmp_path / "b.jsonl"), "char", **strange)
    assert "'λ' at 1; set config.unknown_characters" in message
    for choice, want in (("drop", "ab\nac"), ("replace", "ab\na\nc")):
        data = data_of(str(tmp_path / "b.jsonl"), "char", unknown_characters=choice, **strange)
        assert known.decode(all_of(data)) == want
        assert data.train.num_bytes + data.val.num_bytes == len(want)


BAD = {
    ".jsonl": {
        b'{"body": "x"}\n': "has no 'text' but body",
        b'{"text": null}\n': "is null",
        b'{"text": 7}\n': "is no text but int",
        b'{"text": "x"\n': "is not JSON (",
        b"[1]\n": "is no JSON object but list",
        b'{"text": "\\ud800"}\n': "is not UTF-8 at character 0",
        b'{"text": "\xff"}\n': "is not JSON ('utf-8' codec",
        b"[" * 70 + b"]" * 70 + b"\n": "is nested too deeply",
        b'{"text": "x", "n": ' + b"1" * 99 + b"}\n": "holds a number of 99 digits",
    },
    ".csv": {b"x\n": "has no 'text'", b"1,\xff\n": "is not UTF-8 at character 0"},
}


@pytest.mark.parametrize(("kind", "row", "why"), [(kind, row, why) for kind in BAD for row, why in BAD[kind].items()])
def test_a_bad_row_is_named_and_left_out_on_demand(tmp_path, bpe, capsys, kind, row, why):
    path = tmp_path / f"rows{kind}"
    ROWS[kind](path, ["one", "two", "three"])
    head, rest = path.read_bytes().split(b"1,two" if kind == ".csv" else b'{"id": 1', 1)
    path.write_bytes(head + row + (b"1,two" if kind == ".csv" else b'{"id": 1') + rest)
    message = refusal(run, path, tmp_path / "out", WHOLE)
    assert message.startswith(f"config.dataset: {path}, row 2: {why}")
    index = run(path, tmp_path / "out", replace(WHOLE, skip_bad_rows=True))  # goes on from where it stopped
    np.testing.assert_array_equal(tokens_of(tmp_path / "out", index), joined(bpe, ["one", "two", "three"]))
    shown = capsys.readouterr()
    assert f"warning: {path}, row 2: {why}" in shown.err and "1 bad left out" in shown.out
    given = dict(data_dir=tmp_path, whole=True, **SPLIT)
    assert refusal(data_of, str(path), "gpt2", **given) == message
    said: list[str] = []
    data = data_of(str(path), "gpt2", skip_bad_rows=True, say=said.append, **given)
    assert data.train.num_tokens == index["splits"]["train"]["tokens"]
    assert said == [f"warning: {path} has 1 bad rows, which are left out"]


def test_without_a_place_for_shards_one_line_says_so(tmp_path):
    json_lines(tmp_path / "rows.jsonl", TEXTS)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/\.cache: Not a directory, .*; set config\.data_dir to"):
        data_of(str(tmp_path / "rows.jsonl"), "byte", data_dir=tmp_path / "file", **SPLIT)


def test_a_null_of_parquet_is_a_bad_row_and_many_are_counted(tmp_path, bpe, capsys, monkeypatch):
    monkeypatch.setattr(RowFiles, "step", 2)
    parquet(tmp_path / "rows.parquet", [*TEXTS, *[None] * 9, "last"])
    assert "row 14: is null" in refusal(run, tmp_path / "rows.parquet", tmp_path / "out", WHOLE)
    index = run(tmp_path / "rows.parquet", tmp_path / "out", replace(WHOLE, skip_bad_rows=True))
    assert (index["bad_rows"], capsys.readouterr().err.count("left out")) == (9, prepare_module.BAD_ROWS_SHOWN)
    np.testing.assert_array_equal(tokens_of(tmp_path / "out", index), joined(bpe, [*FULL, "last"]))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_stopped_at_any_task_end_with_the_same_bytes(tmp_path, bpe, monkeypatch, kind):
    monkeypatch.setattr(RowFiles, "step", 2)
    for i in range(2):
        ROWS[kind](tmp_path / f"{i}{kind}", [*TEXTS, None])
    chosen = replace(SETTINGS, skip_bad_rows=True, shard_tokens=100)
    index = run(tmp_path / f"*{kind}", tmp_path / "whole", chosen)
    monkeypatch.setattr(prepare_module, "SAVE_EVERY", 0.0)
    add, stops = Output.add, 0

    def stopping(self, task, result):
        add(self, task, result)
        raise Stop

    monkeypatch.setattr(Output, "add", stopping)
    while not (tmp_path / "out" / "index.json").exists():
        try:
            run(tmp_path / f"*{kind}", tmp_path / "out", chosen)
        except Stop:
            stops += 1
    assert stops == 15 and index["bad_rows"] == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_rows_by_two_threads_are_those_of_one(tmp_path):
    json_lines(tmp_path / "rows.jsonl", TEXTS * 90)
    for threads in (1, 2):
        run(tmp_path / "rows.jsonl", tmp_path / f"{threads}", replace(SETTINGS, tokenizer="byte"), threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_names_say_which_rows_are_held_out(tmp_path, bpe, capsys):
    for name, texts in {"test-0": ["the test"], "train-0": TEXTS, "validation-0": ["one", "two"]}.items():
        json_lines(tmp_path / f"{name}.jsonl", texts)
    index = run(tmp_path / "*.jsonl", tmp_path / "out")
    assert {name: part["tokens"] for name, part in index["splits"].items()} == {
        "train": len(joined(bpe, FULL)),
        "val": len(joined(bpe, ["one", "two"])),
        "test": len(joined(bpe, ["the test"])),
    }
    assert "for validation, by their names: validation-0.jsonl" in capsys.readouterr().out
    said = []
    data_of(tmp_path / "*.jsonl", "gpt2", data_dir=tmp_path, **SPLIT | {"context_len": 2, "say": said.append})
    assert said.count("for validation, by their names: validation-0.jsonl") == 1
    (tmp_path / "validation-0.jsonl").unlink()
    data = data_of(str(tmp_path / "*.jsonl"), "gpt2", data_dir=tmp_path, **SPLIT | {"context_len": 2})
    assert bpe.decode(ids(data.test)) == "<|endoftext|>the test"
    assert bpe.decode(np.append(ids(data.train), ids(data.val))) == bpe.decode(joined(bpe, FULL))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, bpe):
    for kind, has in {".parquet": "its columns of text are text", ".csv": "its columns are id, text"}.items():
        ROWS[kind](tmp_path / f"rows{kind}", TEXTS)
        message = refusal(run, tmp_path / f"rows{kind}", tmp_path / "out", replace(WHOLE, text_column="id"[:1] + "x"))
        assert message == f"{tmp_path}/rows{kind}: has no column of text 'ix'; {has}: set config.text_column"
    data = data_of(str(tmp_path / "rows.csv"), "gpt2", text_column="id", data_dir=tmp_path, whole=True, **SPLIT)
    np.testing.assert_array_equal(ids(data.train), joined(bpe, [str(i) for i in range(len(TEXTS))]))


def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 1000)
    bomb = gzip.compress(b'{"text": "' + b"\0" * 10**6)
    (tmp_path / "bomb.jsonl.gz").write_bytes(bomb)
    assert "it has a line of more than 1,000 bytes" in refusal(run, tmp_path / "bomb.jsonl.gz", tmp_path / "out")
    monkeypatch.setattr("os.sysconf", lambda name: 500)
    (tmp_path / "bomb.txt.gz").write_bytes(bomb)
    given = dict(data_dir=tmp_path, **SPLIT)
    message = refusal(data_of, str(tmp_path / "bomb.txt.gz"), "byte", **given)
    assert "does not fit into memory; make shards with `main.py prepare`" in message


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.jsonl.xz", "rows.parquet", "rows.arrow"])
def test_a_file_that_was_cut_off_is_named(tmp_path, name):
    json_lines(tmp_path / "rows.jsonl", TEXTS * 40)
    if name in ("rows.parquet", "rows.arrow"):
        ROWS[Path(name).suffix](tmp_path / name, TEXTS * 40)
    else:
        (tmp_path / name).write_bytes(PACKERS[Path(name).suffix]((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    message = refusal(run, tmp_path / name, tmp_path / "out", replace(SETTINGS, tokenizer="byte"))
    assert message.startswith(f"{tmp_path / name}: cannot be read (") and message.endswith("; copy it again")


# --- Columns of Parquet ----------------------------------------------------------------------------------------------


def test_without_pyarrow_its_files_are_refused_in_one_line(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, data in {"a.parquet": b"PAR1\x15", "a.txt.zst": b"\x28\xb5\x2f\xfd"}.items():
        (tmp_path / name).write_bytes(data)
        message = refusal(run, tmp_path / name, tmp_path / "out", replace(SETTINGS, tokenizer="byte"))
        assert message == f"{tmp_path}/{name}: needs pyarrow; pip install -r requirements-data.txt"


@pytest.mark.parametrize("kind", ["string_view", "binary", "large_binary", "binary_view", "large_string"])
@pytest.mark.parametrize("in_a_dictionary", [False, True])
def test_a_column_of_any_type_of_text_gives_the_same_tokens(tmp_path, bpe, kind, in_a_dictionary):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if in_a_dictionary and kind.endswith("view"):
        pytest.skip("Arrow has no dictionaries of views")
    texts = ["A hérald", "", "☃ two", "A hérald", ""]
    column = pa.array(texts).cast(getattr(pa, kind)())
    pq.write_table(
        pa.table({"body": column.dictionary_encode() if in_a_dictionary else column}),
        tmp_path / "rows",
        row_group_size=2,
    )
    run(tmp_path / "rows", tmp_path / "out", replace(WHOLE, text_column="body"))  # known without its ending
    tokens = np.fromfile(tmp_path / "out" / "train_000000.bin", np.uint16, offset=1024)
    assert bpe.decode(tokens) == "".join(f"<|endoftext|>{text}" for text in texts if text)


def test_a_row_that_is_no_utf8_is_named_and_bytes_take_it(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.array([b"A text", b"A \xff"])
    pq.write_table(pa.table({"text": column}), tmp_path / "bytes.parquet")
    strings = pa.Array.from_buffers(pa.string(), 2, column.buffers())  # as a careless writer says it
    pq.write_table(pa.table({"text": strings}), tmp_path / "strings.parquet")
    chosen = replace(WHOLE, tokenizer="char")
    for name in ("bytes", "strings"):
        message = refusal(run, tmp_path / f"{name}.parquet", tmp_path / "a", chosen)
        assert f"{name}.parquet, row 2: is not UTF-8 at byte 2; mend it" in message
        run(tmp_path / f"{name}.parquet", tmp_path / name, replace(chosen, skip_bad_rows=True))
        tokens = np.fromfile(tmp_path / name / "train_000000.bin", np.uint16, offset=1024)
        assert "".join("\n Aetx"[token] for token in tokens) == "A text"
    run(tmp_path / "bytes.parquet", tmp_path / "c", replace(chosen, tokenizer="byte"))
    tokens = np.fromfile(tmp_path / "c" / "train_000000.bin", np.uint16, offset=1024)
    assert tokens.astype(np.uint8).tobytes() == b"A text\nA \xff"


# --- Texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_text_is_that_text(tmp_path, monkeypatch, packer):
    monkeypatch.setattr(TextFiles, "step", 150)
    monkeypatch.setattr(corpus_files, "KEPT", 300)
    text = make_text(60).encode()
    (tmp_path / "plain.txt").write_bytes(text)
    (tmp_path / f"text.txt{packer}").write_bytes(PACKERS[packer](text[:500]) + PACKERS[packer](text[500:]))
    for name in ("char", "byte"):
        given = dict(data_dir=tmp_path / name, **SPLIT)
        want, have = (data_of(str(tmp_path / file), name, **given) for file in ("plain.txt", f"text.txt{packer}"))
        assert want.sha256 == have.sha256 and want.tokenizer.to_dict() == have.tokenizer.to_dict()
        for a, b in ((want.train, have.train), (want.val, have.val), (want.test, have.test)):
            assert (a.tokens == b.tokens).all() and a.num_bytes == b.num_bytes
        run(tmp_path / f"text.txt{packer}", tmp_path / f"out-{name}", replace(SETTINGS, tokenizer=name))
        np.testing.assert_array_equal(whole(tmp_path / f"out-{name}", name)[0], all_of(want))


def test_a_compressed_text_is_unpacked_as_it_is_read(tmp_path, monkeypatch, bpe):
    """No more than what lies around the place is in memory, and nothing is unpacked twice but to begin again."""
    monkeypatch.setattr(TextFiles, "step", 3000)
    monkeypatch.setattr(corpus_files, "LOOK_FOR_CUT", 100)
    monkeypatch.setattr(corpus_files, "KEPT", 5000)
    text = make_text(100_000)
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    opened, most = [], []
    source_open, read = formats.Source.stream, corpus_files._TextFile.read
    monkeypatch.setattr(formats.Source, "stream", lambda self: opened.append(1) or source_open(self))
    monkeypatch.setattr(
        corpus_files._TextFile, "read", lambda self, *where: (read(self, *where), most.append(len(self._data)))[0]
    )
    index = run(tmp_path / "text.txt.gz", tmp_path / "out", replace(SETTINGS, shard_tokens=10**6))
    assert bpe.decode(tokens_of(tmp_path / "out", index)) == "<|endoftext|>" + text
    assert len(opened) <= 5 and max(most) < 2**20 + 20_000 < len(text) / 2


def test_a_directory_is_searched_for_texts(tmp_path, bpe):
    folder = tmp_path / "texts"
    for name in ("b.txt", "a/z.md", "a/a.txt.gz", ".hidden/x.txt", "a/.y.txt", "c.py", "a/empty.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith("gz") else name.encode())
    (folder / "a" / "empty.txt").write_bytes(b"")
    said: list[str] = []
    data = data_of(str(folder), "gpt2", data_dir=tmp_path, whole=True, say=said.append, **SPLIT)
    np.testing.assert_array_equal(ids(data.train), joined(bpe, ["a/a.txt.gz", "a/z.md", "b.txt"]))
    assert said == [f"{folder}: 4 files; left out by the endings of their names: c.py"]
    index = run(folder, tmp_path / "out", WHOLE)
    np.testing.assert_array_equal(tokens_of(tmp_path / "out", index), ids(data.train))
    assert (index["documents"], index["empty_documents"]) == (3, 1)
    (folder / "rows.csv").write_text("text\n")
    assert "has files of rows, as" in refusal(run, folder, tmp_path / "b", WHOLE)
    (tmp_path / "none").mkdir()
    assert "has no file that is named as a text" in refusal(run, tmp_path / "none", tmp_path / "c", WHOLE)


def test_a_data_set_that_was_saved_to_disk(tmp_path, bpe):
    """By the library `datasets` itself, of which a cache lies beside the data, as `map` leaves them."""
    datasets = pytest.importorskip("datasets")
    parts = {"train": TEXTS, "test": ["the test"]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()})
    saved.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 1})
    arrow_ipc("new_stream")(tmp_path / "saved" / "train" / "cache-1234.arrow", ["of the cache"])
    check_saved(tmp_path / "saved", tmp_path, bpe)


def test_a_data_set_in_the_form_that_is_saved_to_disk(tmp_path, bpe):
    for name, rows in {"train": TEXTS, "test": ["the test"]}.items():
        folder = tmp_path / "saved" / name
        folder.mkdir(parents=True)
        arrow_ipc("new_stream")(folder / "data-00000-of-00001.arrow", rows)
        arrow_ipc("new_stream")(folder / "cache-1234.arrow", ["of the cache"])
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    check_saved(tmp_path / "saved", tmp_path, bpe)


def check_saved(saved: Path, data_dir: Path, bpe) -> None:
    data = data_of(str(saved), "gpt2", data_dir=data_dir, **SPLIT | {"context_len": 2})
    np.testing.assert_array_equal(np.append(ids(data.train), ids(data.val)), joined(bpe, FULL))
    assert bpe.decode(ids(data.test)) == "<|endoftext|>the test" and data.val.num_tokens < data.train.num_tokens


# --- What is not read -------------------------------------------------------------------------------------------------


def write_tar(path: Path, data: bytes) -> None:
    (path.parent / "inside").write_bytes(data)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        archive.add(path.parent / "inside")


def write_zip(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside", data)


def mds_shard(path: Path, data: bytes) -> None:
    """One sample, as the format is described: how many, where each begins, then a description, then the samples."""
    about = json.dumps({"column_encodings": ["str"], "column_names": ["text"], "format": "mds"}).encode()
    begin = 4 * 3 + len(about)
    sample = np.array([len(data)], "<u4").tobytes() + data
    path.write_bytes(np.array([1, begin, begin + len(sample)], "<u4").tobytes() + about + sample)


REFUSED = {
    "text.txt.gz.gz": (
        lambda path, data: path.write_bytes(gzip.compress(gzip.compress(data))),
        "is gzip, not plain text; decompress it",
    ),
    "text.zip": (write_zip, "is a zip archive"),
    "text.tar": (write_tar, "is a tar archive, not plain text; write its texts to text files"),
    "text.tar.gz": (write_tar, "is a tar archive"),
    "tokens.npy": (lambda path, data: np.save(path.open("wb"), np.frombuffer(data, np.uint8)), "is NumPy's array"),
    "shard.mds": (mds_shard, "is an MDS shard"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_inside_another_file_is_refused_by_what_it_is(tmp_path, capsys, name):
    write, words = REFUSED[name]
    path, fractions = tmp_path / name, {"val_fraction": 0.1, "test_fraction": 0.0}
    write(path, make_text(40).encode())
    for tokenizer in ("char", "byte"):
        message = refusal(data_of, str(path), tokenizer, data_dir=tmp_path, context_len=4, **fractions)
        assert message.startswith(f"config.dataset: {path} {words}")
        assert message == refusal(run, path, tmp_path / "out", replace(SETTINGS, tokenizer=tokenizer))
    assert main.main(["prepare", f"--dataset={path}", f"--out={tmp_path / 'out'}", "--text_column=nothing"]) == 2
    assert_one_line(capsys.readouterr().err, f"--dataset: {path} {words}")


@pytest.mark.parametrize("text", [b"PAR1 is a word", b"BZh is too", b"PK", b'{"a": 1}\n', b"ARROW1 flies", b"%PDF\n"])
def test_a_text_that_only_looks_like_one_is_a_text(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text * 30)
    data = data_of(str(path), "byte", data_dir=tmp_path, val_fraction=0.1, test_fraction=0.0, context_len=2)
    assert ids(data.train).astype(np.uint8).tobytes() == (text * 30)[: len(text) * 27]
