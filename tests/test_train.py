"""Whole runs of a small model: what they leave, that they are exact, and that a cut changes nothing."""

import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import config_lib
import input_pipeline
import main
import run_lib
import train_lib
from helpers import (
    arguments,
    assert_one_line,
    assert_same_bits,
    losses,
    make_text,
    rows,
    run_main,
    saved_state,
    signal_before,
    tiny_config,
)
from runtime.checkpoint import Checkpoints
from runtime.errors import DivergedError, Interrupted, NoCheckpointError, UserError
from transformer.model import params_of
from transformer.sharding import make_mesh
from transformer.tokenizer import tokenizer_from_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
    """An uninterrupted run of 30 steps. Nobody changes its directory."""
    return train_lib.train(tiny_config(folder), folder / "finished")


@pytest.fixture(scope="module")
def accumulated(folder):
    """An uninterrupted run with three micro-batches a step and dropout."""
    return train_lib.train(tiny_config(folder, **ACCUMULATED), folder / "accumulated")


ACCUMULATED = {"accumulation_steps": 3, "dropout": 0.2, "max_steps": 20}


def assert_same_run(workdir: Path, reference: train_lib.Run, config) -> None:
    """Every logged loss, every sample, and every bit of the last checkpoint."""
    assert losses(workdir) == losses(reference.workdir)
    assert [row["step"] for row in rows(workdir)] == list(range(1, reference.step + 1))
    assert (workdir / "samples.txt").read_text() == (reference.workdir / "samples.txt").read_text()
    last = reference.step * config.accumulation_steps
    vocab_size = reference.tokenizer.vocab_size
    assert_same_bits(
        saved_state(workdir, config, vocab_size, last), saved_state(reference.workdir, config, vocab_size, last)
    )
    assert not [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]


# --- A cut changes nothing ------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_nothing_had_been(finished, folder):
    config, workdir = tiny_config(folder), folder / "killed"
    command = arguments(config, workdir)
    killed = run_main(*command, cut=(signal.SIGKILL, 13))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert rows(workdir)[-1]["step"] == 13
    again = run_main(*command)
    assert again.returncode == 0, again.stderr
    # Checkpoints are written in the background: that of step 10 may not have been complete.
    assert "resuming at step 10" in again.stdout or "resuming at step 7" in again.stdout
    assert_same_run(workdir, finished, config)


def test_a_run_stopped_in_mid_accumulation_and_killed_later_is_the_same(accumulated, folder):
    config, workdir = tiny_config(folder, **ACCUMULATED), folder / "stopped"
    command = arguments(config, workdir)
    stopped = run_main(*command, cut=(signal.SIGTERM, 22))
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "saved step 7; the same command goes on from here" in stopped.stdout
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest() == 22  # the second micro-batch of step 8 is next
    killed = run_main(*command, cut=(signal.SIGKILL, 50))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_main(*command)
    assert again.returncode == 0, again.stderr
    assert_same_run(workdir, accumulated, config)


def test_a_signal_at_any_step_saves_that_step(finished, folder, monkeypatch, capsys):
    """Before the first step, twice at one step, right after a checkpoint, between two."""
    config, workdir = tiny_config(folder), folder / "cut often"
    for signum, step in (("SIGTERM", 0), ("SIGINT", 0), ("SIGINT", 10), ("SIGTERM", 10), ("SIGTERM", 12)):
        number = signal.Signals[signum]
        with monkeypatch.context() as patch:
            patch.setattr(train_lib, "prefetch", signal_before(number, step))
            assert main.main(arguments(config, workdir)) == 128 + number
        output = capsys.readouterr()
        assert f"saved step {step}; the same command goes on from here" in output.out
        assert "error" not in output.err
        with Checkpoints(workdir, read_only=True) as checkpoints:
            assert checkpoints.latest() == step
    assert main.main(arguments(config, workdir)) == 0
    assert_same_run(workdir, finished, config)


@pytest.mark.parametrize("evaluation, step", [(2, 14), (5, 30)])
def test_a_signal_in_an_evaluation(finished, folder, monkeypatch, evaluation, step):
    """It breaks the evaluation off; the next session makes up for it. Both of these give a new best checkpoint."""
    config, workdir = tiny_config(folder), folder / f"cut in evaluation {evaluation}"
    begun = []

    def cut_short(*args):
        begun.append(args)
        for number, batch in enumerate(input_pipeline.eval_batches(*args)):
            assert (len(begun), number) != (evaluation, 2), "the evaluation went on after the signal"
            if (len(begun), number) == (evaluation, 1):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "eval_batches", cut_short)
        with pytest.raises(Interrupted):
            train_lib.train(config, workdir)
    assert rows(workdir)[-1]["step"] == step - 1
    run = train_lib.train(config, workdir)
    assert_same_run(workdir, finished, config)
    assert (run.best_step, run.best_val_loss) == (finished.best_step, finished.best_val_loss)


