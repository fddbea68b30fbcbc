"""Shards on disk read as one array, checked before use, and nothing grows with them but their list."""

import builtins
import gzip
import itertools
import json
import os
import resource
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import refusal, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import run_lib
import train_lib
from corpus import load_shards as load_shards_module
from corpus import shards
from corpus.dataset import ORDERS, SPLITS, Split, Wanted, count_bytes
from corpus.load_shards import holds_shards, load_shards
from corpus.shards import ShardedTokens, header, is_shard, read_shard, sample_hash
from corpus.tokenizer import ByteTokenizer, CharTokenizer, TiktokenTokenizer
from input_pipeline import IGNORED, Batches, eval_batches
from reports import summary


def llm_c(path: Path, tokens, magic: int = 20240520, version: int = 1, kind: type = np.uint16) -> Path:
    """A shard as llm.c's description of the format says: 256 int32, then the tokens."""
    first = np.zeros(256, np.int32)
    first[0], first[1], first[2] = magic, version, len(tokens)
    path.write_bytes(first.tobytes() + np.asarray(tokens, kind).tobytes())
    return path


def arange_shards(folder: Path, sizes, kind=np.uint16) -> list[Path]:
    """Shards that hold 0, 1, 2, ... one after the other."""
    folder.mkdir(exist_ok=True)
    ends = np.cumsum([0, *sizes])
    return [llm_c(folder / f"part_{i:03}.bin", np.arange(ends[i], ends[i + 1]), kind=kind) for i in range(len(sizes))]


def load(dataset, tokenizer="byte", **changes):
    given = dict(data_dir=Path(changes.pop("data_dir", "/nowhere")), val_fraction=0.1, test_fraction=0.0, context_len=4)
    return load_shards(Wanted(str(dataset), tokenizer, **(given | {"say": lambda line: None} | changes)))


# --- The format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "magic", "version"), [("uint16", 20240520, 1), ("uint32", 20240801, 7)])
def test_both_headers_are_written_and_read_as_llm_c_does(tmp_path, kind, magic, version):
    path = llm_c(tmp_path / "a.bin", [3, 1, 2], magic, version, np.dtype(kind))
    assert header(3, np.dtype(kind)) == path.read_bytes()[:1024] and is_shard(path)
    shard = read_shard(path)
    assert (shard.num_tokens, shard.dtype, shard.offset) == (3, np.dtype(kind), 1024)
    assert ShardedTokens([shard], 4)[0:3].tolist() == [3, 1, 2]


def test_nanogpts_files_have_no_header_and_its_pickle_is_left_alone(tmp_path, monkeypatch):
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(7, dtype=np.uint16).tofile(tmp_path / "val.bin")
    bomb = tmp_path / "meta.pkl"
    bomb.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    opened, real = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))
    data = load(tmp_path, data_dir=tmp_path)
    assert data.train.tokens[0:40].tolist() == list(range(40)) and data.val.tokens[0:9].tolist() == list(range(7))
    assert bomb not in opened and not (tmp_path / "ran").exists()
    assert "a pickle beside them is never opened" in refusal(load, tmp_path, "char")
    assert load(tmp_path, "char", data_dir=tmp_path, vocabulary=CharTokenizer([chr(65 + i) for i in range(40)])).train


def megatron(path: Path, documents, kind: type, code: int) -> Path:
    """A .bin and its .idx as Megatron-LM's IndexedDataset describes them."""
    np.concatenate(documents).astype(kind).tofile(path)
    lengths = [len(tokens) for tokens in documents]
    begins = np.cumsum([0, *lengths[:-1]]) * np.dtype(kind).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    of_documents = np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    index = head + np.array(lengths, "<i4").tobytes() + np.array(begins, "<i8").tobytes() + of_documents
    path.with_suffix(".idx").write_bytes(index)
    return path


