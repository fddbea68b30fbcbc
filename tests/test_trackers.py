"""Trackers: what they are given, and where one is wanted and cannot be had: one warning, no key, never a failure."""

import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import arguments, losses, rows, run_main, tiny_config, train_until

import config_lib
import run_lib
import train_lib
from runtime import trackers
from runtime.errors import UserError
from runtime.trackers import wandb

ROOT = Path(__file__).parent.parent
KEY = "c4a5" * 10  # what a W&B key looks like


@pytest.fixture
def wandb_world(tmp_path, monkeypatch):
    """A world in which nothing is known of W&B: no variable, no key, an empty current directory."""
    here = tmp_path / "here"
    here.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    monkeypatch.setattr(os, "environ", clean | {"HOME": str(here), "NETRC": str(here / "netrc")})
    monkeypatch.chdir(here)
    return here


class Notes:
    """The least that a tracker can be: it keeps a list."""

    def __init__(self, name, config, workdir, warn, step):
        self.where, self.rows = f"a list for {name}", []

    def log(self, row, step):
        self.rows.append((step, row))

    def samples(self, read):
        pass

    def finish(self):
        pass


def test_a_new_tracker_is_a_line_in_the_table(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "notes", Notes)
    none, one = (trackers.Trackers(names, "a run", {}, Path(), print) for names in ([], ["notes"]))
    for tracker in (none, one):
        tracker.log({"loss": 1.0}, 1)
        tracker.samples(lambda: [(1, "text")])
        tracker.finish()
    assert (none.where, one.where) == ({}, {"notes": "a list for a run"})
    assert one._running["notes"].rows == [(1, {"loss": 1.0})]


@pytest.mark.parametrize("tracker", trackers.TRACKERS)
def test_without_its_package_there_is_one_warning(tracker, tmp_path, wandb_world, monkeypatch):
    package = {"tensorboard": "tensorboardX"}.get(tracker, tracker)
    monkeypatch.setitem(sys.modules, package, None)
    warnings: list[str] = []
    started = trackers.Trackers([tracker], "a run", {}, tmp_path, warnings.append)
    started.log({"loss": 1.0}, 1)
    started.samples(lambda: [(1, "text")])
    started.finish()
    [warning] = warnings
    assert f"{tracker} is off" in warning and f"pip install {package}" in warning


def test_settings_come_from_the_environment_then_from_dotenv(wandb_world):
    (wandb_world / ".env").write_text("WANDB_MODE=offline\nWANDB_PROJECT=mine\nWANDB_ENTITY=us\nAWS_SECRET=hush\n")
    os.environ["WANDB_ENTITY"] = "them"
    wandb._load_settings()
    found = {name: os.environ.get(name) for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "AWS_SECRET")}
    assert found == {"WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_ENTITY": "them", "AWS_SECRET": None}


def test_the_key_that_wandb_login_left_is_found(wandb_world):
    url = "https://wandb.example.com"
    assert not wandb._key_in_netrc(url)
    (wandb_world / "netrc").write_text(f"machine wandb.example.com login user password {KEY}\n")
    assert wandb._key_in_netrc(url)
    assert not wandb._key_in_netrc("https://elsewhere.example.com")
    (wandb_world / "netrc").write_text("no such thing\n")
    assert not wandb._key_in_netrc(url)


WANDB_RUN = """if True:
    import sys
    from pathlib import Path
    from runtime import trackers
    tracker = trackers.Trackers(["wandb"], "a run", {"lr": 0.1, "betas": (0.9, 0.95)}, Path(sys.argv[1]), print)
    tracker.log({"loss": 0.123456, "mfu": None}, 7)
    tracker.samples(lambda: [(step, f"<ROMEO> {step}") for step in range(8)])
    tracker.finish()
"""


