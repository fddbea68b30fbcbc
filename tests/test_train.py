"""Whole runs of a small model: what they leave, that evaluation is exact, and what bad numbers do."""

import json
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    arguments,
    finished_run,
    losses,
    make_text,
    rows,
    run_main,
    saved_state,
    tiny_config,
    train_until,
)
from xla_flags import SOONER

import config_lib
import input_pipeline
import main
import run_lib
import train_lib
from corpus import dataset
from corpus.tokenizer import tokenizer_from_dict
from reports import summary
from runtime.checkpoints.manager import Checkpoints, val_tokens_of
from runtime.errors import DivergedError, UserError
from training.budget import total_steps
from training.evaluate import Evaluator
from transformer.config import TransformerConfig
from transformer.model import params_of
from transformer.sharding import make_mesh

# --- What a run leaves ----------------------------------------------------------------------------------------------


def test_what_a_run_leaves():
    workdir = finished_run().workdir
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "checkpoints", "loss.png", "samples.txt", "tokenizer.json", ".lock")
    }
    config = tiny_config()
    written = json.loads((workdir / "config.json").read_text())
    assert config_lib.from_dict(written["config"]) == config
    assert written["packages"]["jax"] == jax.__version__
    assert written["device_kind"] == jax.devices()[0].device_kind and "git_commit" in written
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    samples = (workdir / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("---")] == [
        *("--- step 12 ---", "--- step 24 ---", "--- step 30 ---")
    ]
    assert tokenizer_from_dict(json.loads((workdir / "tokenizer.json").read_text())).vocab_size == len(set(make_text()))


def test_the_keys_and_sums_of_the_metrics():
    always = {"step", "tokens", "loss", "grad_norm", "lr", "muon_lr", "step_seconds", "tokens_per_second", "mfu"}
    always |= {"elapsed_seconds", "compile_seconds", "peak_memory_bytes"}
    always |= {f"{what}_rms_{group}" for what in ("param", "update") for group in ("muon", "adamw")}
    validation = {"val_loss", "bits_per_byte", "val_tokens"}
    history = rows(finished_run().workdir)
    for row in history:
        evaluated = row["step"] % 7 == 0 or row["step"] == 30
        assert always <= row.keys() and (validation <= row.keys()) == evaluated
        assert row["tokens"] == row["step"] * 4 * 16
        assert (row["lr"], row["muon_lr"]) == (0.01, 0.02)
        if row["step"] > 1:
            assert row["tokens_per_second"] == pytest.approx(4 * 16 / row["step_seconds"])
        if evaluated:  # one character is one token and one byte
            assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2))
    assert [row["elapsed_seconds"] for row in history] == sorted(row["elapsed_seconds"] for row in history)
    compiled = [row["compile_seconds"] for row in history]
    assert compiled == sorted(compiled) and 0 < compiled[-1] < history[-1]["elapsed_seconds"]
    assert history[0]["loss"] == pytest.approx(math.log(finished_run().tokenizer.vocab_size), abs=0.2)
    assert history[-1]["loss"] < history[0]["loss"] - 1


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    """Validation losses by script: the best is neither first nor last, and later sessions still know it."""
    values = iter([3.0, 2.0, 2.5, 2.25, 2.75, 2.5])  # at steps 7, 14, 21, 28, 30; and 34
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: (next(values), 1))
    stored = lambda: sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    train_until(14, tiny_config(sample_every=0), tmp_path)  # when the best has just been saved
    train_lib.train(tiny_config(sample_every=0), tmp_path)
    assert stored() == [14, 25, 30]
    run = train_lib.train(tiny_config(sample_every=0, max_steps=34), tmp_path)
    assert stored() == [14, 30, 34]
    assert (run.best_step, run.best_val_loss, run.val_loss) == (14, 2.0, 2.5)
    assert run_lib.load_model(tmp_path)[3]["step"] == 14