def test_the_same_command_again_finds_nothing_to_do(finished, capsys, folder):
    before = (finished.workdir / "metrics.jsonl").read_bytes()
    run = train_lib.train(tiny_config(folder), finished.workdir)
    assert "already at step 30" in capsys.readouterr().out
    assert (finished.workdir / "metrics.jsonl").read_bytes() == before
    assert (run.step, run.val_loss, run.history) == (30, finished.val_loss, finished.history)


def test_runs_are_deterministic_and_say_what_they_do(finished, folder, capsys):
    run = train_lib.train(tiny_config(folder, max_steps=8, print_per_layer_params=True), folder / "second")
    reference = [loss for loss in losses(finished.workdir) if loss[0] < 8]
    assert losses(run.workdir)[:7] == reference
    output = capsys.readouterr().out
    vocab_size = run.tokenizer.vocab_size
    counted = sum(leaf.size for leaf in jax.tree.leaves(params_of(run.model)))
    for text in (
        f"parameters  {counted:,} (embedding {vocab_size * 32:,},",
        "Muon: 12 matrices",
        f"ln {vocab_size} = {math.log(vocab_size):.3f}",
        "blocks.1.attention.query.kernel",
        "8/8  loss",
    ):
        assert text in output


# --- Another length, another start ----------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run's directory, to be changed."""
    return Path(shutil.copytree(finished.workdir, tmp_path / "copy"))


def test_a_finished_run_can_be_made_longer(copy, folder):
    """With constant rates it is the longer run that it would have been."""
    longer = train_lib.train(tiny_config(folder, max_steps=34), folder / "longer")
    run = train_lib.train(tiny_config(folder, max_steps=34), copy)
    assert run.step == 34
    assert [row["loss"] for row in run.history] == [row["loss"] for row in longer.history]


@pytest.mark.parametrize("schedule, possible", [("constant_linear", True), ("cosine", False), ("linear", False)])
def test_whether_a_schedule_can_be_made_longer(schedule, possible, folder):
    workdir = folder / schedule
    config = tiny_config(folder, schedule=schedule, max_steps=2)
    train_lib.train(config, workdir)
    config.max_steps = 4
    if possible:
        assert train_lib.train(config, workdir).step == 4
        return
    with pytest.raises(UserError, match=rf"config\.max_steps: .*{schedule}.* 2.* 4.*init_from") as refused:
        train_lib.train(config, workdir)
    assert "\n" not in str(refused.value)


def test_a_run_cannot_be_made_shorter(finished, folder):
    before = losses(finished.workdir)
    with pytest.raises(UserError, match=r"config\.max_steps: .*at step 30, past 29"):
        train_lib.train(tiny_config(folder, max_steps=29), finished.workdir)
    assert losses(finished.workdir) == before


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(copy, folder):
    content = lambda path: {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    before = content(copy)
    for number in (1, 2):
        run = train_lib.train(tiny_config(folder, max_steps=1), copy, fresh=True)
        assert [row["step"] for row in run.history] == [1]
        moved = content(copy.with_name(f"copy.old-{number}"))
        if number == 1:
            assert moved == {path: data for path, data in before.items() if path.name != ".lock"}


@pytest.mark.parametrize(
    "changes", [{"seed": 5}, {"num_blocks": 3}, {"embedding_dim": 48}, {"batch_size": 8}, {"betas": (0.8, 0.9)}]
)
def test_a_key_that_makes_another_run_is_refused_on_resume(finished, folder, changes):
    config = tiny_config(folder)
    ((key, new),) = changes.items()
    old = config[key]
    config[key] = new
    with pytest.raises(UserError) as refused:
        train_lib.train(config, finished.workdir)
    message = str(refused.value)
    assert message.startswith(f"config.{key}: ") and "\n" not in message
    assert message.index(repr(old)) < message.index(repr(new))
    for way_out in ("--workdir", "--fresh", f"--config.init_from={finished.workdir}"):
        assert way_out in message


def test_changed_data_is_refused_on_resume(copy, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes((folder / "text.txt").read_bytes() + b".")
    kept = json.loads((copy / "config.json").read_text())
    config = tiny_config(folder)
    original = config.dataset
    try:
        (folder / "text.txt").write_bytes((folder / "text.txt").read_bytes() + b".")
        with pytest.raises(UserError, match=r"^config\.dataset: the text has changed .*--fresh"):
            train_lib.train(config, copy)
    finally:
        Path(original).write_text(make_text())
    assert json.loads((copy / "config.json").read_text()) == kept


def test_init_from_starts_a_new_run_from_those_weights(finished, folder):
    config = tiny_config(folder, init_from=str(finished.workdir), max_steps=1, seed=3)
    run = train_lib.train(config, folder / "tuned")
    assert run.step == 1
    # Another batch, so near is what can be asked; a new model starts at ln V, two nats above.
    assert abs(run.history[0]["loss"] - finished.best_val_loss) < 0.2 < math.log(run.tokenizer.vocab_size) - 2


@pytest.mark.parametrize(
    "changes, key",
    [({"embedding_dim": 48}, "embedding_dim"), ({"mlp": "swiglu"}, "mlp"), ({"tokenizer": "byte"}, "tokenizer")],
)
def test_init_from_a_model_of_another_kind_is_refused(finished, folder, tmp_path, changes, key):
    config = tiny_config(folder, init_from=str(finished.workdir), **changes)
    with pytest.raises(UserError) as refused:
        train_lib.train(config, tmp_path / "tuned")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"config.{key}: ")


def test_init_from_a_model_with_other_characters_is_refused(finished, folder, tmp_path):
    (tmp_path / "text.txt").write_text(make_text() + "Ω")
    config = tiny_config(tmp_path, init_from=str(finished.workdir))
    with pytest.raises(UserError, match=r"^config\.dataset: .*vocabulary [^\n]*$"):
        train_lib.train(config, tmp_path / "tuned")


def test_init_from_nothing_is_refused(folder, tmp_path):
    with pytest.raises((UserError, NoCheckpointError), match=r"nowhere[^\n]*$"):
        train_lib.train(tiny_config(folder, init_from=str(tmp_path / "nowhere")), tmp_path / "tuned")


# --- What a run leaves ----------------------------------------------------------------------------------------------


def test_what_a_run_leaves(finished, folder):
    workdir = finished.workdir
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "checkpoints", "loss.png", "samples.txt", "tokenizer.json", ".lock")
    }
    config = tiny_config(folder)
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


