"""Whatever happens to the files of a checkpoint: it is restored exactly, or passed over for the one before it."""

import json
import os
import pickle
import random
import warnings
from collections import Counter
from pathlib import Path

import damage
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import KINDS, PLACE, bits, copy_of, files_of, small_run, snapshot, trees

from runtime import processes
from runtime.checkpoints.integrity import BOOKKEEPING, FILE_LIST, seal
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import NoCheckpointError, StorageError, UserError

PAPERS = {*BOOKKEEPING, FILE_LIST, "metadata", "_METADATA", "_sharding", "process_0", "manifest.ocdbt"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run with two checkpoints. Nobody changes its directory."""
    return small_run(tmp_path_factory.mktemp("sound"))


def restore(workdir: Path, wanted=None, keep: int = 2) -> tuple[int, list, list[str]]:
    """Which step is restored, its bits, and the warnings."""
    warnings: list[str] = []
    with Checkpoints(workdir, keep) as checkpoints:
        step, _, *found = checkpoints.restore_newest(lambda step, meta: wanted or trees(0), PLACE, warnings.append)
    return step, bits(found), warnings


def stored(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def outcome(workdir: Path, file: Path, kind: str, rng: random.Random) -> str:
    """Damage one file of the newest checkpoint, and see what `verify` and a resume make of it."""
    changed = damage.damage(workdir / "checkpoints" / "10" / file, kind, rng)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        before, newest = (checkpoints.examine(step) for step in (5, 10))
    assert not before.wrong
    seen = changed and file.name not in BOOKKEEPING[:1] and str(file) not in BOOKKEEPING
    if file.name == FILE_LIST and kind == "delete":
        assert not newest.wrong and not newest.listed
    else:
        assert bool(newest.wrong) == seen, (file, kind, newest)
    step, found, warnings = restore(workdir)
    assert found == bits(trees(step))
    if step == 10:
        assert warnings == [] and stored(workdir) == ["10", "5"]
        return "restored exactly"
    assert len(warnings) == 1 and "set aside as 10.damaged-1, going on from 5" in warnings[0]
    assert stored(workdir) == ["10.damaged-1", "5"]
    with Checkpoints(workdir, keep=2) as checkpoints:  # the same number can be used again
        checkpoints.save(10, *trees(10), {}, None)
    assert stored(workdir) == ["10", "10.damaged-1", "5"]
    return "fell back exactly"


def matrix(sound: Path) -> list[tuple[Path, str]]:
    newest = sound / "checkpoints" / "10"
    return [(file.relative_to(newest), kind) for file in files_of(newest) for kind in KINDS]


def test_some_of_all_files_damaged_in_some_of_all_ways(sound, tmp_path):
    rng = random.Random(0)
    cases = matrix(sound)
    arrays = [case for case in cases if "/d/" in str(case[0])]
    chosen = [*rng.sample(arrays, 8), *rng.sample(cases, 12)]
    found = Counter(outcome(copy_of(sound, tmp_path / "run"), *case, rng) for case in chosen)
    assert found["fell back exactly"] >= 6 and found.total() == 20, found


def test_a_flipped_bit_in_each_file_that_holds_no_array(sound, tmp_path):
    """Of Orbax's papers, ours, and the list of files."""
    newest, rng = sound / "checkpoints" / "10", random.Random(1)
    papers = [file.relative_to(newest) for file in files_of(newest) if file.parent.name != "d"]
    found = {str(file): outcome(copy_of(sound, tmp_path / "run"), file, "flip", rng) for file in papers}
    assert {file.name for file in papers} == PAPERS and found["meta/metadata"] == "fell back exactly", found


@pytest.mark.slow
def test_each_file_damaged_in_each_way(sound, tmp_path):
    found = Counter(
        outcome(copy_of(sound, tmp_path / "run"), *case, random.Random(f"{seed} {case}"))
        for seed in range(3)
        for case in matrix(sound)
    )
    print(f"\n{found.total()} damaged checkpoints: {dict(found)}")
    assert found["fell back exactly"] > 100 and found.total() == 3 * len(matrix(sound))


def test_damage_of_the_meta_item(sound, tmp_path):
    """By its content, by its size, and from another step."""
    meta = json.loads((sound / "checkpoints" / "10" / "meta" / "metadata").read_text())
    values = {key: value for key, value in meta.items() if key != "sha256"}
    elsewhere = json.loads((sound / "checkpoints" / "5" / "meta" / "metadata").read_text())
    for content, reason in [
        (json.dumps(meta | {"position": 11}), "does not fit its seal"),
        (json.dumps(values), "carries no seal"),
        (json.dumps(elsewhere), "is that of step 5"),
        ("[" * 10**5, "is nested too deeply"),
        ("[" * 90 + "]" * 90, "is nested too deeply"),
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"step": ' + "1" * 5000 + "}", "holds a number of 5,000 digits"),
        (json.dumps(seal(values | {"position": "7"})), "no position"),
        (json.dumps(seal(values | {"arrays": {"params": {"w": [["x"], 3, 4]}, "rest": {}}})), "else than arrays"),
        (json.dumps(seal(values | {"arrays": {"params": {}, "rest": {}, "more": 3}})), "no table of the arrays"),
    ]:
        workdir = copy_of(sound, tmp_path / "run")
        (workdir / "checkpoints" / "10" / "meta" / "metadata").write_text(content)
        step, found, warnings = restore(workdir)
        assert (step, found) == (5, bits(trees(5))) and len(warnings) == 1 and reason in warnings[0], (warnings, reason)


def test_a_giant_meta_item_is_not_read(sound, tmp_path, monkeypatch):
    workdir = copy_of(sound, tmp_path / "run")
    with (workdir / "checkpoints" / "10" / "meta" / "metadata").open("r+b") as file:
        file.truncate(10**12)  # of holes: it takes no room on the disk
    step, _, warnings = restore(workdir)
    assert step == 5 and "is too large" in warnings[0]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "holes"])
