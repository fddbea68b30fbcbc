"""Processes of one run that die, never come, or differ: each of the others ends, and says why."""

import hashlib
import time

import jax
import numpy as np
import pytest
from helpers import arguments, assert_one_line, tiny_config
from process_runs import HIT, ends, free_port, start, train

import train_lib
from runtime import devices, distributed, multihost, workdir
from runtime.checkpoints.retention import UNFINISHED
from runtime.errors import UserError

SETTINGS = {
    "use_muon": False,
    "save_every": 3,
    "eval_every": 30,
    "sample_every": 0,
    "peer_seconds": 15,
}


def own_lines(text: str) -> list[str]:
    """What is no log line of the libraries."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


KILL_IN_A_SAVE = """
import os, signal
import orbax.checkpoint as ocp
from runtime.checkpoints.manager import Checkpoints
save, write = Checkpoints.save, ocp.StandardCheckpointHandler.async_save
async def killed(*args, **others):  # its directory is there, and the other process waits for this one's part
    os.kill(os.getpid(), signal.SIGKILL)
def save_or_die(self, step, *args):
    ocp.StandardCheckpointHandler.async_save = killed if step == 6 else write
    save(self, step, *args)
Checkpoints.save = save_or_die
"""


def test_a_process_killed_between_saves_and_in_one_ends_the_other_with_one_line_and_the_run_goes_on(tmp_path):
    workdir = tmp_path / "run"
    command = arguments(tiny_config(**SETTINGS, max_steps=8), workdir)
    for patch in (HIT.format(step=5, saved=3, name="SIGKILL"), KILL_IN_A_SAVE):
        began = time.monotonic()
        first, second = train(command, 2, {1: patch}, seconds=90)
        assert (first.status, second.status) == (6, -9), first.err
        assert time.monotonic() - began < 80
        assert_one_line(first.err, "process 0: another process is gone", "the same command goes on from the last")
        assert (workdir / "checkpoints" / "3").exists() and not (workdir / "checkpoints" / "6").exists()
    assert "resuming at step 3" in first.out
    assert list(workdir.glob(f"checkpoints/6{UNFINISHED}*"))
    first, second = train(command, 2)
    assert (first.status, second.status, first.err) == (0, 0, "") and "resuming at step 3" in first.out, first.err
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "8"]


def test_a_process_that_never_comes_is_not_waited_for_for_ever(tmp_path):
    config = tiny_config(**SETTINGS | {"peer_seconds": 3})
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0"]
    [ended] = ends([start([*arguments(config, tmp_path / "run"), *flags])], seconds=60)
    assert ended.status == 6
    assert "waiting for the other processes at 127.0.0.1:" in ended.out and "3 s at most" in ended.out
    assert_one_line(ended.err, "--coordinator", "did not come within 3 s", "config.peer_seconds")


@pytest.mark.slow
def test_the_first_process_killed_ends_the_others(tmp_path):
    workdir = tmp_path / "run"
    config = tiny_config(**SETTINGS, max_steps=8)
    first, second = train(arguments(config, workdir), 2, {0: HIT.format(step=5, saved=3, name="SIGKILL")}, seconds=90)
    assert first.status == -9 and second.status in (6, -6), second.err  # ours, or JAX's abort, whichever is first
    assert "another process is gone" in second.err or "another task died" in second.err
    assert (workdir / "checkpoints" / "3").exists()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path):
    config = tiny_config(**SETTINGS, max_steps=8)
    patch = "import train_lib\ntrain_lib.Trainer._row = lambda *_: 1 / 0"
    first, second = train(arguments(config, tmp_path / "run"), 2, {1: patch}, seconds=90)
    assert second.status == 1 and "ZeroDivisionError" in second.err
    assert first.status == 6 and len(own_lines(first.err)) == 1, first.err


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path):
    config = tiny_config(**SETTINGS, max_steps=8)
    patch = "import config_lib\ncheck = config_lib.check\ndef other(config):\n check(config)\n config.lr = 0.5\n"
    first, second = train(arguments(config, tmp_path / "run"), 2, {1: patch + "config_lib.check = other"}, seconds=90)
    assert (first.status, second.status) == (2, 2), first.err + second.err
    assert own_lines(first.err)[0].startswith("error: config: not the same in process 1 as in process 0")
    assert own_lines(second.err)[0].startswith("error: process 1: config: not the same")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_by_all(tmp_path):
    workdir = tmp_path / "run"
    config = tiny_config(**SETTINGS, max_steps=8, keep=5)
    assert [ended.status for ended in train(arguments(config, workdir), 2)] == [0, 0]
    for path in (workdir / "checkpoints" / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000 and "params" in path.parts:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (workdir / "checkpoints" / "6").rename(workdir / "checkpoints" / "6.replaced")  # as a kill may leave it
    first, second = train([*arguments(config, workdir), "--config.max_steps=9"], 2)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.err.count("set aside as 8.damaged-1, going on from 6") == 1 and "set aside" not in second.err
    assert (workdir / "checkpoints" / "9").exists()


@pytest.mark.parametrize(
    "values, words",
    [
        (("node1:1234", 2, None), "--process_id: missing"),
        ((None, None, 0), "--coordinator: missing"),
        (("node1", 2, 0), "--coordinator: expected HOST:PORT"),
        (("node1:1234", 2, 2), "--process_id: 2 is not from 0 to 1"),
        (("node1:1234", 0, 0), "--process_id: 0 is not from 0 to -1"),
    ],
)
def test_flags_that_say_too_little_or_the_impossible(values, words):
    with pytest.raises(UserError, match=words), distributed.joined(*values, 5, print):
        raise AssertionError("joined")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}, True),
        ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "16"}, False),  # the batch script itself, outside of srun
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_launchers_are_known_by_what_they_set(environment, expected, monkeypatch):
    for name in (*distributed._SIZES, *distributed._SIZES.values(), "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert distributed.launched() is expected


def test_a_tpus_library_without_a_tpu_means_no_other_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    assert distributed.launched() is False
    (tmp_path / "accel").mkdir()  # Linux's folder for accelerators, as a laptop's
    (tmp_path / "accel" / "accel0").touch()
    assert distributed.launched() is False
    (tmp_path / "accel0").touch()
    assert distributed.launched() is None


def test_a_new_run_s_workdir_that_only_process_0_sees_is_refused(monkeypatch, tmp_path):
    """As each host's own disk; process 1 is played, and finds no lock."""
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "is_first", lambda: False)
        with workdir.WorkdirLock(tmp_path, pytest.fail) as lock:
            its_own = lock.holder()
    hash_of = np.frombuffer(hashlib.sha256(repr(its_own).encode()).digest(), np.uint8)
    monkeypatch.setattr(multihost, "from_all", lambda values: np.stack([values, hash_of]))
    with pytest.raises(UserError, match=rf"^workdir {tmp_path}/run: not the same in process 1 as in process 0; "):
        train_lib.train(tiny_config(), tmp_path / "run", fresh=True)
    assert not (tmp_path / "run").exists()
    with workdir.WorkdirLock(tmp_path, pytest.fail) as lock:
        assert lock.holder() == (tmp_path / ".lock").read_text() != its_own


@pytest.mark.parametrize(
    "error, refused",
    [
        (ValueError("coordinator_address should be defined."), False),  # no cluster is known
        (RuntimeError("jax.distributed.initialize() must be called before any JAX calls"), False),  # as in a notebook
        (RuntimeError("Failed to recognize coordinator address host-0"), True),
        (jax.errors.JaxRuntimeError("UNKNOWN: Failed to add port to server: address in use"), True),
    ],
)
def test_on_a_tpu_a_process_that_cannot_join_does_not_go_on_alone(monkeypatch, error, refused):
    def initialize(*_, **__):
        raise error

    monkeypatch.setattr(distributed, "launched", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    if not refused:
        with distributed.joined(None, None, None, 5, str):
            return
    with pytest.raises(UserError, match=f"^--coordinator: .*{error}; "), distributed.joined(None, None, None, 5, str):
        pytest.fail("it went on")


def test_devices_of_processes_that_have_not_joined_are_refused(monkeypatch):
    """As a TPU pod's, to a command on one of its hosts."""
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    with pytest.raises(UserError, match=r"^--coordinator: these are the devices of 16 processes, and 1 joined; "):
        devices.start_jax()
