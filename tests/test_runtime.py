"""What surrounds a run: measurements and their file, the plot, signals, the lock, the workdir."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.dataset import Split
from corpus.tokenizer import CharTokenizer
from reports import plots
from runtime import devices, files, signals, workdir
from runtime.errors import Interrupted, StorageError, UserError
from training import cost
from training.evaluate import bits_per_byte

ROOT = Path(__file__).parent.parent


def start(code: str) -> subprocess.Popen:
    """A Python process beside this one that runs `code`."""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


# Metrics


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_named_device_and_of_no_namesake(kind, peak):
    assert cost.peak_flops(kind) == peak


def test_utilisation_is_the_share_of_all_devices_peak():
    assert cost.mfu(6e9, 1e5, 3, "NVIDIA A100-SXM4-80GB") == pytest.approx(6e14 / (3 * 312e12))
    assert cost.mfu(6e9, 1e5, 3, "cpu") is None


def test_bits_per_byte_of_uniform_bytes_is_eight_whatever_the_tokens():
    split_of = lambda num_bytes: SimpleNamespace(unpredicted=0, bytes_of=lambda tokens, tokenizer: num_bytes)
    assert bits_per_byte(math.log(256), 70, split_of(70), None) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(256), 35, split_of(70), None) == pytest.approx(8)  # two bytes a token
    assert bits_per_byte(1.0, 35, split_of(0), None) is None


@pytest.mark.parametrize("first", [0, 2])  # bytes: an end-of-text token has none, and adds none to a short text
def test_the_first_token_counts_in_bits_per_byte_if_it_is_text(first):
    bytes_of = lambda tokens, tokenizer: first + 2 * (tokens - 1)
    text = SimpleNamespace(unpredicted=1, bytes_of=bytes_of)
    assert bits_per_byte(2 * math.log(256), 3, text, None) == pytest.approx(8)


def test_bits_per_byte_of_a_part_are_of_the_bytes_that_it_has():
    """A text of three bytes a character, then of one: as many tokens, and a third of the bits a byte at the start."""
    tokenizer = CharTokenizer("a中")
    split = Split(np.repeat(np.array([1, 0], np.uint16), 40), 160)
    loss = math.log(2) * 6
    assert bits_per_byte(loss, 39, split, tokenizer) == pytest.approx(2)
    assert bits_per_byte(loss, 79, split, tokenizer) == pytest.approx(3)
    assert bits_per_byte(loss, 59, split, tokenizer) == pytest.approx(6 * 60 / 140)


def test_peak_memory_is_the_devices_own_count_or_this_process():
    class Gpu:
        def memory_stats(self):
            return {"bytes_in_use": 3, "peak_bytes_in_use": 7}

    assert devices.peak_memory_bytes(Gpu()) == 7
    before = devices.peak_memory_bytes(jax.devices("cpu")[0])
    assert 2**24 < before < 2**37  # in bytes: neither KiB nor pages
    block = np.ones(before // 8 + 2**24)  # more than the peak so far
    assert devices.peak_memory_bytes(jax.devices("cpu")[0]) >= block.nbytes


def test_environment_is_json_and_holds_no_environment_variable(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    found = devices.environment()
    assert found["packages"]["jax"] == jax.__version__
    assert found["device_count"] == jax.device_count()
    assert found["git_commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", found["git_commit"])
    assert "canary" not in json.dumps(found)


def test_rows_come_back_as_they_were_and_what_is_not_finite_as_none(tmp_path):
    file = files.MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    file.append({"step": np.int32(1), "loss": np.float32(0.5), "rms": {"muon": math.nan}, "mfu": None})
    file.append({"step": 2, "loss": jax.numpy.inf})
    assert file.read() == [
        {"step": 1, "loss": 0.5, "rms": {"muon": None}, "mfu": None},
        {"step": 2, "loss": None},
    ]
    text = file.path.read_text()
    assert text.count("\n") == 2 and text.endswith("\n") and "NaN" not in text and "Infinity" not in text


def test_a_name_that_is_no_utf8_is_written_and_read_back(tmp_path):
    values = {"command": "train --config.dataset=caf\udce9.txt"}
    files.write_json(tmp_path / "config.json", values)
    assert files.read_json(tmp_path / "config.json") == values


def test_metrics_go_back_to_where_the_checkpoint_was(tmp_path):
    file, said = files.MetricsFile(tmp_path / "metrics.jsonl"), []
    file.append({"step": 1})
    size = files.size_of(file.path)
    file.append({"step": 2})
    files.cut_back(file.path, size, said.append)
    assert (file.read(), said) == ([{"step": 1}], [])
    files.cut_back(file.path, size + 5, said.append)
    assert files.size_of(file.path) == size
    assert len(said) == 1 and "5 bytes" in said[0]


@given(cut=st.integers(1, 30))
def test_a_line_cut_short_is_passed_over(tmp_path_factory, cut):
    file = files.MetricsFile(tmp_path_factory.mktemp("cut") / "metrics.jsonl")
    for step in (1, 2):
        file.append({"step": step, "loss": 3.25, "text": "a\u2028b"})
    os.truncate(file.path, files.size_of(file.path) - cut)
    rows = file.read()
    assert [row["step"] for row in rows] == ([1, 2] if cut == 1 else [1])  # one byte less: only the newline is gone


DAMAGED_ROWS = [
    b"[1]",
    b"7",
    b"nonsense",
    b'{"step": ' + b"9" * 400 + b"}",
    b"[" * 100_000,
    b'{"a": ' * 90 + b"1" + b"}" * 90,
]


def test_damaged_rows_are_left_out_with_one_warning(tmp_path):
    file, said = files.MetricsFile(tmp_path / "metrics.jsonl"), []
    good = b'{"step": 1, "loss": Infinity}\n'
    file.path.write_bytes(good + b"\n".join(DAMAGED_ROWS) + b'\n\xff\n{"step": 2}\n{"step": 3, "lo')
    assert file.read(said.append) == [{"step": 1, "loss": None}, {"step": 2}]
    assert said == [f"{file.path}: {len(DAMAGED_ROWS) + 1} damaged rows left out"]


def no_file(path: Path, kind: str) -> None:
    """What lies in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a terabyte":
        path.touch()
        os.truncate(path, 10**12)


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a device", "a terabyte", "nothing"])
def test_only_a_regular_file_of_sane_size_is_read(tmp_path, kind):
    path = tmp_path / "file"
    no_file(path, kind)
    rows = files.MetricsFile(path).read
    for read in (files.read_json, files.read_text, *([lambda path: rows()] if kind != "nothing" else [])):
        with pytest.raises(UserError, match=rf"^{path}: cannot be read \(.+\); is {tmp_path} the right directory\?$"):
            read(path)
    assert kind != "nothing" or rows() == []


