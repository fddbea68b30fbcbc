"""What the documentation says to type is what the program takes, and what it quotes is what stands in the source.

Blocks of docs/*.md run in the order of their page, in a directory of their own, with a tiny model and text:

    ```sh        each command runs, most pages' under `-m slow`; one with a comment `# takes ...` is only parsed, as it
                 would train for long. The real command line parses all of them each time.
    ```python    runs; when its first line is `# FILE`, it is an excerpt of that file, or a new file that is written

Commands of the README, which train for minutes and read corpora, are parsed alone; its Python runs.
"""

import argparse
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, finished_run, make_text, tiny_config

import config_lib
import main
from commands import sweep
from configs import shakespeare

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LONG = "# takes "
OTHER = r"tail|echo|(?:\.venv/bin/)?pip|uv|python3 -m venv|git clone|cd"  # programs of others


class Parsed(Exception):
    """Raised in place of the command's work."""


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(page.read_text(encoding="utf-8")) if kind == language]


def shell_lines(page: Path) -> list[str]:
    """The lines of fenced shell blocks, and of indented ones that begin with a program."""
    text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))  # a line that goes on
    indented = re.findall(rf"^    ((?:time |\.venv/bin/)?(?:python3?|pytest|{OTHER}) .*)$", FENCED.sub("", text), re.M)
    fenced = [line for body in blocks(page, "sh") for line in body.splitlines() if line.strip()]
    return fenced + indented


def commands(line: str) -> list[list[str]]:
    """The words of each command of a line."""
    words, found = shlex.split(line, comments=True), [[]]
    for word in words:
        if word == "&&":
            found.append([])
        elif word != "&":
            found[-1].append(word)
    return found


def main_arguments(words: list[str]) -> list[str] | None:
    """What is given to main.py, if it is that."""
    return words[words.index("main.py") + 1 :] if "main.py" in words[:3] else None


def is_file_of_page(words: list[str]) -> bool:
    return words[0] == "python" and Path(words[1]).exists()


