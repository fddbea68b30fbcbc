"""Runs compared: numbers worked out by hand, in the terminal, in a pipe, and on a page that a name cannot break."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import assert_one_line, run_main
from screen import Watched

import config_lib
import main
from config_lib import key_docs, written
from configs import default, shakespeare
from reports import compare, plots
from runtime.files import MetricsFile, write_json
from runtime.screen.console import Console
from runtime.screen.text import Table


def fabricate(workdir: Path, val: dict[int, float], logged: int = 40, scale: float = 1.0, **changes) -> Path:
    """A run's directory as the trainer leaves it: a row each 10 steps, `val` at some; 100 tokens and 0.5 s a step.

    Bits per byte are `scale` times the loss.
    """
    workdir.mkdir(parents=True)
    config = default.get_config()
    config.update(changes)
    write_json(workdir / "config.json", {"config": config_lib.to_dict(config), "device_kind": "cpu"})
    file = MetricsFile(workdir / "metrics.jsonl")
    for step in range(10, logged + 1, 10):
        row = {"step": step, "tokens": 100 * step, "loss": 4 - step / 20, "elapsed_seconds": step / 2}
        row |= {"tokens_per_second": None if step == 10 else 190.0 + step, "peak_memory_bytes": (100 - step) * 2**20}
        if step in val:
            row |= {"val_loss": val[step], "bits_per_byte": val[step] * scale, "val_tokens": 999}
        file.append(row)
    return workdir


def compared(capsys, *argv: str | Path) -> str:
    capsys.readouterr()
    assert main.main(["compare", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, argv: list, *words: str) -> None:
    capsys.readouterr()
    assert main.main(["compare", *map(str, argv)]) == 2
    assert_one_line(capsys.readouterr().err, *words)


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Two seeds of one config and one of another."""
    return [
        fabricate(tmp_path / "muon-seed0", {20: 2.5, 30: 1.5, 40: 1.75}, run="x"),
        fabricate(tmp_path / "muon-seed1", {20: 2.0, 30: 1.75, 40: 1.625}, seed=1),
        fabricate(tmp_path / "adam", {20: 2.25, 40: 2.125}, use_muon=False),
    ]


def cells(text: str, title: str) -> list[list[str]]:
    """The rows below a table's title and its headings."""
    block = text.split(title + "\n", 1)[1].split("\n\n", 1)[0]
    return [re.split(r" {2,}", line.strip()) for line in block.splitlines()[1:]]


def test_every_number_is_the_one_worked_out_by_hand(three, tmp_path, capsys):
    text = compared(capsys, *three, f"--out={tmp_path / 'out'}")
    assert cells(text, "What differs") == [
        ["muon", "True", "0, 1"],
        ["adam", "False", "0"],
    ]
    assert cells(text, "Loss") == [  # steps, tokens, last, best, at step, bits
        ["muon-seed0", "40", "4.0k", "1.7500", "1.5000", "30", "1.5000"],
        ["muon-seed1", "40", "4.0k", "1.6250", "1.6250", "40", "1.6250"],
        ["adam", "40", "4.0k", "2.1250", "2.1250", "40", "2.1250"],
    ]
    # The worst of the bests is 2.125: reached at steps 30, 20 and 40. Speeds are 210, 220, 230; the peak is the first.
    assert "tokens to 2.1250  seconds to 2.1250" in text
    assert cells(text, "Cost") == [
        ["muon-seed0", "3.0k", "15.0", "20.0", "220", "90"],
        ["muon-seed1", "2.0k", "10.0", "20.0", "220", "90"],
        ["adam", "4.0k", "20.0", "20.0", "220", "90"],
    ]
    # (1.75 + 1.625) / 2, and sqrt(2 x 0.0625^2 / (2 - 1)); seconds 15 and 10: 12.5 and 3.54.
    loss, cost = cells(text, "Loss, mean over seeds"), cells(text, "Cost, mean over seeds")
    assert loss[0] == ["muon", "2", "40 ± 0", "1.6875 ± 0.0884", "1.5625 ± 0.0884", "1.5625 ± 0.0884"]
    assert loss[1] == ["adam", "1", "40", "2.1250", "2.1250", "2.1250"]
    assert cost[0] == ["muon", "2", "2.5k ± 707", "12.5 ± 3.5", "20.0 ± 0.0", "220 ± 0", "90 ± 0"]


def test_a_target_that_some_do_not_reach(three, tmp_path, capsys):
    text = compared(capsys, "--target=1.5", *three, "--out", tmp_path / "out")
    assert [row[1:3] for row in cells(text, "Cost")] == [["3.0k", "15.0"], ["-", "-"], ["-", "-"]]
    assert [row[2:4] for row in cells(text, "Cost, mean over seeds")] == [["1 of 2", "1 of 2"], ["-", "-"]]