@pytest.mark.parametrize("listed", [True, False])
def test_what_cannot_be_read_to_its_end_is_not_opened(sound, tmp_path, kind, listed):
    """In the place of an array's file: a pipe would be waited for, a terabyte of holes read for an hour."""
    workdir = copy_of(sound, tmp_path / "run")
    newest = workdir / "checkpoints" / "10"
    file = next(path for path in files_of(newest / "params") if path.parent.name == "d")
    if kind == "holes":
        os.truncate(file, 10**12)
    else:
        file.unlink()
        os.mkfifo(tmp_path / "pipe" if "link" in kind else file)
        if "link" in kind:
            file.symlink_to(tmp_path / "pipe")
    if not listed:
        (newest / FILE_LIST).unlink()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert "no regular file, or too large" in checkpoints.examine(10).wrong[0]
    step, _, warnings = restore(workdir)
    assert step == 5 and f"{file.name} is no regular file, or too large" in warnings[0]


def test_numbers_that_were_not_saved_are_not_believed(sound, tmp_path):
    """Files that are whole, of arrays of the right shapes, from another checkpoint of the same run."""
    workdir = copy_of(sound, tmp_path / "run")
    for item in ("params", "rest"):
        copy_of(workdir / "checkpoints" / "5" / item, workdir / "checkpoints" / "10" / item)
    step, _, warnings = restore(workdir)
    assert step == 5 and "params/b has changed (3 of 3 arrays)" in warnings[0]


def test_all_damaged_is_an_error_and_stays_one(sound, tmp_path):
    workdir = copy_of(sound, tmp_path / "run")
    for step in (5, 10):
        (workdir / "checkpoints" / str(step) / "rest" / "manifest.ocdbt").unlink()
    before = snapshot(workdir)
    for _ in range(2):
        with pytest.raises(
            NoCheckpointError, match=r"^[^\n]*every checkpoint is damaged \(5: rest[^\n]*10: rest[^\n]*--fresh"
        ):
            restore(workdir)
    assert snapshot(workdir) == before
    for step in ("5", "10"):
        (workdir / "checkpoints" / step).rename(workdir / "checkpoints" / f"{step}.damaged-1")
    with pytest.raises(NoCheckpointError, match="all were set aside"):
        restore(workdir)


def test_what_only_looks_like_a_checkpoint(sound, tmp_path):
    workdir = copy_of(sound, tmp_path / "run")
    (workdir / "checkpoints" / "40").mkdir()
    (workdir / "checkpoints" / "50").write_text("a file")
    for name in ("notes.txt", "07", "-3", "1e3", "٣", "a\nb", ".hidden"):
        (workdir / "checkpoints" / name).write_text("not ours")
    step, found, warnings = restore(workdir)
    assert (step, found) == (10, bits(trees(10))) and len(warnings) == 3
    assert warnings[0].endswith(r"have such names: '-3', '07', '1e3', 'a\nb', 'notes.txt', '\u0663'")
    assert {"40.damaged-1", "50.damaged-1", "notes.txt", "07"} <= set(stored(workdir))
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(40, *trees(40), {}, None)
    assert restore(workdir)[0] == 40


