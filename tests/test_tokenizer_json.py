"""Tokenizers travel to and from the library tokenizers, and to transformers, with the same ids and the same text."""

import json
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from corpus.fetch import tiktoken_cache
from corpus.load_text import find_files
from corpus.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    ImportedTokenizer,
    TextStream,
    TiktokenTokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)
from interop.tokenizer_json import from_tokenizers, hf_tokenizer_config, to_tokenizers
from transformer.config import TransformerConfig
from transformer.model import model_of
from transformer.sampling import Sampling, generate, generate_tokens, stream

ROOT = Path(__file__).parent.parent
NASTY = (
    "It's THEY'LL we'Ve I'm x'ſ 12 12345678 ½٣๑ ²  \t \r\n\n a  b   \n\n\n   end.../!?//\n--\n élève e\u0301 ǅʰ "
    "中文，日本語 한국어 😀👩\u200d👩\u200d👧🏽 \u00a0\u2028\u3000x\x85y\x1cz\x00\ufeff\u200b <|endoftext|> "
    "HTMLParser'S fooBar ÀÉ ß'ſ  \n \t"
)
FRAGMENTS = [*NASTY.split(" "), *NASTY, "  ", "\n\n", "12"]
texts = st.lists(st.sampled_from(FRAGMENTS)).map("".join) | st.text()
untimed = settings(max_examples=50)
BYTES = {bytes([byte]): byte for byte in range(256)}


