"""Several processes: the bits of one process with as many devices, the same decisions everywhere, checkpoints of any
number of them. What can go wrong is in tests/faults/test_peers.py."""

import re
import shutil

import numpy as np
import pytest
from helpers import arguments, assert_same_bits, losses, saved_state, tiny_config
from process_runs import HIT, ends, slurm, start, train

from corpus.dataset import Split
from input_pipeline import Batches

STEPS, CUT = 12, 6
VOCABULARY = 34  # of the tests' text
SETTINGS = {
    "max_steps": STEPS,
    "save_every": 5,
    "eval_every": 4,
    "keep": 3,
    "steps_per_dispatch": 2,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def config():
    return tiny_config(**SETTINGS)


@pytest.fixture(scope="module")
def one_process(config, tmp_path_factory):
    """A run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    [ended] = ends([start(arguments(config, workdir), devices=2)])
    assert ended.status == 0, ended.err
    return workdir


def final_state(workdir, config):
    return saved_state(workdir, config, VOCABULARY, STEPS * config.accumulation_steps)


def assert_same_run(workdir, other, config):
    """Every logged loss, every evaluation, every sample and every bit of the last checkpoint."""
    assert losses(workdir) == losses(other)
    assert (workdir / "samples.txt").read_text() == (other / "samples.txt").read_text()
    assert_same_bits(final_state(workdir, config), final_state(other, config))


def test_a_notice_to_one_of_two_stops_both_at_one_step_and_one_process_goes_on(config, one_process, tmp_path):
    workdir = tmp_path / "run"
    first, second = train(arguments(config, workdir), 2, {1: HIT.format(step=CUT, saved=5, name="SIGTERM")})
    assert (first.status, second.status) == (143, 143), first.err + second.err
    assert "the same command goes on" in first.out
    assert "step" not in second.out and "warning" not in second.err, "process 1 has printed"
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    assert CUT <= newest < STEPS and f"saved step {newest}" in first.out
    assert losses(workdir) == losses(one_process)[: len(losses(workdir))]
    [ended] = ends([start(arguments(config, workdir), devices=2)])
    assert ended.status == 0 and f"resuming at step {newest}" in ended.out, ended.err
    assert_same_run(workdir, one_process, config)


@pytest.mark.slow
def test_a_scheduler_s_warning_to_one_of_two_has_both_save_the_same_step(tmp_path):
    quiet = tiny_config(**SETTINGS | {"save_every": 100, "eval_every": 100, "max_steps": 12})
    warned = """
import input_pipeline, os, signal, train_lib
def prefetch(make, spans):
    for span, batch in input_pipeline.prefetch(make, spans):
        if 6 in span:
            os.kill(os.getpid(), signal.SIGUSR1)
        yield span, batch
train_lib.prefetch = prefetch
"""
    first, second = train(arguments(quiet, tmp_path), 2, {1: warned})
    assert (first.status, second.status) == (0, 0), first.err + second.err
    [saved] = re.findall(r"saved step (\d+), as a signal asked for it", first.out)
    assert int(saved) in (7, 8) and (tmp_path / "checkpoints" / saved).is_dir()


def test_two_processes_of_slurm_go_on_from_one_and_end_in_its_bits(config, one_process, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one_process, workdir)
    for step in (10, STEPS):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    ended = slurm(arguments(config, workdir), tmp_path)
    assert ended.status == 0, ended.err
    assert ended.out.count("resuming at step 8") == 1
    assert_same_run(workdir, one_process, config)


@pytest.mark.slow  # a minute each: as many processes on whatever cores there are
@pytest.mark.parametrize("mesh, count", [("", 4), ("data=2,tensor=2", 4), ("fsdp=2", 2)])
def test_processes_accumulate_as_one_with_as_many_devices_on_any_mesh(mesh, count, tmp_path):
    config = tiny_config(**SETTINGS, accumulation_steps=2, mesh=mesh)
    one, many = tmp_path / "one", tmp_path / "many"
    [alone] = ends([start(arguments(config, one), devices=count)])
    together = train(arguments(config, many), count)
    assert [ended.status for ended in [alone, *together]] == [0] * (count + 1), together[0].err
    if count == 2:
        assert_same_run(many, one, config)
    for (step, loss, val), (its_step, its_loss, its_val) in zip(losses(one), losses(many), strict=True):
        assert step == its_step
        np.testing.assert_allclose(loss, its_loss, rtol=1e-5)  # beyond two devices the order of the sums is free
        assert (val is None) == (its_val is None)
        if val is not None:
            np.testing.assert_allclose(val, its_val, rtol=1e-5)
    alone_again = [*arguments(config, many), "--config.mesh=", f"--config.max_steps={STEPS + 2}"]
    [ended] = ends([start(alone_again, devices=1)])
    assert ended.status == 0 and f"resuming at step {STEPS}" in ended.out, ended.err


@pytest.mark.parametrize("order", ["shuffle", "sequential", "random"])
def test_the_rows_of_processes_are_those_of_one(order):
    batches = Batches(Split(np.arange(700, dtype=np.int32), None), 5, 12, seed=3, order=order, offset=-7)
    for step in (1, 40):
        parts = [batches.rows(step, start, start + 3) for start in range(0, 12, 3)]
        np.testing.assert_array_equal(np.concatenate(parts), batches(step))
