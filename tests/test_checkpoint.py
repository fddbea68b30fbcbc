"""Checkpoints come back bit for bit; the newest and the best stay; what is missing or damaged is one clear line."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from runtime.checkpoints import manager
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import NoCheckpointError, StorageError

PLACE = SingleDeviceSharding(jax.devices()[0])
PARAMS = {"w": jnp.array([[1.0, -0.0, jnp.inf], [1e-40, 3.3, 7.0]]), "half": jnp.array([1.1, 2.2], jnp.bfloat16)}
REST = ({"count": jnp.array(5, jnp.int32), "nu": jnp.arange(4.0)}, jnp.array(2, jnp.int32))


def save(checkpoints: Checkpoints, step: int, val_loss: float | None = None, **meta) -> None:
    checkpoints.save(step, PARAMS, REST, meta, val_loss)


def stored(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def bits(tree) -> list[tuple[np.dtype, bytes]]:
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_arrays_and_meta_come_back_as_they_were(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, elapsed=1.25, text="µ")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, rest = checkpoints.restore(3, PARAMS, REST, PLACE)
        alone = checkpoints.restore_params(3, PARAMS, PLACE)
        meta = checkpoints.meta(3)
    assert bits((params, rest)) == bits((PARAMS, REST)) and bits(alone) == bits(PARAMS)
    assert jax.tree.structure(rest) == jax.tree.structure(REST)
    fingerprint = meta["arrays"]["rest"].pop("0/count")
    assert fingerprint[:2] == [[], "int32"] and len(fingerprint[2]) == 16
    assert sorted(meta["arrays"]["params"]) == ["half", "w"] and sorted(meta["arrays"]["rest"]) == ["0/nu", "1"]
    assert {key: meta[key] for key in ("format", "step", "position", "elapsed", "text")} == {
        **{"format": 2, "step": 3, "position": 3},
        **{"elapsed": 1.25, "text": "µ"},
    }


def test_the_newest_and_the_best_are_kept_over_sessions(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step, val_loss in ((10, 2.0), (20, None), (30, 2.5), (40, float("nan"))):
            save(checkpoints, step, val_loss)
    assert stored(tmp_path) == ["10", "30", "40"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (40, 10)
        save(checkpoints, 50)
    assert stored(tmp_path) == ["10", "40", "50"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 60, 1.5)
        save(checkpoints, 70)
        assert checkpoints.best() == 60
    assert stored(tmp_path) == ["60", "70"]


def test_without_an_evaluation_the_newest_is_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        assert checkpoints.best() == 2


def test_saving_a_step_again_replaces_it(tmp_path):
    for keep in (1, 2):
        with Checkpoints(tmp_path, keep) as checkpoints:
            save(checkpoints, 7, note="first")
            save(checkpoints, 7, 0.5, note="second")
            assert checkpoints.meta(7)["note"] == "second"
            assert checkpoints.best() == 7
        assert stored(tmp_path) == ["7"]


def test_a_crash_while_a_step_is_replaced_loses_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7, note="first")
    checkpoints._manager.wait_until_finished()

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints._manager, "save", crash)
        save(checkpoints, 7, note="second")
    checkpoints.close()
    with Checkpoints(tmp_path) as again:
        assert again.meta(7)["note"] == "first"
        save(again, 8)
    assert stored(tmp_path) == ["8"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(NoCheckpointError, match=r"^.*/checkpoints: no checkpoints here; [^\n]*$"):
        Checkpoints(tmp_path, read_only=True)
    assert not list(tmp_path.iterdir())
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(NoCheckpointError, match=r"^.*: no checkpoint yet; [^\n]*$"):
            checkpoints.best()
        save(checkpoints, 4)
        for read in (checkpoints.meta, lambda step: checkpoints.restore_params(step, PARAMS, PLACE)):
            with pytest.raises(NoCheckpointError, match=r"^.*/9: no such checkpoint; there are 4$"):
                read(9)


def test_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr("runtime.checkpoints.manager.FORMAT", 3)
        save(checkpoints, 4)
    for read_only in (False, True):
        with pytest.raises(NoCheckpointError, match=r"/4: format 3, this program reads 2; [^\n]*$"):
            Checkpoints(tmp_path, read_only=read_only)
    assert stored(tmp_path) == ["4"]


def test_a_disk_that_refuses_is_a_storage_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match=r"step 4 not saved: No space .*\(need 0\.0 MB"),
    ):
        patch.setattr(checkpoints._manager, "save", full)
        save(checkpoints, 4)
    save(checkpoints, 5)
    with pytest.raises(StorageError, match="not saved: a newer one is there"):
        save(checkpoints, 4)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(checkpoints._manager, "wait_until_finished", full)
        checkpoints.close()


def test_on_a_cpu_a_large_state_is_written_when_save_returns(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "LARGE", 24 + 4 + 4 + 16 + 4)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
            assert str(step) in stored(tmp_path)


def test_a_reader_follows_a_run_that_deletes_what_it_was_about_to_read(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, val_loss in ((10, 2.0), (20, 2.5), (30, 1.5)):
            save(checkpoints, step, val_loss)
    place, aside = tmp_path / "checkpoints", tmp_path / "aside"
    aside.mkdir()
    (place / "30").rename(aside / "30")
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps() == [10, 20]
        (place / "10").rename(aside / "10")
        assert reader.examine(10) is None and reader.examine(20).wrong == []
        assert reader.restore_best_params(PARAMS, PLACE, pytest.fail)[0] == 20
        (aside / "30").rename(place / "30")
        (place / "20").rename(aside / "20")
        assert reader.restore_best_params(PARAMS, PLACE, pytest.fail)[0] == 30


def test_what_one_of_several_processes_cannot_read_is_no_damage(tmp_path, monkeypatch):
    """The others may have read it, and would wait for ever for the one that goes on to another."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)

    def refuse(step, args):
        raise OSError(errno.EIO, "Input/output error")

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refuse)
        monkeypatch.setattr(manager, "seen_by_first", lambda look: bool(look()))
        monkeypatch.setattr(manager, "num_processes", lambda: 2)
        monkeypatch.setattr(manager, "process_id", lambda: 1)
        words = f"^{checkpoints.directory}/2: params cannot be read in process 1: .*Input/output error; try again"
        with pytest.raises(StorageError, match=words):
            checkpoints.restore_newest(lambda step, meta: (PARAMS, REST), PLACE, pytest.fail)
    assert stored(tmp_path) == ["1", "2"]
