"""The notebook, executed from top to bottom in a kernel of its own with a model that trains in a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT, TINY, rows, tiny_config
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "training.ipynb"


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def pictures(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None), cell.source


@pytest.fixture
def executed(tmp_path, monkeypatch) -> dict[str, nbformat.NotebookNode]:
    """The cells by the heading that they stand under, those of code alone; each heading has one."""
    steps = {"max_steps": 200, "eval_every": 100, "save_every": 100, "sample_every": 0, "report": True}
    changes = {**TINY, "dataset": tiny_config().dataset, "data_dir": tiny_config().data_dir, **steps}
    monkeypatch.setenv("NOTEBOOK_CONFIG", json.dumps(changes))
    monkeypatch.setenv("NOTEBOOK_RUNS", str(tmp_path))
    assert "JAX_COMPILATION_CACHE_DIR" in os.environ  # what other tests compiled is compiled
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    cells, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = cell.source.splitlines()[0].lstrip("# ")
        else:
            assert heading not in cells
            cells[heading] = cell
    return cells


@pytest.mark.once
def test_it_runs_from_top_to_bottom(executed, tmp_path):
    assert f"in {ROOT}\n" in printed(executed["Train a Transformer with attention sinks"])
    assert "1 x cpu (cpu)" in printed(executed["The device, and the settings"])
    assert "validation loss" in printed(executed["Train"]) and pictures(executed["Train"]) == 1
    assert printed(executed["Sample"]).count("--- temperature") == 2
    compared = executed["With and without sinks"]
    assert "attention_sink" in printed(compared) and pictures(compared) == 2
    assert (tmp_path / "compare" / "compare.html").exists()
    looked = executed["Look at the sinks"]
    assert (
        pictures(looked) == 2
        and printed(looked).count("goes to sinks") == 2
        and "Of all attention 0.0%" in printed(looked)
    )
    stopped = printed(executed["Stop, and go on"])
    assert "saved step" in stopped and "resuming at step" in stopped and "bit for bit" in stopped
    assert [row["loss"] for row in rows(tmp_path / "stopped")] == [row["loss"] for row in rows(tmp_path / "sinks")]


def test_where_no_clone_is_it_asks_for_the_address_and_needs_no_edit(tmp_path, monkeypatch):
    source = next(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    asked, ran = [], []

    def run(words, check):
        ran.append([str(word) for word in words])
        (tmp_path / "transformer-jax").mkdir(exist_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", run)
    exec(source, {"input": lambda text: asked.append(text) or "https://example.org/mine.git"})
    assert asked == ["address of the repository: "] and Path.cwd() == tmp_path / "transformer-jax"
    assert [words[:2] for words in ran] == [["git", "clone"], [sys.executable, "-m"]]
    assert ran[0][-2:] == ["https://example.org/mine.git", str(tmp_path / "transformer-jax")]
    monkeypatch.chdir(tmp_path)
    exec(source, {"input": None})  # the clone is there now
    assert [words[0] for words in ran[2:]] == [sys.executable]
