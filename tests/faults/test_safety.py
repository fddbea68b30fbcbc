"""What was read is never run, and nothing leads out of the folder: files with a payload that would leave a trace."""

import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import arguments, assert_one_line, data_of, finished_run, losses, tiny_config

import main
import train_lib
from runtime.trackers import wandb as trackers


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path) -> Path:
    """What must not be there after a test; it is shown first that the payload works."""
    path = tmp_path / "trace"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    return path


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(finished_run().workdir, tmp_path / "copy"))


def texts(trace: Path) -> list[bytes]:
    """Payloads in the languages in which a JSON file might be taken for something else."""
    call = f"__import__('os').mkdir({str(trace)!r})"
    return [
        pickle.dumps(Payload(trace)),
        call.encode(),
        f"!!python/object/apply:os.mkdir [{str(trace)!r}]".encode(),
        json.dumps({"kind": "char", "symbols": ["a", call]}).encode(),
        json.dumps({"kind": call, "config": {"lr": call}}).encode(),
        json.dumps({"kind": "char", "config": call, "symbols": {"__reduce__": call}}).encode(),
        b"[" * 200_000,  # deeper than Python's stack
        b'{"kind": "char", "symbols": [' + b'"a", ' * 1_200_000 + b'"b"]}',  # more than there are characters
        b'{"config": {"lr": 1' + b"0" * 5_000 + b"}}",  # a number longer than Python converts
    ]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_payload_in_a_run_s_json_is_refused_and_never_run(copy, trace, capsys, name):
    for content in texts(trace):
        (copy / name).write_bytes(content)
        capsys.readouterr()
        assert main.main(["sample", f"--workdir={copy}"]) == 2
        assert_one_line(capsys.readouterr().err, "copy" if name == "tokenizer.json" else "")
        assert not trace.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that Orbax dropped
def test_a_payload_in_a_checkpoint_is_never_run(copy, trace, capsys):
    """In each kind of its files in turn: the run may be refused or read past it, but no code of the file's is run."""
    every = [path for path in sorted((copy / "checkpoints" / "30").rglob("*")) if path.is_file()]
    files = list({(path.parent.name, re.sub("[0-9a-f]{8,}", "", path.name)): path for path in every}.values())
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload(trace)))
        status = main.main(["sample", f"--workdir={copy}", "--prompt=at", "--num_tokens=1"])
        error = capsys.readouterr().err
        assert status in (0, 3), error
        assert not status or error.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in error and not trace.exists()
        path.write_bytes(content)


def test_a_payload_in_the_cache_of_encoded_texts_is_never_run(tmp_path, trace):
    (tmp_path / "text").write_text("abcd" * 20)
    size = {"data_dir": tmp_path, "val_fraction": 0.5, "test_fraction": 0.0, "context_len": 1}
    said: list[str] = []
    want = data_of(str(tmp_path / "text"), "char", say=said.append, **size).train.tokens.copy()
    for path in (tmp_path / ".cache").iterdir():
        buffer = io.BytesIO()
        np.save(buffer, np.array([Payload(trace)], object), allow_pickle=True)
        path.unlink()
        path.write_bytes(buffer.getvalue())
    again = data_of(str(tmp_path / "text"), "char", say=said.append, **size).train.tokens
    assert not trace.exists() and said and all("damaged" in line for line in said)
    np.testing.assert_array_equal(again, want)


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", "."])
def test_the_name_of_a_run_leads_nowhere_else(name, capsys):
    assert main.main([f"--config.run={name}"]) == 2
    assert_one_line(capsys.readouterr().err, "error: config.run: must be a plain name")


@pytest.mark.parametrize("content", ["../../out", "/etc/passwd", "", "a\nb", "\0", "x" * 5000])
def test_an_id_of_wandb_that_is_none_is_replaced(tmp_path, content):
    (tmp_path / "wandb_id.txt").write_text(content)
    found = trackers._run_id(tmp_path)
    assert found.isalnum() and len(found) == 8 and (tmp_path / "wandb_id.txt").read_text() == f"{found}\n"


def test_links_and_strange_files_in_a_workdir_are_left_alone(tmp_path):
    """Another's files survive a run and its putting aside; a link out of it is not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    (run / "link").symlink_to(outside)
    assert main.main(arguments(tiny_config(), run)) == 0
    train_lib.train(tiny_config(max_steps=1), run, fresh=True)
    aside = tmp_path / "run.old-1"
    assert (aside / "notes.txt").read_text() == "mine" and (outside / "mine").read_text() == "mine"
    assert losses(aside) == losses(finished_run().workdir)
