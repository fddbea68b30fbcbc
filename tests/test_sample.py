"""The prompt of `sample`: commands, what cannot be read, Ctrl-C, the history; and a prompt from standard input."""

import io
import json
import signal
import sys
import time

import pytest
from helpers import ROOT, assert_one_line, finished_run, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from terminal import Terminal

import main
import run_lib
import train_lib
from commands.sample import Session
from corpus.tokenizer import until
from runtime.errors import UserError
from transformer.sampling import Sampling, generate


class Person:
    """Someone at the prompt, who sees what is said and what is written."""

    def __init__(self, **settings):
        self.said, self.written = [], []
        run = finished_run()
        values = {"sampling": Sampling(seed=7), "num_tokens": 12, **settings}
        self.talk = Session(run.model, run.tokenizer, say=self.said.append, write=self.written.append, **values)

    def types(self, line: str) -> tuple[str, list[str]]:
        """(text, lines) that come back."""
        self.said.clear()
        self.written.clear()
        assert self.talk.answer(line)
        return "".join(self.written), list(self.said)


def text_after(prompt: str, **settings) -> str:
    run = finished_run()
    return prompt + generate(run.model, run.tokenizer, [prompt], 12, Sampling(**settings))[0] + "\n"


def test_each_text_has_the_next_seed_and_an_empty_line_goes_on():
    person = Person()
    first, said = person.types("A heron")
    assert (first, said) == (text_after("A heron", seed=7), [])
    second, _ = person.types("A heron")
    assert second == text_after("A heron", seed=8) != first
    assert person.types("")[0] == text_after(second.removesuffix("\n"), seed=9)


def test_settings_are_changed_and_shown():
    person = Person()
    for line in ("/temperature 0.3", "/top_k 3", "/top_p 0.9", "/min_p 0.05", "/seed 4", "/num_tokens 5"):
        assert person.types(line) == ("", [])
    assert person.talk.sampling == Sampling(0.3, 3, 0.9, 0.05, 4) and person.talk.num_tokens == 5
    assert person.types("/temperature") == ("", ["temperature 0.3"])
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "num_tokens", "quit"):
        assert f"/{name}" in person.types("/help")[1][0]
    assert max(map(len, Session.HELP.split("\n"))) <= 108
    assert not person.talk.answer("/quit")


