"""Runs whose length is given in seconds or in floating-point operations."""

import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from helpers import assert_same_state, losses, tiny_config, train_until

import config_lib
import train_lib
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import UserError
from training import budget
from training.budget import Pace, steps_in
from training.clock import side_work
from training.cost import flops_per_token

SMALL = {"num_blocks": 1, "max_steps": 0, "sample_every": 0, "sample_tokens": 1, "eval_every": 4, "save_every": 3}


class SimpleState(NamedTuple):
    params: Any
    opt_state: Any


def flops_of_a_step(config):
    model = config_lib.model_config_of(config, vocab_size=34)  # as of the tests' text
    return flops_per_token(model) * config.batch_size * config.context_len * config.accumulation_steps


def test_max_flops_is_so_many_steps(tmp_path):
    config = tiny_config(**SMALL, accumulation_steps=2)
    config.max_flops = 5.9 * flops_of_a_step(config)
    assert train_lib.train(config, tmp_path / "run").step == 5
    config.max_flops = 6.1 * flops_of_a_step(config)  # constant rates: it may go on
    assert train_lib.train(config, tmp_path / "run").step == 6


def test_flops_are_spent_in_steps_of_either_size(tmp_path):
    config = tiny_config(**SMALL)
    config.max_flops = 8.1 * flops_of_a_step(config)
    train_until(4, config, tmp_path / "run")
    config.batch_size *= 2
    assert train_lib.train(config, tmp_path / "run", rebatch=True).step == 6  # four, and two of twice the size
    config.schedule = "cosine"
    smaller = config.copy_and_resolve_references()
    smaller.batch_size //= 2
    with pytest.raises(UserError, match=r"^config\.batch_size: schedule 'cosine' was laid out in steps of"):
        config_lib.check_resume(smaller, config, tmp_path, rebatch=True)


def test_limits_beyond_all_bounds_are_no_error():
    assert budget.total_steps(10**12, 1, 0) == budget.total_steps(None, 1, 0, 0, 1e300, 1.0) == 2**31 - 1
    assert (
        steps_in(1e300, Pace(1e-3, 0.0, 0.0), side_work(8, 20, 0, eval_every=4, sample_every=0, save_every=8))
        == 2**31 - 1
    )


def test_processes_make_the_same_steps_whatever_their_clocks_say(monkeypatch):
    """Each step is an exchange; the numbers asked for are those of the first process."""
    monkeypatch.setattr(budget, "from_all", lambda values: values[None] * 0 + 17)
    taken = []

    class Counted:
        def init(self, key):
            return SimpleState(jnp.zeros(2), ())

        def run(self, state, batch):
            taken.append(batch)
            return state, jnp.zeros(())

    monkeypatch.setattr(budget, "average_of", lambda opt_state: None)
    monkeypatch.setattr(budget, "fingerprints", lambda tree: {})
    budget.measure(Counted(), None, lambda i: i, 2, lambda params: None, evaluated=1, seconds=1.0)
    assert len(taken) == 2 * (1 + 2 + 17)


def test_less_than_a_step_is_refused(tmp_path):
    config = tiny_config(**SMALL)
    config.max_flops = 0.9 * flops_of_a_step(config)
    with pytest.raises(UserError, match=r"^config\.max_flops: .* is less than the .* of a step; raise it$"):
        train_lib.train(config, tmp_path / "run")


def test_steps_that_fit_are_counted_with_evaluations_and_saves():
    """10 s of steps of 0.5, evaluations of 1 s after each fourth and after the last, saves of 0.25 s with them."""
    work = side_work(8, 20, 0, eval_every=4, sample_every=0, save_every=8)
    takes = lambda n: 0.5 * n + (-(-n // 4)) * 1.0 + (-(-n // 4)) * 0.25
    found = steps_in(10.0, Pace(step=0.5, evaluation=1 / 20, save=0.25), work)
    assert takes(found) <= 10 < takes(found + 1) and found == 12
    assert steps_in(0.1, Pace(step=0.5, evaluation=1.0, save=1.0), work) == 1


@pytest.fixture
def paced(monkeypatch):
    """What the trial is said to have found; it is made, too."""
    real, found = budget.measure, []

    def measure(*args):
        found.append(real(*args))
        return Pace(step=1.0, evaluation=0.0, save=0.0)

    monkeypatch.setattr(train_lib, "measure", measure)
    return found


def test_max_seconds_fixes_the_steps_and_the_run_is_that_of_max_steps(paced, tmp_path, capsys):
    """To the bit, though the rates depend on the number of steps; cut and resumed, nothing is timed again."""
    changes = {**SMALL, "accumulation_steps": 2, "schedule": "cosine", "lr_warmup_ratio": 0.2, "ema_decay": 0.5}
    timed = tiny_config(**changes, max_seconds=7.5)
    train_until(9, timed, tmp_path / "timed")
    assert len(paced) == 1 and all(seconds > 0 for seconds in paced[0])
    assert "max_seconds 7.5: enough for 7 steps of" in capsys.readouterr().out
    saved = json.loads((tmp_path / "timed" / "config.json").read_text())
    assert saved["timed_steps"] == 7 and saved["flops_per_token"] > 0
    run = train_lib.train(timed, tmp_path / "timed")
    assert len(paced) == 1 and run.step == 7
    with Checkpoints(tmp_path / "timed", read_only=True) as checkpoints:
        assert checkpoints.meta(14)["timed_steps"] == 7
    fixed = tiny_config(**changes | {"max_steps": 7})
    reference = train_lib.train(fixed, tmp_path / "fixed")
    assert losses(tmp_path / "timed") == losses(tmp_path / "fixed")
    assert_same_state(tmp_path / "timed", reference, fixed, 14)
    with pytest.raises(UserError, match=r"^config\.max_seconds: "):
        train_lib.train(tiny_config(**changes, max_seconds=9.5), tmp_path / "timed")


def test_a_run_without_any_limit_is_refused():
    with pytest.raises(UserError, match="would never end"):
        config_lib.check(tiny_config(max_steps=0, epochs=0))
    config_lib.check(tiny_config(max_steps=0, epochs=0, max_seconds=3))
