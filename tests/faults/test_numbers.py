"""Numbers that go bad: nothing of theirs reaches the weights, they are counted and named, and too many end the run."""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_state, finished_run, losses, tiny_config, train_until
from test_step import AT_ONCE, MODEL, Trainer, assert_same, batch

import input_pipeline
import run_lib
import train_lib
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import DivergedError, NoCheckpointError
from training import health, step
from training.health import Divergence

VALUES = (math.nan, math.inf, -math.inf)


# --- Gradients that are not finite ----------------------------------------------------------------------------------


def poisoned_gradients(make):
    """One entry of one gradient, or the loss, is replaced, as the batch says where nobody reads: in its first input."""

    def make_loss_and_grads(config, mesh):
        real = make(config, mesh)

        def loss_and_grads(params, batch_BT1, key):
            loss, tokens, grads = real(params, batch_BT1, key)
            numbers = dict(sorted(grads.items())) | {"loss": loss}
            for i, (name, x) in enumerate(numbers.items()):
                for j, value in enumerate(VALUES):
                    ill = x.ravel().at[x.size // 2].set(value).reshape(x.shape)
                    numbers[name] = x = jnp.where(batch_BT1[0, 0] == -1 - len(VALUES) * i - j, ill, x)
            return numbers.pop("loss"), tokens, numbers

        return loss_and_grads

    return make_loss_and_grads


def test_one_bad_entry_anywhere_changes_no_bit_and_is_named(monkeypatch, random_params):
    monkeypatch.setattr(step, "make_loss_and_grads", poisoned_gradients(step.make_loss_and_grads))
    params = random_params(MODEL)
    trainer = Trainer(params, AT_ONCE)
    places, batches = [], [batch(1)]
    for place in range(len(params) + 1):
        for j in range(len(VALUES)):
            ill = batch(2)
            ill[0, 0] = -1 - len(VALUES) * place - j
            places.append(place)
            batches.append(ill)
    history = trainer.run([*batches, batch(3)])
    good = history[0][0]
    assert not np.array_equal(good.params["head.kernel"], params["head.kernel"])
    for number, (place, (state, metrics)) in enumerate(zip(places, history[1:-1], strict=True), 1):
        assert_same((state.params, state.opt_state.inner_state), (good.params, good.opt_state.inner_state))
        assert (metrics["bad_steps"], metrics["bad_batches"], metrics["bad_leaf"]) == (number, number, place)
        assert_same(state.health[2:], good.health[2:])  # no NaN in what spikes are measured by
    after, metrics = history[-1]
    assert (metrics["bad_steps"], metrics["bad_batches"]) == (0, len(places))
    assert all(np.isfinite(value).all() and (value != good.params[name]).any() for name, value in after.params.items())


def bad_batches(*steps: int):
    """Batches of which those of `steps` hold token ids that no embedding has, which gives NaN."""

    class BadBatches(input_pipeline.Batches):
        def __call__(self, index: int) -> np.ndarray:
            whole = super().__call__(index)
            return np.full_like(whole, 10_000) if index in steps else whole

    return BadBatches


def test_bad_steps_between_two_rows_are_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lib, "Batches", bad_batches(2, 3))
    config = tiny_config(max_steps=11, log_every=5, eval_every=100, sample_every=0)
    history = train_lib.train(config, tmp_path).history
    assert [(row["step"], row["bad_batches"], row["bad_steps"]) for row in history] == [
        (5, 2, 0),
        (10, 2, 0),
        (11, 2, 0),
    ]
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1
    assert warnings.startswith("warning: step 5: 2 new batches dropped, in the last the gradient of blocks.0.")


def test_a_run_that_stays_bad_says_where_and_ends_no_later_than_the_next_row(tmp_path, monkeypatch):
    """Cut between two bad steps, it goes on counting."""
    monkeypatch.setattr(train_lib, "Batches", bad_batches(*range(12, 1000)))
    config = tiny_config(max_steps=60, max_bad_steps=4, log_every=4, eval_every=100, sample_every=0)
    train_until(14, config, tmp_path)
    with pytest.raises(DivergedError) as diverged:
        train_lib.train(config, tmp_path)
    assert "4 steps in a row, up to step 16 (lr 0.01; in the last of them the gradient of blocks.0." in str(
        diverged.value
    )
    assert "\n" not in str(diverged.value) and diverged.value.status == 4
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() in (14, 15)  # whose weights are those of step 12, as all after it was bad


