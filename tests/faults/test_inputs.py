"""Whatever a person gives: it works, or it is one line that names the key; texts come back as they were."""

import contextlib
import copy
import io
import math
import re
import unicodedata

import numpy as np
import pytest
from helpers import assert_one_line, assert_possible_or_refused, data_of, finished_run, losses, make_text, tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

import config_lib
import input_pipeline
import main
import run_lib
import train_lib
from commands import flags
from configs import default
from corpus.tokenizer import UnknownCharacters
from runtime.errors import UserError
from runtime.screen.console import Console
from training.cost import parameter_counts
from transformer import sampling

DEFAULTS = default.get_config()
NUMBERS = [key for key, value in DEFAULTS.items() if type(value) in (int, float)]
ODD = st.sampled_from(
    [-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 10**30, -1.0, 0.0, 1e-300, 0.5, 1.0, 1e300, math.nan, math.inf]
)
WRONG = st.one_of(st.none(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2), st.just({}))


# --- Configs --------------------------------------------------------------------------------------------------------


@given(changes=st.dictionaries(st.sampled_from(NUMBERS), ODD, min_size=1, max_size=4))
@settings(max_examples=300)
def test_numbers_in_several_keys_are_possible_together_or_refused_in_one_line(changes):
    """What the check lets through has a size that can be counted, and so be held against the memory there is."""
    config = copy.deepcopy(DEFAULTS)
    with config.ignore_type():
        config.update(changes)
    try:
        config_lib.check(config)
    except UserError as error:
        assert re.match(r"config\.\w+: [^\n]+$", str(error))
        return
    model = config_lib.transformer_config(config, 65, "float32")
    assert all(isinstance(count, int) and count >= 0 for count in parameter_counts(model).values())
    config_lib.optimizer_config(config)
    assert config_lib.from_dict(config_lib.to_dict(config)) == config


@given(key=st.sampled_from(list(DEFAULTS)), value=WRONG | ODD)
@settings(max_examples=300)
def test_any_value_in_any_key_keeps_its_type_or_is_refused_in_one_line(key, value):
    assert_possible_or_refused(key, value)


@given(word=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12))
@example("--config.=1").via("a key without a name")
@example("--config.lr").via("a value that is missing")
@example("--=").via("nothing at all")
@settings(max_examples=150)
def test_any_word_on_the_command_line_is_a_flag_or_one_line(word):
    for argv in ([word], [f"--{word}"], [f"--config.{word}"], [f"--config.lr={word}"]):
        if argv[0] in ("-h", "--h", "--help", "--helpfull") or argv[0].startswith(("-h", "--h")):
            continue
        try:
            values = flags.parse_flags("train", "", argv, lambda _: None, config=True)
            config_lib.check(values.config)
        except UserError as error:
            with contextlib.redirect_stderr(io.StringIO()) as screen:
                Console().print_error(error)
            assert_one_line(screen.getvalue())


# --- Texts ----------------------------------------------------------------------------------------------------------

LINES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@given(text=LINES, mark=st.booleans(), tokenizer=st.sampled_from(["char", "byte"]), val=st.floats(0.1, 0.9))
@example("\r\n", False, "char", 0.5).via("line ends of another system")
@example("\0", True, "char", 0.5).via("NUL")
@example("\ufeff", True, "char", 0.5).via("a second byte order mark")
@settings(max_examples=60)
def test_any_text_comes_back_as_it_was(tmp_path_factory, text, mark, tokenizer, val):
    """Split, encoded, decoded and joined: but for a byte order mark at the start, every character is there."""
    folder = tmp_path_factory.mktemp("text")
    whole = text * 30
    if tokenizer == "char":
        whole = whole.removeprefix("\ufeff")
    content = (b"\xef\xbb\xbf" if mark else b"") + whole.encode()
    (folder / "text").write_bytes(content)
    size = {"data_dir": folder, "val_fraction": val, "test_fraction": 0.0, "context_len": 1, "say": lambda _: None}
    data = data_of(str(folder / "text"), tokenizer, **size)
    tokens = np.concatenate([data.train.tokens, data.val.tokens])
    assert data.tokenizer.decode_bytes(tokens) == (content if tokenizer == "byte" else whole.encode())