def learn(text: str, pattern: str, special: dict[str, int]) -> TiktokenTokenizer:
    """Merges learned from the text as a whole, so that they reach over every place where `pattern` may cut it."""
    ranks, parts = dict(BYTES), [bytes([byte]) for byte in text.encode()]
    while len(parts) > 1:
        (pair, _), *_ = Counter(pairwise(parts)).most_common(1)
        ranks.setdefault(b"".join(pair), len(ranks))
        joined: list[bytes] = []
        for part in parts:
            if joined and (joined[-1], part) == pair:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    encoding = tiktoken.Encoding("learned", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return TiktokenTokenizer(encoding)


@cache
def learned(name: str) -> tuple[TiktokenTokenizer, tokenizers.Tokenizer]:
    """A small vocabulary under the pattern of one of tiktoken's encodings, which is had without the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, load, lambda *args, **kwargs: {})
        pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    ours = learn(NASTY, pattern, {})
    return ours, to_tokenizers(ours)


def encode(library: tokenizers.Tokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def decode(library: tokenizers.Tokenizer, ids) -> str:
    return library.decode(list(ids), skip_special_tokens=False)


# --- To the library ---------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@untimed
def test_a_character_vocabulary_keeps_its_ids_and_every_space(text):
    ours = build_tokenizer("char", text + " \n")
    library = to_tokenizers(ours)
    for each in (text, f"\n {text}  \n\n{text} "):
        assert encode(library, each) == ours.encode(each).tolist()
        assert decode(library, ours.encode(each)) == each


@pytest.mark.parametrize("symbols", ["ab \n", "ab\n", "ba"])
def test_unknown_characters_are_replaced_as_ours_are_on_demand(symbols):
    ours = CharTokenizer(symbols)
    assert encode(to_tokenizers(ours), "aé😀b") == ours.encode("aé😀b", replace_unknown=True).tolist()


@given(texts, st.binary())
@untimed
def test_bytes_keep_their_values_as_ids(text, data):
    library = to_tokenizers(ByteTokenizer())
    library.encode_special_tokens = True
    assert encode(library, text) == list(text.encode())
    data = data.replace(b"\xff", b"")
    assert decode(library, data) == ByteTokenizer().decode(list(data))


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@given(texts)
@untimed
def test_the_patterns_of_tiktoken_cut_alike(name, text):
    ours, library = learned(name)
    for each in (NASTY, text):
        ids = ours.encode(each).tolist()
        assert (encode(library, each), decode(library, ids)) == (ids, each)


@given(st.permutations(["ab", "ba", "aab", "abb", "bab", "aba", "abab", "bbb", "aabba"]), st.text("ab ", max_size=30))
@untimed
def test_any_ranks_merge_alike_whether_merging_reaches_every_token_or_not(order, text):
    ranks = BYTES | {piece.encode(): 256 + i for i, piece in enumerate(order)}
    encoding = tiktoken.Encoding("any", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    library = to_tokenizers(TiktokenTokenizer(encoding))
    for each in (text, " ".join(order), "".join(order)):
        assert encode(library, each) == encoding.encode(each)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"[ab]{1,2}+b|.", "abbab"),
        (r"\p{N}{1,2}+\p{N}|\x{61}{2}+a|\.{2,}+|.", "12341aaaaa...1"),
        (r"a+$|\n$|a|\n", "aa\naa\n\naa"),
        (r"^a|aa|a|\n", "aaa\naaa"),
        (r"\$|\^|[$^\]]{2}|.", "$^]$$]^^"),
        (r"b+|c", "abbabc"),
    ],
)
def test_what_the_engines_read_differently_is_rewritten(pattern, text):
    substrings = {text[i:j] for j in range(len(text) + 1) for i in range(j - 1)}
    ranks = BYTES | {piece.encode(): 256 + i for i, piece in enumerate(sorted(substrings))}  # so that each piece shows
    encoding = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert 1 < len(encoding.encode(text)) < len(text)
    assert encode(to_tokenizers(TiktokenTokenizer(encoding)), text) == encoding.encode(text)


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        (CharTokenizer("a\udc80"), r"the lone surrogate '\\udc80'"),
        (learn("hello", r"\S+", {"hello": 300}), "'hello' both as a special token and as a plain one"),
        (learn("abc", r"(?:ab){1,2}+|.", {}), "a possessive count of a group"),
        (learn("abc", r"(?s:.)", {}), r"the pattern \(\?s:\.\)"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(ours, why):
    with pytest.raises(ValueError, match=f"^tokenizer.json cannot hold {why}"):
        to_tokenizers(ours)


BPE = learn("hello hello😀 x\n  ", r"\S+|\s+", {"<|endoftext|>": 280, "<|control|>": 283})


def test_special_tokens_keep_their_ids_over_gaps_and_are_plain_text_on_demand():
    library, text = to_tokenizers(BPE), "hello<|control|> <|endoftext|>x"
    ids = encode(library, text)
    assert {280, 283} < set(ids) and decode(library, ids) == text
    assert library.decode(ids) == "hello x"
    library.encode_special_tokens = True
    assert encode(library, text) == BPE.encode(text).tolist()


OURS = {"char": CharTokenizer(sorted({*NASTY, ",", "i"})), "byte": ByteTokenizer(), "bpe": BPE}


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
def test_transformers_reads_the_same_tokenizer(ours, model_type, tmp_path):
    (tmp_path / "tokenizer.json").write_text(to_tokenizers(ours).to_str(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hf_tokenizer_config(ours)))
    if model_type:
        config = {"model_type": model_type, "vocab_size": ours.vocab_size, "bos_token_id": None, "eos_token_id": None}
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (NASTY.replace("<|endoftext|>", " ,  it 's n't . "), "", "\n", "  "):
        ids = ours.encode(text).tolist()
        assert theirs(text) == {"input_ids": ids, "attention_mask": [1] * len(ids)}
        assert theirs.decode(ids) == text
    end = {"char": 0, "byte": 255}.get(ours.name, ours.eot)  # NUL is missed least
    assert (theirs.eos_token_id, theirs.clean_up_tokenization_spaces) == (end, False)
    if ours.eot is None:
        assert (theirs.bos_token_id, theirs.pad_token_id, len(theirs)) == (end, end, ours.vocab_size)
        text = "It's\n 12, fooBar! é"
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", tiktoken.list_encoding_names())
def test_each_of_tiktokens_encodings_is_saved_opened_and_exported(name, monkeypatch):
    """With its pattern and special tokens; o200k_harmony, in tiktoken 0.14, has two names for one of them."""
    for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, load, lambda *args, **kwargs: BYTES)
    parts = openai_public.ENCODING_CONSTRUCTORS[name]() | {"explicit_n_vocab": None}
    ours = TiktokenTokenizer(tiktoken.Encoding(**parts))
    again = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    assert (again.fingerprint, again.eot, again.unsampled) == (ours.fingerprint, ours.eot, ours.unsampled)
    library = to_tokenizers(again)
    for text in (NASTY, *parts["special_tokens"]):
        assert again.encode(text).tolist() == ours.encode(text).tolist()
    of_each_id = {i: special for special, i in reversed(parts["special_tokens"].items())}
    assert {i: encode(library, special) for i, special in of_each_id.items()} == {i: [i] for i in of_each_id}
    imported = from_tokenizers(library.to_str(), ours.vocab_size, ours.eot)
    assert imported.encode(NASTY).tolist() == ours.encode(NASTY).tolist() and imported.unsampled == ours.unsampled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_whole_vocabularies_give_the_ids_of_tiktoken(name, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache(name, ROOT / "data")))
    ours = build_tokenizer(name, "")
    text = to_tokenizers(ours).to_str()
    imported = from_tokenizers(text, ours.vocab_size, ours.eot)
    rng = np.random.default_rng(0)
    mixed = "".join(rng.choice(FRAGMENTS, 100_000))
    [shakespeare] = find_files("tiny_shakespeare", ROOT / "data", print)
    for each in (shakespeare.read_text(), NASTY, mixed):
        np.testing.assert_array_equal(imported.encode(each), ours.encode(each))
        assert imported.decode(ours.encode(each)) == each
    assert imported.unsampled == ours.unsampled


# --- From the library -------------------------------------------------------------------------------------------------


def sentencepiece(kind: str) -> tokenizers.Tokenizer:
    """Byte tokens and spaces that show, put together as Llama 2's ("prepend"), later ones or T5's are."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁helo\né",
        "he",
        "ll",
        "hell",
        "▁hell",
    ]
    if kind == "unigram":
        library = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in words], 0, True))
    else:
        ids, merges = {word: i for i, word in enumerate(words)}, [("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "hell")]
        library = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces, strip = decoders.Replace("▁", " "), [decoders.Strip(" ", 1, 0)]
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=kind == "unigram")
        spaces, strip = decoders.Metaspace(prepend_scheme="first"), []
    library.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


SENTENCEPIECE = {kind: sentencepiece(kind) for kind in ("prepend", "first", "unigram")}
LIBRARIES = SENTENCEPIECE | {"byte level": to_tokenizers(BPE)}
IMPORTED = {k: from_tokenizers(lib.to_str(), 300, 280 if k == "byte level" else 2) for k, lib in LIBRARIES.items()}
each_imported = pytest.mark.parametrize("imported", IMPORTED.values(), ids=IMPORTED)


@pytest.mark.parametrize("ours", [CharTokenizer("b\x00 \naé😀"), CharTokenizer("x"), ByteTokenizer()])
def test_our_own_files_become_our_own_tokenizers(ours):
    library = to_tokenizers(ours)
    library.enable_truncation(3)
    library.enable_padding(length=5)
    again = from_tokenizers(library.to_str(pretty=True), ours.vocab_size, None)
    assert type(again) is type(ours) and again.fingerprint == ours.fingerprint
    for vocab_size, eot in ((ours.vocab_size + 1, None), (ours.vocab_size, 0)):
        other = from_tokenizers(library.to_str(), vocab_size, eot)
        assert (other.name, other.vocab_size, other.eot) == ("imported", vocab_size, eot)
        np.testing.assert_array_equal(other.encode("xx xx\n", True), ours.encode("xx xx\n", True))


def test_bytes_as_earlier_exports_wrote_them_are_still_ours():
    content = json.loads(to_tokenizers(ByteTokenizer()).to_str())
    content["model"]["vocab"]["ÿ"] = content["model"]["vocab"].pop("<|endoftext|>")
    assert from_tokenizers(json.dumps(content | {"added_tokens": []}), 256, None).name == "byte"


@pytest.mark.parametrize(
    ("symbols", "end"), [("\n $Zaz3.", "$"), ("\n .az", "."), ("\n az", "z"), ("\n\t ", "\t"), ("\x00\n &", "\x00")]
)
def test_the_end_of_a_text_by_characters_is_the_one_that_is_missed_least(symbols, end):
    config = hf_tokenizer_config(CharTokenizer(symbols))
    assert {config[f"{name}_token"] for name in ("bos", "eos", "pad")} == {end}


@pytest.mark.parametrize("change", [{"vocab": {"a": 0, "b": 2}}, {"unk_token": None}, {"fuse_unk": True}])
def test_what_only_resembles_our_own_files_is_imported(change):
    content = json.loads(to_tokenizers(CharTokenizer("abc")).to_str())
    content["model"] |= change
    assert from_tokenizers(json.dumps(content), 3, None).name == "imported"


@given(texts)
@untimed
def test_an_imported_tokenizer_is_the_one_it_was_made_from(text):
    imported = IMPORTED["byte level"]
    ids = imported.encode(text)
    assert ids.dtype == imported.dtype == np.uint16 and ids.ndim == 1
    assert ids.tolist() == BPE.encode(text).tolist()
    assert imported.decode(ids) == text and imported.decode_bytes(ids) == text.encode()


def test_every_token_of_a_byte_level_vocabulary_has_its_bytes():
    imported = IMPORTED["byte level"]
    for token in {*range(BPE.vocab_size)} - {*BPE.unsampled} | {283}:
        assert imported.decode_bytes([token]) == BPE.decode_bytes([token])
    assert imported.unsampled == (*BPE.unsampled, *range(284, 300))


def test_a_token_that_does_not_spell_bytes_is_the_text_it_shows():
    content = json.loads(to_tokenizers(ByteTokenizer()).to_str())
    content["model"]["vocab"]["é ☃"] = 256
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.add_tokens(["naïve"])
    imported = from_tokenizers(library.to_str(), 260, None)
    assert imported.encode("a naïve").tolist() == [97, 32, 257] and imported.decode([256, 257]) == "é ☃naïve"
    assert imported.unsampled == (255, 258, 259)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@given(texts | st.text("helo \né☃"))
@untimed
def test_sentencepiece_text_is_read_token_by_token(kind, text):
    imported, library = IMPORTED[kind], sentencepiece(kind)
    library.encode_special_tokens = True
    ids = imported.encode(text).tolist()
    assert ids == encode(library, text)
    assert imported.decode(ids) == decode(library, ids)
    if kind == "prepend":
        assert imported.decode(ids) == text
        assert imported.decode_bytes(ids) == b" " * bool(text) + text.encode()


def test_the_space_before_a_text_is_taken_off_but_not_one_within():
    imported = IMPORTED["prepend"]
    ids = imported.encode("hell hell")
    assert imported.decode(ids) == "hell hell" and imported.decode(ids[1:]) == "hell"
    assert imported.decode_bytes(ids[1:]) == b" hell"
    assert imported.unsampled == (0, 1, *range(270, 300))


@each_imported
@given(st.text("helo \né☃😀"))
@untimed
def test_a_stream_over_it_never_gives_half_a_character(imported, text):
    text += "é \U0001f600☃ hell"
    ids, stream, shown = imported.encode(text), TextStream(imported), ""
    whole = imported.decode_bytes(ids).decode()
    for token in ids:
        shown += stream.feed([token])
        assert whole.startswith(shown)
    assert shown == whole and whole.lstrip(" ") == text.lstrip(" ") and stream.flush() == ""


def test_merges_are_never_left_out_at_random():
    library = sentencepiece("prepend")
    library.model.dropout = 0.5
    text, told = "hell hello " * 9, []
    assert len({tuple(encode(library, text)) for _ in range(9)}) > 1
    imported = from_tokenizers(library.to_str(), 300, 2, say=told.append)
    older = ImportedTokenizer(json.loads(library.to_str()), 300, 2)  # as in runs that were imported before
    library.model.dropout = None
    for tokenizer in (imported, older):
        assert {tuple(tokenizer.encode(text)) for _ in range(9)} == {tuple(encode(library, text))}
        assert json.loads(to_tokenizers(tokenizer).to_str())["model"]["dropout"] is None
    assert [line.partition("(")[2] for line in told] == ["dropout 0.5); here it never does"]
    assert older.fingerprint != imported.fingerprint == IMPORTED["prepend"].fingerprint


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_generated_text_keeps_the_space_before_its_first_word(kind, random_params):
    tokenizer, prompts, settings = IMPORTED[kind], ["hell", "o", "é☃", "l", "he"], Sampling(seed=5)
    config = TransformerConfig(tokenizer.vocab_size, context_len=8, num_blocks=1, num_heads=2, embedding_dim=6)
    params = random_params(config)
    starts_a_word = [tokenizer.decode_bytes([i])[:1] == b" " for i in range(270)] + [False] * 30
    params["embedding.embedding"] *= 1 + 9 * np.array(starts_a_word)[:, None]  # such tokens are likely, or never come
    model, ids = model_of(config, params), [tokenizer.encode(prompt) for prompt in prompts]
    texts = generate(model, tokenizer, prompts, 30, settings)
    new = np.concatenate(list(generate_tokens(model, ids, 30, settings, tokenizer.ends, tokenizer.unsampled))).T
    shown = [tokenizer.decode_bytes([i for i in row if i not in (-1, 2)]).decode("utf-8", "replace") for row in new]
    assert texts == shown and any(text.startswith(" ") for text in texts)
    assert texts[0] == "".join(stream(model, tokenizer, prompts[0], 30, settings))


@pytest.mark.parametrize("imported", [IMPORTED[kind] for kind in ("prepend", "first", "byte level")])
def test_special_tokens_in_a_text_are_plain_text_and_surrogates_question_marks(imported):
    text = "<|control|></s> hell<unk> <|endoftext|>"
    ids = imported.encode(text)
    assert imported.decode(ids) == text and not {*ids} & {imported.eot, *imported.unsampled}
    assert imported.decode(imported.encode("e\ud800l")) == "e?l"


def test_a_second_end_without_a_token_has_no_text():
    """As where a vocabulary is padded."""
    content = tokenizer_from_dict(learn("ab ab", ".", {"<|endoftext|>": 300}).to_dict())
    library = json.loads(to_tokenizers(content).to_str())
    imported = ImportedTokenizer(library, 320, 300, [310])
    assert imported.ends == (300, 310) and len(imported.pieces) == 320 and imported.pieces[310] == b""


@each_imported
def test_ids_that_stand_for_no_text_are_refused(imported):
    assert imported.decode([]) == "" and imported.encode("").size == 0
    for ids, why in (([-1], "vocabulary"), ([5, 300], "vocabulary"), ([5, 299], "no text: 299")):
        with pytest.raises(ValueError, match=why):
            imported.decode(ids)


@pytest.mark.parametrize("kind", IMPORTED)
def test_it_is_saved_and_given_back_whole(kind):
    imported, library = IMPORTED[kind], LIBRARIES[kind]
    again = tokenizer_from_dict(json.loads(json.dumps(imported.to_dict())))
    assert isinstance(again, ImportedTokenizer)
    for name in ("name", "vocab_size", "eot", "unsampled", "fingerprint"):
        assert getattr(again, name) == getattr(imported, name), name
    np.testing.assert_array_equal(again.encode(NASTY), imported.encode(NASTY))
    assert to_tokenizers(again).to_str() == library.to_str()
    assert hf_tokenizer_config(again)["eos_token"] == library.id_to_token(imported.eot)


# --- Nonsense ---------------------------------------------------------------------------------------------------------


LLAMA = json.loads(LIBRARIES["prepend"].to_str())


def changed(model: dict | None = None, **others) -> str:
    return json.dumps(LLAMA | {"model": LLAMA["model"] | (model or {})} | others)


@pytest.mark.parametrize(
    ("text", "vocab_size", "eot", "why"),
    [
        ("", 300, 2, "not JSON"),
        ("[" * 100_000, 300, 2, "nested too deeply"),
        ("[]", 300, 2, "not a list"),
        ("{}", 300, 2, "cannot read it: Model missing"),
        (changed({"type": "Pickle"}), 300, 2, "cannot read it"),
        (changed({"vocab": {"a": 0}}), 300, 2, "cannot read it"),
        (changed({"vocab": {"a": -1}}), 300, 2, "cannot read it"),
        (changed({"vocab": {}, "merges": []}), 300, None, "cannot read it"),
        (changed({"vocab": {"\ud800": 0}}), 300, 2, "cannot read it"),
        (changed({"unk_token": "☃", "byte_fallback": False}), 300, 2, "cannot read it: Unk token"),
        (changed({"vocab": LLAMA["model"]["vocab"] | {"twice": 7}}), 300, 2, "two of .* have the same id"),
        (changed(decoder=None), 300, 2, "type none"),
        (changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), 300, 2, "type WordPiece"),
        (changed(added_tokens=[LLAMA["added_tokens"][2] | {"id": 7}]), 300, 2, "'</s>' .* the id 7"),
        (changed(), 269, 2, "270 tokens do not fit a vocabulary of 269"),
        (changed(), 2**21 + 1, 2, "do not fit"),
        (changed(), 300, 270, "the id 270"),
    ],
)
def test_nonsense_is_refused_in_one_line(text, vocab_size, eot, why):
    with pytest.raises(ValueError, match=why) as caught:
        from_tokenizers(text, vocab_size, eot)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_reading_runs_and_opens_nothing():
    seen, watching = set(), [True]
    sys.addaudithook(lambda event, args: seen.add(event.partition(".")[0]) if watching else None)
    try:
        for text in (changed(), to_tokenizers(BPE).to_str()):
            from_tokenizers(text, 300, None).encode("hello")
    finally:
        watching.clear()  # a hook cannot be taken away
    assert not seen & {"exec", "compile", "import", "open", "os", "pickle", "socket", "subprocess"}
