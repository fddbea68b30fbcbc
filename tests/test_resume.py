"""A run that is cut goes on as if nothing had been, bit for bit; what may change on the way, and what may not."""

import math
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import (
    arguments,
    assert_same_state,
    finished_run,
    losses,
    make_text,
    rows,
    run_main,
    signal_before,
    tiny_config,
)

import input_pipeline
import main
import run_lib
import train_lib
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import ExpectedError, Interrupted, UserError
from training import evaluate
from training import step as step_lib


def assert_same_run(workdir: Path, reference: run_lib.Run, config) -> None:
    """Every logged loss, every sample, and every bit of the last checkpoint."""
    assert losses(workdir) == losses(reference.workdir)
    assert [row["step"] for row in rows(workdir)] == list(range(1, reference.step + 1))
    assert (workdir / "samples.txt").read_text() == (reference.workdir / "samples.txt").read_text()
    last = reference.step * config.accumulation_steps
    assert_same_state(workdir, reference, config, last)
    stored = lambda run: sorted(path.name for path in (run / "checkpoints").iterdir())
    assert stored(workdir) == stored(reference.workdir)
    with Checkpoints(workdir, read_only=True) as ours, Checkpoints(reference.workdir, read_only=True) as theirs:
        assert ours.best() == theirs.best()


# --- A cut changes nothing ------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, capsys):
    reference, config = finished_run(), tiny_config()
    command = arguments(config, tmp_path)
    killed = run_main(*command, cut=(signal.SIGKILL, 13))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert rows(tmp_path)[-1]["step"] == 13
    capsys.readouterr()
    assert main.main(command) == 0
    # Checkpoints are written in the background: that of step 10 may not have been complete.
    assert re.search("resuming at step (7|10)\n", capsys.readouterr().out)
    assert_same_run(tmp_path, reference, config)


def test_a_run_stopped_in_mid_accumulation_and_killed_later_is_the_same(tmp_path):
    config = tiny_config(accumulation_steps=3, dropout=0.2, max_steps=11, num_blocks=1)
    reference = train_lib.train(config, tmp_path / "reference")
    workdir = tmp_path / "cut"
    command = arguments(config, workdir)
    stopped = run_main(*command, cut=(signal.SIGTERM, 22))
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "saved step 7; the same command goes on from here" in stopped.stdout
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest() == 22  # the second micro-batch of step 8 is next
    killed = run_main(*command, cut=(signal.SIGKILL, 28))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main.main(command) == 0
    assert_same_run(workdir, reference, config)


def test_a_signal_at_any_step_saves_that_step(tmp_path, monkeypatch, capsys):
    """Before the first step, twice at one step, right after checkpoints, between two."""
    reference, config = finished_run(), tiny_config()
    for signum, step in (("SIGTERM", 0), ("SIGINT", 0), ("SIGINT", 10), ("SIGTERM", 12)):
        number = signal.Signals[signum]
        with monkeypatch.context() as patch:
            patch.setattr(train_lib, "prefetch", signal_before(number, step))
            assert main.main(arguments(config, tmp_path)) == 128 + number
        output = capsys.readouterr()
        assert f"saved step {step}; the same command goes on from here" in output.out
        assert "error" not in output.err
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert checkpoints.latest() == step
    assert main.main(arguments(config, tmp_path)) == 0
    assert_same_run(tmp_path, reference, config)


@pytest.mark.parametrize("evaluation, step", [(2, 14), (5, 30)])
def test_a_signal_in_an_evaluation(tmp_path, monkeypatch, evaluation, step):
    """It breaks the evaluation off; the next session makes up for it. Both of these give a new best checkpoint."""
    reference, config = finished_run(), tiny_config()
    begun = []

    def cut_short(*args):
        begun.append(args)
        for number, batch in enumerate(input_pipeline.eval_batches(*args)):
            if (len(begun), number) == (evaluation, 1):
                signal.raise_signal(signal.SIGTERM)
            assert len(begun) < evaluation or number < 2, "the evaluation went on after the signal"
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "eval_batches", cut_short)
        with pytest.raises(Interrupted):
            train_lib.train(config, tmp_path)
    assert rows(tmp_path)[-1]["step"] == step - 1
    run = train_lib.train(config, tmp_path)
    assert_same_run(tmp_path, reference, config)
    assert (run.best_step, run.best_val_loss) == (reference.best_step, reference.best_val_loss)


def test_a_finished_run_has_nothing_left_to_do(capsys, monkeypatch):
    reference, calls = finished_run(), []
    for module, name in ((run_lib, "require_same_run"), (train_lib, "make_step"), (step_lib, "make_optimizer")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _r=real, _n=name, **k: calls.append(_n) or _r(*a, **k))
    before = (reference.workdir / "metrics.jsonl").read_bytes()
    run = train_lib.train(tiny_config(), reference.workdir)
    assert "already at step 30" in capsys.readouterr().out
    assert (reference.workdir / "metrics.jsonl").read_bytes() == before
    assert (run.step, run.val_loss, run.history) == (30, reference.val_loss, reference.history)
    assert calls == ["require_same_run", "make_step", "make_optimizer"]  # each is done once