@given(data=st.binary(min_size=1, max_size=40))
@example("\ud800".encode("utf-8", "surrogatepass")).via("half of a surrogate pair")
@settings(max_examples=60)
def test_bytes_that_are_no_text_are_refused_with_the_place(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text").write_bytes(data * 20)
    size = {"data_dir": folder, "val_fraction": 0.5, "test_fraction": 0.0, "context_len": 1, "say": lambda _: None}
    try:
        (data * 20).decode()
    except UnicodeDecodeError as error:
        with pytest.raises(
            UserError, match=rf"is not UTF-8 at byte {error.start} \(0x{(data * 20)[error.start]:02x}\)"
        ):
            data_of(str(folder / "text"), "char", **size)


@pytest.mark.once
def test_a_text_that_is_rewritten_during_a_run_changes_nothing_until_the_next(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text(make_text())

    def rewriting(make, spans):
        for span, batch in input_pipeline.prefetch(make, spans):
            if 3 in span:
                text.write_text(make_text(seed=1))
            yield span, batch

    monkeypatch.setattr(train_lib, "prefetch", rewriting)
    config = tiny_config(dataset=str(text), max_steps=8, sample_every=0)
    train_lib.train(config, tmp_path / "run")
    assert text.read_text() != make_text() and losses(tmp_path / "run")[:7] == losses(finished_run().workdir)[:7]
    config.max_steps = 9
    with pytest.raises(UserError, match=r"^config\.dataset: the text has changed .*--fresh"):
        train_lib.train(config, tmp_path / "run")
    text.write_text(make_text())
    assert train_lib.train(config, tmp_path / "run").step == 9


@pytest.mark.once
def test_a_text_of_one_symbol_trains_to_a_loss_of_nothing(tmp_path):
    (tmp_path / "text").write_text("a" * 3000)
    run = train_lib.train(tiny_config(dataset=str(tmp_path / "text"), max_steps=3, sample_prompt="a"), tmp_path / "run")
    assert [row["loss"] for row in run.history] == [0.0] * 3 and run.val_loss == 0
    assert all(row["bad_batches"] == row["loss_spikes"] == 0 for row in run.history)
    assert "a" * 21 in (tmp_path / "run" / "samples.txt").read_text()


@pytest.mark.once
@pytest.mark.slow
def test_an_alphabet_of_65000_symbols_is_warned_of_and_trains(tmp_path, capsys):
    alphabet = [chr(code) for code in range(0x100, 0x110000) if not 0xD800 <= code < 0xE000][:65_000]
    (tmp_path / "text").write_text("".join(alphabet), encoding="utf-8")
    config = tiny_config(
        dataset=str(tmp_path / "text"),
        max_steps=1,
        sample_prompt=alphabet[7],
        embedding_dim=8,
        eval_tokens=64,
        val_fraction=0.01,
    )
    run = train_lib.train(config, tmp_path / "run")
    assert run.history[0]["loss"] == pytest.approx(math.log(65_000), abs=0.1)
    assert "warning: the text has 65,000 different characters; config.tokenizer=byte has 256" in capsys.readouterr().out


# --- Prompts --------------------------------------------------------------------------------------------------------


@given(prompt=st.text(st.characters(codec="utf-8"), max_size=40))
@example("A\u0301").via("a mark that would be printed onto the quote before it")
@settings(max_examples=60)
def test_any_prompt_is_known_or_its_strange_characters_are_named(prompt):
    tokenizer = finished_run().tokenizer
    try:
        assert tokenizer.decode(tokenizer.encode(prompt)) == prompt
    except UnknownCharacters as error:
        text = str(error)
        assert text.isprintable()
        strange = [place for place, character in enumerate(prompt) if character not in set(make_text())]
        first = prompt[strange[0]]
        assert f"{ascii(first) if unicodedata.combining(first) else repr(first)} at {strange[0]}" in text
        assert set(tokenizer.decode(tokenizer.encode(prompt, replace_unknown=True))) <= set(make_text())


def test_an_empty_prompt_a_long_one_and_no_tokens(capsys):
    workdir = finished_run().workdir
    capsys.readouterr()
    assert main.main(["sample", f"--workdir={workdir}", "--prompt=", "--num_tokens=5", "--temperature=0"]) == 0
    empty = capsys.readouterr().out
    assert main.main(["sample", f"--workdir={workdir}", "--prompt=\n", "--num_tokens=5", "--temperature=0"]) == 0
    assert capsys.readouterr().out == f"\n{empty}"
    long, end = "The miller finds two eels at 7.\n", "finds two eels at 7.\n"[-16:]
    model, tokenizer, _, _ = run_lib.load_model(workdir)
    assert sampling.generate(model, tokenizer, [long], 6) == sampling.generate(model, tokenizer, [end], 6)
    assert main.main(["sample", f"--workdir={workdir}", "--prompt=A", "--top_k=100000", "--num_tokens=2"]) == 0


def test_a_sample_prompt_with_strange_characters_is_refused_with_their_places(tmp_path, capsys):
    config = tiny_config(sample_prompt="A µ☃")
    with pytest.raises(UserError) as refused:
        train_lib.train(config, tmp_path)
    assert_one_line(f"error: {refused.value}\n", "error: config.sample_prompt: ", "'µ' at 2", "'☃' at 3")