@pytest.mark.parametrize(("kind", "code"), [(np.int32, 4), (np.uint16, 8), (np.int64, 5), (np.uint8, 1)])
def test_megatrons_index_says_the_type(tmp_path, kind, code):
    documents = [[3, 1, 2], [5] * 40, [7, 200]]
    path = megatron(tmp_path / "web_text_document.bin", documents, kind, code)
    assert is_shard(path) and holds_shards(str(path), "byte")
    data = load(path, data_dir=tmp_path, context_len=2)
    assert data.train.tokens[0:99].tolist() == np.concatenate(documents)[:40].tolist() and data.train.num_tokens == 40
    path.rename(tmp_path / "train.bin")
    path.with_suffix(".idx").rename(tmp_path / "train.idx")
    path = tmp_path / "train.bin"
    assert read_shard(path).dtype.itemsize == np.dtype(kind).itemsize
    cut_short(path)
    assert "it is cut short" in refusal(read_shard, path)
    index = path.with_suffix(".idx")
    for damaged in (index.read_bytes()[:40], index.read_bytes()[:17] + b"\x06" + index.read_bytes()[18:]):
        index.write_bytes(damaged)
        assert "train.idx: is no index that can be read" in refusal(read_shard, path)


@pytest.mark.parametrize(
    ("kind", "vocab_size", "ids"),
    [
        (np.uint16, 300, range(300)),
        (np.uint32, 300, range(300)),
        (np.int64, 300, range(300)),
        (np.uint16, 2**16, range(40_000, 60_000)),
        (np.uint32, 100_000, range(70_000, 100_000)),
        (np.uint32, 100_000, [7, 3, 9]),
        (np.int64, 100_000, range(70_000, 100_000)),
        (np.uint16, 300, [5, 0] * 7),  # too few to tell that every second one is 0
        (np.uint16, 300, [0] * 99),
        (np.uint32, 100_000, [0] * 99),
    ],
)
def test_the_type_of_headerless_tokens_is_told_by_their_vocabulary_and_content(tmp_path, kind, vocab_size, ids):
    np.array(ids, kind).tofile(tmp_path / "train.bin")
    shard = read_shard(tmp_path / "train.bin", vocab_size)
    assert shard.dtype.itemsize == np.dtype(kind).itemsize
    assert ShardedTokens([shard], vocab_size)[0 : len(ids)].tolist() == list(ids)