def test_runs_are_deterministic_and_say_what_they_do(tmp_path, capsys):
    run = train_lib.train(tiny_config(max_steps=8, print_per_layer_params=True), tmp_path)
    reference = [loss for loss in losses(finished_run().workdir) if loss[0] < 8]
    assert losses(run.workdir)[:7] == reference
    output = capsys.readouterr().out
    vocab_size = run.tokenizer.vocab_size
    counted = sum(leaf.size for leaf in jax.tree.leaves(params_of(run.model)))
    for text in (
        f"parameters  {counted:,} (embedding {vocab_size * 32:,},",
        f"memory      about 0 MB a device (parameters {4 * counted / 1e6:,.0f})",  # smaller parts are left out
        "Muon for 6 matrices",
        f"ln {vocab_size} = {math.log(vocab_size):.3f}",
        "blocks.0.attention.query.kernel",
        "8/8  loss",
    ):
        assert text in output


# --- Evaluation -----------------------------------------------------------------------------------------------------


def naive_loss(model, tokens: np.ndarray, context_len: int) -> float:
    """The mean over windows one by one, from the definition."""
    total = 0.0
    for start in range(0, len(tokens) - 1, context_len):
        window = tokens[start : start + context_len + 1].astype(int)
        logits = np.asarray(model(jnp.asarray(window[None, :-1]))[0], np.float64)
        log_sum = np.log(np.exp(logits).sum(-1))
        total += (log_sum - logits[np.arange(len(window) - 1), window[1:]]).sum()
    return total / (len(tokens) - 1)


def test_evaluation_is_exact_over_the_whole_split_and_over_a_prefix():
    split = run_lib.load_data(tiny_config(), say=print).val
    tokens = split.tokens[:1500]
    split = dataset.Split(tokens, len(tokens))
    evaluate = Evaluator(finished_run().model.config, make_mesh(devices=jax.devices()[:1]), batch_size=4)
    params = params_of(finished_run().model)
    loss, count = evaluate(params, split)
    assert count == 1499
    assert loss == pytest.approx(naive_loss(finished_run().model, tokens, 16), rel=1e-6)
    loss, count = evaluate(params, split, max_tokens=200)
    assert count == 192
    assert loss == pytest.approx(naive_loss(finished_run().model, tokens[:193], 16), rel=1e-6)


def test_eval_tokens_is_for_training_and_not_for_the_end(tmp_path):
    run = train_lib.train(tiny_config(eval_tokens=300, max_steps=8), tmp_path)
    whole = run_lib.load_data(tiny_config(), say=print).val.num_tokens - 1
    assert [(row["step"], row["val_tokens"]) for row in run.history if "val_loss" in row] == [(7, 288), (8, whole)]
    assert (run.history[-1]["prefix_val_tokens"], run.best_tokens) == (288, 300)


def test_only_losses_over_the_same_tokens_make_a_best(tmp_path, monkeypatch):
    """By script: of all of the split at the end, which is no record; then of another prefix, which begins anew."""
    whole = [1.5, 1.75, 1.7]  # at steps 8, 15, 22
    prefix = [2.5, 2.4, 2.0, 2.25, 2.75, 2.8]  # at 7, 8, 14, 15, 21, 22

    def scripted(self, params, split, max_tokens=0, check=None):
        return (prefix if max_tokens else whole).pop(0), max_tokens or 999

    monkeypatch.setattr(Evaluator, "__call__", scripted)
    config = lambda steps, tokens: tiny_config(
        eval_tokens=tokens, max_steps=steps, save_every=100, sample_every=0, keep=1
    )
    stored = lambda: sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    run = train_lib.train(config(8, 300), tmp_path)
    assert (run.best_step, run.best_val_loss, run.val_loss) == (8, 2.4, 1.5)
    run = train_lib.train(config(15, 300), tmp_path)
    assert (run.best_step, run.best_val_loss, run.val_loss) == (14, 2.0, 1.75)
    assert run_lib.load_model(tmp_path)[3]["step"] == 14 and stored() == [14, 15]
    said = ["best step", "14, validation loss 2.0000 over 300 tokens"]
    assert said in summary.closing(run, 1.0)[0].rows
    run = train_lib.train(config(22, 400), tmp_path)
    assert (run.best_step, run.best_val_loss) == (21, 2.75) and stored() == [14, 21, 22]
    assert run_lib.load_model(tmp_path)[3]["step"] == 21


