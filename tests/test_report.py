"""The report of a run: what is measured for it on the way, what the page holds, and that it never stops a run."""

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SCRATCH, assert_one_line, assert_same_state, finished_run, losses, tiny_config, train_until
from test_compare import Page

import config_lib
import main
import run_lib
import train_lib
from configs import default
from reports import run_page, sinks
from reports.compare import read_runs, tables_of
from reports.sinks import as_json, measure, scalars_of, separators_of
from transformer.model import model_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@cache
def reported_run() -> run_lib.Run:
    """`finished_run()` with report = True, made once, in a directory with a name to be escaped."""
    return train_lib.train(tiny_config(report=True), SCRATCH / "<i>a run_&")


def shares_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "sinks.jsonl").read_text().splitlines()]


def page_of(workdir: Path) -> tuple[str, str]:
    """The page's source, and its text."""
    source = (workdir / "report.html").read_text()
    return source, "".join(Page(source).text)


# --- On the way ---------------------------------------------------------------------------------------------------


def test_attention_is_measured_at_each_evaluation_and_nothing_else_changes():
    run, without, config = reported_run(), finished_run(), tiny_config()
    assert losses(run.workdir) == losses(without.workdir)
    assert_same_state(run.workdir, without, config, run.step)
    assert not (without.workdir / "sinks.jsonl").exists() and not (without.workdir / "report.html").exists()
    rows = shares_of(run.workdir)
    evaluated = [(row["step"], row["tokens"]) for row in run.history if row.get("val_loss") is not None]
    assert [(row["step"], row["tokens"]) for row in rows] == evaluated
    data = run_lib.load_data(config, lambda text: None)
    tokens_BT = sinks.stretch(data.val, config.context_len)
    want = measure(run.model, tokens_BT, separators_of(run.tokenizer))
    assert rows[-1] == {"step": 30, "tokens": rows[-1]["tokens"], **as_json(want)} and want.separators.any()
    np.testing.assert_allclose(rows[-1]["shares"], want.shares, rtol=1e-6)
    assert rows[0]["shares"] != rows[-1]["shares"]
    scalars = scalars_of(want)
    assert {key: run.history[-1][key] for key in scalars} == scalars  # and only where there is an evaluation
    assert all((key in row) == (row.get("val_loss") is not None) for key in scalars for row in run.history)


def test_a_run_that_goes_on_has_the_same_shares(tmp_path):
    config = tiny_config(report=True)
    train_until(13, config, tmp_path)
    before = (tmp_path / "sinks.jsonl").read_bytes()
    with (tmp_path / "sinks.jsonl").open("ab") as file:  # as a session that was killed after this checkpoint
        file.write(b'{"step": 14, "tokens": 1, "shares": [[0.5')
    train_lib.train(config, tmp_path)
    after = (tmp_path / "sinks.jsonl").read_bytes()
    assert after.startswith(before) and after == (reported_run().workdir / "sinks.jsonl").read_bytes()


def test_drawing_says_nothing_of_a_user_without_a_home():
    code = "import pwd, pathlib, sys\npwd.getpwuid = lambda number: {}[number]\nfrom reports import plots\n"
    code += "plots.plot_loss([], pathlib.Path(sys.argv[1]), 'a')"
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": os.environ["PATH"], "TMPDIR": folder}
        command = [sys.executable, "-c", code, f"{folder}/a.png"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(reported_run().workdir, workdir)
    monkeypatch.setattr(run_page, "html_page", lambda *_: [].pop())
    run = train_lib.train(tiny_config(report=True), workdir)
    assert run.step == reported_run().step
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "report.html" in line]
    assert "not written" in warning and "main.py report --workdir=" in warning


# --- The page -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_page_at_the_end_of_a_run_and_the_commands(tmp_path, capsys):
    workdir = tmp_path / "<i>a run_&"
    shutil.copytree(reported_run().workdir, workdir)
    with (workdir / "samples.txt").open("a") as file:
        file.write("--- step 99 ---\n<script>alert(1)</script> & so on\n\n")
    first, _ = page_of(workdir)
    assert main.main(["report", f"--workdir={workdir}", "--text=My aunt paints"]) == 0
    assert capsys.readouterr().out == f"wrote {workdir / 'report.html'}\n"
    source, text = page_of(workdir)
    page = Page(source)
    assert not {"script", "link", "iframe", "i"} & set(page.tags) and "http" not in source and "url(" not in source
    assert len(page.links) == page.tags.count("img") == first.count("<img") == 4 + 4 + 3
    for link in page.links:
        kind, data = link.split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    for expected in ("<i>a run_&", "<script>alert(1)</script> & so on", "step 99", "val_fraction", "muon_lr", "jaxlib"):
        assert expected in text
    last_LN = np.array(shares_of(workdir)[-1]["shares"])
    most, least = (np.unravel_index(at, last_LN.shape) for at in (last_LN.argmax(), last_LN.argmin()))
    assert f"{last_LN.mean():.1%} of all attention goes to the sinks; " in text
    assert f"most in head {most[1] + 1} of layer {most[0] + 1} ({last_LN.max():.1%})" in text
    assert f"least in head {least[1] + 1} of layer {least[0] + 1} ({last_LN.min():.1%})" in text
    assert "My aunt paints" in text and "on a text of 14 tokens" in text
    differs = source[source.index("what differs from the defaults") : source.index("Every key")].replace("<wbr>", "")
    base, config = map(config_lib.to_dict, (default.get_config(), run_lib.read_config(workdir)))
    assert set(re.findall(r'<tr><td class="word">(\w+)<', differs)) == {k for k in base if base[k] != config[k]}