@pytest.mark.parametrize("source", ["resume", "init_from", "sample"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, monkeypatch, source, capsys):
    def ill(params):
        name = sorted(params)[3]
        return params | {name: params[name].at[0].set(jnp.inf)}

    workdir = finished_run().workdir
    with monkeypatch.context() as patch:
        restore, restore_params = Checkpoints.restore, Checkpoints.restore_params
        patch.setattr(Checkpoints, "restore", lambda *a: (ill((whole := restore(*a))[0]), whole[1]))
        patch.setattr(Checkpoints, "restore_params", lambda *a: ill(restore_params(*a)))
        with pytest.raises(NoCheckpointError, match=r"^/[^\n]*: the checkpoint's blocks\.0\S* is not finite; [^\n]*$"):
            if source == "sample":
                run_lib.load_model(workdir)
            else:
                changes = {"init_from": str(workdir)} if source == "init_from" else {}
                train_lib.train(tiny_config(**changes), tmp_path if source == "init_from" else workdir)
    assert losses(workdir)[-1][0] == 30  # nothing of the run was lost


# --- Spikes ---------------------------------------------------------------------------------------------------------


def spikes_of(values, sigmas: float) -> tuple[list[int], float, float]:
    """Places of the spikes, mean and deviation at the end: written down once more, in double precision."""
    found, mean, variance, n = [], 0.0, 0.0, 0
    for place, value in enumerate(values):
        if not math.isfinite(value):
            continue
        limit = mean + sigmas * max(math.sqrt(variance), 0.01 * mean)
        if n >= 32 and value > limit:
            found.append(place)
            value = limit
        weight = max(1 / (n + 1), 1 / 128)
        mean, variance = mean + weight * (value - mean), (1 - weight) * (variance + weight * (value - mean) ** 2)
        n += 1
    return found, mean, math.sqrt(variance)


def watched(values, sigmas: float) -> tuple[list[int], health.Health]:
    see = jax.jit(lambda state, loss: health.see_loss(state, loss, jnp.isfinite(loss), sigmas))
    state, found = health.fresh_health(), []
    for place, value in enumerate(values):
        spike, state = see(state, jnp.float32(value))
        found += [place] * bool(spike)
    return found, jax.device_get(state)


def wavering(count: int, level: float = 2.0) -> list[float]:
    return list(level + 0.05 * np.random.default_rng(0).normal(size=count))


def test_a_spike_is_seen_and_neither_it_nor_a_nan_spoils_the_window():
    values = [8.0, 5.0, *wavering(80)]
    values[10], values[60], values[70] = 20.0, 20.0, math.nan  # the first comes before the window is warm
    values[61] = math.inf
    found, state = watched(values, 6.0)
    assert (found, float(state.loss_mean), float(math.sqrt(state.loss_variance))) == (
        [60],
        pytest.approx(spikes_of(values, 6.0)[1], rel=1e-5),
        pytest.approx(spikes_of(values, 6.0)[2], rel=1e-3),
    )
    assert spikes_of(values, 6.0)[0] == [60] and state.loss_spikes == 1 and state.loss_steps == 80
    assert watched(values, 0.0)[0] == []


def test_a_level_that_has_risen_for_good_is_accepted():
    values = [*wavering(60), *wavering(60, level=4.0)]
    found, _ = watched(values, 6.0)
    assert found == spikes_of(values, 6.0)[0]
    assert found[0] == 60 and found == list(range(60, 60 + len(found))) and len(found) < 20


def test_a_constant_loss_has_no_spikes():
    assert watched([2.0] * 40 + [2.1] + [0.0] * 5, 6.0)[0] == []


def test_a_spike_is_skipped_only_when_asked_for(monkeypatch):
    def loss_is_in_the_batch(config, mesh):
        return lambda params, batch_BT1, key: (batch_BT1[0, 0] / 7.0, jnp.int32(5), jax.tree.map(jnp.ones_like, params))

    monkeypatch.setattr(step, "make_loss_and_grads", loss_is_in_the_batch)
    values = [round(35 * value) for value in wavering(40)]
    values[37] = 3500
    batches = [np.full_like(batch(), value) for value in values]
    moved = {}
    for skip in (False, True):
        trainer = Trainer({"head.kernel": jnp.ones((2, 3))}, AT_ONCE, spike_sigmas=6.0, skip_spikes=skip)
        history = trainer.run(batches)
        assert [int(metrics["loss_spikes"]) for _, metrics in history] == [0] * 37 + [1] * 3
        assert history[37][1]["loss"] == pytest.approx(100) and history[37][1]["bad_steps"] == 0
        moved[skip] = [
            not np.array_equal(a.params["head.kernel"], b.params["head.kernel"]) for (a, _), (b, _) in pairwise(history)
        ]
        if skip:
            assert_same(history[37][0].opt_state.inner_state, history[36][0].opt_state.inner_state)
            assert math.isnan(history[37][1]["grad_norm"])
    assert all(moved[False]) and moved[True] == [number != 36 for number in range(39)]


def spiky_batches(index_of_spike: int):
    class SpikyBatches(input_pipeline.Batches):
        def __call__(self, index: int) -> np.ndarray:
            whole = super().__call__(index)
            return np.full_like(whole, 5) if index == index_of_spike else whole  # one character again and again

    return SpikyBatches


def test_a_run_warns_of_a_spike_and_a_resume_skips_the_same_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lib, "Batches", spiky_batches(38))
    config = tiny_config(
        **{"max_steps": 42, "eval_every": 100, "save_every": 100, "sample_every": 0},
        **{"spike_sigmas": 2.0, "skip_spikes": True},
    )
    whole = train_lib.train(config, tmp_path / "whole")
    assert [row["step"] for row in whole.history if row["loss_spikes"]] == [39, 40, 41, 42]
    warning = capsys.readouterr().err
    assert warning == "warning: step 39: 1 new loss spike, not applied\n"
    cut = tmp_path / "cut"
    train_until(36, config, cut)
    train_lib.train(config, cut)
    assert losses(cut) == losses(whole.workdir)
    assert_same_state(cut, whole, config, 42)


