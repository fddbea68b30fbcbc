"""A tokenizer of one's own: learned, exact for every text, and kept with whatever was made with it."""

import gzip
import json
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import regex
from helpers import assert_one_line, data_of, make_text, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import SETTINGS, pattern, refusal, run

import main
import run_lib
import train_lib
from corpus import fetch
from corpus.tokenizer import TiktokenTokenizer, build_tokenizer, tokenizer_from_dict
from corpus.train_tokenizer import FEWEST, PATTERNS, SPECIAL, train_tokenizer
from interop.tokenizer_json import hf_tokenizer_config, to_tokenizers
from runtime.errors import UserError

SIZE = 300


@cache
def learned(split: str = "gpt4") -> TiktokenTokenizer:
    return train_tokenizer(iter([make_text(200), "naïve — 100% 'T IS\r\n\r\n  x\n" * 3]), SIZE, split)


@pytest.fixture
def own(tmp_path):
    """A directory as the command makes it, and rows to learn from."""
    rows = [json.dumps({"body": line}) + "\n" for line in make_text(300).splitlines()]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    flags = [f"--dataset={tmp_path / 'rows.jsonl.gz'}", f"--out={tmp_path / 'own'}", f"--vocab_size={SIZE}"]
    assert main.main(["tokenizer", *flags, "--text_column=body"]) == 0
    return tmp_path / "own"


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("Aa '.\n\r\t09é")), max_size=40)


@given(text=texts, split=st.sampled_from(sorted(PATTERNS)))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_and_the_exported_form_gives_the_same_ids(text, split):
    tokenizer = learned(split)
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode() and (not text or ids.max() < SIZE - len(SPECIAL))
    library = to_tokenizers(tokenizer)
    library.encode_special_tokens = True
    assert library.encode(text).ids == ids.tolist() and library.decode(ids.tolist()) == text


