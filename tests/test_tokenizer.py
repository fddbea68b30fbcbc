"""Tokenizers give back what they were given, keep their vocabulary in JSON, and never give out half a character."""

import json

import numpy as np
import pytest
import tiktoken
from helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    TextStream,
    TiktokenTokenizer,
    UnknownCharacters,
    build_tokenizer,
    check_tokenizer_name,
    tokenizer_from_dict,
)

EOT, CONTROL, GAPS = 263, 265, (260, 262, 264)


def small_bpe() -> TiktokenTokenizer:
    """Every byte, five merges (one ends inside a character), gaps, an end of text and a control token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"he": 256, b"ll": 257, b"hell": 258, b"hello": 259, b"\xf0\x9f": 261}
    special = {"<|endoftext|>": EOT, "<|control|>": CONTROL}
    return TiktokenTokenizer(
        tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    )


BPE = small_bpe()
any_code_point = st.text(st.integers(0, 0x10FFFF).map(chr), min_size=1)


@given(any_code_point)
def test_char_round_trip_of_any_code_points(text):
    tokenizer = build_tokenizer("char", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.shape == (len(text),) and tokenizer.vocab_size == len(set(text))
    assert [tokenizer.symbols[i] for i in ids] == list(text)


def test_char_ids_follow_the_order_of_the_characters():
    assert build_tokenizer("char", "banana\n").encode("\nabn").tolist() == [0, 1, 2, 3]


@given(st.text())
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "tiktoken"])
def test_byte_level_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype == np.uint16 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


@given(st.binary())
def test_bytes_round_trip_of_any_bytes(data):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert tokenizer.encode_bytes(data).tolist() == list(data)


def test_every_byte_is_a_token():
    every = bytes(range(256))
    assert ByteTokenizer().decode_bytes(ByteTokenizer().encode_bytes(every)) == every
    assert BPE.decode_bytes(range(256)) == every


def test_lone_surrogates_become_question_marks_at_byte_level():
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800b")) == "a?b"
    assert BPE.decode(BPE.encode("a\udfffb")) == "a?b"


def test_a_run_of_a_million_blanks_is_encoded():
    """GPT-2's pattern cannot match it in one piece."""
    text, ranks = "a" + " " * 1_000_000 + "b", {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("blanks", pat_str=r"\S+|\s+(?!\S)|\s+", mergeable_ranks=ranks, special_tokens={})
    tokenizer = TiktokenTokenizer(encoding)
    with pytest.raises(ValueError, match="stack"):
        tokenizer._ids(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiktoken_merges_and_takes_special_tokens_as_plain_text():
    assert BPE.encode("hello hell he").tolist() == [259, 32, 258, 32, 256]
    assert BPE.encode("<|endoftext|>").tolist() == list(b"<|endoftext|>")
    assert BPE.decode([EOT]) == "<|endoftext|>"


def test_tiktoken_knows_which_ids_stand_for_no_text():
    assert (BPE.vocab_size, BPE.eot, BPE.unsampled) == (266, EOT, tuple(sorted((*GAPS, CONTROL))))
    with pytest.raises(ValueError, match="stands for no text"):
        BPE.decode([104, GAPS[0]])


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer(), BPE], ids=["char", "byte", "tiktoken"])
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    assert tokenizer.decode([]) == "" and tokenizer.encode("").size == 0
    for ids in ([-1], [0, tokenizer.vocab_size]):
        with pytest.raises(ValueError, match="vocabulary"):
            tokenizer.decode(ids)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_have_the_smallest_type_that_holds_the_vocabulary(size, dtype):
    text = "".join(map(chr, range(size)))
    tokenizer = build_tokenizer("char", text)
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype == dtype
    np.testing.assert_array_equal(ids, np.arange(size))


def test_unknown_characters_are_named_once_with_their_first_place():
    tokenizer = CharTokenizer(["c", "b", "a"])
    with pytest.raises(UnknownCharacters) as caught:
        tokenizer.encode("abé\x00cé☃\x00")
    assert caught.value.characters == "é\x00☃"
    assert caught.value.positions == (2, 3, 6)
    assert str(caught.value) == r"characters not in the vocabulary: 'é' at 2, '\x00' at 3, '☃' at 6"
    with pytest.raises(UnknownCharacters, match=r"'S' at 7 and 18 more$"):
        tokenizer.encode("ZYXWVUTSRQPONMLKJIHGFEDCBA")


def test_every_other_character_is_unknown():
    others = "".join(map(chr, [*range(ord("a")), *range(ord("d"), 0x800), 0x10FFFF]))
    with pytest.raises(UnknownCharacters) as caught:
        CharTokenizer("abc").encode(others)
    assert caught.value.characters == others


