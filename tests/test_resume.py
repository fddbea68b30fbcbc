"""A run that is cut goes on as if nothing had been, bit for bit; what may change on the way, and what may not."""

import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
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

import config_lib
import input_pipeline
import main
import run_lib
import train_lib
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import ExpectedError, Interrupted, UserError
from training import evaluate
from training import step as step_lib
from training.evaluate import Evaluator
from transformer.sharding import make_mesh


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
    config = tiny_config(accumulation_steps=3, dropout=0.2, max_steps=11)
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


@pytest.mark.once
@pytest.mark.parametrize(
    "changes, more, line",
    [
        ({"schedule": "constant"}, {}, "1 of their peak in the last step, are 1 in the next and 1 at the end"),
        ({"schedule": "constant_linear"}, {}, "0.1 of their peak in the last step, are 1 in the next and 0.0333 at"),
        ({"schedule": "constant", "max_steps": 0, "epochs": 1}, {"max_steps": 0, "batch_size": 6}, "1 in the next"),
    ],
)
def test_a_run_that_is_made_longer_does_not_warm_up_again(changes, more, line, tmp_path, capsys):
    """Ten of its first twenty steps warm up, however many follow; the line that says so tells what the rates do."""
    base = tiny_config(
        **{"use_muon": False, "lr_warmup_ratio": 0.5, "sample_every": 0, "eval_every": 100},
        **{"max_steps": 20, "save_every": 100},
    )
    base.update(changes)
    text = tmp_path / "short.txt"
    text.write_text(make_text()[: 2 * (20 * 4 * 16 + 1)])  # an epoch of twenty steps of four sequences
    base.dataset = str(text)
    longer = base.copy_and_resolve_references()
    longer.update({"max_steps": 60, **more})
    longer.epochs *= 4
    train_lib.train(base, tmp_path / "run")
    capsys.readouterr()
    train_lib.train(longer, tmp_path / "run", rebatch=True)
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("going on to step ")]
    assert len(said) == 1 and " instead of 20: " in said[0] and line in said[0]
    rates = [row["lr"] / base.lr for row in rows(tmp_path / "run")]
    assert rates[:11] == pytest.approx([n / 11 for n in range(1, 12)]) and rates[20:30] == [1] * 10


def test_the_warm_up_of_a_run_of_an_older_build_is_that_of_its_config(tmp_path):
    meta = {"config": config_lib.to_dict(tiny_config(lr_warmup_ratio=0.1, max_steps=20)), "position": 40, "step": 10}
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = SimpleNamespace(config=tiny_config(lr_warmup_ratio=0.1, max_steps=60), mesh=mesh, workdir=tmp_path)
    trainer.data = run_lib.load_data(trainer.config, print)
    trainer.model_config = finished_run().model.config
    train_lib.Trainer._build(trainer, jax.random.key(0), 10, meta)
    assert (trainer.total, trainer.total_before, trainer.first_total) == (60, 20, 20)


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


def test_another_programs_files_are_not_overwritten(tmp_path):
    held = {"config.json": '{"model_type": "gpt2"}', "samples.txt": "mine", "notes.md": "mine too"}
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"holds samples\.txt and no checkpoint, so it is no run .* --fresh"):
        train_lib.train(tiny_config(max_steps=1), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch=1.ckpt").write_text("another trainer's")
    with pytest.raises(UserError, match=r"holds samples\.txt and no checkpoint"):
        train_lib.train(tiny_config(max_steps=1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*held, "checkpoints"}  # nothing was made
    assert {name: (tmp_path / name).read_text() for name in held} == held


def test_a_run_does_not_go_on_from_other_initial_weights(tmp_path):
    began = tiny_config(init_from=str(tmp_path))
    check = lambda old, **changes: config_lib.check_resume(old, tiny_config(**changes), Path("run"))
    with pytest.raises(UserError, match=r"^config\.init_from: the run in run began with '.*', this config has 'other'"):
        check(began, init_from="other")
    with pytest.raises(UserError, match=r"^config\.init_weights: the run in run began with 'auto', .* has 'trained'"):
        check(began, init_from=str(tmp_path), init_weights="trained")
    check(began, init_from=f"{tmp_path}/.")
    check(began)
    check(tiny_config(init_from="moved away"), init_from=str(tmp_path))


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


# --- Other batches on the way -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_never_replaced_by_one_with_other_batches(tmp_path, monkeypatch, capsys):
    """From 4 micro-batches a step to 1 and back to 2: the first session's best lives through all."""
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: (next(values), 1))
    config = lambda k, steps: tiny_config(
        **{"accumulation_steps": k, "batch_size": 8 // k, "max_steps": steps, "keep": 1},
        **{"eval_every": 3, "save_every": 2, "sample_every": 0, "use_muon": False},
    )
    numbers = lambda: sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    train_lib.train(config(4, 3), tmp_path)
    assert numbers() == [12]
    train_lib.train(config(1, 14), tmp_path, rebatch=True)  # steps 4 to 14, at which 12 would have come again
    assert numbers() == [12, 23]
    run = train_lib.train(config(2, 16), tmp_path, rebatch=True)
    assert numbers() == [12, 27] and run.best_step == 3
    capsys.readouterr()
    monkeypatch.undo()
    for flags, step in (([], 3), (["--step=27"], 16)):
        assert main.main(["eval", f"--workdir={tmp_path}", *flags]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == step


def test_a_run_whose_numbers_fell_under_an_older_build_goes_on_above_them(tmp_path, monkeypatch):
    """There a checkpoint's number was its micro-step, which a change of the accumulation made smaller."""
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: (next(values), 1))
    config = lambda k, steps: tiny_config(
        **{"accumulation_steps": k, "batch_size": 8 // k, "max_steps": steps, "keep": 1},
        **{"eval_every": 100, "save_every": 100, "sample_every": 0, "use_muon": False},
    )

    class Older(Checkpoints):
        def save(self, step, params, rest, meta, *more):
            meta = dict(meta)
            super().save(meta.pop("micro_step"), params, rest, meta, *more)

    numbers = lambda: sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "Checkpoints", Older)
        train_lib.train(config(4, 3), tmp_path)
        train_lib.train(config(1, 6), tmp_path, rebatch=True)
    assert numbers() == [6, 12]
    run = train_lib.train(config(1, 12), tmp_path)
    assert numbers() == [12, 18] and (run.step, run.best_step) == (12, 3)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