def parse_only(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line up to where the work would begin. Raises SystemExit or an error for what it does not take."""
    command, arguments = ("train", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    module = importlib.import_module(f"commands.{command}")
    real = module.parse_flags

    def parse(command, about, argv, define, config=False, words=None):
        values = real(command, about, argv, define, config, words)
        if command == "sweep":
            patch.setattr(module, "parse_flags", real)
            sweep.grid(argv, values.set, values.seeds)
        elif config:
            config_lib.check(values.config)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(module, "parse_flags", parse)
        with pytest.raises(SystemExit if "--help" in arguments else Parsed):
            module.main(arguments)


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether what the line calls is there and takes its flags; nothing is trained."""
    for words in commands(line):
        words = words[1:] if words[0] == "time" else words
        argv = main_arguments(words)
        if argv is not None:
            parse_only(["train" if word == "COMMAND" else word for word in argv], monkeypatch)
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            check_benchmark(words[2], words[3:], monkeypatch)
        elif words[0].endswith("pytest"):
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests"))
        elif not is_file_of_page(words):
            assert re.match(OTHER, " ".join(words)), f"not known to the test: {line}"


def check_benchmark(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    if not arguments:
        assert callable(module.main)
        return

    def stop(real):
        def parse(*args, **kwargs):
            real(*args, **kwargs)
            raise Parsed

        return parse

    with monkeypatch.context() as patch:
        if hasattr(module, "flags_of"):
            patch.setattr(module, "flags_of", stop(module.flags_of))
        else:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop(argparse.ArgumentParser.parse_args))
        with pytest.raises(Parsed):
            module.main(arguments)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory as the clone's: configs, a text, finished runs under the names that the pages use."""
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (tmp_path / "configs" / path.name).symlink_to(path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.txt").write_text(make_text(), encoding="utf-8")
    talk = [{"role": "user", "content": "A lamp?"}, {"role": "assistant", "content": "It."}]
    (tmp_path / "talks.jsonl").write_text(4 * (json.dumps({"messages": talk}) + "\n"))
    stories = [json.dumps({"text": line}) for line in make_text().splitlines()]
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress("\n".join(stories).encode()))
    for name in "shakespeare", "imported":
        shutil.copytree(finished_run().workdir, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_new_files(page: Path, place: Path) -> None:
    for body in blocks(page, "python"):
        first = re.match(r"# (\S+\.py)\n", body)
        if first and not (ROOT / first[1]).exists():
            (place / first[1]).write_text(body.removeprefix(first[0]), encoding="utf-8")


def run(argv: list[str]) -> None:
    """A command with a tiny model and text, as far as the page does not say otherwise."""
    trains = not argv or argv[0].startswith("-") or argv[0] == "train"
    given = {word.partition("=")[0].removeprefix("--config.") for word in argv}
    settings = tiny_config(sample_every=0, sample_tokens=1, eval_every=1000, save_every=1000)
    names = {*TINY, "dataset", "data_dir"} - given
    tiny = [f"--config.{name}={settings[name]}" for name in sorted(names)] if trains else []
    assert main.main([*argv, *tiny]) == 0


RUN_EACH_TIME = "configs"  # the page whose commands all are run without `-m slow` too
PAGES_TO_RUN = [
    pytest.param(page, id=page.stem, marks=[] if page.stem == RUN_EACH_TIME else pytest.mark.slow) for page in PAGES
]


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES_TO_RUN)
def test_the_commands_of_a_page_run(page, place):
    write_new_files(page, place)
    for line in shell_lines(page):
        for words in commands(line):
            argv = main_arguments(words)
            if argv is not None and LONG not in line:
                run(argv)
            elif argv is not None and argv[0].startswith("-"):  # two steps, by bytes: the next line may give any text
                short = ["--config.max_steps=2", "--config.tokenizer=byte"]
                run([word for word in argv if not word.startswith("--config.max_steps")] + short)
            elif is_file_of_page(words) and importlib.util.find_spec("torch"):  # for transformers
                subprocess.run([sys.executable, *words[1:]], check=True)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_the_python_of_a_page(page, place, monkeypatch):
    shutil.rmtree("runs/shakespeare")
    small = tiny_config(tokenizer="byte", max_steps=2, sample_every=0, sample_tokens=1)
    monkeypatch.setattr(shakespeare, "get_config", lambda: small)
    for body in blocks(page, "python"):
        first = re.match(r"# (\S+\.py)\n", body)
        if first is None:
            exec(compile(body, page.name, "exec"), {})
        elif (ROOT / first[1]).exists():
            assert body.removeprefix(first[0]) in (ROOT / first[1]).read_text(encoding="utf-8"), body


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_a_page_says_what_the_command_line_takes(page, place, monkeypatch):
    write_new_files(page, place)
    for name in "base", "stories":  # which a line begins from that an earlier one would have made
        shutil.copytree("runs/imported", f"runs/{name}")
    lines = shell_lines(page)
    assert page != README or len(lines) + len(shell_lines(ROOT / "docs" / "using.md")) > 20
    for line in lines:
        check(line, monkeypatch)


def test_every_block_is_of_a_kind_that_is_tested():
    for page in [README, *PAGES]:
        kinds = {kind for kind, _ in FENCED.findall(page.read_text(encoding="utf-8"))}
        assert kinds <= {"sh", "python"}, page


@pytest.mark.parametrize(
    "line",
    [
        "python main.py --config=configs/shakespeare.py --config.max_step=3",
        "python main.py sample --work_dir=runs/a",
        "python main.py sweep --set attention_sinks=True,False",
        "python main.py --config=configs/gone.py",
        "python -m benchmarks.recipe --goals 2.0",
        "pytest tests/gone.py",
        "rm runs",
    ],
)
def test_a_renamed_flag_is_seen(line, place, monkeypatch):
    with pytest.raises((SystemExit, Exception)):
        check(line, monkeypatch)


def test_links_lead_somewhere():
    for page in [README, ROOT / "benchmarks" / "README.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", page.read_text(encoding="utf-8")):
            assert (page.parent / "".join(target)).exists(), (page.name, target)
