"""Several micro-steps in one dispatch: the same run, to the bit, however its steps are divided."""

from itertools import pairwise

import pytest
from helpers import arguments, assert_same_state, losses, run_main, tiny_config, train_until
from xla_flags import SOONER

import input_pipeline
import train_lib
from runtime.checkpoints.manager import Checkpoints
from training import dispatch
from training.dispatch import MOST, longest, spans, throttled

QUIET = {"log_every": 100, "eval_every": 100, "save_every": 100, "sample_every": 0}


@pytest.mark.parametrize(
    "changes, start, ends, want",
    [
        ({"steps_per_dispatch": 1}, 3, (), [3, 4, 5, 6, 7, 8]),
        ({"steps_per_dispatch": 4}, 0, (), [0, 4, 8]),
        ({"steps_per_dispatch": 9}, 1, (), [1, 8]),
        ({"steps_per_dispatch": 4, "log_every": 3}, 0, (), [0, 3, 6, 8]),
        ({"steps_per_dispatch": 4, "eval_every": 5, "save_every": 6, "sample_every": 7}, 2, (), [2, 5, 6, 7, 8]),
        ({"steps_per_dispatch": 4, "accumulation_steps": 2, "log_every": 3}, 0, (), [0, 4, 6, 8]),
        ({"steps_per_dispatch": 8, "accumulation_steps": 2}, 0, (1, 2), [0, 2, 4, 8]),
        ({"steps_per_dispatch": 8}, 8, (), []),
    ],
)
def test_a_dispatch_ends_where_something_is_due(changes, start, ends, want):
    config = tiny_config(**(QUIET | changes))
    every = [config[key] for key in config if key.endswith("_every")]
    done = list(spans(start, 8, config.steps_per_dispatch, config.accumulation_steps, every, ends))
    assert [list(span) for span in done] == [list(range(a, b)) for a, b in pairwise(want)]


def test_a_run_is_the_same_in_large_dispatches_and_cut_in_between(tmp_path, monkeypatch):
    """5 at once, then 4 when a signal has moved the cuts, and 1: the same log, samples and last checkpoint."""
    # Without Muon there is less to compile for each number of steps.
    config = tiny_config(accumulation_steps=3, dropout=0.2, max_steps=20, log_every=4, use_muon=False)
    reference = train_lib.train(config, tmp_path / "reference")
    config.steps_per_dispatch = 5
    cut = tmp_path / "cut"
    train_until(33, config, cut)
    with Checkpoints(cut, read_only=True) as checkpoints:
        assert checkpoints.latest() == 30  # a checkpoint is due there; 30 to 34 would have been next
    config.steps_per_dispatch = 4
    train_lib.train(config, cut)
    assert losses(cut) == losses(reference.workdir)
    assert (cut / "samples.txt").read_bytes() == (reference.workdir / "samples.txt").read_bytes()
    assert_same_state(cut, reference, config, 60)


def test_large_dispatches_on_two_devices(tmp_path):
    config = tiny_config(max_steps=9, log_every=4, eval_every=9, steps_per_dispatch=3, sample_every=0)
    want = losses(train_lib.train(config, tmp_path / "one").workdir)
    two = arguments(tiny_config(**(dict(config) | {"cpu_devices": "2"})), tmp_path / "two")
    done = run_main(*two, XLA_FLAGS=SOONER)  # none that an earlier test has set, such as the number of devices
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stderr
    have = losses(tmp_path / "two")
    assert [row[0] for row in have] == [row[0] for row in want] == [4, 8, 9]
    assert [row[1] for row in have] == pytest.approx([row[1] for row in want], rel=1e-5)


def test_the_devices_are_never_far_behind(monkeypatch):
    waited = []
    monkeypatch.setattr("training.dispatch.jax.block_until_ready", waited.append)
    step = throttled(lambda state, batch: (state + 1, f"metrics {batch}"), most=3)
    state = 0
    for batch in range(5):
        state, step_metrics = step(state, batch)
        assert (state, step_metrics) == (batch + 1, f"metrics {batch}")
    assert waited == ["metrics 0", "metrics 1"]


@pytest.mark.once
def test_room_is_made_for_the_batches_that_are_left(tmp_path, monkeypatch):
    """Not for two thousand million of them; and what is under way ends before somebody loses patience."""
    sizes = []

    def place(batches, mesh, most, span):
        sizes.append((most, len(span)))
        return input_pipeline.place(batches, mesh, most, span)

    monkeypatch.setattr(train_lib, "place", place)
    run = train_lib.train(tiny_config(max_steps=3, steps_per_dispatch=2**31 - 1, **QUIET), tmp_path)
    assert sizes == [(3, 3)] and run.step == 3
    assert longest(0, 2**31 - 1, 2**31 - 1, 1, [2_000_000_000]) == MOST
    assert (
        longest(4, 2**31 - 1, 2**31 - 1, 3, [0, 7]) == 21
        and longest(5, 5, 9, 1, []) == 2
        and longest(0, 9, 1, 3, []) == 1
    )


def test_nothing_to_wait_for_in_three_hundred_steps_of_two_devices(tmp_path):
    """With 33 under way XLA's two devices wait for each other, and the process is aborted."""
    never = dict.fromkeys(["log_every", "eval_every", "save_every"], 300)
    done = run_main(
        *arguments(tiny_config(max_steps=300, cpu_devices="2", sample_every=0, **never), tmp_path), XLA_FLAGS=SOONER
    )
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stderr


@pytest.mark.once
def test_a_trace_covers_its_steps_alone(tmp_path, monkeypatch):
    begun, ended = [], []
    config = tiny_config(max_steps=8, steps_per_dispatch=8, use_muon=False, **QUIET)

    class Profiler:
        start_trace = lambda path: begun.append(len(made))
        stop_trace = lambda: ended.append(len(made))

    made = []
    make_train_step = dispatch.several_steps

    def counting(train_step, state):
        step = make_train_step(train_step, state)
        return lambda state, batch: made.extend([0] * int(batch[1].addressable_shards[0].data)) or step(state, batch)

    monkeypatch.setattr(dispatch, "several_steps", counting)
    monkeypatch.setattr(train_lib.jax, "profiler", Profiler)
    train_lib.train(config, tmp_path, profile=(3, 5))
    assert (begun, ended, len(made)) == ([3], [5], 8)