@pytest.mark.parametrize("text", ["[1]", "3", '"a"', "{", "[" * 200_000, '{"a": %s}' % ("9" * 41), "\udc80"])
def test_only_an_object_of_sane_depth_and_numbers_is_json_of_ours(tmp_path, text):
    (tmp_path / "file").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"file: cannot be read \((is|holds) .+\); "):
        files.read_json(tmp_path / "file")


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics.jsonl: No space left on device \(free .+; .+") as caught:
        files.MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1})
    assert "\n" not in str(caught.value)


# Plots


def test_the_plot_is_a_picture_and_replaces_the_old_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    losses = [4 * 0.98**i for i in range(100)]
    rows = [{"tokens": 64 * i, "loss": loss} for i, loss in enumerate(losses)]
    rows[7]["loss"] = None
    rows[50]["val_loss"] = 2.0
    plots.plot_loss(rows, path, "a run")
    with_val = matplotlib.image.imread(path)
    del rows[50]["val_loss"]
    plots.plot_loss(rows, path, "a run")
    without = matplotlib.image.imread(path)
    assert with_val.shape == without.shape and (with_val != without).any()
    assert os.listdir(tmp_path) == ["loss.png"]

    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        plots.plot_loss(rows[:3], path, "a run")
    assert (matplotlib.image.imread(path) == without).all()
    plots_of_nothing = tmp_path / "empty.png"
    monkeypatch.undo()
    plots.plot_loss([], plots_of_nothing, "a run")
    assert plots_of_nothing.exists()


@given(st.lists(st.floats(-10, 10), min_size=60, max_size=300))
def test_smoothing_stays_within_the_values_and_keeps_the_first(values):
    smooth = plots.smoothed(np.array(values))
    assert len(smooth) == len(values)
    assert smooth[0] == pytest.approx(values[0], abs=1e-12)
    assert min(values) - 1e-9 <= smooth.min() and smooth.max() <= max(values) + 1e-9


# Signals, locks, directories


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_the_first_signal_asks_and_the_handlers_come_back(signum):
    old, said = signal.getsignal(signum), []
    with signals.StopSignals(said.append, "stop") as stop:
        stop.raise_if_set()
        assert stop.signum is None
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted) as caught:
            stop.raise_if_set()
        assert caught.value.signum == signum
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(said) == 1
    assert signal.getsignal(signum) is old
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_signal_ends_the_process_though_it_is_deep_in_c_code(signals):
    code = """if True:
        import ctypes, signal
        from runtime.signals import StopSignals
        with StopSignals(lambda text: print(text, flush=True)):
            # Blocked here, the signals go to another thread and do not cut this sleep short: no handler can run.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            print("ready", flush=True)
            ctypes.CDLL(None).sleep(20)
    """
    process = start(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signals[0])
    assert process.stdout.readline().startswith("stopping")
    process.send_signal(signals[1])
    assert process.wait(timeout=5) == 128 + signals[1]
    process.stdout.close()