def test_a_trace_ends_with_the_run_and_if_none_was_written_that_is_said(tmp_path, capsys, monkeypatch):
    calls, config = [], tiny_config(max_steps=2, report=False)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    train_lib.train(config, tmp_path / "a", profile=(1, 9))
    assert calls == ["start", "stop"] and "no trace" not in capsys.readouterr().err
    train_lib.train(config, tmp_path / "b", profile=(2, 9))
    assert calls == ["start", "stop"] and "--profile_steps: no trace" in capsys.readouterr().err
    train_lib.train(tiny_config(max_steps=4, report=False), tmp_path / "a", profile=(1, 9))  # goes on within the range
    assert calls == ["start", "stop"] * 2


def test_each_process_traces_into_a_directory_of_its_own(tmp_path, monkeypatch):
    """XLA names the files by the second and the host, which may have several processes."""
    places = []
    monkeypatch.setattr(jax.profiler, "start_trace", places.append)
    for number in (0, 7):
        monkeypatch.setattr(train_lib, "process_id", lambda number=number: number)
        train_lib.Trainer._profile(SimpleNamespace(workdir=tmp_path, step=4, tracing=None), 4, 6)
    assert places == [tmp_path / "profile", tmp_path / "profile" / "7"]


@pytest.mark.parametrize(
    "meta, tokens",
    [
        ({"step": 5, "config": {"eval_tokens": 0, "max_steps": 9}}, 0),
        ({"step": 5, "config": {"eval_tokens": 7, "max_steps": 9}}, 7),
        ({"step": 18, "config": {"eval_tokens": 7, "max_steps": 9, "accumulation_steps": 2}}, 0),
        ({"step": 9, "config": {"eval_tokens": 7, "max_steps": 9}, "checkpoint_val_tokens": 7}, 7),
        ({"step": 3}, 0),
    ],
)
def test_an_older_checkpoint_says_by_its_config_what_its_loss_stands_on(meta, tokens):
    assert val_tokens_of(meta) == tokens