def test_a_spike_that_is_not_skipped_names_the_key():
    said = []
    divergence = Divergence(5, False, ["a"], {"bad_batches": 0, "loss_spikes": 3}, said.append, vocab_size=65)
    step_metrics = {"bad_steps": 0, "bad_batches": 0, "loss_spikes": 5, "bad_leaf": 0, "loss": 4.0, "grad_norm": 1.0}
    divergence.check(7, 0.1, step_metrics)

    assert said == ["step 7: 2 new loss spikes, applied; config.skip_spikes=True leaves such steps out"]


# --- Finite, and yet no training ------------------------------------------------------------------------------------


def test_a_run_that_diverges_without_a_nan_says_so(tmp_path, capsys):
    """Unclipped, at rates that throw the weights far away: a loss of hundred thousands, and every number is finite."""
    wild = {"lr": 100.0, "muon_lr": 1000.0, "grad_clip": 0.0, "max_steps": 12, "sample_every": 0}
    train_lib.train(tiny_config(**wild, eval_every=100), tmp_path)
    said = capsys.readouterr().err.splitlines()
    [far] = [line for line in said if "far above ln" in line]
    assert "the run has diverged; lower lr and muon_lr, or clip harder" in far
    assert len(said) == 1


def test_each_sign_of_divergence_is_told_of_once_until_it_was_gone():
    said = []
    divergence = Divergence(5, False, ["a"], {"bad_batches": 0, "loss_spikes": 0}, said.append, vocab_size=20)
    values = [
        (3.0, 1.0),
        (8.9, 0.0),
        (9.0, 0.5),
        (9.1, 0.0),
        (3.0, 0.0),
        (3.0, 0.0),
        (1e5, 1.0),
        (3.0, 0.0),
        (3.0, 0.0),
    ]
    for number, (loss, norm) in enumerate(values, 1):  # 3 ln 20 is 8.987
        counts = {"bad_steps": 0, "bad_batches": 0, "loss_spikes": 0, "bad_leaf": 0}
        divergence.check(number, 0.1, {**counts, "loss": loss, "grad_norm": norm})
    assert [line.split(",")[0].split(" the ")[0] for line in said] == [
        *("step 3: loss 9", "step 5:", "step 7: loss 1e+05", "step 9:")
    ]
    assert "as at step 4" in said[1] and "as at step 8" in said[3]