def test_runs_that_go_on_and_files_that_are_odd(tmp_path, capsys):
    """No row yet, no evaluation yet, a line cut short, lines that are no rows, a step logged twice, a loss of NaN."""
    fabricate(tmp_path / "new", {}, logged=0)
    fabricate(tmp_path / "early", {}, logged=20)
    torn = fabricate(tmp_path / "torn", {20: 2.5, 30: math.nan}, logged=30)
    with (torn / "metrics.jsonl").open("a") as file:
        again = {"step": 20, "tokens": 2000, "loss": 3.0, "elapsed_seconds": 11.0, "val_loss": 2.25}
        file.write(f'7\n[]\nnull\n{{"step": "40", "tokens": 1}}\n{json.dumps(again)}\n{{"step": 40, "tokens": 40')
    text = compared(capsys, tmp_path / "new", tmp_path / "early", tmp_path / "torn", f"--out={tmp_path / 'out'}")
    assert cells(text, "Loss") == [
        ["new", "-", "-", "-", "-", "-", "-"],
        ["early", "20", "2.0k", "-", "-", "-", "-"],
        ["torn", "30", "3.0k", "2.2500", "2.2500", "20", "-"],
    ]
    assert cells(text, "Cost")[2][:4] == ["torn", "2.0k", "11.0", "15.0"]
    nothing = compared(capsys, tmp_path / "new", f"--out={tmp_path / 'out'}")
    assert "tokens to a loss" in nothing and (tmp_path / "out" / "loss_by_tokens.png").stat().st_size > 1000


def cover(run: Path, tokens: dict[int, int], **end: float) -> Path:
    """Sets on how many tokens the evaluations of a fabricated run stand, and what the last row tells beside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    covered = [row | ({"val_tokens": tokens[row["step"]]} if row["step"] in tokens else {}) for row in lines]
    covered[-1] |= end
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in covered))
    return run


def test_only_losses_over_the_same_tokens_are_compared(tmp_path, capsys):
    """A prefix of 100 tokens in training, all 999 at the end, there with the prefix: 1.25 of all is no record."""
    prefix = {"prefix_val_loss": 2.25, "prefix_val_tokens": 100, "prefix_bits_per_byte": 2.25}
    ended = cover(fabricate(tmp_path / "ended", {20: 2.5, 30: 2.0, 40: 1.25}), {20: 100, 30: 100}, **prefix)
    longer = cover(fabricate(tmp_path / "longer", {20: 2.75, 30: 1.75, 40: 1.5}, seed=1), {20: 100, 30: 100, 40: 100})
    whole = fabricate(tmp_path / "whole", {20: 1.75, 40: 1.5}, lr=0.5)
    out = f"--out={tmp_path / 'out'}"
    columns = lambda text: [row[3:6] for row in cells(text, "Loss")]  # last, best, at step
    text = compared(capsys, ended, longer, out)
    assert columns(text) == [["2.2500", "2.0000", "30"], ["1.5000", "1.5000", "40"]]
    assert "To 2.0000" in text and "All losses are over the first 100 tokens" in text
    text = compared(capsys, ended, out)
    assert columns(text) == [["1.2500", "2.0000", "30"]] and "Best is over the first 100 tokens" in text
    text = compared(capsys, ended, whole, out)
    assert columns(text) == [["1.2500", "1.2500", "40"], ["1.5000", "1.5000", "40"]] and "over the first" not in text
    text = compared(capsys, longer, whole, out)
    assert columns(text) == [["1.5000", "1.5000", "40"], ["1.5000", "1.5000", "40"]]
    assert "which do not compare" in text and "tokens to a loss" in text


def test_different_tokenizers_compare_by_bits_per_byte(tmp_path, capsys):
    fabricate(tmp_path / "char", {20: 2.0, 40: 1.5}, scale=1.5)
    fabricate(tmp_path / "gpt2", {20: 5.0, 40: 4.0}, scale=0.5, tokenizer="gpt2")
    text = compared(capsys, tmp_path / "char", tmp_path / "gpt2", f"--out={tmp_path / 'out'}")
    assert "To 2.2500 bits per byte" in text and "tokenizers differ" in text  # of 2.25 and 2.0
    assert [row[1:3] for row in cells(text, "Cost")] == [["4.0k", "20.0"], ["4.0k", "20.0"]]


def test_a_directory_of_runs_stands_for_them_and_output_among_them_is_passed_over(three, tmp_path, capsys):
    out = tmp_path / "compare"
    by_name = compared(capsys, *sorted(three), f"--out={out}")
    assert compared(capsys, tmp_path, three[0], out, f"--out={out}") == by_name


class Page(HTMLParser):
    """Counts a page's tags, gathers its text and what it points at."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.text, self.links = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.filterwarnings("error")