@given(data=st.binary(max_size=30))
def test_any_bytes_have_tokens(data):
    tokenizer = learned()
    assert tokenizer.decode_bytes(list(data)) == data and tokenizer.pieces[:256] == [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(("split", "theirs"), [("gpt4", "cl100k_base"), ("gpt2", "gpt2")])
@given(text=texts)
@settings(max_examples=300)
def test_a_pattern_finds_the_pieces_that_tiktokens_own_does(split, theirs, text):
    assert regex.findall(PATTERNS[split], text) == regex.findall(pattern(theirs), text)


def test_it_learns_what_is_frequent_and_has_its_special_tokens_at_the_end():
    tokenizer = learned()
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("own", SIZE, SIZE - 5)
    assert tokenizer.to_dict()["special"] == {name: SIZE - 5 + i for i, name in enumerate(SPECIAL)}
    assert b" at" in tokenizer.pieces and len(make_text(50)) > 2 * len(tokenizer.encode(make_text(50)))
    assert tokenizer.decode(tokenizer.encode(SPECIAL[1])) == SPECIAL[1]  # in a text it is text
    assert train_tokenizer(iter(["ab ab cd"]), 4000, "gpt2").vocab_size == FEWEST + 1  # no other pair occurs twice
    again = train_tokenizer(iter([make_text(200), "naïve — 100% 'T IS\r\n\r\n  x\n" * 3]), SIZE, "gpt4")
    assert again.fingerprint == tokenizer.fingerprint == tokenizer_from_dict(tokenizer.to_dict()).fingerprint


def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = learned()
    (tmp_path / "tokenizer.json").write_text(to_tokenizers(tokenizer).to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hf_tokenizer_config(tokenizer)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = make_text(20) + "é☃\r\n 12345"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    chat = "<|user|>A heron<|end|><|endoftext|>"
    assert theirs(chat)["input_ids"] == [SIZE - 3, *tokenizer.encode("A heron"), SIZE - 1, SIZE - 5]
    assert theirs.decode(theirs(chat)["input_ids"]) == chat and theirs.eos_token_id == tokenizer.eot


def test_the_command_compares_with_what_is_here(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "obtain", None)  # nothing is fetched
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    flags = ["tokenizer", f"--dataset={tmp_path / 'rows.jsonl.gz'}", "--text_column=body", f"--vocab_size={SIZE + 1}"]
    assert main.main([*flags, f"--out={tmp_path / 'other'}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    size = sum(len(line.encode()) for line in make_text(300).splitlines())
    tokens = sum(len(build_tokenizer(str(tmp_path / "other"), "").encode(line)) for line in make_text(300).splitlines())
    assert [str(tmp_path / "other"), f"{SIZE + 1}", f"{size / tokens:.3f}"] in lines
    assert f"{tmp_path}/other: {SIZE + 1} tokens; --config.tokenizer={tmp_path}/other" in map(" ".join, lines)
    assert ["gpt2", "not", "here"] in lines and ["o200k_base", "not", "here"] in lines
    assert main.main([*flags[:2], "--skip_bad_rows", "--vocab_size=261", f"--out={tmp_path / 'none'}"]) == 0
    assert "300 bad rows are left out; the first is " in capsys.readouterr().err
    for more, words in (
        ([f"--out={own}"], [f"--out={own}: holds a tokenizer"]),
        ([f"--out={tmp_path / 'rows.jsonl.gz'}/in"], ["--out=", "rows.jsonl.gz/in"]),
        ([], ["--out: must be given"]),
        (["--vocab_size=260", "--out=x"], [f"--vocab_size=260: 260 is not an integer in the range [{FEWEST}, "]),
        (["--split=gpt3", "--out=x"], ["split", "gpt2|gpt4"]),
        (["--text_column=text", "--out=x"], ["--dataset: ", "row 1: has no 'text' but body", "--skip_bad_rows"]),
    ):
        assert main.main([*flags, *more]) == 2
        assert_one_line(capsys.readouterr().err, *words)
    assert not Path("x").exists()


def test_a_run_keeps_it_and_needs_its_directory_no_more(own, tmp_path, capsys):
    rows, text = tmp_path / "rows.jsonl.gz", tmp_path / "text.txt"
    text.write_text(make_text(30))
    config = tiny_config(tokenizer=str(own), dataset=str(rows), text_column="body", max_steps=3, mask_documents=True)
    config.update({"num_blocks": 1, "sample_every": 0, "sample_tokens": 1, "val_fraction": 0.3})
    made = train_lib.train(config, tmp_path / "run")
    assert (made.tokenizer.vocab_size, made.tokenizer.eot) == (SIZE, SIZE - 5)
    index = run(rows, tmp_path / "corpus", replace(SETTINGS, tokenizer=str(own), text_column="body"))
    assert (index["tokenizer"], index["eot"]) == ("own", SIZE - 5)
    load = partial(data_of, data_dir=tmp_path, val_fraction=0.3, test_fraction=0.0, context_len=4)
    assert load(str(tmp_path / "corpus"), str(own)).tokenizer.fingerprint == made.tokenizer.fingerprint
    assert f"set config.tokenizer={tmp_path / 'corpus'}" in refusal(load, str(tmp_path / "corpus"), "gpt2")
    assert load(str(text), str(tmp_path / "run")).tokenizer.fingerprint == made.tokenizer.fingerprint  # a run's will do
    another = tmp_path / "another"
    assert main.main(["tokenizer", f"--dataset={text}", f"--out={another}", f"--vocab_size={SIZE}"]) == 0
    assert "was prepared with own" in refusal(load, str(tmp_path / "corpus"), str(another))
    shutil.copy(another / "tokenizer.json", own)
    message = refusal(run, rows, tmp_path / "corpus", replace(SETTINGS, tokenizer=str(own), text_column="body"))
    assert message.startswith(
        f"--tokenizer: {tmp_path / 'corpus'} was begun with 'own {made.tokenizer.fingerprint[:12]}'"
    )
    tuned = tiny_config(tokenizer=str(another), dataset=str(text), init_from=str(tmp_path / "run"), num_blocks=1)
    with pytest.raises(UserError, match=r"^config\.tokenizer: the weights were trained with 'own'"):
        train_lib.train(tuned, tmp_path / "tuned")
    shutil.rmtree(own)
    config.max_steps = 5
    assert train_lib.train(config, tmp_path / "run").step == 5
    assert run_lib.load_tokenizer(tmp_path / "run").fingerprint == made.tokenizer.fingerprint
    capsys.readouterr()
    assert main.main(["eval", f"--workdir={tmp_path / 'run'}"]) == 0
    assert '"split": "val"' in capsys.readouterr().out
    message = refusal(load, str(text), str(own))
    assert message.startswith(f"{own}/tokenizer.json: cannot be read (No such file")


def test_only_one_of_its_kind_lies_in_a_directory(tmp_path):
    for saved, words in (({"kind": "byte"}, "is of kind byte"), ({"model": {}}, "not a saved tokenizer")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
        message = refusal(build_tokenizer, str(tmp_path), "")
        assert message.startswith(f"config.tokenizer: {tmp_path}/tokenizer.json: {words}")