@pytest.mark.parametrize(
    "wanted, words",
    [
        (lambda p: p | {"w": jnp.zeros((37, 30))}, r"params/w is float32\[37, 29\] in .* and float32\[37, 30\] in"),
        (
            lambda p: p | {"w": p["w"].astype(jnp.bfloat16)},
            r"params/w is float32\[37, 29\] in .* and bfloat16\[37, 29\]",
        ),
        (lambda p: p | {"new": p["b"]}, "params/new is not there in the checkpoint"),
        (lambda p: {"w": p["w"], "half": p["half"]}, r"params/b is float32\[5\] .* and not there in this run"),
    ],
)
def test_another_kind_of_array_is_no_damage(sound, tmp_path, wanted, words):
    """Orbax alone would cast the one without a word, and leave the other out."""
    workdir = copy_of(sound, tmp_path / "run")
    before = snapshot(workdir)
    params, rest = trees(0)
    with pytest.raises(UserError, match=rf"^[^\n]*/10: {words}[^\n]*$"):
        restore(workdir, (wanted(params), rest))
    assert snapshot(workdir) == before


def test_a_refusal_renames_nothing(sound, tmp_path):
    """Also where the newest is damaged and the one before it is refused."""
    workdir = copy_of(sound, tmp_path / "run")
    (workdir / "checkpoints" / "10" / "meta" / "metadata").write_text("")
    before = snapshot(workdir)

    def refuse(step, meta):
        raise UserError("config.lr: another")

    with Checkpoints(workdir) as checkpoints, pytest.raises(UserError):
        checkpoints.restore_newest(refuse, PLACE, pytest.fail)
    assert snapshot(workdir) == before


def test_an_interruption_leaves_all_as_it_is(sound, tmp_path, monkeypatch):
    workdir = copy_of(sound, tmp_path / "run")
    before = snapshot(workdir)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with Checkpoints(workdir) as checkpoints, pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(checkpoints._manager, "restore", interrupted)
        checkpoints.restore_newest(lambda step, meta: trees(0), PLACE, pytest.fail)
    assert snapshot(workdir) == before