def test_names_are_harmless_on_the_page_in_the_pictures_and_on_a_terminal(tmp_path, capsys):
    names = ["<script>alert(1)<", "_'\" onerror=x & $\\foo$", "[red]$", "\x1b[31mred"]
    for i, name in enumerate(names):
        fabricate(tmp_path / "runs" / name, {20: 2.0 + i}, lr=0.1 + i, dataset="<img src=x onerror=alert(2)>")
    text = compared(capsys, *(tmp_path / "runs" / name for name in names), f"--out={tmp_path / 'out'}")
    assert "\x1b" not in text and all(name in text for name in names[:3])
    source = (tmp_path / "out" / "compare.html").read_text()
    page = Page(source)
    assert set(page.tags) <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "div",
            "table",
            "tr",
            "th",
            "td",
            "p",
            "img",
            "wbr",
        )
    }
    assert len(page.links) == page.tags.count("img") == 2
    for link, file in zip(page.links, ("loss_by_tokens.png", "loss_by_seconds.png"), strict=True):
        kind, data = link.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / "out" / file).read_bytes()
    assert all(name in "".join(page.text) for name in names[:3])
    assert "http" not in source and "url(" not in source and "width=device-width" in source


@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_tables_fold_into_its_width(columns, monkeypatch):
    screen = Watched()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    for no_color in (False, True):
        screen.seek(0)
        screen.truncate()
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        Console().table(Table("T", ["run", "loss"], [["[b]" + "name" * 40, "1.5"], ["b", "22"]], bold=frozenset({1})))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
        assert max(map(len, plain.splitlines())) <= columns
        assert plain.count("name") >= 38 - columns // 40 and "[b]" in plain and "1.5" in plain
        assert ("\x1b[1;32m" in screen.getvalue()) is not no_color


def test_what_cannot_be_compared_is_one_line(three, tmp_path, capsys):
    refused(capsys, [], "compare: names no run")
    refused(capsys, [tmp_path / "adma"], f"{tmp_path / 'adma'}: no run", "did you mean adam?")
    (tmp_path / "empty").mkdir()
    refused(capsys, [tmp_path / "empty"], "empty: no run", "no config.json in it")
    refused(capsys, [tmp_path / "empty", tmp_path / "empty"], "no run among them")
    refused(capsys, [*three, f"--out={three[0] / 'config.json'}"], "--out=", "name a directory")
    refused(capsys, [*three, "--target=low"], "--target=low")
    (three[1] / "metrics.jsonl").unlink()
    (three[1] / "metrics.jsonl").mkdir()
    refused(capsys, three, "metrics.jsonl: cannot be read")
    for content in ("{", "[]", '{"config": 3}'):
        (three[0] / "config.json").write_text(content)
        refused(capsys, three, "config.json: ")
    for key, value in ("batch_size", "four"), ("betas", [[]]), ("tokenizer", {}), ("num_blocks", 0):
        write_json(three[0] / "config.json", {"config": {key: value}})
        refused(capsys, three, f"{three[0] / 'config.json'}: config.{key}: ")


def test_what_is_no_run_is_left_out_with_a_word(three, tmp_path, capsys):
    (tmp_path / "refused").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    out = f"--out={tmp_path / 'out'}"
    assert main.main(["compare", *map(str, sorted(tmp_path.iterdir())), out]) == 0
    output = capsys.readouterr()
    assert "muon-seed0" in output.out and output.err.count("\n") == 1
    assert (
        f"left out, for there is no config.json in it: {tmp_path / 'notes.txt'}, {tmp_path / 'refused'}" in output.err
    )


def test_a_damaged_row_is_left_out_with_one_warning(three, tmp_path, capsys):
    argv = ["compare", *map(str, three), f"--out={tmp_path / 'out'}"]
    assert main.main(argv) == 0
    before = capsys.readouterr()
    with (three[1] / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": ' + "9" * 400 + "}\n" + "[" * 10**5 + '\n{"step": 50, "tokens": "many"}\n')
    assert main.main(argv) == 0
    after = capsys.readouterr()
    assert after.out == before.out and after.err == f"warning: {three[1] / 'metrics.jsonl'}: 3 damaged rows left out\n"


def test_seconds_leave_out_what_was_compiled(tmp_path, capsys):
    """The first of two seeds compiled for twenty seconds, the second found it in the cache."""
    both = [fabricate(tmp_path / f"seed{seed}", {20: 2.5, 40: 2.0}, seed=seed) for seed in (0, 1)]
    for path, compiled in zip(both, (20.0, 0.5), strict=True):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        slower = [
            row | {"elapsed_seconds": row["elapsed_seconds"] + compiled, "compile_seconds": compiled} for row in lines
        ]
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in slower))
    text = compared(capsys, *both, f"--out={tmp_path / 'out'}")
    assert [row[3] for row in cells(text, "Cost")] == ["20.0", "20.0"] and "20.0 ± 0.0" in text