def test_two_devices_train_as_one_and_eval_repeats_the_best_loss(tmp_path, capsys):
    assert jax.device_count() != 2
    done = run_main(*arguments(tiny_config(cpu_devices="2", max_steps=20), tmp_path), XLA_FLAGS=SOONER)
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stderr
    history = rows(tmp_path)
    for one, two in zip(finished_run().history, history, strict=False):
        assert abs(one["loss"] - two["loss"]) < 1e-5  # sums in another order, and Newton-Schulz amplifies rounding
    best = min((row["val_loss"], row["step"]) for row in history if "val_loss" in row)
    assert main.main(["eval", f"--workdir={tmp_path}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["step"], result["split"], result["tokens"]) == (best[1], "val", history[-1]["val_tokens"])
    assert result["loss"] == pytest.approx(best[0], abs=1e-6)


def test_products_in_half_precision_train_as_float32_does(tmp_path, capsys):
    """Two devices; the header says what runs, and whoever reads the run computes as it did."""
    config = tiny_config(cpu_devices="2", max_steps=20, dtype="bfloat16_matmul")
    done = run_main(*arguments(config, tmp_path), XLA_FLAGS=SOONER)
    assert done.returncode == 0 and "2 x cpu (cpu), bfloat16_matmul" in done.stdout, done.stderr
    apart = [abs(own["loss"] - row["loss"]) for own, row in zip(rows(tmp_path), finished_run().history, strict=False)]
    assert 0 < max(apart) < 0.02
    assert main.main(["eval", f"--workdir={tmp_path}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = min(row["val_loss"] for row in rows(tmp_path) if "val_loss" in row)
    assert result["loss"] == pytest.approx(best, abs=1e-4)  # on one device sums differ, and what they round to


@pytest.mark.parametrize(
    "vocab_size, batch_size, more, rows",
    [
        (65, 4, {}, 64),  # 4096 tokens: where there is room, as ever
        (65, 4, {"num_blocks": 1, "dropout": 0.5}, 64),
        (50_257, 1, {}, 10),  # 4096 tokens would have 1.6 GB of logits, with what is made of them
        (50_257, 16, {}, 16),  # a step has as many
        (50_257, 1, {"loss_chunk": 32}, 64),
        (50_257, 1, {"loss_chunk": 0, "remat": "block"}, 10),
    ],
)
def test_an_evaluation_needs_no_more_memory_than_a_step(vocab_size, batch_size, more, rows):
    config = TransformerConfig(vocab_size=vocab_size, context_len=64, embedding_dim=32, **more)
    assert Evaluator(config, make_mesh(devices=jax.devices()[:1]), batch_size)._rows == rows


@pytest.mark.parametrize("method", ["_evaluate", "_sample"])
def test_steps_are_saved_when_memory_runs_out_beside_them(method, tmp_path, monkeypatch):
    config = tiny_config(max_steps=8, eval_every=7, sample_every=7, save_every=100)

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 823410688 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(train_lib.Trainer, method, fail)
        with pytest.raises(UserError, match=r"^config\.loss_chunk: out of memory \(asked for 823410688 bytes\); set"):
            train_lib.train(config, tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 7
    run = train_lib.train(config, tmp_path)
    assert losses(tmp_path)[:7] == losses(finished_run().workdir)[:7] and run.step == 8


@pytest.mark.parametrize(
    "epochs, max_steps, accumulation, total",
    [(1, 0, 1, 6), (2, 0, 1, 11), (0, 9, 1, 9), (1, 9, 1, 6), (3, 9, 1, 9), (2, 0, 3, 4), (1, 0, 7, 1)],
)
def test_a_run_ends_at_the_first_of_epochs_and_max_steps(epochs, max_steps, accumulation, total):
    split = dataset.Split(np.arange(103), 103)  # 21 windows of 5: batches of 4 take 5.25 steps an epoch
    batches = input_pipeline.Batches(split, context_len=5, batch_size=4, seed=0)
    assert total_steps(batches.steps(epochs) if epochs else None, accumulation, max_steps) == total


# --- Bad numbers ----------------------------------------------------------------------------------------------------


def bad_from(first: int, last: int) -> Callable:
    """Batches of which those from `first` to `last` hold token ids that no embedding has, which gives NaN."""

    class BadBatches(input_pipeline.Batches):
        def __call__(self, step: int) -> np.ndarray:
            batch = super().__call__(step)
            return np.full_like(batch, 10_000) if first <= step <= last else batch

    return BadBatches


def test_a_bad_step_changes_nothing_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lib, "Batches", bad_from(4, 5))
    run = train_lib.train(tiny_config(max_steps=8, max_bad_steps=3, eval_every=100), tmp_path)
    assert [row["bad_steps"] for row in run.history] == [0, 0, 0, 0, 1, 2, 0, 0]
    assert [row["loss"] is None for row in run.history] == [row["bad_steps"] > 0 for row in run.history]
    assert {row["param_rms_muon"] for row in run.history[4:6]} == {run.history[3]["param_rms_muon"]}
    assert math.isfinite(run.val_loss)


def test_a_run_that_stays_bad_ends_and_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(max_bad_steps=3, eval_every=100)
    monkeypatch.setattr(train_lib, "Batches", bad_from(12, 10**9))
    with pytest.raises(DivergedError, match=r"^config\.lr: .*3 steps in a row, up to step 15") as diverged:
        train_lib.train(config, tmp_path)
    assert diverged.value.status == 4 and "\n" not in str(diverged.value)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 10
    for name, array in saved_state(tmp_path, config, len(set(make_text())), 10).items():
        assert np.isfinite(array).all(), name


# --- What must not happen -------------------------------------------------------------------------------------------


def test_a_prompt_that_the_vocabulary_lacks_is_refused_before_the_first_step(tmp_path):
    config = tiny_config(sample_prompt="½")
    with pytest.raises(UserError, match=r"^config\.sample_prompt: "):
        train_lib.train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_is_not_even_imported_unless_asked_for(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    train_lib.train(tiny_config(max_steps=1), tmp_path)
    assert "wandb" not in sys.modules