def test_the_best_that_is_damaged_is_passed_over_and_left_where_it_is(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, val_loss in ((1, 2.5), (2, 2.0), (3, 2.25), (4, None)):
            checkpoints.save(step, *trees(step), {}, val_loss)
    params, warnings = trees(0)[0], []
    for best, file in ((2, "meta/metadata"), (3, "params/manifest.ocdbt"), (1, "params/_METADATA")):
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            step, found, _ = checkpoints.restore_best_params(params, PLACE, warnings.append)
        assert step == best and bits(found) == bits(trees(best)[0])
        (tmp_path / "checkpoints" / str(best) / file).write_bytes(b"")
    before = snapshot(tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore_best_params(params, PLACE, warnings.append)[0] == 4
        assert (
            len(warnings) == 1 + 2 + 3
            and "meta is not JSON (Expecting value: line 1 column 1 (char 0)); using 3" in warnings[0]
        )
    (tmp_path / "checkpoints" / "4" / "params" / "manifest.ocdbt").unlink()
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(NoCheckpointError, match="every checkpoint"),
    ):
        checkpoints.restore_best_params(params, PLACE, warnings.append)
    assert before.keys() - snapshot(tmp_path).keys() == {"checkpoints/4/params/manifest.ocdbt"}


def test_the_newest_is_the_one_that_has_read_most(tmp_path):
    """Whatever its number: in runs of older builds these may have fallen. No other one is ever replaced."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, position in ((10, 40), (20, 80), (12, 96)):
            checkpoints.save(step, *trees(position), {}, None, position)
            assert checkpoints.latest() == step
        with pytest.raises(StorageError, match="step 20 not saved: an older one has its number"):
            checkpoints.save(20, *trees(160), {}, None, 160)
        checkpoints.save(14, *trees(97), {}, None, 96)  # the newest again
    assert stored(tmp_path) == ["12", "20"]
    assert restore(tmp_path)[:2] == (12, bits(trees(97)))


def test_of_several_processes_the_first_alone_finishes_a_replacement(sound, tmp_path, monkeypatch):
    workdir = copy_of(sound, tmp_path / "run")
    (workdir / "checkpoints" / "10").rename(workdir / "checkpoints" / "10.replaced")
    copy_of(workdir / "checkpoints" / "5", workdir / "checkpoints" / "5.replaced")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "process_id", lambda: 1)
        Checkpoints(workdir, keep=2).close()
        assert stored(workdir) == ["10.replaced", "5", "5.replaced"]
    assert restore(workdir) == (10, bits(trees(10)), [])
    assert stored(workdir) == ["10", "5"]


def test_what_orbax_drops_when_a_read_fails_is_not_warned_of(sound):
    async def dropped():
        raise AssertionError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Checkpoints(sound, read_only=True).close()
        dropped()
        warnings.warn("another", RuntimeWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_nothing_in_a_checkpoint_is_run(sound, tmp_path):
    ran = tmp_path / "ran"
    payload = pickle.dumps(Payload(ran))
    pickle.loads(payload)
    assert ran.exists()
    ran.unlink()
    for name in ("meta/metadata", "params/_METADATA", "rest/manifest.ocdbt", "rest/_sharding", "_CHECKPOINT_METADATA"):
        workdir = copy_of(sound, tmp_path / "run")
        (workdir / "checkpoints" / "10" / name).write_bytes(payload)
        restore(workdir)
    evil = {"format": 2, "step": 10, "position": 10, "checkpoint_val_loss": None, "arrays": {"../../evil": {"/etc": 1}}}
    workdir = copy_of(sound, tmp_path / "run")
    (workdir / "checkpoints" / "10" / "meta" / "metadata").write_text(json.dumps(seal(evil)))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.examine(10).wrong
    assert restore(workdir)[0] == 5
    assert not ran.exists()


def test_a_kill_between_commit_and_pruning_leaves_one_too_many(tmp_path, monkeypatch):
    """Only until one that stays was found sound, and it serves where that is damaged."""
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(1, *trees(1), {}, None)
    monkeypatch.setattr(checkpoints._manager._checkpoint_deleter, "delete_steps", lambda steps: None)
    checkpoints.save(2, *trees(2), {}, None)
    checkpoints.close()
    assert stored(tmp_path / "run") == ["1", "2"]
    copies = [copy_of(tmp_path / "run", tmp_path / name) for name in ("saved", "restored", "damaged")]
    with Checkpoints(copies[0], keep=1) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(3, *trees(3), {}, None)
    assert stored(copies[0]) == ["3"]
    assert restore(copies[1], keep=1) == (2, bits(trees(2)), [])
    assert stored(copies[1]) == ["2"]
    (copies[2] / "checkpoints" / "2" / "rest" / "manifest.ocdbt").unlink()
    assert restore(copies[2], keep=1)[:2] == (1, bits(trees(1)))
    assert stored(copies[2]) == ["1", "2.damaged-1"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a `kill -9`."""


@pytest.mark.parametrize("deletions", [0, 1, 4, 9])
def test_a_kill_in_the_middle_of_a_deletion_is_no_damage(tmp_path, monkeypatch, deletions):
    """After so many files: the checkpoint is no longer one, and the rest of it goes at the next start."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, *trees(1), {}, None)
    checkpoints.save(2, *trees(2), {}, None)
    left, unlink = [deletions], os.unlink

    def unlink_some(path, **where):
        if not left[0]:
            raise Killed
        left[0] -= 1
        unlink(path, **where)

    monkeypatch.setattr(os, "unlink", unlink_some)
    with pytest.raises(Killed):
        checkpoints.close()
    monkeypatch.undo()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2]
    assert stored(tmp_path) == ["2", "deleted"]
    assert restore(tmp_path, keep=1) == (2, bits(trees(2)), [])
    assert stored(tmp_path) == ["2"]


def test_an_unfinished_save_is_cleared_away(sound, tmp_path):
    workdir = copy_of(sound, tmp_path / "run")
    copy_of(workdir / "checkpoints" / "10", workdir / "checkpoints" / "15.orbax-checkpoint-tmp")
    assert restore(workdir)[0] == 10
    assert stored(workdir) == ["10", "5"]


def test_the_list_of_files_is_in_the_commit_and_its_loss_is_no_damage(sound, tmp_path):
    listed = (sound / "checkpoints" / "10" / FILE_LIST).read_text().splitlines()
    names = {str(file.relative_to(sound / "checkpoints" / "10")) for file in files_of(sound / "checkpoints" / "10")}
    assert {line.split("  ")[1] for line in listed} == names - {FILE_LIST, *BOOKKEEPING}
    workdir = copy_of(sound, tmp_path / "run")
    (workdir / "checkpoints" / "10" / FILE_LIST).unlink()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        found = checkpoints.examine(10)
    assert found.wrong == [] and not found.listed
    assert restore(workdir) == (10, bits(trees(10)), [])


def test_arrays_on_the_host_can_be_saved(tmp_path):
    tree = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree, {"micro_step": np.zeros((), np.int32)}, {}, None)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert bits(checkpoints.restore_params(0, tree, PLACE)) == bits(tree)
        assert isinstance(checkpoints.restore_params(0, tree, PLACE)["x"], jax.Array)
