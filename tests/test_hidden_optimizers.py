"""Each optimizer of the hidden matrices, and the forms of weight decay, against its paper's formula in float64."""

import math

import jax
import numpy as np
import optax
import pytest
from helpers import arguments, assert_one_line, assert_same_state, losses, tiny_config, train_until
from test_optimizer import iterate, normal

import config_lib
import main
import train_lib
from runtime.errors import UserError
from training.optimizer import OptimizerConfig, make_optimizer

STEPS = 20
SHAPES = {
    "blocks.0.attention.query.kernel": (6, 12),
    "blocks.0.attention.key.kernel": (6, 8),
    "blocks.0.attention.out.kernel": (12, 6),
    "blocks.0.mlp.up.kernel": (6, 14),
    "blocks.1.mlp.up.kernel": (6, 14),
    "blocks.0.mlp.down.kernel": (14, 6),
}


def gradients(step):
    """Entries of very different sizes, so that each neuron, direction and epsilon has its turn."""
    return {
        name: np.float32(10.0 ** (step % 3 - 2) * normal(*shape, seed=100 * step + i) * 2.0 ** np.arange(shape[1]) / 9)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def compare(config, restate, tolerance=1e-4):
    """Steps with our optimizer and with `restate(name, number of the step, gradient, weight)` -> the new weight."""
    params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    want = {name: w.astype(np.float64) for name, w in params.items()}
    opt = make_optimizer(config, params, STEPS)
    update, state = jax.jit(opt.update), opt.init(params)
    for step in range(STEPS):
        grads = gradients(step)
        updates, state = update(grads, state, params, tokens=1.0, real_step=step, apply=True)
        params = optax.apply_updates(params, updates)
        want = {name: restate(name, step, grads[name].astype(np.float64), w) for name, w in want.items()}
    for name in SHAPES:
        np.testing.assert_allclose(params[name], want[name], rtol=tolerance, atol=tolerance, err_msg=name)
    return params


class Momentum:
    """Muon's orthogonal direction before its scale: Nesterov, then Newton-Schulz, in float64."""

    def __init__(self):
        self.buf = {name: np.zeros(shape) for name, shape in SHAPES.items()}

    def __call__(self, name, g):
        self.buf[name] = 0.95 * self.buf[name] + 0.05 * g
        return iterate(0.95 * self.buf[name] + 0.05 * g, "classical", 5)


def aspect(shape):
    return math.sqrt(max(1, shape[1] / shape[0]))


@pytest.mark.parametrize("scale", ["aspect", "rms"])
def test_normuon(scale):
    """Algorithm 1 with its neurons in columns; "rms" is the paper's norm, "aspect" that of the authors' code."""
    muon, square = Momentum(), {name: np.zeros(shape[1]) for name, shape in SHAPES.items()}

    def restate(name, step, g, w):
        o = muon(name, g)
        square[name] = 0.95 * square[name] + 0.05 * np.mean(o * o, axis=0)
        even = o / (np.sqrt(square[name]) + 1e-10)
        norm = 0.2 * math.sqrt(o.size) if scale == "rms" else np.linalg.norm(o) * aspect(o.shape)
        return w - 0.03 * (norm * even / np.linalg.norm(even) + 0.1 * w)

    compare(
        OptimizerConfig(hidden_optimizer="normuon", muon_lr=0.03, muon_scale=scale, weight_decay=0.1, grad_clip=0.0),
        restate,
    )


# --- In a run -----------------------------------------------------------------------------------------------------


def test_a_run_learns_and_goes_on_to_the_same_bits(tmp_path):
    """With a state besides the momentum, and whatever else is off by default."""
    quick = {"max_steps": 14, "eval_every": 14, "save_every": 14, "sample_every": 0, "report": False}
    config = tiny_config(**quick, weight_decay=0.1, hidden_optimizer="normuon", muon_lr=0.03)
    whole = train_lib.train(config, tmp_path / "whole")
    assert whole.history[-1]["loss"] < whole.history[0]["loss"] - 0.2
    assert "param_rms_normuon" in whole.history[-1]
    train_until(11, config, tmp_path / "cut")
    train_lib.train(config, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(whole.workdir)
    assert_same_state(tmp_path / "cut", whole, config, 14)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_optimizer": "normuon", "use_muon": False}, ("config.use_muon: must be True", "normuon")),
        ({"hidden_optimizer": "normoun"}, ("config.hidden_optimizer: unknown value", "did you mean normuon?")),
    ],
)
def test_what_cannot_be_is_refused(changes, words, tmp_path, capsys):
    assert main.main(arguments(tiny_config(**changes), tmp_path / "run")) == 2
    assert_one_line(capsys.readouterr().err, *words)


@pytest.mark.parametrize(
    "key, value",
    [("muon_by_head", False), ("cautious_decay", False), ("decay_schedule", "constant"), ("value_embeddings", False)],
)
def test_a_config_of_a_build_that_had_more_settings_is_read(key, value):
    values = config_lib.to_dict(tiny_config())
    assert config_lib.from_dict(values | {key: value}) == config_lib.from_dict(values)
    with pytest.raises(UserError, match=rf"^config\.{key}: 'linear' was taken out of the program; take the build"):
        config_lib.from_dict(values | {key: "linear"})