class Refuse(http.server.BaseHTTPRequestHandler):
    """A server that is there, and takes no key."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(401)
        self.send_header("content-length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def refusing_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.once
@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, None),
        ({}, "no API key"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}, "http://127.0.0.1:9 does not answer"),
        ({"WANDB_BASE_URL": "refusing", "WANDB_API_KEY": KEY}, "401"),
    ],
    ids=["offline", "no key", "no server", "refused"],
)
def test_wandb_logs_offline_with_one_warning_and_without_the_key(
    tmp_path, wandb_world, refusing_server, settings, warning
):
    if settings.get("WANDB_BASE_URL") == "refusing":
        settings = settings | {"WANDB_BASE_URL": refusing_server}
    run = tmp_path / "run"
    run.mkdir()
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(run)],
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - begin < 10
    assert done.stderr == ""
    warnings = done.stdout.splitlines()
    assert len(warnings) == (0 if warning is None else 1)
    assert all(warning in text and "wandb sync" in text for text in warnings)
    left = b"".join(file.read_bytes() for file in run.rglob("*") if file.is_file())
    assert b"0.123456" in left
    assert KEY.encode() not in left and KEY not in done.stdout
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.once
def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    first = wandb._run_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert wandb._run_id(tmp_path) == first


def records(path: Path) -> Iterator[Any]:
    """What W&B wrote: LevelDB's log format after seven bytes, of W&B's own protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        if (left := -place % 32768) < 7:  # a record's header is never divided
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.once
def test_what_an_offline_run_wrote_is_all_there_and_a_resumed_one_goes_on_with_its_id(tmp_path, wandb_world):
    workdir = tmp_path / "run"
    for max_steps in 8, 12:
        config = tiny_config(max_steps=max_steps, eval_every=6, sample_every=4, wandb_enabled=True)
        done = run_main(*arguments(config, workdir), WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    runs, curve, tables = [], {}, []
    for file in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            elif record.WhichOneof("record_type") == "history":
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                if "loss" in row:
                    curve[row["step"]] = row["loss"], row.get("val_loss")
                else:
                    tables.append(json.loads((file.parent / "files" / row["samples/path"]).read_text()))
    assert {run.run_id for run in runs} == {(workdir / "wandb_id.txt").read_text().strip()}
    assert {run.display_name for run in runs} == {"run"}
    settings = [{item.key: json.loads(item.value_json) for item in run.config.update} for run in runs]
    assert [each["max_steps"] for each in settings] == [8, 12]
    assert settings[1].items() >= json.loads((workdir / "config.json").read_text())["config"].items()
    assert curve == {step: (loss, val_loss) for step, loss, val_loss in losses(workdir)} and len(curve) == 12
    assert [table["data"] for table in tables][-1] == [list(sample) for sample in run_lib.read_samples(workdir)]
    assert [len(table["data"]) for table in tables] == [1, 2, 3] and tables[-1]["columns"] == ["step", "sample"]


def test_a_tracker_failing_in_mid_run_is_one_warning_and_then_silence(monkeypatch):
    class Failing(Notes):
        def log(self, row, step):
            super().log(row, step)
            if len(self.rows) == 2:
                raise BrokenPipeError("the service\nis gone")

        def finish(self):
            pytest.fail("it is off")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    monkeypatch.setitem(trackers.TRACKERS, "notes", Notes)
    warnings: list[str] = []
    both = trackers.Trackers(["wandb", "notes"], "a run", {}, Path(), warnings.append)
    failing, other = both._running["wandb"], both._running["notes"]
    for step in range(5):
        both.log({"loss": 1.0}, step)
    both.finish()
    assert (len(failing.rows), len(other.rows)) == (2, 5)
    [warning] = warnings
    assert warning.startswith("wandb failed") and "the service is gone" in warning


# --- TensorBoard and trackio ------------------------------------------------------------------------------------------


def tracked_run(workdir: Path, name: str) -> Any:
    """A run that logged steps 11 and 12 past the checkpoint from which it goes on to 15, as one that was killed."""
    config = tiny_config(num_blocks=1, max_steps=15, sample_every=4, trackers=name)
    train_until(12, config, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    train_lib.train(config, workdir)
    return config


def expected_of(workdir: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows(workdir) if row.get(key) is not None}


def test_tensorboard_reads_the_run(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install -r requirements-trackers.txt")
    reader = "tensorboard.backend.event_processing.plugin_event_accumulator"  # the one behind its pages
    event_accumulator = pytest.importorskip(reader, reason="pip install -r requirements-test.txt")
    workdir = tmp_path / "run"
    config = tracked_run(workdir, "tensorboard")
    assert len(list((workdir / "tensorboard").iterdir())) == 2
    found = event_accumulator.EventAccumulator(str(workdir / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    for key in ("loss", "val_loss", "grad_norm", "lr", "muon_lr", "tokens_per_second"):
        curve = [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors(key)]
        assert [step for step, _ in curve] == sorted(expected_of(workdir, key))  # each once
        assert dict(curve) == pytest.approx(expected_of(workdir, key), rel=1e-6)  # kept in float32
    of_tag = lambda tag: found.Tensors(f"{tag}/text_summary")
    plain = lambda event: event.tensor_proto.string_val[0].decode()[4:-1].replace("\n    ", "\n")
    assert [(event.step, plain(event)) for event in of_tag("sample")] == run_lib.read_samples(workdir)
    assert json.loads(plain(of_tag("config")[-1])) == config_lib.to_dict(config)


def test_trackio_has_the_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="pip install -r requirements-trackers.txt")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    workdir = tmp_path / "run"
    tracked_run(workdir, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert list(workdir.glob("trackio/*.db")) and not (tmp_path / "elsewhere").exists()
    logs = SQLiteStorage.get_logs("transformer", "run")
    for key in ("loss", "val_loss", "lr"):
        curve = [(log["step"], log[key]) for log in logs if key in log]
        assert sorted(curve) == sorted(expected_of(workdir, key).items())
    assert [(log["step"], log["sample"]) for log in logs if "sample" in log] == run_lib.read_samples(workdir)
    assert SQLiteStorage.get_run_config("transformer", "run")["max_steps"] == 15


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"wandb_enabled": True}, ["wandb"]),  # as runs of older builds say
        ({"trackers": "tensorboard, wandb", "wandb_enabled": True}, ["wandb", "tensorboard"]),
    ],
)
def test_which_trackers_a_config_names(settings, names):
    assert config_lib.trackers_of(tiny_config(**settings)) == names


def test_an_unknown_tracker_is_refused():
    with pytest.raises(UserError, match=r"^config\.trackers: unknown tracker 'tensorbord'; did you mean tensorboard\?"):
        config_lib.check(tiny_config(trackers="wandb,tensorbord"))