@pytest.mark.parametrize(
    "line, words",
    [
        ("/temprature 1", "/temprature: unknown"),
        ("/temperature warm", "/temperature: 'warm' is no such number"),
        ("/temperature -1", "/temperature: must be at least 0"),
        ("/temperature nan", "/temperature: must be at least 0"),
        ("/top_k 1.5", "/top_k: '1.5' is no such number"),
        ("/seed -1", "/seed: "),
        ("/num_tokens -3", "/num_tokens: must be at least 0"),
        ("A µ", "'µ' at 2"),
        ("A \N{COMBINING ACUTE ACCENT}\N{ZERO WIDTH SPACE}", r"'\u0301' at 2, '\u200b' at 3"),
        ("//", "'/' at 0"),  # one slash of text, which this model does not know
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(line, words):
    person = Person()
    before = person.talk.sampling, person.talk.num_tokens
    text, said = person.types(line)
    assert text == "" and len(said) == 1 and words in said[0] and "\n" not in said[0]
    assert (person.talk.sampling, person.talk.num_tokens) == before


def test_long_prompts_and_unknown_characters_where_they_are_replaced():
    person = Person(replace_unknown=True)
    text, said = person.types("two eels " * 3)
    assert text.startswith("two eels " * 3) and said == ["the prompt has 27 tokens; the model reads the last 16"]
    assert person.types("A µ")[0].startswith("A  ")


def test_an_interrupt_stops_the_text_and_nothing_else():
    person = Person(num_tokens=100_000)
    whole = person.written.append

    def write(text):
        whole(text)
        if len(person.written) == 3:
            signal.raise_signal(signal.SIGINT)

    person.talk.write = write
    before = signal.getsignal(signal.SIGINT)
    text, _ = person.types("At")
    assert len(text) < 1000 and text.endswith("\n") and signal.getsignal(signal.SIGINT) is before
    assert person.types("/seed")[1] == ["seed 8"]


def test_a_terminal_gets_a_prompt_with_history_and_ctrl_c_stops_only_the_text(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        "sample",
        f"--workdir={finished_run().workdir}",
        "--num_tokens=20",
    ]
    for session in range(2):
        with Terminal(*command, XDG_STATE_HOME=str(tmp_path), PYTHONPATH=str(ROOT)) as terminal:
            terminal.wait_for("/help says more")
            terminal.wait_for("> ")
            if session == 0:
                terminal.type("A µ\r")
                assert "leave them out\r\n" in terminal.wait_for("> ")
                terminal.type("/num_tokens 1000000\rA heron\r")
                terminal.wait_for("A heron")  # the echo
                terminal.wait_for("A heron")
                terminal.wait_for("at ")
                terminal.type("\x03")
                terminal.wait_for("> ")
                terminal.type("half a line")
                terminal.wait_for("half a line")
                time.sleep(0.3)  # until it waits for a key: Python's readline misses a signal just before that
                terminal.type("\x03")
                terminal.wait_for("> ")
                terminal.type("/num_tokens 5\rAt\\\r")
                terminal.wait_for("… ")
                terminal.type(" 7\r")
                assert "At\r\n 7" in terminal.wait_for("> ")
                terminal.type("/quit\r")
            else:
                terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\r")  # four lines back: before /quit, " 7" and "At\\"
                terminal.wait_for("/num_tokens 5\r\n")
                terminal.wait_for("> ")
                terminal.type("\x04")
            assert terminal.end() == 0
            assert "Traceback" not in terminal.seen


def test_without_a_terminal_the_prompt_is_read_from_standard_input(capsys, monkeypatch):
    def sample(given: bytes) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return main.main(["sample", f"--workdir={finished_run().workdir}", "--num_tokens=12"])

    finished_run()
    capsys.readouterr()
    for typed in (b"A heron\n", b"\xef\xbb\xbfA heron\r\n"):
        assert sample(typed) == 0
        assert capsys.readouterr() == (text_after("A heron"), "")
    assert sample(b"") == 0
    assert capsys.readouterr().out == text_after("\n")
    assert sample(b"A \xff") == 2
    assert_one_line(capsys.readouterr().err, "error: standard input: not UTF-8 at byte 2")
    assert sample("A µ".encode()) == 2
    assert_one_line(capsys.readouterr().err, "error: standard input: ", "'µ' at 2")


@pytest.mark.once
def test_a_text_without_newlines_needs_no_prompt(tmp_path, capsys, monkeypatch):
    (tmp_path / "dna.txt").write_text("ACCGTTTGACA" * 30)
    config = tiny_config(dataset=str(tmp_path / "dna.txt"), max_steps=1, sample_tokens=7)
    run = train_lib.train(config, tmp_path / "run")
    ((_, sampled),) = run_lib.read_samples(tmp_path / "run")
    assert len(sampled) == 7 and set(sampled) <= set("ACGT")
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main.main(["sample", f"--workdir={run.workdir}", "--num_tokens=9"]) == 0
    assert len(capsys.readouterr().out) == 9 + 1
    config.sample_prompt = "N"
    with pytest.raises(UserError, match=r"^config\.sample_prompt: .*'N' at 0"):
        train_lib.train(config, tmp_path / "other")


# --- Several texts, stops, files --------------------------------------------------------------------------------------


def sample_out(capsys, *flags: str) -> str:
    workdir = finished_run().workdir
    capsys.readouterr()
    assert main.main(["sample", f"--workdir={workdir}", "--num_tokens=12", *flags]) == 0
    return capsys.readouterr().out


@given(pieces=st.lists(st.text("ab ", max_size=5), max_size=8), stops=st.lists(st.text("ab ", min_size=1), max_size=3))
def test_a_stop_ends_the_text_wherever_the_pieces_end(pieces, stops):
    text, shown = "".join(pieces), "".join(until(pieces, stops))
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
    else:
        there = text[: min(ends)]
        assert there.startswith(shown) and there.removeprefix(shown) in stops
        assert not any(stop in shown for stop in stops)
    assert "".join(until(list(text), stops)) == shown


def test_what_cannot_begin_a_stop_is_not_held_back():
    assert list(until(["A her", "on f", "inds"], ["f!", "x"])) == ["A her", "on ", "finds"]


def test_stops_end_a_text_on_the_command_line_and_at_the_prompt(capsys):
    whole = text_after("A heron")
    stop = whole[len("A heron") :][4:7]
    cut = "A heron" + whole[len("A heron") :].partition(stop)[0] + "\n"
    assert sample_out(capsys, "--prompt=A heron", f"--stop={stop}", "--stop=nowhere") == cut != whole
    person = Person(sampling=Sampling(), stops=[stop])
    assert person.types("A heron")[0] == cut


def test_several_samples_are_those_of_the_seeds_that_follow(capsys):
    texts = [text_after("At 7", seed=seed) for seed in (5, 6, 7)]
    told = "".join(f"--- {i + 1} of 3, seed {5 + i} ---\n{text}" for i, text in enumerate(texts))
    assert sample_out(capsys, "--prompt=At 7", "--num_samples=3", "--seed=5") == told


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_of_a_file_go_to_a_file(tmp_path, capsys, name):
    prompts, out = ["A heron", "My aunt "], tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": prompt, "other": 1}) if name.endswith("l") else prompt for prompt in prompts]
    (tmp_path / name).write_text("\ufeff" + "\r\n\n".join(lines) + "\n", newline="")  # as editors and shells write it
    flags = [f"--prompts={tmp_path / name}", f"--out={out}", "--num_samples=2"]
    assert sample_out(capsys, *flags) == ""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    want = [(prompt, text_after(prompt, seed=seed)[len(prompt) : -1], seed) for prompt in prompts for seed in (0, 1)]
    assert [(row["prompt"], row["text"], row["seed"]) for row in rows] == want
    assert main.main(["sample", f"--workdir={finished_run().workdir}", *flags]) == 2
    assert_one_line(capsys.readouterr().err, f"error: --out={out}: is there already; name a new file")
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_long_prompts_of_a_file_are_told_in_one_line(tmp_path, capsys):
    (tmp_path / "prompts").write_text("A heron\n" + "two eels \n" * 2 + "two eels at 7 two\n" * 3)
    told = ["sample", f"--workdir={finished_run().workdir}", f"--prompts={tmp_path / 'prompts'}", "--num_tokens=0"]
    capsys.readouterr()
    assert main.main(told) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["3 of 6 prompts have more than 16 tokens; the model reads their last 16"]


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("", [], ["has no prompt"]),
        ("A heron\nA µ\n", [], ["prompts.jsonl: line 1: is no JSON object"]),
        ('{"prompt": "A"}\n\n{"text": "A"}', [], ["prompts.jsonl: line 3: is no JSON object"]),
        ('{"prompt": "A"}\n{"prompt": "A µ"}', [], ["prompts.jsonl: line 2: ", "'µ' at 2", "--replace_unknown"]),
        (None, [], ["--prompts=", "cannot be read"]),
        ('{"prompt": "A"}', ["--prompt=A"], ["--prompts: ", "leave out that or --prompt"]),
        ('{"prompt": "A"}', ["--num_samples=0"], ["--num_samples=0: 0 is not a positive integer"]),
        ('{"prompt": "A"}', ["--stop="], ["--stop: must not be empty"]),
        ('{"prompt": "A"}', ["--out=/gone/out.jsonl"], ["--out=/gone/out.jsonl: cannot be made"]),
    ],
)
def test_what_cannot_be_sampled_is_one_line_and_no_file(tmp_path, capsys, content, flags, words):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        prompts.write_text(content)
    given = [f"--workdir={finished_run().workdir}", f"--prompts={prompts}", f"--out={out}", *flags]
    capsys.readouterr()
    assert main.main(["sample", *given]) == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert not out.exists()