@pytest.mark.parametrize("key", ["SIGTERM", "SIGTSTP"])
def test_the_second_signal_ends_the_process_though_the_terminal_takes_nothing_more(key):
    """Of a connection that is dead: whoever writes waits, with the lock that others wait for."""
    code = """if True:
        import os, signal, sys, threading, time
        from runtime.screen import live
        from runtime.signals import StopSignals
        _, full = os.pipe()  # of which nobody reads; a terminal's driver would make room for some time
        os.set_blocking(full, False)
        try:
            while os.write(full, b"x"): pass
        except BlockingIOError:
            os.set_blocking(full, True)
        sys.stdout.isatty = lambda: True
        def write():
            with live.drawing: os.write(1, b"y")
        class View:
            def hide(self): write()
            def show(self): write()
        out = os.dup(1)
        os.dup2(full, 1)
        os.dup2(full, 2)
        live.note(View(), True)
        with StopSignals(lambda text: write()) as stop:
            threading.Thread(target=write, daemon=True).start()
            os.write(out, b"ready\\n")
            while stop.signum is None: time.sleep(0.01)
            os.write(out, b"heard\\n")
            time.sleep(60)
    """
    process = start(code)
    assert process.stdout.readline() == "ready\n"
    if key == "SIGTSTP":
        process.send_signal(signal.SIGTSTP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "heard\n"
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()


def test_a_scheduler_s_warning_asks_for_a_save_once():
    with signals.StopSignals(pytest.fail) as stop:
        assert not stop.take_save_request()
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.raise_if_set()
        assert stop.take_save_request() and not stop.take_save_request()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_so():
    """As nohup leaves it to its program."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignals(pytest.fail) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.raise_if_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_outside_the_main_thread_signals_are_left_alone():
    old, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with signals.StopSignals() as stop:
            inside.append((signal.getsignal(signal.SIGINT), stop.signum))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(old, None)]


def test_a_workdir_is_one_runs_own_until_it_ends_in_whatever_way(tmp_path):
    code = f"""if True:
        import time
        from pathlib import Path
        from runtime.workdir import WorkdirLock
        with WorkdirLock(Path({str(tmp_path)!r}), print):
            print("locked", flush=True)
            time.sleep(20)
    """
    process = start(code)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"in use by pid {process.pid} on \S+; ") as caught:
        workdir.WorkdirLock(tmp_path, pytest.fail).__enter__()
    assert str(tmp_path) in str(caught.value)
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(2):
        with workdir.WorkdirLock(tmp_path, pytest.fail):
            assert (tmp_path / ".lock").read_text().split()[1] == str(os.getpid())


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    warnings = []
    with workdir.WorkdirLock(tmp_path, warnings.append):
        pass
    assert len(warnings) == 1 and "Operation not supported" in warnings[0]


def test_a_workdir_is_made_and_its_path_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("deep")
    assert workdir.prepare_workdir("deep/er ü/../run") == tmp_path / "deep" / "run"
    assert workdir.prepare_workdir("link/run") == tmp_path / "deep" / "run"
    assert os.listdir(tmp_path / "deep" / "run") == []


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "samples.txt", "checkpoints", "wandb", "checkpoints/5", "dangling"]
)
def test_a_link_that_leads_out_of_a_workdir_is_refused_before_anything_is_written(tmp_path, name):
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "deleted").mkdir(parents=True)
    (outside / "mine").write_text("mine")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "dangling":
        (run / "metrics.jsonl").symlink_to(outside / "new")
    else:
        (run / name).symlink_to(outside if "." not in name else outside / "mine")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=rf"^{run}/\S+: a link that leads out of the run's directory; "):
        workdir.prepare_workdir(run, ["metrics.jsonl", "samples.txt"])
    assert sorted(run.rglob("*")) == before
    assert sorted(os.listdir(outside)) == ["deleted", "mine"] and (outside / "mine").read_text() == "mine"


def test_links_within_a_workdir_and_of_the_workdir_itself_are_followed(tmp_path):
    (tmp_path / "run" / "big").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to("big")
    (tmp_path / "link").symlink_to("run")
    assert workdir.prepare_workdir(tmp_path / "link", ["metrics.jsonl"]) == tmp_path / "run"


@pytest.mark.parametrize("kind", ["a directory", "a pipe"])
def test_something_else_in_the_place_of_a_run_s_file_is_refused(tmp_path, kind):
    for name in ("metrics.jsonl", ".lock"):
        no_file(tmp_path / name, kind)
        with pytest.raises(UserError, match=rf"/{name}: not what a run keeps under this name; "):
            workdir.prepare_workdir(tmp_path, ["metrics.jsonl"])
        (tmp_path / name).rmdir() if kind == "a directory" else (tmp_path / name).unlink()
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"/checkpoints: not what"):
        workdir.prepare_workdir(tmp_path)


def test_the_lock_is_no_link_to_elsewhere(tmp_path):
    """Put there after the directory was looked at."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"cannot open \.lock"):
        workdir.WorkdirLock(tmp_path / "run", pytest.fail).__enter__()
    assert (tmp_path / "mine").read_text() == "mine"


# Putting a run aside, and leaving nothing


def an_earlier_run(path: Path) -> Path:
    (path / "checkpoints" / "5").mkdir(parents=True)
    for name in (".lock", "metrics.jsonl", "a.txt", "z.txt"):
        (path / name).write_text(name)
    return path


@pytest.mark.parametrize("where", ["beside", "inside", "neither"])
def test_a_run_is_put_aside_where_that_is_a_rename(tmp_path, monkeypatch, where):
    """A directory that is a disk of its own has no room beside it, and one in it cannot be renamed at all."""
    run, rename, said = an_earlier_run(tmp_path / "run"), Path.rename, []

    def renamed(path, target):
        if where == "neither" or (where == "inside" and target.parent.parent != run):
            raise OSError(18, "Invalid cross-device link", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    if where == "neither":
        with pytest.raises(UserError, match=rf"^workdir {run}: {run}/checkpoints cannot be moved aside \(Invalid cro"):
            workdir.move_aside(run, said.append)
        assert sorted(os.listdir(tmp_path)) == ["run"] and len(os.listdir(run)) == 5 and not said
        return
    for number in (1, 2):
        workdir.move_aside(run, said.append)
        target = run / f"old-{number}" if where == "inside" else tmp_path / f"run.old-{number}"
        assert said.pop() == f"moved the earlier run to {target}" and not said
        assert {path.name for path in run.iterdir() if not path.name.startswith("old-")} == {".lock"}
        assert sorted(os.listdir(target)) == ["a.txt", "checkpoints", "metrics.jsonl", "z.txt"]
        an_earlier_run(run)


def test_checkpoints_are_moved_first_and_the_log_of_steps_last(tmp_path, monkeypatch):
    run, moved = an_earlier_run(tmp_path / "run"), []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: moved.append(path.name) or rename(path, target))
    workdir.move_aside(run, lambda text: None)
    assert moved[0] == "checkpoints" and moved[-1] == "metrics.jsonl" and len(moved) == 4


def test_a_refused_run_leaves_no_directory_but_what_was_there_or_was_made(tmp_path):
    def refused(name, *made, before=False):
        run = tmp_path / name
        if before:
            run.mkdir()
        with (
            pytest.raises(UserError, match="refused"),
            workdir.removed_if_unused(run),
            workdir.WorkdirLock(workdir.prepare_workdir(run), pytest.fail),
        ):
            (run / "checkpoints").mkdir()
            for file in made:
                (run / file).touch()
            raise UserError("refused")
        return run.exists()

    assert not refused("a") and not refused("b", f"checkpoints/{workdir.UNSAVED}")
    assert refused("c", before=True) and refused("d", "metrics.jsonl") and refused("e", "checkpoints/5")


def test_a_lock_whose_directory_has_just_gone_is_none(tmp_path, monkeypatch):
    run, flock = tmp_path / "run", workdir.fcntl.flock

    def gone_before(file, how):
        (run / ".lock").unlink()
        return flock(file, how)

    run.mkdir()
    monkeypatch.setattr(workdir.fcntl, "flock", gone_before)
    with pytest.raises(UserError, match="try again"):
        workdir.WorkdirLock(run, pytest.fail).__enter__()


def test_a_workdir_that_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")

    def refused(path, reason):
        with pytest.raises(UserError, match=reason) as caught:
            workdir.prepare_workdir(path)
        text = str(caught.value)
        assert text.startswith(f"--workdir={path}: ") and "; " in text and "\n" not in text

    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "file" / "run", "Not a directory")
    refused(tmp_path / "loop", "loop|symbolic links")
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/run", "s3://bucket", Path("https://server/run")):
        refused(address, "an address and no path")
    assert sorted(os.listdir()) == ["file", "loop"]

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(workdir.tempfile, "TemporaryFile", read_only)
    refused(tmp_path, "Read-only file system")