def test_tokens_of_two_bytes_are_none_of_a_large_vocabulary(tmp_path):
    np.arange(600, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert "for a vocabulary of 100,000" in refusal(read_shard, tmp_path / "train.bin", 100_000)
    np.arange(601, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert "for a vocabulary of 100,000" in refusal(read_shard, tmp_path / "train.bin", 100_000)
    np.arange(80, dtype=np.uint32).tofile(tmp_path / "train.bin")
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert "uint32 tokens and" in refusal(load, tmp_path, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: np.arange(90, dtype=np.float32).tofile(path), "are no token ids of two, four or eight bytes"),
        (lambda path: np.arange(64_000, 64_099, dtype=np.uint32).tofile(path), "are no token ids"),
        (lambda path: np.save(path.open("wb"), np.arange(90, dtype=np.uint16)), "is NumPy's array"),
        (lambda path: path.write_bytes(gzip.compress(bytes(90))), "is gzip"),
        (os.mkfifo, "cannot be read (no regular file)"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read (no regular file)"),
    ],
)
def test_what_is_called_as_headerless_tokens_and_holds_none_is_refused(tmp_path, write, words):
    """Read as they are, the numbers would be trained on; a pipe would be waited for."""
    write(tmp_path / "train.bin")
    assert words in refusal(read_shard, tmp_path / "train.bin", 50_000)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def no_header(path: Path) -> None:
    path.write_bytes(b"\1\2\3\4" + path.read_bytes()[4:])


def another_version(path: Path) -> None:
    llm_c(path, range(100), version=2)


def negative(path: Path) -> None:
    path.write_bytes(np.array([20240520, 1, -5], np.int32).tobytes() + path.read_bytes()[12:])


FAULTS = [
    (cut_short, "100 tokens need 1,224; it is cut short"),
    (grow, "it does not end there"),
    (no_header, f"begins with {0x04030201}, not a shard's magic (20240520 or 20240801)"),
    (another_version, "has version 2 under magic 20240520, expected 1"),
    (negative, "has 1,224 bytes where -5 tokens"),
    (lambda path: llm_c(path, []), "holds no tokens"),
    (lambda path: path.write_bytes(b""), "begins with 0"),
    (lambda path: path.write_bytes(path.read_bytes()[:700]), "it is cut short"),
    (lambda path: path.unlink() or path.symlink_to("gone"), "cannot be read"),
    (lambda path: llm_c(path, [*range(99), 256]), "token 99 is 256, outside the vocabulary of 256"),
    (lambda path: llm_c(path, range(9), 20240801, 7, np.uint32), "uint16 tokens and"),
]


@pytest.mark.parametrize(("damage", "words"), FAULTS, ids=range(len(FAULTS)))
def test_a_damaged_shard_is_named(tmp_path, damage, words):
    arange_shards(tmp_path / "s", [50, 70, 80])
    path = llm_c(tmp_path / "s" / "part_001.bin", range(100))
    assert load(tmp_path / "s", data_dir=tmp_path).train.num_tokens == (50 + 100 + 80) * 9 // 10
    damage(path)
    message = refusal(load, tmp_path / "s", data_dir=tmp_path)
    assert words in message and str(path) in message


def test_a_headerless_file_of_an_odd_length_is_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\0\0\0")
    assert "3 bytes, an odd number" in refusal(read_shard, tmp_path / "train.bin")


def test_an_id_between_the_samples_is_found_when_it_is_used(tmp_path):
    tokens = np.zeros(40_000, np.uint16)
    tokens[3000] = 300
    data = load(llm_c(tmp_path / "a.bin", tokens), data_dir=tmp_path, context_len=50)
    batches = Batches(data.train, 50, 1, seed=0, order="sequential")
    batches(3000 // 50 - 1 - 1)
    assert "a.bin: token 3,000 is 300" in refusal(batches, 3000 // 50 - 1)


# --- One array --------------------------------------------------------------------------------------------------------

SIZES = [5, 1, 17, 3, 30]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> ShardedTokens:
    paths = arange_shards(tmp_path_factory.mktemp("shards") / "s", SIZES)
    return ShardedTokens([read_shard(path) for path in paths], sum(SIZES))


@given(data=st.data())
def test_slices_are_those_of_one_array(sharded, data):
    whole, total = np.arange(sum(SIZES)), sum(SIZES)
    first, last = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    part = ShardedTokens(sharded._shards, total, first, last)
    start, stop = data.draw(st.tuples(st.integers(0, total + 9), st.integers(0, total + 9)))
    np.testing.assert_array_equal(part[start:stop], whole[first:last][start:stop])
    assert len(part) == last - first


def test_bytes_are_counted_in_parts(sharded, monkeypatch):
    monkeypatch.setattr("corpus.dataset.COUNTED_AT_ONCE", 7)
    tokenizer = CharTokenizer([chr(100 + i) for i in range(sum(SIZES))])  # of two bytes from the 28th on
    for size in (0, 1, 7, 28, 29, sum(SIZES)):
        assert count_bytes(sharded, size, tokenizer) == size + max(0, size - 28)


@pytest.mark.parametrize("order", ORDERS)
@given(context_len=st.integers(1, 20), batch_size=st.integers(1, 5), step=st.integers(0, 50))
@settings(max_examples=25)
def test_batches_do_not_know_shards_and_rows_go_to_any_number_of_processes(
    sharded, order, context_len, batch_size, step
):
    plain = Batches(Split(np.arange(sum(SIZES), dtype=np.uint16), 1), context_len, batch_size, 3, order)
    batches = Batches(Split(sharded, None), context_len, batch_size, 3, order)
    np.testing.assert_array_equal(batches(step), plain(step))
    for processes in range(1, batch_size + 1):
        ends = [batch_size * i // processes for i in range(processes + 1)]
        rows = [batches.rows(step, *pair) for pair in itertools.pairwise(ends)]
        np.testing.assert_array_equal(np.concatenate(rows), plain(step))


@pytest.mark.parametrize("context_len", [1, 4, 7, 55])
def test_every_token_but_the_first_is_predicted_once_over_all_shards(sharded, context_len):
    rows = np.concatenate(list(eval_batches(Split(sharded, None), context_len, 3)))
    predicted = rows[:, 1:] != IGNORED
    np.testing.assert_array_equal(rows[:, 1:][predicted], np.arange(1, sum(SIZES)))
    np.testing.assert_array_equal(rows[:, :-1][predicted], np.arange(sum(SIZES) - 1))


def test_few_shards_are_mapped_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAPPED_AT_ONCE", 3)
    tokens = ShardedTokens([read_shard(path) for path in arange_shards(tmp_path / "s", [2] * 40)], 80)
    open_files = len(os.listdir("/proc/self/fd"))
    assert [tokens[i : i + 1][0] for i in range(80)] == list(range(80))
    assert len(os.listdir("/proc/self/fd")) <= open_files + 3


def test_a_shard_that_changes_while_it_is_read_is_noticed(tmp_path):
    """Of a map of a file that was cut off, reading alone would end the process, without a word."""
    paths = arange_shards(tmp_path / "s", [7, 5, 6])
    found = [read_shard(path) for path in paths]
    tokens, later = ShardedTokens(found, 18), ShardedTokens(found, 18)
    whole = tokens[0:18].tolist()
    os.replace(llm_c(tmp_path / "new", [3] * 7), paths[0])
    assert tokens[0:18].tolist() == whole == list(range(18))  # what is mapped is still the old file
    assert f"{paths[0]}: was changed while" in refusal(later.__getitem__, slice(2, 4))
    os.truncate(paths[1], 1024 + 2 * 4)
    for start in (7, 11):
        assert f"{paths[1]}: was changed while" in refusal(tokens.__getitem__, slice(start, start + 1))
    assert tokens[12:18].tolist() == later[12:18].tolist() == whole[12:]


def test_ten_billion_tokens_cost_no_more_than_their_list(tmp_path):
    """A hundred sparse shards of a hundred million tokens: 20 GB that take no room on the disk, and none in memory."""
    number, size, before = 100, 100_000_000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(number):
        path = tmp_path / f"web_train_{i:06}.bin"
        path.write_bytes(header(size, np.dtype(np.uint16)))
        os.truncate(path, 1024 + 2 * size)
    llm_c(tmp_path / "web_val_000000.bin", range(60))
    tracemalloc.start()
    data = load(tmp_path, context_len=50, data_dir=tmp_path)
    batches = Batches(data.train, 50, 16, seed=0)
    for step in (0, 10**6, 12_499_999, 10**9, 10**12):
        assert batches(step).shape == (16, 51)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.train.num_tokens == 10**10 and batches.steps(1) == 12_500_000
    assert peak < 2**20  # bytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 1024  # KiB; pages of the samples


# --- Data sets --------------------------------------------------------------------------------------------------------


def test_what_names_shards(tmp_path):
    assert not holds_shards("tiny_shakespeare", "char") and not holds_shards(str(tmp_path), "gpt2")
    assert holds_shards("web/*.bin", "gpt2") and not holds_shards("web/*.txt", "gpt2")
    plain, shard = tmp_path / "firmware.bin", llm_c(tmp_path / "shard.bin", [1])
    plain.write_bytes(b"any bytes")
    assert holds_shards(str(plain), "gpt2") and not holds_shards(str(plain), "byte")  # which takes any file
    assert holds_shards(str(shard), "byte") and holds_shards(str(tmp_path), "byte")


def test_names_say_which_shards_validate_and_test(tmp_path):
    for name, size in {"web_train_0": 9, "web_val_0": 6, "interval": 8, "validation": 7, "my-test": 5}.items():
        llm_c(tmp_path / f"{name}.bin", range(size))
    data = load(tmp_path / "*.bin", data_dir=tmp_path)
    assert [split.num_tokens for split in (data.train, data.val, data.test)] == [17, 13, 5]
    for path in tmp_path.glob("*val*.bin"):
        path.unlink()
    (tmp_path / "my-test.bin").unlink()
    llm_c(tmp_path / "b.bin", range(91))
    data = load(tmp_path / "*.bin", data_dir=tmp_path, val_fraction=0.1, test_fraction=0.07)
    assert [split.num_tokens for split in (data.train, data.val, data.test)] == [83, 10, 7]
    assert data.val.tokens[0:99].tolist() == [*range(83, 91), 0, 1]  # over the end of b.bin
    assert "4 needs 5 tokens in each split, but" in refusal(load, tmp_path, data_dir=tmp_path, val_fraction=0.04)
    for path in tmp_path.glob("*.bin"):
        path.rename(path.with_stem(f"{path.stem}_val"))
    assert "has no shard to train on" in refusal(load, tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train/0", "train"), ("val/0", "val"), ("validation/deep/0", "val"), ("test/0", "test")),
        *(("web_eval_000", "val"), ("dev_000", "val"), ("Heldout-1", "val"), ("held_out/0", "val")),
        *(("val/train_000", "train"), ("train/web_valid_7", "val"), ("developer/evaluate", "train")),
    ],
)
def test_folders_and_more_words_say_the_split(tmp_path, name, split):
    """The folders above the one that all have in common say nothing."""
    folder = tmp_path / "test" / "corpus"
    for i, other in enumerate(("a/web_train_1", "a/web_train_2", "b/val")):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        llm_c(folder / f"{other}.bin", [i] * 30)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    llm_c(folder / f"{name}.bin", [9] * 30)
    data = load(folder / "**" / "*.bin", data_dir=tmp_path)
    have = {word for word in SPLITS if (part := getattr(data, word)) and 9 in part.tokens[0:999]}
    assert have == {split} and f"{name}.bin" in getattr(data, split).files


def test_the_header_names_each_splits_files(tmp_path):
    for name in ("train/0", "train/1", "train/2", "val/3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        llm_c(tmp_path / f"{name}.bin", range(40))
    data = load(tmp_path / "*" / "*.bin", data_dir=tmp_path)
    told = summary._shards(data)
    assert told == "training train/0.bin to train/2.bin (3 files), validation val/3.bin"
    data = load(tmp_path / "val" / "*.bin", data_dir=tmp_path, context_len=2)
    assert summary._shards(data) == "training 3.bin, validation at their end"


def test_all_shards_together_are_one_text(tmp_path):
    llm_c(tmp_path / "a_val.bin", range(50, 59))
    llm_c(tmp_path / "a_train.bin", range(50))
    data = load(tmp_path, data_dir=tmp_path, context_len=200, whole=True)
    assert data.val.tokens[0:99].tolist() == list(range(59)) and data.train is data.val
    assert data.sha256 == load(tmp_path, data_dir=tmp_path).sha256
    assert data.val.holds(58) and not data.val.holds(59)


def test_bytes_of_foreign_shards_are_counted_once_for_validation_and_unknown_for_training(tmp_path, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"hello": 257, "é".encode(): 258}
    tokenizer = TiktokenTokenizer(
        tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    )
    llm_c(tmp_path / "a_train.bin", [300, 257, 32] * 9)
    llm_c(tmp_path / "a_val.bin", [300, 257, 32, 258, 300, 97, 256])
    data = load(tmp_path, "small", data_dir=tmp_path, vocabulary=tokenizer)
    assert data.val.num_bytes == 5 + 1 + 2 + 1 + 2 and data.train.num_bytes is None
    assert data.train.bytes_of(27, tokenizer) == 9 * (5 + 1)
    monkeypatch.setattr(load_shards_module, "count_bytes", None)  # not counted again
    assert load(tmp_path, "small", data_dir=tmp_path, vocabulary=tokenizer).val.num_bytes == 11
    monkeypatch.setattr(load_shards_module, "count_bytes", count_bytes)
    (counted,) = (tmp_path / ".cache").iterdir()
    whole, lines = counted.read_bytes(), []
    for damaged in (b"", b"0", whole[:128] + bytes(8) + whole[136:]):
        counted.write_bytes(damaged)
        again = load(tmp_path, "small", data_dir=tmp_path, vocabulary=tokenizer, say=lines.append)
        assert again.val.num_bytes == 11 and counted.read_bytes() == whole
    assert len(lines) == 3 and all(f"{counted} is damaged" in line for line in lines)


def test_the_hash_stays_with_the_tokens_and_sees_a_change(tmp_path):
    paths = arange_shards(tmp_path / "a", [3000, 7000, 30_000])
    (tmp_path / "b").mkdir()
    for path in paths:
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    digest = lambda folder: sample_hash([read_shard(path) for path in sorted(folder.glob("*.bin"))], 40_000)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    seen = {digest(tmp_path / "b")}
    for start in (0, 15_000, 29_999):  # the first, the middle and the last token of the last shard
        tokens = np.arange(10_000, 40_000)
        tokens[start] ^= 1
        llm_c(tmp_path / "b" / paths[2].name, tokens)
        seen.add(digest(tmp_path / "b"))
    llm_c(tmp_path / "b" / paths[2].name, np.arange(10_000, 39_999))
    seen.add(digest(tmp_path / "b"))
    assert len(seen) == 5


@pytest.mark.slow
def test_a_run_trains_on_shards_and_notices_other_ones(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 900)
    llm_c(tmp_path / "x_train.bin", tokens[:500])
    llm_c(tmp_path / "x_val.bin", tokens[500:])
    config = tiny_config(
        dataset=str(tmp_path), tokenizer="byte", max_steps=2, save_every=1, sample_every=0, sample_tokens=1
    )
    run = train_lib.train(config, tmp_path / "run")
    assert run.history[-1]["val_tokens"] == 399
    assert run.history[-1]["bits_per_byte"] == pytest.approx(run.val_loss / np.log(2))
    assert isinstance(run_lib.load_data(config, print, ByteTokenizer()).train.tokens, ShardedTokens)
    llm_c(tmp_path / "x_train.bin", tokens[1:501])
    config.max_steps = 3
    assert "the text has changed since this run began" in refusal(train_lib.train, config, tmp_path / "run")


# --- Prepared directories ---------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path) -> Path:
    root = tmp_path / "prepared"
    paths = arange_shards(root, [60, 30, 20])
    entries = [{"file": path.name, "tokens": size} for path, size in zip(paths, [60, 30, 20], strict=True)]
    splits = {name: {"shards": part, "bytes": 500} for name, part in {"train": entries[:2], "val": entries[2:]}.items()}
    tokenizer = ByteTokenizer()
    index = {"format": "transformer-jax corpus 1", "tokenizer": "byte", "vocab_size": 256, "splits": splits}
    (root / "index.json").write_text(json.dumps(index | {"fingerprint": tokenizer.fingerprint}))
    (root / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
    return root


def test_the_index_of_a_prepared_directory_is_followed(prepared, tmp_path):
    data = load(prepared)
    assert (data.train.num_tokens, data.val.num_tokens, data.val.num_bytes, data.test) == (90, 20, 500, None)
    assert data.val.tokens[0:99].tolist() == list(range(90, 110))
    index = json.loads((prepared / "index.json").read_text())
    del index["splits"]["val"]  # prepared without one: cut off training's end, whose bytes are counted
    (prepared / "index.json").write_text(json.dumps(index))
    cut = load(prepared, data_dir=tmp_path)
    assert (cut.train.num_tokens, cut.train.num_bytes, cut.val.num_tokens, cut.val.num_bytes) == (81, None, 9, 9)
    assert cut.sha256 != data.sha256


def spoil(name: str, change):
    def damage(root: Path) -> None:
        value = json.loads((root / name).read_text())
        change(value)
        (root / name).write_text(json.dumps(value))

    return damage


def mix(root: Path) -> None:
    spoil("index.json", lambda index: index["splits"]["train"]["shards"].append({"file": "../x.bin", "tokens": 1}))(
        root
    )


INDEX_FAULTS = [
    (spoil("index.json", lambda index: index.pop("splits")), "is no index ('splits' is missing)"),
    (spoil("index.json", lambda index: index.update(format="2")), "its format is '2'"),
    (spoil("index.json", lambda index: index["splits"].update(extra={})), "is no index"),
    (spoil("index.json", lambda index: index["splits"]["val"].update(bytes="many")), "of another type"),
    (spoil("index.json", lambda index: index["splits"]["val"]["shards"][0].update(tokens=19)), "the index says 19"),
    (spoil("index.json", lambda index: [split["shards"].clear() for split in index["splits"].values()]), "no shards"),
    (spoil("index.json", lambda index: index.update(fingerprint="0")), "is not the index's tokenizer"),
    (spoil("tokenizer.json", lambda saved: saved.update(kind="pickle")), "not a saved tokenizer"),
    (mix, "lies outside the directory"),
    (lambda root: (root / "index.json").write_text("{"), "cannot be read"),
    (lambda root: (root / "part_001.bin").unlink(), "part_001.bin: cannot be read"),
    (lambda root: (root / "index.json").rename(root / ".progress.json"), "is not finished; run the `prepare` command"),
]


@pytest.mark.parametrize(("damage", "words"), INDEX_FAULTS, ids=range(len(INDEX_FAULTS)))
def test_a_damaged_prepared_directory_is_named(prepared, damage, words):
    damage(prepared)
    message = refusal(load, prepared)
    assert words in message and str(prepared) in message


def test_a_prepared_directory_wants_its_own_tokenizer(prepared, tmp_path):
    assert "was prepared with byte, this config has gpt2; set config.tokenizer=byte" in refusal(load, prepared, "gpt2")
    other = CharTokenizer([chr(i) for i in range(300)])
    assert "another vocabulary (byte, 256 tokens) than the run's (char, 300)" in refusal(
        load, prepared, vocabulary=other
    )
    same_pieces = CharTokenizer([chr(i) for i in range(128)])  # but not for the upper half
    assert "another vocabulary" in refusal(load, prepared, vocabulary=same_pieces)
    second = tmp_path / "second"
    arange_shards(second, [40])
    saved = CharTokenizer("abc")
    index = json.loads((prepared / "index.json").read_text()) | {"tokenizer": "char", "fingerprint": saved.fingerprint}
    (second / "index.json").write_text(json.dumps(index))
    (second / "tokenizer.json").write_text(json.dumps(saved.to_dict()))
    assert "shards of two tokenizers cannot be mixed" in refusal(load, tmp_path / "*" / "*.bin", "gpt2")


def test_another_tokenizer_that_reads_the_same_ids_is_welcome(prepared):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256}
    wider = TiktokenTokenizer(tiktoken.Encoding("wider", pat_str=r".", mergeable_ranks=ranks, special_tokens={}))
    assert load(prepared, vocabulary=wider).tokenizer is wider
