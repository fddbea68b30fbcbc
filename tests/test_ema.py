"""The average of the weights: its formula, what keeps it, and who reads it."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_one_line,
    assert_same_state,
    finished_run,
    losses,
    rows,
    tiny_config,
    train_until,
)
from safetensors.numpy import load_file

import main
import run_lib
import train_lib
from reports.compare import read_runs, tables_of
from training.ema import average_of, average_weights
from training.optimizer import OptimizerConfig, make_optimizer
from transformer.model import params_of
from transformer.sampling import Sampling, generate

DECAY = 0.7
CONFIG = {
    **{"num_blocks": 1, "accumulation_steps": 2, "max_steps": 7, "ema_decay": DECAY, "muon_lr": 0.1, "lr": 0.05},
    **{"save_every": 1, "keep": 9, "eval_every": 3, "sample_every": 0, "sample_tokens": 9},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> run_lib.Run:
    return train_lib.train(tiny_config(**CONFIG), tmp_path_factory.mktemp("averaged") / "run")


def weights_of(workdir: Path, weights: str, step: int | None = None) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in params_of(run_lib.load_model(workdir, step, weights=weights)[0]).items()}


def mean_after(weights: list[np.ndarray], decay: float) -> np.ndarray:
    """The definition, in float64."""
    parts = decay ** np.arange(len(weights) - 1.0, -1, -1)
    return sum(part * np.asarray(w, np.float64) for part, w in zip(parts, weights, strict=True)) / parts.sum()


@pytest.mark.parametrize("decay", [0.3, 0.999, 0.99999])
def test_the_average_is_the_definition_and_that_of_optax(decay):
    rng, params = np.random.default_rng(0), {"w": jnp.zeros((3, 2))}
    ours, theirs = average_weights(decay), optax.ema(decay, debias=True)
    state, their_state, seen = ours.init(params), theirs.init(params), []
    for _ in range(20):
        updates = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
        same, state = ours.update(updates, state, params, apply=True)
        assert same is updates
        params = jax.tree.map(jnp.add, params, updates)
        their_average, their_state = theirs.update(params, their_state)
        seen.append(params["w"])
        np.testing.assert_allclose(state.average["w"], mean_after(seen, decay), rtol=0, atol=3e-6)
    assert int(state.count) == 20
    # optax computes 1 - decay^t in float32: at 0.99999 half its digits are rounding.
    np.testing.assert_allclose(their_average["w"], state.average["w"], rtol=0, atol=1e-2 if decay > 0.9999 else 1e-4)


def test_a_run_averages_its_real_steps(run):
    """Of two micro-batches each, as its checkpoints have them."""
    steps = [weights_of(run.workdir, "trained", 2 * step) for step in range(1, 8)]
    for t in (1, 4, 7):
        averaged = weights_of(run.workdir, "ema", 2 * t)
        assert averaged.keys() == steps[0].keys()
        for name, value in averaged.items():
            np.testing.assert_allclose(value, mean_after([w[name] for w in steps[:t]], DECAY), rtol=0, atol=1e-6)
    assert any(np.abs(averaged[name] - steps[-1][name]).max() > 1e-3 for name in averaged)


def test_a_run_cut_in_mid_accumulation_averages_the_same_bits(run, tmp_path):
    config = tiny_config(**CONFIG)
    train_until(7, config, tmp_path)
    train_lib.train(config, tmp_path)
    assert losses(tmp_path) == losses(run.workdir)
    assert_same_state(tmp_path, run, config, 14)


def test_evaluations_tell_of_both_and_the_best_is_the_average_s(run):
    told = {row["step"]: row for row in rows(run.workdir) if "ema_val_loss" in row}
    assert list(told) == [3, 6, 7] == [row["step"] for row in rows(run.workdir) if "val_loss" in row]
    assert all(row["ema_val_loss"] != row["val_loss"] for row in told.values())
    best = min(told.values(), key=lambda row: row["ema_val_loss"])
    assert (run.best_step, run.best_val_loss) == (best["step"], best["ema_val_loss"])
    assert run_lib.load_model(run.workdir)[3]["step"] == 2 * best["step"]


@pytest.mark.parametrize("flags, key", [([], "ema_val_loss"), (["--weights=trained"], "val_loss")])
def test_eval_and_export_take_either(run, flags, key, tmp_path, capsys):
    assert main.main(["eval", f"--workdir={run.workdir}", "--step=12", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"] == pytest.approx({row["step"]: row for row in rows(run.workdir)}[6][key], rel=1e-6)
    assert result["weights"] == ("ema" if key == "ema_val_loss" else "trained")
    out = ["--format=safetensors", f"--out={tmp_path / 'out'}"]
    assert main.main(["export", f"--workdir={run.workdir}", "--step=12", *flags, *out]) == 0
    wanted = weights_of(run.workdir, result["weights"], 12)
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(value, wanted[name])


def test_samples_are_the_average_s(run, capsys):
    [(step, text)] = run_lib.read_samples(run.workdir)
    model, tokenizer, *_ = run_lib.load_model(run.workdir, 14, weights="ema")
    how = Sampling(temperature=tiny_config().temperature, seed=0)
    assert (step, text) == (7, "\n" + generate(model, tokenizer, ["\n"], 9, how)[0])
    capsys.readouterr()
    written = {}
    for weights in ("auto", "ema", "trained"):
        flags = [f"--workdir={run.workdir}", "--step=14", f"--weights={weights}", "--prompt=A", "--num_tokens=40"]
        assert main.main(["sample", *flags]) == 0
        written[weights] = capsys.readouterr().out
    assert written["auto"] == written["ema"] != written["trained"]


@pytest.mark.parametrize("which, weights", [("auto", "ema"), ("trained", "trained")])
def test_a_new_run_begins_with_either_and_so_does_its_average(run, which, weights, tmp_path):
    config = tiny_config(**CONFIG | {"ema_decay": 0.9}, init_from=str(run.workdir), init_weights=which)
    train_until(0, config, tmp_path)
    wanted = weights_of(run.workdir, weights)
    for of in ("trained", "ema"):
        found = weights_of(tmp_path, of)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_run_without_an_average_has_none_to_give(capsys, tmp_path):
    assert main.main(["eval", f"--workdir={finished_run().workdir}", "--weights=ema"]) == 2
    assert_one_line(capsys.readouterr().err, "keeps no average of the weights", "trained")
    config = tiny_config(init_from=str(finished_run().workdir), init_weights="ema")
    with pytest.raises(run_lib.UserError, match="keeps no average"):
        train_lib.train(config, tmp_path)
    assert not any("ema_val_loss" in row for row in rows(finished_run().workdir))


def test_an_average_cannot_begin_on_the_way(run):
    with pytest.raises(run_lib.UserError, match=r"^config\.ema_decay: "):
        train_lib.train(tiny_config(**CONFIG | {"ema_decay": 0.0}), run.workdir)


def test_without_it_the_state_is_as_it_was():
    """Old checkpoints have no array for it; tests/data/golden_run.zip is one."""
    params = {"embedding.embedding": jnp.zeros((3, 2)), "blocks.0.mlp.up.kernel": jnp.zeros((2, 5))}
    init = lambda decay: make_optimizer(OptimizerConfig(ema_decay=decay), params, 5).init(params)
    plain, averaged = jax.eval_shape(partial(init, 0.0)), jax.eval_shape(partial(init, 0.5))
    assert average_of(plain) is None and average_of(averaged).keys() == params.keys()
    assert len(jax.tree.leaves(averaged)) == len(jax.tree.leaves(plain)) + len(params) + 1


def test_a_comparison_has_a_column_for_it_where_a_run_keeps_one(run):
    columns = lambda *runs: tables_of(read_runs([r.workdir for r in runs], print), None)[0][1].columns
    assert "best, averaged" in columns(run) and "best, averaged" in columns(run, finished_run())
    assert "best, averaged" not in columns(finished_run())
    table = tables_of(read_runs([run.workdir], print), None)[0][1]
    assert dict(zip(table.columns, table.rows[0], strict=True))["best, averaged"] == f"{run.best_val_loss:.4f}"
