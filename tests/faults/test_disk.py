"""Disks that are full, read-only or slow to say so: one line with the bytes that are missing, and nothing is lost."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, arguments, assert_one_line, assert_same_state, finished_run, rows, tiny_config

import main
import train_lib
from runtime import files
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import StorageError

SPACE = r"\(need [\d.]+ MB, free [\d.]+ MB\); make room, then run the same command again\n$"


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> dict:
    """What the runs of disks.py gave: case -> results; and where they lie."""
    finished_run()  # compiles what they run
    out = tmp_path_factory.mktemp("disk")
    script = [sys.executable, str(Path(__file__).with_name("disks.py")), str(out)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    for namespace in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        if subprocess.run(
            [*namespace, "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True, check=False
        ).returncode:
            continue
        done = subprocess.run([*namespace, *script], env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return {"out": out} | json.loads((out / "results.json").read_text())
    pytest.skip("this system does not allow a small disk to be mounted, not even in a namespace")


def assert_refused(result: dict, status: int, start: str) -> None:
    assert result["status"] == status, result
    assert_one_line(result["stderr"])
    assert re.match(start, result["stderr"]), result["stderr"]
    assert result["seconds"] < 60  # Orbax's own wait for a directory that never appears is 300


def assert_as_if_nothing_had_been(workdir: Path, config) -> None:
    reference = finished_run()
    assert [row["loss"] for row in rows(workdir)] == [
        row["loss"] for row in rows(reference.workdir) if row["step"] % config.log_every == 0 or row["step"] == 30
    ]
    assert_same_state(workdir, reference, config, 30)
    assert not list(workdir.rglob("*-tmp"))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_seen_at_the_next_save_and_nothing_is_lost(disk):
    full, again = disk["full in mid-run"]
    assert_refused(full, 5, r"error: /\S+ in mid-run/checkpoints: no space left for a checkpoint " + SPACE)
    assert (again["status"], again["stderr"]) == (0, "")
    assert_as_if_nothing_had_been(disk["out"] / "full in mid-run", tiny_config())


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_very_last_save_is_no_success(disk):
    assert_refused(disk["full at the last save"][0], 5, r"error: .*: no space left for a checkpoint " + SPACE)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save_leaves_the_one_before(disk):
    full, again = disk["full during a save"]
    assert_refused(full, 5, r"error: .*: (step [23]0|the last checkpoint was) not saved: No space left on device \(")
    assert (again["status"], again["stderr"]) == (0, "")
    config = tiny_config(log_every=100)
    assert_as_if_nothing_had_been(disk["out"] / "full during a save", config)


@pytest.mark.slow
def test_a_run_does_not_begin_without_room_for_two_checkpoints(disk):
    assert_refused(disk["full at the start"][0], 5, r"error: .*: no space left for 2 checkpoints " + SPACE)


@pytest.mark.slow
def test_a_read_only_disk_is_refused_within_a_second(disk):
    assert_refused(disk["read-only at the start"][0], 2, r"error: workdir /.*: Read-only file system; ")
    assert disk["read-only at the start"][0]["seconds"] < 1


@pytest.mark.slow
def test_a_disk_that_turns_read_only_ends_the_run_at_once(disk):
    assert_refused(
        disk["read-only in mid-run"][0], 5, r"error: /.*Read-only file system \(.*free [\d.]+ MB\); make room"
    )
    with Checkpoints(disk["out"] / "read-only in mid-run", read_only=True) as checkpoints:
        assert checkpoints.latest() in (7, 10)  # as far as the writing in the background had come


@pytest.mark.slow
def test_a_run_on_a_read_only_disk_can_be_read(disk):
    assert [disk["read-only and read from"][0][key] for key in ("status", "stderr")] == [0, ""]


# --- Without a disk of one's own ------------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files_is_reported_within_one_save_interval(tmp_path):
    config = tiny_config()
    finished_run()
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", sys.executable]  # KiB
    command = [*limited, str(ROOT / "main.py"), *arguments(config, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 5, done.stderr
    assert_one_line(done.stderr, "File too large", str(tmp_path))
    assert rows(tmp_path)[-1]["step"] <= 10
    assert main.main(arguments(config, tmp_path)) == 0
    assert_as_if_nothing_had_been(tmp_path, config)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_full_disk_under_a_file_that_grows(tmp_path, capsys, monkeypatch, name):
    def opened(path, mode="r", **options):
        return open("/dev/full" if path.name == name and mode == "a" else path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert main.main(arguments(tiny_config(max_steps=1), tmp_path)) == 5
    assert_one_line(
        capsys.readouterr().err, f"error: {tmp_path / name}: No space left on device (free ", "MB); make room"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "loss.png", "profile", "checkpoints"])
def test_a_full_disk_under_a_file_that_is_replaced(tmp_path, capsys, monkeypatch, name):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / name))
    real = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise full
        real(source, target)

    def refuse(*_):
        raise full

    monkeypatch.setattr(os, "replace", replace)
    if name == "profile":  # where nobody foresaw it
        monkeypatch.setattr(train_lib.jax.profiler, "start_trace", refuse)
    if name == "checkpoints":
        monkeypatch.setattr(Checkpoints, "__init__", refuse)
    command = [*arguments(tiny_config(max_steps=1), tmp_path), "--profile_steps=0:1"]
    assert main.main(command) == 5
    assert_one_line(capsys.readouterr().err, f"error: {tmp_path / name}: No space left on device", "make room")
    assert not list(tmp_path.glob(".*.json.*"))


def test_a_log_that_cannot_be_cut_back_is_an_error_too(tmp_path):
    (tmp_path / "log").write_text("12345")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError, match=r"log: Read-only .* \(free "):
        patch.setattr(os, "truncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS))))
        files.cut_back(tmp_path / "log", 3, pytest.fail)


def test_a_path_that_no_system_takes_is_one_line(capsys):
    for command in (["sample", f"--workdir={'a' * 5000}"], ["eval", f"--workdir={'b/' * 3000}"]):
        assert main.main(command) == 2
        assert_one_line(capsys.readouterr().err, "File name too long; name another one")


def test_other_errors_of_the_system_are_bugs(monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(train_lib, "train", broken)
    with pytest.raises(OSError, match="Invalid"):
        main.main([])