def test_every_run_is_in_the_picture(monkeypatch, tmp_path):
    """One that ended early, far above the others too."""
    long = [{"tokens": 100 * step, "val_loss": 2 - step / 100} for step in range(10, 101)]
    short = [{"tokens": 100 * step, "val_loss": 9.0} for step in range(1, 9)]
    limits = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: limits.append(figure.axes[0].get_ylim()))
    plots.plot_curves(
        [plots.Curve("long", long), plots.Curve("short", short)], tmp_path / "a.png", "tokens", "val_loss"
    )
    assert limits[0][0] < 1.0 and limits[0][1] > 9.0


def test_no_device_is_needed(three, tmp_path):
    done = run_main("compare", *map(str, three), f"--out={tmp_path / 'out'}", JAX_PLATFORMS="abacus")
    assert (done.returncode, done.stderr) == (0, "") and "muon-seed0" in done.stdout


def test_names_of_seeds_and_the_last_way_out():
    shared = compare._shared_name
    assert shared(["lr=0.1,seed=0", "lr=0.1,seed=1"]) == shared(["lr=0.1,seed=10", "lr=0.1,seed=11"]) == "lr=0.1"
    assert shared(["a/seed0", "a/seed1"]) == "a" and shared(["x1", "x1b"]) == "x1" and shared(["p", "q"]) == ""
    assert shared(["seed=0", "seed=1", "seed=2"]) == "3 seeds" and shared(["seed=0"]) == "seed=0"
    assert shared(["/p", "/q"]) == ""
    records = [compare.RunRecord(name, {"seed": name}, {}, []) for name in "pq"]
    assert list(compare.group_seeds(records)) == ["p ..."]


def test_a_run_of_max_seconds_is_whole_at_its_own_end():
    def record(name, timed, *steps):
        rows = [{"step": step, "tokens": 10 * step, "val_loss": 1.0} for step in steps]
        return compare.RunRecord(name, {"seed": 0}, {}, rows, timed)

    fast, slow, cut, failed = record("a", 100, 50, 100), record("b", 70, 70), record("c", 80, 60), record("d", 90)
    assert compare._whole([fast, slow, cut, failed]) == [fast, slow]
    assert compare._whole([record("e", 0, 100), record("f", 0, 70)]) == [record("e", 0, 100)]


def test_runs_with_averaged_weights_are_judged_by_these():
    """Averaging leaves the trained weights alone: by their losses, two runs that differ in it would never differ."""
    rows = [{"val_loss": 2.0, "bits_per_byte": 4.0, "ema_val_loss": 1.5}, {"val_loss": 3.0}, {"loss": 1.0}]
    judged = compare.as_judged([compare.RunRecord("a", {}, {}, rows)])[0].rows
    assert judged == [rows[0] | {"val_loss": 1.5, "bits_per_byte": 3.0}, *rows[1:]]


# --- The config command, and help -------------------------------------------------------------------------------------


def test_config_shows_every_key_with_its_comment_and_what_differs(capsys):
    assert main.main(["config", "--config.lr=0.5", "--config.betas=0.8,0.9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    config = shakespeare.get_config()
    config.update({"lr": 0.5, "betas": (0.8, 0.9)})
    for key, doc in key_docs().items():
        (line,) = [line for line in lines if re.match(rf"[* ] +{key} ", line)]
        assert written(config[key]) in line and doc.comment in line
        differs = config[key] != doc.default
        assert line.startswith("*") == differs == line.endswith(f"(default {written(doc.default)})")
    assert [line for line in lines if re.fullmatch(r"[A-Z]\w+", line)] == (
        ["Model", "Data", "Optimizer", "Training", "Logging", "Checkpoints"]
    )
    assert "zero also starts an untied head at zero" in key_docs()["output_init"].comment


def test_config_refuses_what_training_would_refuse(capsys):
    assert main.main(["config", "--config.num_heads=3"]) == 2
    assert_one_line(capsys.readouterr().err, "config.embedding_dim")


@pytest.mark.parametrize("command", ["", *main.COMMANDS])
def test_help_fits_on_a_screen(command, capsys):
    if command:
        with pytest.raises(SystemExit):
            main.main([command, "--help"])
    else:
        main.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= (40 if command else 24)
    if command == "train":
        text = "\n".join(lines)
        for key in default.MOST_USED:
            assert f"    {key}={written(key_docs()[key].default)} " in text