# --- What may change, and what may not ------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the finished run's directory, to be changed."""
    return Path(shutil.copytree(finished_run().workdir, tmp_path / "copy"))


def test_a_finished_run_can_be_made_longer(copy, tmp_path):
    """With constant rates it is the longer run that it would have been."""
    config = tiny_config(max_steps=34)
    longer = train_lib.train(config, tmp_path / "longer")
    run = train_lib.train(config, copy)
    assert run.step == 34
    assert [row["loss"] for row in run.history] == [row["loss"] for row in longer.history]


def test_a_run_cannot_be_made_shorter():
    before = losses(finished_run().workdir)
    with pytest.raises(UserError, match=r"^config\.max_steps: .*at step 30, past 29"):
        train_lib.train(tiny_config(max_steps=29), finished_run().workdir)
    assert losses(finished_run().workdir) == before


def content(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder but the lock."""
    files = [path for path in folder.rglob("*") if path.name != ".lock" and path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(copy):
    for number in (1, 2):
        before = content(copy)
        run = train_lib.train(tiny_config(max_steps=1), copy, fresh=True)
        assert [row["step"] for row in run.history] == [1]
        assert content(copy.with_name(f"copy.old-{number}")) == before


@pytest.mark.parametrize(
    "key, new", [("seed", 5), ("num_blocks", 3), ("batch_size", 8), ("betas", (0.8, 0.9)), ("val_fraction", 0.4)]
)
def test_a_key_that_makes_another_run_is_refused(key, new):
    workdir = finished_run().workdir
    with pytest.raises(UserError) as refused:
        train_lib.train(tiny_config(**{key: new}), workdir)
    message = str(refused.value)
    assert message.startswith(f"config.{key}: ") and "\n" not in message
    assert f" has {tiny_config()[key]!r}, this config {new!r}; " in message
    for way_out in ("--workdir", "--fresh", f"--config.init_from={workdir}"):
        assert way_out in message


def test_changed_data_is_refused(copy):
    before = (copy / "metrics.jsonl").read_bytes()
    text = Path(tiny_config().dataset)
    try:
        text.write_text(make_text() + ".")
        with pytest.raises(UserError, match=r"^config\.dataset: the text has changed .*--fresh"):
            train_lib.train(tiny_config(), copy)
    finally:
        text.write_text(make_text())
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_text_that_was_moved_is_the_same_text(copy, tmp_path):
    before = content(copy / "checkpoints")
    moved = tmp_path / "elsewhere.txt"
    moved.write_text(make_text())
    assert train_lib.train(tiny_config(dataset=str(moved)), copy).step == 30
    assert content(copy / "checkpoints") == before and run_lib.read_config(copy).dataset == str(moved)
    moved.write_text(make_text(seed=1))
    with pytest.raises(UserError, match=r"^config\.dataset: the text has changed .*--fresh"):
        train_lib.train(tiny_config(dataset=str(moved)), copy)


# --- A new run from old weights -------------------------------------------------------------------------------------


def test_init_from_starts_a_new_run_from_those_weights(tmp_path):
    source = finished_run()
    run = train_lib.train(tiny_config(init_from=str(source.workdir), max_steps=1, seed=3), tmp_path)
    assert run.step == 1
    # Another batch, so near is what can be asked; a new model starts at ln V, a nat above.
    assert abs(run.history[0]["loss"] - source.best_val_loss) < 0.2
    assert source.best_val_loss < math.log(run.tokenizer.vocab_size) - 1


@pytest.mark.parametrize("changes", [{"embedding_dim": 48}, {"mlp": "swiglu"}, {"tokenizer": "byte"}])
def test_init_from_a_model_of_another_kind_is_refused(tmp_path, changes):
    with pytest.raises(UserError) as refused:
        train_lib.train(tiny_config(init_from=str(finished_run().workdir), **changes), tmp_path)
    assert str(refused.value).startswith(f"config.{next(iter(changes))}: ") and "\n" not in str(refused.value)


def test_init_from_a_model_with_other_characters_is_refused(tmp_path):
    (tmp_path / "greek.txt").write_text(make_text() + "Ω")
    config = tiny_config(init_from=str(finished_run().workdir), dataset=str(tmp_path / "greek.txt"))
    with pytest.raises(UserError, match=r"^config\.dataset: .* 'Ω' at \d+; set config\.unknown_characters to [^\n]*$"):
        train_lib.train(config, tmp_path / "tuned")
    config.update({"unknown_characters": "drop", "max_steps": 1, "sample_tokens": 1})
    assert train_lib.train(config, tmp_path / "tuned").tokenizer.vocab_size == finished_run().tokenizer.vocab_size


def test_init_from_nothing_is_refused(tmp_path):
    with pytest.raises(ExpectedError, match=r"nowhere[^\n]*$"):
        train_lib.train(tiny_config(init_from=str(tmp_path / "nowhere")), tmp_path / "tuned")