def test_the_keys_and_sums_of_the_metrics(finished):
    always = {"step", "tokens", "loss", "grad_norm", "lr", "muon_lr", "step_seconds", "tokens_per_second", "mfu"}
    always |= {"elapsed_seconds", "peak_memory_bytes"}
    always |= {f"{what}_rms_{group}" for what in ("param", "update") for group in ("muon", "adamw")}
    validation = {"val_loss", "bits_per_byte", "val_tokens"}
    history = rows(finished.workdir)
    for row in history:
        evaluated = row["step"] % 7 == 0 or row["step"] == 30
        assert always <= row.keys() and (validation <= row.keys()) == evaluated
        assert row["tokens"] == row["step"] * 4 * 16
        assert (row["lr"], row["muon_lr"]) == (3e-4, 0.02)
        if row["step"] > 1:
            assert row["tokens_per_second"] == pytest.approx(4 * 16 / row["step_seconds"])
        if evaluated:  # one character is one token and one byte
            assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2))
    assert [row["elapsed_seconds"] for row in history] == sorted(row["elapsed_seconds"] for row in history)
    assert history[0]["loss"] == pytest.approx(math.log(finished.tokenizer.vocab_size), abs=0.2)
    assert history[-1]["loss"] < history[0]["loss"] - 1


def test_the_newest_checkpoints_and_the_best_are_kept(folder, monkeypatch, capsys):
    """Validation losses by script: the best is neither first nor last, and a later session still knows it."""
    values = iter([3.0, 2.0, 2.5, 2.25, 2.75, 2.5])  # at steps 7, 14, 21, 28, 30; and 34
    monkeypatch.setattr(train_lib.Evaluator, "__call__", lambda *_: (next(values), 1))
    workdir = folder / "scripted"
    stored = lambda: sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    train_lib.train(tiny_config(folder, sample_every=0), workdir)
    assert stored() == [14, 28, 30]
    run = train_lib.train(tiny_config(folder, sample_every=0, max_steps=34), workdir)
    assert stored() == [14, 30, 34]
    assert (run.best_step, run.best_val_loss, run.val_loss) == (14, 2.0, 2.5)
    assert run_lib.load_model(workdir)[3] == 14


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


def test_evaluation_is_exact_over_the_whole_split_and_over_a_prefix(finished, folder):
    split = run_lib.load_data(tiny_config(folder), say=print).val
    tokens = split.tokens[:1500]
    split = input_pipeline.Split(tokens, len(tokens))
    evaluate = train_lib.Evaluator(finished.model.config, make_mesh(1), batch_size=4)
    params = params_of(finished.model)
    loss, count = evaluate(params, split)
    assert count == 1499
    assert loss == pytest.approx(naive_loss(finished.model, tokens, 16), rel=1e-6)
    loss, count = evaluate(params, split, max_tokens=200)
    assert count == 192
    assert loss == pytest.approx(naive_loss(finished.model, tokens[:193], 16), rel=1e-6)