@pytest.mark.parametrize(("symbols", "expected"), [("x \n", "x x"), ("xy\n", "x\nx"), ("yx", "xyx")])
def test_unknown_characters_can_be_replaced(symbols, expected):
    tokenizer = CharTokenizer(symbols)
    assert tokenizer.decode(tokenizer.encode("x\U0001f600x", replace_unknown=True)) == expected


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer("\ud83d\ude00\x00é\U0001f600"), ByteTokenizer(), BPE],
    ids=["char", "byte", "tiktoken"],
)
def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for name in ("name", "vocab_size", "eot", "unsampled", "dtype", "fingerprint"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    text = "\ud83d\ude00\x00é\U0001f600" if tokenizer.name == "char" else "hello \U0001f600<|control|>\n"
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert again.decode(tokenizer.encode(text)) == text


def test_an_imported_tokenizer_is_saved_whole():
    tokenizer = tokenizer_from_dict(IMPORTED)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot, tokenizer.unsampled) == ("imported", 2, 0, (1,))
    assert tokenizer.to_dict() == IMPORTED


def test_fingerprints_tell_vocabularies_apart():
    other = BPE.to_dict() | {"pattern": r"\S|\s"}
    imported = [IMPORTED, IMPORTED | {"eot": None}, IMPORTED | {"vocab_size": 3}]
    others = map(tokenizer_from_dict, [other, *imported])
    tokenizers = [CharTokenizer("ab"), CharTokenizer("ba"), ByteTokenizer(), BPE, *others]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def damaged(**changes):
    return BPE.to_dict() | changes


RANKS = BPE.to_dict()["ranks"]
WORDS = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    "decoder": {"type": "Fuse"},
}
IMPORTED = {"kind": "imported", "json": WORDS, "vocab_size": 2, "eot": 0}


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"kind": "pickle"},
        {"kind": "char"},
        {"kind": "char", "symbols": "ab"},
        {"kind": "char", "symbols": []},
        {"kind": "char", "symbols": ["ab"]},
        {"kind": "char", "symbols": ["a", 1]},
        {"kind": "char", "symbols": ["a", "b", "a"]},
        {"kind": "tiktoken", "name": "gpt2"},
        damaged(pattern=None),
        damaged(pattern="("),
        damaged(special={"<|endoftext|>": 259}),
        damaged(special={"<|endoftext|>": 10**12}),
        damaged(special={"<|endoftext|>": -1}),
        damaged(special={"<|endoftext|>": [263]}),
        damaged(ranks=dict(list(RANKS.items())[1:])),
        damaged(ranks=RANKS | {"not base64!": 270}),
        damaged(ranks=RANKS | {"aGVsbG8=": 4.5}),
        damaged(ranks=RANKS | {"aGVsbG9v": 7}),
        {"kind": "imported", "json": WORDS},
        IMPORTED | {"json": json.dumps(WORDS)},
        IMPORTED | {"json": {}},
        IMPORTED | {"json": WORDS | {"decoder": None}},
        IMPORTED | {"vocab_size": 0},
        IMPORTED | {"vocab_size": 2**21 + 1},
        IMPORTED | {"vocab_size": 2.5},
        IMPORTED | {"eot": 1},
        IMPORTED | {"eot": 0.0},
        IMPORTED | {"more_ends": 1},
        IMPORTED | {"more_ends": [2]},
        IMPORTED | {"more_ends": ["1"]},
    ],
)
def test_nonsense_in_a_saved_tokenizer_is_refused(saved):
    with pytest.raises(ValueError, match=r"tokenizer|vocabulary"):
        tokenizer_from_dict(saved)


@given(st.text(), st.booleans())
@settings(max_examples=50)
def test_a_stream_never_gives_half_a_character(text, bpe):
    text += "naïve \U0001f600☃ hello"
    tokenizer = BPE if bpe else ByteTokenizer()
    stream, shown = TextStream(tokenizer), ""
    for token in tokenizer.encode(text):
        shown += stream.feed([token])
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_a_stream_shows_a_character_cut_short_as_such():
    stream = TextStream(ByteTokenizer())
    assert stream.feed(list("é☃".encode()[:-1])) == "é"
    assert stream.flush() == "\ufffd"
    assert stream.feed(list(b"\xffa")) == "\ufffda"


def test_an_unknown_name_is_met_with_a_guess():
    message = refusal(build_tokenizer, "gtp2", "text")
    assert message.startswith(
        "config.tokenizer: unknown tokenizer 'gtp2'; did you mean gpt2? use char, byte or one of "
    )
    assert "o200k_base" in message
    for name in ("char", "byte", "gpt2", "o200k_base", "imported"):
        check_tokenizer_name(name)


def test_an_imported_tokenizer_cannot_be_built_from_a_text():
    want = 'config.tokenizer: "imported" comes with a run\'s weights; set config.init_from to it'
    assert refusal(build_tokenizer, "imported", "text") == want
