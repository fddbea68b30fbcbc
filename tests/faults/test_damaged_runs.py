"""Runs whose checkpoints were damaged, and runs that go on with other devices or another batch."""

import json
import random
import re
import shutil
from pathlib import Path

import damage
import numpy as np
import pytest
from damage import snapshot
from helpers import (
    ROOT,
    arguments,
    assert_one_line,
    assert_same_state,
    finished_run,
    losses,
    rows,
    run_main,
    tiny_config,
)
from xla_flags import SOONER

import main
import run_lib
import train_lib
from corpus.dataset import Split
from input_pipeline import Batches
from runtime.checkpoints.integrity import FILE_LIST, seal
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import UserError


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the finished run's directory, to be damaged."""
    return Path(shutil.copytree(finished_run().workdir, tmp_path / "copy"))


def stored(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def hurt(workdir: Path, *steps: int) -> None:
    """The second halves of all files with parameters become zeros."""
    for step in steps:
        for file in (workdir / "checkpoints" / str(step) / "params").rglob("d/*"):
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))


# --- Falling back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["an array", "meta/metadata"])
def test_a_run_falls_back_and_ends_as_if_nothing_had_been(copy, capsys, file):
    reference, config = finished_run(), tiny_config()
    if file == "an array":
        hurt(copy, 30)
    else:
        (copy / "checkpoints" / "30" / file).write_bytes(b"")
    before = set(stored(copy))
    capsys.readouterr()
    assert main.main(arguments(config, copy)) == 0
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "30: damaged: " in output.err, output.err
    assert "set aside as 30.damaged-1, going on from 28" in output.err and "resuming at step 28\n" in output.out
    assert losses(copy) == losses(reference.workdir)
    assert (copy / "samples.txt").read_text() == (reference.workdir / "samples.txt").read_text()
    assert_same_state(copy, reference, config, 30)
    assert set(stored(copy)) == before | {"30.damaged-1"}
    with Checkpoints(copy, read_only=True) as ours, Checkpoints(reference.workdir, read_only=True) as theirs:
        assert ours.best() == theirs.best()


def test_all_damaged_is_never_a_fresh_start(copy, capsys):
    hurt(copy, 28, 30)
    before = snapshot(copy)
    for _ in range(2):
        capsys.readouterr()
        assert main.main(arguments(tiny_config(), copy)) == 3
        assert_one_line(capsys.readouterr().err, str(copy / "checkpoints"), "28: params", "30: params", "--fresh")
    after = snapshot(copy)
    del before[".lock"], after[".lock"]
    assert before == after
    assert main.main([*arguments(tiny_config(max_steps=1), copy), "--fresh"]) == 0


@pytest.mark.parametrize("gone", ["the checkpoints", "their directory", "what was moved first"])
def test_steps_without_their_checkpoints_are_no_fresh_start(copy, capsys, monkeypatch, gone):
    """A disk that is not mounted, a directory that was moved, or a kill while the run was being put aside."""
    if gone == "what was moved first":
        rename, moved = Path.rename, []

        def killed(path, target):
            moved.append(path.name)
            if len(moved) == 3:
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", killed)
        assert main.main([*arguments(tiny_config(), copy), "--fresh"]) == 130
        monkeypatch.undo()
        assert moved[0] == "checkpoints"
    else:
        shutil.rmtree(copy / "checkpoints")
        if gone == "the checkpoints":
            (copy / "checkpoints").mkdir()
    logs = {name: (copy / name).read_bytes() for name in run_lib.GROWING_FILES if (copy / name).exists()}
    for _ in range(2):
        capsys.readouterr()
        assert main.main(arguments(tiny_config(), copy)) == 3
        assert_one_line(capsys.readouterr().err, str(copy / "checkpoints"), "30 steps are logged", "--fresh")
        assert {name: (copy / name).read_bytes() for name in logs} == logs
    assert main.main([*arguments(tiny_config(max_steps=1), copy), "--fresh"]) == 0
    assert (copy.with_name(f"copy.old-{2 if gone == 'what was moved first' else 1}") / "metrics.jsonl").exists()


def test_damaged_rows_of_the_log_do_not_spoil_the_end_of_a_run(copy, capsys):
    """It is over and saved: what is drawn at the end passes over them."""
    log = copy / "metrics.jsonl"
    log.write_text('[1]\n{"step": ' + "9" * 400 + '}\n{"step": "x"}\n' + log.read_text())
    capsys.readouterr()
    assert main.main(arguments(tiny_config(), copy)) == 0
    assert capsys.readouterr().err == f"warning: {log}: 2 damaged rows left out\n"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        assert main.main(arguments(tiny_config(), tmp_path)) == 130
    assert rows(tmp_path)[-1]["step"] == 5
    assert main.main(arguments(tiny_config(), tmp_path)) == 0
    assert losses(tmp_path) == losses(finished_run().workdir)