def test_a_model_without_sinks_says_so(tmp_path, random_params):
    workdir, run = tmp_path / "run", finished_run()
    shutil.copytree(run.workdir, workdir)
    saved = json.loads((workdir / "config.json").read_text())
    saved["config"]["attention_sink"] = False
    (workdir / "config.json").write_text(json.dumps(saved))
    config = dataclasses.replace(run.model.config, attention_sink=False)
    model = model_of(config, random_params(config))
    run_page.write_report(workdir, model, run.tokenizer, "step 30", pytest.fail)
    source, text = page_of(workdir)
    measured = measure(model, np.arange(32).reshape(2, 16), separators_of(run.tokenizer))
    (workdir / "sinks.jsonl").write_text(json.dumps({"step": 30, "tokens": 9, **as_json(measured)}) + "\n")
    run_page.write_report(workdir, model, run.tokenizer, "step 30", pytest.fail)
    more, told = page_of(workdir)
    assert f"{measured.first.mean():.1%} of all attention goes to the first token; " in told
    assert "No shares were measured" in text and more.count("<img") == source.count("<img") + 1
    assert (
        "This model has no attention sinks" in text and "on a text of 16 tokens" in text and "to the sinks" not in text
    )


def test_a_comparison_shows_what_was_measured():
    last, shown = reported_run().history[-1], lambda *runs: tables_of(read_runs([*runs], pytest.fail), None)[0]
    [table] = [t for t in shown(reported_run().workdir, finished_run().workdir) if "Attention" in t.title]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows[reported_run().workdir.name]["to first token"] == f"{last['first_share']:.1%}"
    assert rows[reported_run().workdir.name]["kurtosis"] == f"{last['kurtosis']:.1f}"
    assert rows["finished"]["to first token"] == "-"
    assert not any("Attention" in t.title for t in shown(finished_run().workdir))


def test_what_is_missing_or_odd(tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run().workdir, workdir)  # nothing was measured in it
    (workdir / "sinks.jsonl").write_text('{"step": 3, "shares": [[1]]}\n[]\n{"step": "x"}\n{"step": 4, "sha')
    assert main.main(["report", f"--workdir={workdir}", "--text=☃"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "sinks.jsonl" in warning and "damaged" in warning and "--text" in error and "☃" in error
    shutil.rmtree(workdir / "checkpoints")
    assert main.main(["report", f"--workdir={workdir}", "--step=12"]) == 3
    assert main.main(["report", f"--workdir={workdir}"]) == 0
    _, text = page_of(workdir)
    assert "No shares were measured" in text and "No attention map" in text
    capsys.readouterr()
    assert main.main(["report", f"--workdir={tmp_path / 'none'}"]) == 2
    assert_one_line(capsys.readouterr().err, "none")


# --- In a browser -------------------------------------------------------------------------------------------------

PROBE = """<iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe><p id="found"></p><script>
onload = () => {{
  const view = document.querySelector("iframe"), page = view.contentDocument;
  page.querySelectorAll("details").forEach(fold => fold.open = true);
  const broken = [...page.images].filter(image => !(image.complete && image.naturalWidth)).length;
  found.textContent = JSON.stringify({{
    wide: page.documentElement.scrollWidth, images: page.images.length, broken,
    paper: view.contentWindow.getComputedStyle(page.body).backgroundColor,
  }});
}};
</script>"""


def seen_in_chromium(page: Path, width: int, *flags: str) -> tuple[dict, list[str]]:
    """What a page's layout comes to at a width, and what the browser's console says."""
    probe = page.parent / "probe.html"
    probe.write_text(PROBE.format(page=page.name, width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [CHROMIUM, *options, "--enable-logging=stderr", f"--window-size={width + 40},1000", *flags]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(re.search(r'<p id="found">(.*?)</p>', done.stdout)[1]), console


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    page = tmp_path / "report.html"
    shutil.copy(reported_run().workdir / "report.html", page)
    for width in (390, 1280):
        found, console = seen_in_chromium(page, width)
        assert console == [] and found["wide"] <= width and found["images"] == 11 and not found["broken"], found
        assert found["paper"] == "rgb(255, 255, 255)"
    found, console = seen_in_chromium(page, 390, "--blink-settings=preferredColorScheme=0")
    assert console == [] and found["paper"] == "rgb(22, 24, 28)"
    page.write_text(page.read_text() + "<script>missing()</script><img src='data:,'><div style='width:50rem'>x</div>")
    found, console = seen_in_chromium(page, 390)  # what is wrong is seen
    assert console and found["broken"] == 1 and found["wide"] > 390
