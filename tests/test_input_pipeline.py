"""Batches lose nothing and repeat nothing, from any step; texts become tokens once, and bad ones one clear line."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import data_of
from hypothesis import given, settings
from hypothesis import strategies as st

import input_pipeline
from corpus import formats, load_text
from corpus.dataset import ORDERS, Split
from corpus.tokenizer import ByteTokenizer, CharTokenizer
from input_pipeline import IGNORED, Batches, eval_batches, permute, prefetch
from runtime.errors import UserError

# --- batches ----------------------------------------------------------------------------------------------------------


def positions(num_tokens: int) -> Split:
    """A split whose tokens are their own positions."""
    return Split(np.arange(num_tokens, dtype=np.uint16), num_tokens)


def stacked_rows(batches: Batches, num_rows: int) -> np.ndarray:
    steps = -(-num_rows // batches.batch_size)
    return np.concatenate([batches(step) for step in range(steps)])[:num_rows]


splits = {"num_tokens": st.integers(12, 90), "context_len": st.integers(1, 11), "batch_size": st.integers(1, 17)}


@given(**splits, seed=st.integers(0, 2**63), order=st.sampled_from(["shuffle", "sequential"]))
def test_each_epoch_predicts_every_token_but_the_first_exactly_once(num_tokens, context_len, batch_size, seed, order):
    batches = Batches(positions(num_tokens), context_len, batch_size, seed, order)
    windows = batches.split.num_windows(context_len)
    rows = stacked_rows(batches, 3 * windows)
    assert rows.dtype == np.int32 and rows.shape == (3 * windows, context_len + 1)
    for epoch in np.split(rows, 3):
        inputs, targets = epoch[:, :-1], epoch[:, 1:]
        predicted = targets != IGNORED
        np.testing.assert_array_equal(np.sort(targets[predicted]), np.arange(1, num_tokens))
        np.testing.assert_array_equal(inputs[predicted], targets[predicted] - 1)
        assert (predicted.sum(axis=1) < context_len).sum() == ((num_tokens - 1) % context_len > 0)


def test_sequential_windows_come_in_order_and_begin_again():
    rows = stacked_rows(Batches(positions(9), context_len=3, batch_size=4, seed=5, order="sequential"), 5)
    assert rows.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, -1], [0, 1, 2, 3], [3, 4, 5, 6]]


def test_shuffled_epochs_and_seeds_differ():
    batches = Batches(positions(301), context_len=3, batch_size=10, seed=7)
    first, second = np.split(stacked_rows(batches, 200), 2)
    other = stacked_rows(Batches(positions(301), context_len=3, batch_size=10, seed=8), 100)
    ordered = np.arange(0, 300, 3)
    for a, b in ((first, second), (first, other), (second, other), (first, ordered[:, None])):
        assert (a[:, 0] == b[:, 0]).mean() < 0.1  # of 100 windows one is expected to stay, by chance
    assert abs(np.corrcoef(first[:, 0], ordered)[0, 1]) < 0.3  # three standard deviations


@given(**splits, step=st.integers(0, 10**12), order=st.sampled_from(ORDERS), data=st.data())
@settings(max_examples=60)
def test_rows_of_a_batch_are_its_slice_from_any_step(num_tokens, context_len, batch_size, step, order, data):
    start = data.draw(st.integers(0, batch_size))
    stop = data.draw(st.integers(start, batch_size))
    whole = Batches(positions(num_tokens), context_len, batch_size, 3, order)(step)
    again = Batches(positions(num_tokens), context_len, batch_size, 3, order).rows(step, start, stop)
    np.testing.assert_array_equal(again, whole[start:stop])


def test_random_windows_start_anywhere_and_have_no_masked_tail():
    batches = Batches(positions(23), context_len=5, batch_size=300, seed=1, order="random")
    first, second = batches(0), batches(1)
    for batch in (first, second):
        assert set(batch[:, 0]) == set(range(18))  # 23 - 5; each is missed with a chance of 4e-8
        np.testing.assert_array_equal(batch - batch[:, :1], np.tile(np.arange(6), (300, 1)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Batches(positions(23), 5, 300, seed=2, order="random")(0))


def test_steps_of_an_epoch_round_up():
    batches = Batches(positions(31), context_len=3, batch_size=4, seed=0)  # ten windows
    assert [batches.steps(epochs) for epochs in (0.1, 0.5, 1, 2, 3.0)] == [1, 2, 3, 5, 8]
    assert Batches(positions(301), 3, 1, seed=0).steps(0.07) == 7  # in binary, 0.07 * 100 is a little more than 7


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 65537])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(size, key):
    np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_takes_a_key_for_each_index_and_needs_no_neighbours():
    index, keys = np.array([5, 0, 999, 5]), np.array([3, 4, 3, 4], np.uint64)
    together = permute(index, 1000, keys)
    assert together.tolist() == [int(permute(index[[i]], 1000, int(keys[i]))[0]) for i in range(4)]
    assert together[0] != together[3]


def test_permute_reaches_any_size():
    size = 2**62 - 57
    index = np.array([0, 1, 2, size // 2, size - 2, size - 1])
    result = permute(index, size, 9)
    assert len(set(result.tolist())) == 6 and result.min() >= 0 and result.max() < size


def chi_squared(counts: np.ndarray, freedom: int) -> float:
    """How many standard deviations the counts are from what equal chances would give."""
    return (((counts - counts.mean()) ** 2 / counts.mean()).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [2, 37, 100])
def test_permute_is_fair_over_the_keys(size):
    """Any index goes anywhere with equal chances, and so do two neighbours together."""
    keys = input_pipeline._hash(np.arange(20_000), np.uint64(11))
    places = [permute(np.full(len(keys), index), size, keys) for index in range(size)]
    single = np.array([np.bincount(place, minlength=size) for place in places])
    assert abs(chi_squared(single, (size - 1) ** 2)) < 4
    pairs = np.bincount(places[0] * size + places[1], minlength=size**2).reshape(size, size)
    assert not pairs.diagonal().any()
    assert size == 2 or abs(chi_squared(pairs[~np.eye(size, dtype=bool)], size * (size - 1) - 1)) < 4


@given(**splits)
def test_evaluation_predicts_every_token_but_the_first_exactly_once(num_tokens, context_len, batch_size):
    batches = list(eval_batches(positions(num_tokens), context_len, batch_size))
    assert {batch.shape for batch in batches} == {(batch_size, context_len + 1)}
    rows = np.concatenate(batches)
    predicted = rows[:, 1:] != IGNORED
    np.testing.assert_array_equal(rows[:, 1:][predicted], np.arange(1, num_tokens))
    np.testing.assert_array_equal(rows[:, :-1][predicted], np.arange(num_tokens - 1))
    used = positions(num_tokens).num_windows(context_len)
    assert (rows[used:] == IGNORED).all() and 0 <= len(rows) - used < batch_size


@pytest.mark.parametrize(("max_tokens", "predicted"), [(0, 40), (1, 7), (7, 7), (20, 14), (39, 35), (41, 40)])
def test_evaluation_of_a_prefix_takes_whole_windows(max_tokens, predicted):
    rows = np.concatenate(list(eval_batches(positions(41), context_len=7, batch_size=4, max_tokens=max_tokens)))
    assert rows[:, 1:][rows[:, 1:] != IGNORED].tolist() == list(range(1, predicted + 1))


@pytest.mark.parametrize("size", [0, 1, 2, 9])
def test_prefetch_keeps_the_order_and_stays_ahead(size):
    made = []
    for item in prefetch(lambda step: made.append(step) or step, range(3, 8), size):
        assert made == list(range(3, min(item + size + 1, 8)))
    assert made == [3, 4, 5, 6, 7]
    assert list(prefetch(str, [])) == []


# --- texts ------------------------------------------------------------------------------------------------------------

TEXT = "To be, or not to be, that is the question: é☃\U0001f600\r\n" * 11


@pytest.fixture
def load(tmp_path):
    def load(content: bytes | str | Path, tokenizer: str = "char", **changes):
        if isinstance(content, str | bytes):
            path = tmp_path / "text.txt"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            path = content
        settings = dict(
            data_dir=tmp_path / "data", val_fraction=0.1, test_fraction=0.0, context_len=4, say=lines.append
        )
        return data_of(str(path), tokenizer, **(settings | changes))

    lines = load.lines = []
    return load


def refusal(load, *args, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load(*args, **changes)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("config.") and "; " in message
    return message


def test_splits_are_the_text_in_order_cut_by_characters(load):
    data = load(TEXT, val_fraction=0.05, test_fraction=0.15)
    n = len(TEXT)
    ends = [0, n * 80 // 100, n * 85 // 100, n]
    for split, start, end in zip((data.train, data.val, data.test), ends, ends[1:], strict=False):
        assert data.tokenizer.decode(split.tokens) == TEXT[start:end]
        assert split.num_bytes == len(TEXT[start:end].encode()) and split.num_tokens == end - start
        assert split.tokens.dtype == np.uint16 and type(split.tokens) is np.ndarray
        assert not split.tokens.flags.writeable  # the memory map
    assert data.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert load(TEXT).test is None and not load.lines


def test_fractions_are_decimals(load):
    data = load(b"0123456789" * 100, "byte", val_fraction=0.05, test_fraction=0.05)
    assert [split.num_tokens for split in (data.train, data.val, data.test)] == [900, 50, 50]


def test_the_byte_tokenizer_takes_any_bytes_untouched(load):
    content = b"\xef\xbb\xbf" + bytes(range(256)) * 3
    data = load(content, "byte")
    assert data.train.tokens.tolist() + data.val.tokens.tolist() == list(content)
    assert data.train.num_bytes == len(content) * 9 // 10


def test_a_byte_order_mark_goes_and_line_ends_and_nul_stay(load):
    data = load("\ufeffa\r\nb\n\0\ufeffc" * 9)
    whole = data.tokenizer.decode(np.concatenate([data.train.tokens, data.val.tokens]))
    assert whole == ("\ufeffa\r\nb\n\0\ufeffc" * 9)[1:]


def test_a_glob_joins_its_files_in_order_without_their_marks(load, tmp_path):
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    for name, text in (("b.txt", "\ufeffsecond"), ("a.txt", "\ufefffirst"), ("deep/c.txt", "third"), ("d.md", "other")):
        (tmp_path / "parts" / name).write_text(text)
    data = load(tmp_path / "parts" / "**" / "*.txt", context_len=1)
    assert data.tokenizer.decode([*data.train.tokens, *data.val.tokens]) == "first\nsecond\nthird"
    (tmp_path / "x[1].txt").write_text("brackets in a name")
    assert load(tmp_path / "x[1].txt", context_len=1).train.num_tokens == 16


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_the_cache_spares_the_second_encoding(load, monkeypatch, tokenizer):
    first = load(TEXT, tokenizer)
    for kind in (CharTokenizer, ByteTokenizer):
        monkeypatch.setattr(kind, "encode", None)
        monkeypatch.setattr(kind, "encode_bytes", None, raising=False)
    second = load(TEXT, tokenizer, vocabulary=first.tokenizer)
    third = load(TEXT, tokenizer)
    for again in (second, third):
        np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
        np.testing.assert_array_equal(again.val.tokens, first.val.tokens)
        assert (again.train.num_bytes, again.sha256) == (first.train.num_bytes, first.sha256)
    for changes in ({"val_fraction": 0.2}, {"vocabulary": CharTokenizer(sorted(set(TEXT), reverse=True))}):
        with pytest.raises(TypeError, match="not callable"):
            load(TEXT, tokenizer, **changes)
    with pytest.raises(TypeError, match="not callable"):
        load(TEXT + "!", tokenizer)
    assert not load.lines


def wrong_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int32))


def all_zero(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:128] + bytes(len(data) - 128 - 32) + data[-32:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(bytes(200) + path.read_bytes()[200:]),
        wrong_type,
        all_zero,
        lambda path: path.write_bytes(path.read_bytes() + b"!"),
    ],
    ids=["empty", "one byte short", "half a header", "zeroed header", "another type", "all tokens 0", "longer"],
)
def test_a_damaged_cache_is_noticed_and_rebuilt(load, tmp_path, damage):
    wanted = load(TEXT).train.tokens.copy()
    largest = max((tmp_path / "data" / ".cache").iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.unlink()  # damage another file than the mapped one: cutting that short would end this process
    largest.write_bytes(content)
    damage(largest)
    np.testing.assert_array_equal(load(TEXT).train.tokens, wanted)
    (line,) = load.lines
    assert "damaged" in line and str(largest) in line
    assert largest.read_bytes() == content
    load(TEXT)
    assert len(load.lines) == 1 and not list(largest.parent.glob("*.*.npy"))


def test_a_cache_without_a_hash_is_an_earlier_versions_and_is_made_again(load, tmp_path):
    wanted = load(TEXT).train.tokens.copy()
    largest = max((tmp_path / "data" / ".cache").iterdir(), key=lambda path: path.stat().st_size)
    largest.unlink()
    np.save(largest, wanted * 0)
    np.testing.assert_array_equal(load(TEXT).train.tokens, wanted)
    assert not load.lines


def test_without_a_place_to_write_the_tokens_stay_in_memory(load, tmp_path):
    (tmp_path / "data").write_text("a file where the directory should be")
    data = load(TEXT, test_fraction=0.1)
    assert data.tokenizer.decode(data.train.tokens) == TEXT[: len(TEXT) * 8 // 10]
    (line,) = load.lines
    assert "stays in memory" in line


def test_a_failed_write_leaves_nothing_behind(load, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert load(TEXT).train.num_tokens == len(TEXT) * 9 // 10
    assert not list((tmp_path / "data" / ".cache").iterdir())
    (line,) = load.lines
    assert "No space left" in line


def test_a_text_of_one_symbol_and_one_of_very_many(load):
    data = load("a" * 60)
    assert data.tokenizer.vocab_size == 1 and set(data.train.tokens) == {0}
    assert not load.lines
    many = "".join(chr(0x4E00 + i) for i in range(20_900))
    assert load(many).tokenizer.vocab_size == 20_900
    (line,) = load.lines
    assert line.startswith("warning: ") and "20,900 different characters" in line


def test_another_vocabulary_than_the_texts(load):
    vocabulary = CharTokenizer(sorted({*TEXT, "☺"}))
    data = load(TEXT, vocabulary=vocabulary)
    assert data.tokenizer is vocabulary
    assert data.tokenizer.decode(data.val.tokens) == TEXT[len(TEXT) * 9 // 10 :]
    strange = "é" + "abc" * 50 + "☃é" + "cab"
    known = CharTokenizer("cba x")
    message = refusal(load, strange, vocabulary=known)
    assert (
        "characters not in the vocabulary: 'é' at 0, '☃' at 151; set config.unknown_characters to replace or" in message
    )
    assert not load.lines
    for choice, want in {"replace": " " + "abc" * 50 + "  " + "cab", "drop": "abc" * 50 + "cab"}.items():
        data = load(strange, vocabulary=known, unknown_characters=choice)
        assert known.decode(np.concatenate([data.train.tokens, data.val.tokens])) == want
        assert data.train.num_bytes + data.val.num_bytes == len(want)
        assert "2 different characters, which the vocabulary lacks, are" in load.lines.pop()


def test_a_whole_text_is_not_cut_and_may_be_short(load, tmp_path):
    data = load("abc", context_len=50, whole=True)
    assert data.tokenizer.decode(data.val.tokens) == "abc" and data.train is data.val is data.test
    assert "has 1 in the whole text, and the first is not predicted; give two" in refusal(load, "a", whole=True)


def test_files_that_cannot_be_read_are_named(load, tmp_path, monkeypatch):
    assert f"no file '{tmp_path}/none*.txt'" in refusal(load, tmp_path / "none*.txt")
    assert f"{tmp_path} has no file that is named as a text" in refusal(load, tmp_path)
    os.mkfifo(tmp_path / "pipe")  # which would be waited for, and give its text but once
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(UserError, match=rf"/{name}: cannot be read \(no regular file\)"):
            load(tmp_path / name)
    with pytest.raises(UserError, match="did you mean tiny_shakespeare"):
        data_of("tinyshakespeare", "char", data_dir=tmp_path, val_fraction=0.1, test_fraction=0, context_len=4)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(formats, "open_regular", forbidden)
    with pytest.raises(UserError, match=r"/text.txt: cannot be read \(Permission denied\); check its permissions$"):
        load(TEXT)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(load, content):
    assert "text.txt has 0 characters" in refusal(load, content)


def test_text_that_is_not_utf8_is_refused_with_the_place(load):
    message = refusal(load, b"\xef\xbb\xbf" + b"abc" * 20 + b"\xff" + b"abc")
    assert "is not UTF-8 at byte 63 (0xff)" in message and "config.tokenizer=byte" in message


def test_a_text_that_is_too_large_for_each_of_several_processes_is_refused_unread(load, monkeypatch, tmp_path):
    (tmp_path / "holes.txt").touch()
    os.truncate(tmp_path / "holes.txt", 2**30)
    (tmp_path / "more.txt").write_text("x")

    def read(path):
        raise EOFError

    monkeypatch.setattr(load_text, "_read", read)
    with pytest.raises(EOFError):
        load(tmp_path / "*.txt")
    monkeypatch.setattr(load_text, "num_processes", lambda: 2)
    with pytest.raises(UserError, match=r"^config\.dataset: .*: 1,073,741,825 bytes of text .*; make shards with "):
        load(tmp_path / "*.txt")


def test_a_split_shorter_than_a_window_is_refused_with_both_lengths(load):
    assert load("x" * 50, context_len=4).val.num_tokens == 5
    message = refusal(load, "x" * 50, context_len=5)
    assert message.startswith("config.context_len: 5 needs 6 tokens in each split, but ")
    assert "has 5 in the validation split; lower it" in message
    assert "has 0 in the training split" in refusal(load, "x")
    assert "has 4 in the test split" in refusal(load, "x" * 70, val_fraction=0.1, test_fraction=0.05)


def test_an_unknown_tokenizer_is_refused_before_the_text_is_looked_for(load, tmp_path):
    assert "did you mean gpt2?" in refusal(load, tmp_path / "none", "gtp2")


def test_tiny_shakespeare_where_it_is_there(load):
    found = [path for path in (Path("data"), Path("../shared/data")) if (path / "tiny_shakespeare.txt").exists()]
    if not found:
        pytest.skip("no tiny_shakespeare.txt beside the project")
    data = load(found[0] / "tiny_shakespeare.txt", context_len=64)
    assert (data.train.num_tokens, data.val.num_tokens, data.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    assert data.sha256.startswith("86c4e6aa")