def test_eval_tokens_is_for_training_and_not_for_the_end(folder):
    run = train_lib.train(tiny_config(folder, eval_tokens=300, max_steps=8), folder / "prefix")
    whole = run_lib.load_data(tiny_config(folder), say=print).val.num_tokens - 1
    assert [(row["step"], row["val_tokens"]) for row in run.history if "val_loss" in row] == [(7, 288), (8, whole)]


def test_two_devices_train_as_one_and_eval_repeats_the_best_loss(folder, capsys):
    histories = {}
    for devices in ("1", "2"):
        workdir = folder / f"on {devices} devices"
        config = tiny_config(folder, cpu_devices=devices, max_steps=20)
        done = run_main(*arguments(config, workdir), XLA_FLAGS="")
        assert done.returncode == 0, done.stderr
        assert f"{devices} x cpu" in done.stdout
        histories[devices] = rows(workdir)
    for one, two in zip(histories["1"], histories["2"], strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5  # sums in another order, and Newton-Schulz amplifies rounding
    best = min((row["val_loss"], row["step"]) for row in histories["2"] if "val_loss" in row)
    assert main.main(["eval", f"--workdir={workdir}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == best[1] and result["split"] == "val"
    assert result["loss"] == pytest.approx(best[0], abs=1e-6)
    assert result["tokens"] == histories["2"][-1]["val_tokens"]


@pytest.mark.parametrize(
    "epochs, max_steps, accumulation, total",
    [(1, 0, 1, 6), (2, 0, 1, 11), (0, 9, 1, 9), (1, 9, 1, 6), (3, 9, 1, 9), (2, 0, 3, 4), (1, 0, 7, 1)],
)
def test_a_run_ends_at_the_first_of_epochs_and_max_steps(folder, epochs, max_steps, accumulation, total):
    split = input_pipeline.Split(np.arange(103), 103)  # 21 windows of 5: batches of 4 take 5.25 steps an epoch
    batches = input_pipeline.Batches(split, context_len=5, batch_size=4, seed=0)
    config = tiny_config(folder, epochs=epochs, max_steps=max_steps, accumulation_steps=accumulation)
    assert train_lib.total_steps(config, batches) == total


# --- Bad numbers ----------------------------------------------------------------------------------------------------


def bad_from(first: int, last: int) -> Callable:
    """Batches of which those from `first` to `last` hold token ids that no embedding has, which gives NaN."""

    class BadBatches(input_pipeline.Batches):
        def __call__(self, step: int) -> np.ndarray:
            batch = super().__call__(step)
            return np.full_like(batch, 10_000) if first <= step <= last else batch

    return BadBatches


def test_a_bad_step_changes_nothing_and_the_run_goes_on(folder, monkeypatch):
    monkeypatch.setattr(train_lib, "Batches", bad_from(4, 5))
    run = train_lib.train(tiny_config(folder, max_steps=8, max_bad_steps=3, eval_every=100), folder / "bad steps")
    assert [row["bad_steps"] for row in run.history] == [0, 0, 0, 0, 1, 2, 0, 0]
    assert [row["loss"] is None for row in run.history] == [row["bad_steps"] > 0 for row in run.history]
    assert {row["param_rms_muon"] for row in run.history[4:6]} == {run.history[3]["param_rms_muon"]}
    assert math.isfinite(run.val_loss)


def test_a_run_that_stays_bad_ends_and_keeps_its_last_good_checkpoint(folder, monkeypatch):
    config, workdir = tiny_config(folder, max_bad_steps=3, eval_every=100), folder / "diverged"
    monkeypatch.setattr(train_lib, "Batches", bad_from(12, 10**9))
    with pytest.raises(DivergedError, match=r"^config\.lr: .*3 steps in a row, up to step 15") as diverged:
        train_lib.train(config, workdir)
    assert diverged.value.status == 4 and "\n" not in str(diverged.value)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest() == 10
    for name, array in saved_state(workdir, config, len(set(make_text())), 10).items():
        assert np.isfinite(array).all(), name


# --- What must not happen -------------------------------------------------------------------------------------------


def test_a_prompt_that_the_vocabulary_lacks_is_refused_before_the_first_step(folder, tmp_path):
    config = tiny_config(folder, sample_prompt="½")
    with pytest.raises(UserError, match=r"^config\.sample_prompt: "):
        train_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wandb_is_not_even_imported_unless_asked_for(folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    train_lib.train(tiny_config(folder, max_steps=1), tmp_path / "run")
    assert "wandb" not in sys.modules