def test_a_refused_run_leaves_nothing(tmp_path, capsys):
    for changes in ({"dataset": "nowhere.txt"}, {"sample_prompt": "☃"}, {"init_from": str(tmp_path / "none")}):
        assert main.main(arguments(tiny_config(**changes), tmp_path / "runs" / "a")) == 2
        assert_one_line(capsys.readouterr().err, "error: ")
        assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_from_elsewhere_that_leads_out_of_its_directory_is_refused(copy, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to(tmp_path / "mine")
    before = snapshot(tmp_path)
    assert main.main([*arguments(tiny_config(), copy), "--fresh"]) == 2
    assert_one_line(capsys.readouterr().err, f"error: {copy / 'metrics.jsonl'}: a link that leads out")
    assert snapshot(tmp_path) == before


def test_a_config_that_differs_is_no_damage(copy, capsys):
    """The newest is damaged and the config another: nothing is renamed, and the config is what is told of."""
    hurt(copy, 30)
    before = snapshot(copy / "checkpoints")
    for changes in ({"embedding_dim": 48}, {"seed": 3}, {"batch_size": 8}):
        assert main.main(arguments(tiny_config(**changes), copy)) == 2
        assert_one_line(capsys.readouterr().err, f"config.{next(iter(changes))}: the run in {copy} has ")
    assert snapshot(copy / "checkpoints") == before


def test_sampling_and_evaluating_pass_over_what_is_damaged_and_change_nothing(copy, capsys):
    hurt(copy, finished_run().best_step)
    before = snapshot(copy)
    capsys.readouterr()
    assert main.main(["eval", f"--workdir={copy}"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["step"] != finished_run().best_step
    assert output.err.count("\n") == 1 and f"{finished_run().best_step}: damaged: params" in output.err
    assert main.main(["sample", f"--workdir={copy}", f"--step={finished_run().best_step}"]) == 3
    assert_one_line(capsys.readouterr().err, f"{finished_run().best_step}: damaged: params", "--step")
    assert snapshot(copy) == before
    hurt(copy, *({28, 30} - {finished_run().best_step}))
    for command in ("sample", "eval"):
        assert main.main([command, f"--workdir={copy}"]) == 3
        assert_one_line(capsys.readouterr().err, "every checkpoint is damaged")
    with pytest.raises(Exception, match="every checkpoint is damaged"):
        train_lib.train(tiny_config(init_from=str(copy)), copy.with_name("tuned"))


def test_papers_that_changed_are_named(copy, capsys):
    """The arrays would fit: what the model computes with them would not."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"config": config["config"] | {"norm_eps": 0.1}}))
    assert main.main(["sample", f"--workdir={copy}"]) == 2
    assert_one_line(capsys.readouterr().err, f"{copy / 'config.json'}: norm_eps is 0.1, ", "1e-05")
    shutil.copy(finished_run().workdir / "config.json", copy)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"A"', '"Z"'))
    for argv in (["sample", f"--workdir={copy}"], ["eval", f"--workdir={copy}"]):
        assert main.main(argv) in (2, 3)
        assert_one_line(capsys.readouterr().err, "")


@pytest.mark.parametrize("odd", [{"data_sha256": {"a": 1}}, {"arithmetic": [7]}, {"sizes": 3}], ids=str)
def test_a_checkpoint_that_says_something_odd_is_damaged(copy, capsys, odd):
    for step in (28, 30):
        path = copy / "checkpoints" / str(step) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta["sha256"]
        path.write_text(json.dumps(seal(meta | odd)))
        (copy / "checkpoints" / str(step) / FILE_LIST).unlink()
    for argv in (["eval", f"--workdir={copy}"], arguments(tiny_config(), copy)):
        assert main.main(argv) == 3
        assert f"meta has an odd {min(odd)}" in capsys.readouterr().err


def test_a_checkpoint_that_says_too_little_is_refused_in_one_line(copy, capsys):
    """With a seal that fits: somebody has made it so."""
    for step in (28, 30):
        path = copy / "checkpoints" / str(step) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta["sha256"], meta["sizes"]
        path.write_text(json.dumps(seal(meta)))
        (copy / "checkpoints" / str(step) / FILE_LIST).unlink()
    before = snapshot(copy / "checkpoints")
    assert main.main(arguments(tiny_config(), copy)) == 3
    assert_one_line(capsys.readouterr().err, f"error: {copy}: a checkpoint says no sizes; ")
    for step in (28, 30):
        path = copy / "checkpoints" / str(step) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta["sha256"], meta["config"]
        path.write_text(json.dumps(seal(meta)))
    for command in ("sample", "eval"):
        assert main.main([command, f"--workdir={copy}"]) == 3
        assert_one_line(capsys.readouterr().err, f"error: {copy}: a checkpoint's config: ")
    assert snapshot(copy / "checkpoints").keys() == before.keys()


@pytest.mark.parametrize("number", [100_000, 2**31 - 1])
def test_blocks_that_no_checkpoint_has_are_refused_at_once(copy, tmp_path, capsys, monkeypatch, number):
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["num_blocks"] = number
    (copy / "config.json").write_text(json.dumps(saved))
    monkeypatch.setattr(run_lib, "shapes_of", None)  # would be traced block by block
    for command in (["sample"], ["eval"], ["report"], ["sample", "--step=30"]):
        assert main.main([*command, f"--workdir={copy}"]) == 2
        assert_one_line(capsys.readouterr().err, f"{copy / 'config.json'}: num_blocks is {number}, and the checkpoint")
    with pytest.raises(UserError, match=f"num_blocks is {number}"):
        train_lib.train(tiny_config(init_from=str(copy)), tmp_path / "tuned")


# --- verify ---------------------------------------------------------------------------------------------------------


def flips_found(workdir: Path, number: int, seed: int) -> int:
    """How many of so many flipped bits, one at a time, an examination sees."""
    place, found = workdir / "checkpoints" / "30", 0
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.examine(30).wrong == []
        for file, bit in damage.flip_bits(place, number, random.Random(seed)):
            damage.flip(file, bit)
            found += bool(checkpoints.examine(30).wrong)
            damage.flip(file, bit)
        assert checkpoints.examine(30).wrong == []
    return found


def test_verify_finds_flipped_bits(copy):
    assert flips_found(copy, 8, seed=0) == 8


@pytest.mark.slow
def test_verify_finds_each_of_a_hundred_flipped_bits(copy):
    assert flips_found(copy, 100, seed=1) == 100


def test_verify_prints_a_table(copy, capsys):
    capsys.readouterr()
    assert main.main(["verify", f"--workdir={copy}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "28", "30"]
    assert all(line.endswith("  ok") for line in lines[1:]) and f"{finished_run().best_val_loss:.4f}" in "".join(lines)
    before = snapshot(copy)
    (copy / "checkpoints" / "28" / FILE_LIST).unlink()
    file, bit = damage.flip_bits(copy / "checkpoints" / "30", 1, random.Random(5))[0]
    damage.flip(file, bit)
    assert main.main(["verify", f"--workdir={copy}"]) == 3
    output = capsys.readouterr()
    assert "ok; no list of files" in output.out.splitlines()[1] and "damaged: " in output.out.splitlines()[2]
    assert_one_line(output.err, "1 of 2 checkpoints damaged (30)")
    assert before.keys() - snapshot(copy).keys() == {f"checkpoints/28/{FILE_LIST}"}
    for wrong, status in ((copy / "nowhere", 2), (copy / "checkpoints", 3)):
        assert main.main(["verify", f"--workdir={wrong}"]) == status
        assert_one_line(capsys.readouterr().err, str(wrong))


# --- Another batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_no_window_is_read_twice_or_skipped_when_the_batch_changes(order):
    """Two epochs in batches of 4, then 6, then 3, by which windows they hold."""
    split = Split(np.arange(5 * 12 + 1), 61)  # twelve windows of five tokens
    seen, read = [], 0
    for batch_size, steps, at in ((4, 2, 0), (6, 1, 1), (3, 2, 7), (2, 2, 2)):
        batches = Batches(split, 5, batch_size, 0, order, offset=read - at * batch_size)
        assert batches.position(at) == read
        seen += [int(row[0]) // 5 for step in range(at, at + steps) for row in batches(step)]
        read = batches.position(at + steps)
        assert (
            batches.steps(2) * batch_size + batches.offset >= 24 > (batches.steps(2) - 1) * batch_size + batches.offset
        )
    assert read == len(seen) == 24
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))


@pytest.mark.once
def test_another_cut_of_the_same_steps_goes_on_as_the_same_run(tmp_path, capsys):
    """Eight sequences a step every time: only the order of sums differs, so a window that moved would show."""
    cut = lambda steps, *pair: tiny_config(
        **{"use_muon": False, "sample_every": 0},
        **{"max_steps": steps, "batch_size": pair[0], "accumulation_steps": pair[1]},
    )
    reference = train_lib.train(cut(11, 8, 1), tmp_path / "reference")
    train_lib.train(cut(4, 4, 2), tmp_path / "run")
    for config in (cut(7, 8, 1), cut(11, 2, 4)):
        with pytest.raises(UserError, match=r"^config\.(accumulation_steps|batch_size): .* use --rebatch "):
            train_lib.train(config, tmp_path / "run")
        run = train_lib.train(config, tmp_path / "run", rebatch=True)
    ours, theirs = (
        [(row["step"], row["tokens"]) for row in rows(workdir)] for workdir in (run.workdir, reference.workdir)
    )
    assert ours == theirs and len(ours) == 11
    ours, theirs = ([row["loss"] for row in r.history] for r in (run, reference))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert run.val_loss == pytest.approx(reference.val_loss, abs=1e-4)
    again = train_lib.train(config, tmp_path / "run")  # what was rebatched needs to be told but once
    assert again.step == 11 and "already at step 11" in capsys.readouterr().out


def test_a_step_under_way_is_finished_before_the_accumulation_changes(tmp_path):
    config = tiny_config(accumulation_steps=3)
    meta = {**run_lib.identity(config, finished_run().tokenizer), "step": 7}
    run_lib.require_same_run(meta, tiny_config(accumulation_steps=3, batch_size=8), tmp_path, rebatch=True)
    with pytest.raises(UserError, match=r"^config\.accumulation_steps: .*after 1 of the 3 .*max_steps=3$"):
        run_lib.require_same_run(meta, tiny_config(accumulation_steps=2), tmp_path, rebatch=True)
    run_lib.require_same_run(meta | {"step": 9}, tiny_config(accumulation_steps=2), tmp_path, rebatch=True)


def test_a_schedule_that_was_laid_out_in_steps_keeps_their_size(tmp_path):
    config = tiny_config(schedule="cosine", epochs=2, max_steps=0)
    meta = {**run_lib.identity(config, finished_run().tokenizer), "step": 8}
    halves = tiny_config(schedule="cosine", epochs=2, max_steps=0, batch_size=2, accumulation_steps=2)
    run_lib.require_same_run(meta, halves, tmp_path, rebatch=True)
    with pytest.raises(UserError, match=r"^config\.batch_size: schedule 'cosine' .* keep batch_size"):
        doubled = tiny_config(schedule="cosine", epochs=2, max_steps=0, batch_size=8)
        run_lib.require_same_run(meta, doubled, tmp_path, rebatch=True)


# --- Other devices --------------------------------------------------------------------------------------------------


def test_eight_devices_go_on_from_one_and_one_from_eight(tmp_path):
    """Restored bits are equal, or the fingerprints, made on one device or eight, would say damaged."""
    eight = {"XLA_FLAGS": f"{SOONER} --xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"}
    config = lambda steps: tiny_config(batch_size=8, max_steps=steps, sample_every=0)
    train_lib.train(config(5), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "mixed")
    train_lib.train(config(15), tmp_path / "one")
    done = run_main(*arguments(config(10), tmp_path / "mixed"), **eight)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "8 x " in done.stdout and re.search("resuming at step 5\n", done.stdout)
    train_lib.train(config(15), tmp_path / "mixed")
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name)] for name in ("mixed", "one"))
    assert len(ours) == 15
    np.testing.assert_allclose(ours[:10], theirs[:10], rtol=1e-5)
    np.testing.assert_allclose(
        ours[10:], theirs[10:], rtol=1e-4
    )  # ten steps after the first that was rounded otherwise


# --- A checkpoint of an earlier day ---------------------------------------------------------------------------------

GOLDEN = ROOT / "tests" / "data" / "golden_run.zip"


def test_the_golden_checkpoint_still_resumes(tmp_path, monkeypatch):
    """Written by tests/make_golden.py. Where this fails, users' runs can no longer go on: raise FORMAT, or mend it."""
    assert GOLDEN.stat().st_size < 100_000
    shutil.unpack_archive(GOLDEN, tmp_path)
    monkeypatch.chdir(tmp_path)
    expected = json.loads((tmp_path / "expected.json").read_text())
    config = tiny_config(**{"newton_schulz_steps": 5, "dtype": "auto"} | expected["config"])
    workdir = tmp_path / "run"
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest() == expected["step"] and checkpoints.examine(expected["step"]).wrong == []
    train_lib.train(config, workdir)
    found = {row["step"]: row["loss"] for row in rows(workdir)}
    np.testing.assert_allclose(
        [found[int(step)] for step in expected["losses"]], [*expected["losses"].values()], rtol=2e-5
    )
