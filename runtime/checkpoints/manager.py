"""Checkpoints on disk. The only file that uses Orbax, and only in functions: a new run's first steps do without it.

A checkpoint holds three items that are committed together: `params`, which can be read alone, `rest` (the rest of the
training state), and `meta`, a JSON object with a hash of itself. `meta` has the shape, the dtype and a fingerprint of
every array, computed on the device when it was saved; they are checked before an array is used. Beside the items is a
list of all files' hashes, for `verify`.
"""

import contextlib
import gc
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging as absl_logging

from runtime.checkpoints import integrity, retention
from runtime.checkpoints.retention import Mark
from runtime.distributed import end_if_a_peer_is_lost
from runtime.errors import NoCheckpointError, StorageError, UserError, one_line
from runtime.files import LARGEST, MAKE_ROOM, require_room, room
from runtime.malloc import give_back_freed
from runtime.multihost import require_same, seen_by_first
from runtime.processes import by_first, is_first, num_processes, process_id
from runtime.workdir import CHECKPOINTS, UNSAVED, first_free

FORMAT = 2  # of the three items; raised when an older program cannot read them. `meta` has its seal in every format
ITEMS = ("params", "rest")
SESSION: dict[str, tuple[type, ...]] = {  # keys of `meta` that resuming needs, and their types
    **{"data_sha256": (str,), "elapsed_seconds": (int, float), "reported": (bool,), "sizes": (dict,)},
    **dict.fromkeys(["val_loss", "best_val_loss", "best_step"], (int, float, type(None))),
}
BYTES_PER_ARRAY = 4096  # what a checkpoint takes besides the numbers
AVERAGE = "/average/"  # training.ema's, in the paths of the optimizer's state
LARGE = 2**29  # bytes; a larger state is not written in the background on a CPU, where the step needs the memory
NEVER = 100 * 365 * 86400  # seconds
LOOKS = 5  # at the list, where a run deletes what was read from it
Placement = jax.sharding.Sharding | Callable[[Any], Any]  # one for all arrays, or a function: tree -> tree of shardings


class DamagedError(NoCheckpointError):
    """A checkpoint is not what was saved; the text says what is wrong, without the checkpoint's path."""


class Finding(NamedTuple):
    """What `Checkpoints.examine` found."""

    val_loss: float | None
    size: int  # bytes of all files
    wrong: list[str]
    listed: bool  # whether it has a list of its files


def val_tokens_of(meta: Mapping[str, Any]) -> int:
    """How many tokens a checkpoint's validation loss was computed on; 0: the whole split.

    Older builds did not store it: it was the config's `eval_tokens`, but the whole split after the last step.
    """
    config = {"eval_tokens": 0, "max_steps": 0, "accumulation_steps": 1} | meta.get("config", {})
    last = meta["step"] == config["max_steps"] * config["accumulation_steps"]
    return meta.get("checkpoint_val_tokens", 0 if last else config["eval_tokens"])


def _bytes_on_disk(state: Any) -> int:
    """An upper bound for a checkpoint of this state, found by measuring small and large ones."""
    return sum(leaf.nbytes + BYTES_PER_ARRAY for leaf in jax.tree.leaves(state))


def average_in(meta: Mapping[str, Any]) -> str:
    """Where in the rest of a checkpoint the average of the weights is; "" where it keeps none."""
    found = (path.partition(AVERAGE) for path in meta["arrays"]["rest"])
    return next((before + AVERAGE for before, average, _ in found if average), "")


def _is_entry(entry: Any) -> bool:
    """Whether it is [shape, dtype, fingerprint]."""
    match entry:
        case [list(shape), str(), str()]:
            return all(type(n) is int and n >= 0 for n in shape)
    return False


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, in `workdir/checkpoints`.

    The newest `keep` are kept, and the one with the lowest validation loss; if losses were computed on different
    tokens, the lowest on each. Saving is asynchronous: a disk error is raised at the next save or at `close`. As a
    context manager it waits for the last save.
    """

    def __init__(self, workdir: Path, keep: int = 1, read_only: bool = False):
        """Open `workdir/checkpoints`; `read_only` creates and changes nothing.

        Raises NoCheckpointError if `read_only` and there are none, or if one is of another format.
        """
        self.directory = workdir.absolute() / CHECKPOINTS
        if read_only and not self.directory.is_dir():
            raise NoCheckpointError(f"{self.directory}: no checkpoints here; train first, or name another --workdir")
        quieten()
        self._marks: dict[int, Mark] = {}
        self._damaged: dict[int, str] = {}  # step -> why its meta cannot be used
        self._saving: int | None = None
        self._keep, self._read_only = keep, read_only
        if not read_only:
            by_first(lambda: self.directory.mkdir(parents=True, exist_ok=True))
            by_first(lambda: retention.tidy_up(self.directory))
            os.listdir(self.directory.parent)  # as it is opened, a client of NFS forgets the names that it knew
        self._empty_trash()
        self._read_marks()
        require_same((sorted(self._marks.items()), sorted(self._damaged)), f"{self.directory}: checkpoints")

    def _read_marks(self) -> None:
        for step in self._steps_on_disk():
            try:
                meta = self.meta(step)
                self._marks[step] = Mark(meta["position"], meta["checkpoint_val_loss"], val_tokens_of(meta))
            except (NoCheckpointError, FileNotFoundError) as error:
                self._note(step, error, self._damaged)

    def _note(self, step: int, error: Exception, damaged: dict[int, str]) -> None:
        """Notes why a checkpoint cannot be read, if it is still there. Raises `error` if that is no damage."""
        if self.is_there(step):
            if not isinstance(error, DamagedError):
                raise error
            damaged[step] = str(error)

    def _look(self) -> None:
        """List the checkpoints again, of a run that goes on meanwhile."""
        self._marks.clear()
        self._damaged.clear()
        self._read_marks()
        self._manager.reload()

    def load_orbax(self) -> None:
        """Load Orbax now, and not only at the first save, which should find nothing missing. All processes call it."""
        _ = self._manager

    @cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            todelete_subdir=None if self._read_only else retention.DELETED,  # what a kill leaves there is not damaged
            create=False,
            read_only=self._read_only,
            cleanup_tmp_directories=False,  # `tidy_up` does it
            lightweight_initialize=True,  # reads nothing: a damaged checkpoint must not stop us here
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,  # else a read-only disk hangs the exit for minutes
                timeout_secs=NEVER,  # it uses the wall clock, which may jump; the watchdog ends saves that hang
                post_finalization_callback=self._list_files,
            ),
        )
        at_once = {"restore_concurrent_gb": 16} if num_processes() > 1 else {}  # a host may have eight processes
        handlers = {item: ocp.StandardCheckpointHandler(**at_once) for item in ITEMS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        manager.reached_preemption = lambda step: False  # its own calls would disturb `raise_if_set`
        return manager

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's preservation policy: which of the checkpoints stay. Those without a mark do."""
        there = [info.step for info in checkpoints]
        marks = {step: self._marks[step] for step in there if step in self._marks}
        superfluous = retention.superfluous(marks, self._keep)
        return [step not in superfluous for step in there]

    def __exit__(self, *_) -> None:
        self.close()

    def _steps_on_disk(self) -> list[int]:
        names = [entry.name for entry in self.directory.iterdir()] if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name == str(int(name)))

    def is_there(self, step: int) -> bool:
        """Whether the checkpoint is on the disk now: a run deletes old ones while others look."""
        return step in self._steps_on_disk()

    def _known(self) -> dict[int, Mark]:
        """The marks of the checkpoints whose meta is sound."""
        there = self._manager.all_steps() if self._marks else ()
        return {step: self._marks[step] for step in there if step in self._marks}

    def steps(self) -> list[int]:
        """All steps that have a checkpoint, damaged ones included."""
        return sorted({*self._known(), *self._damaged})

    def latest(self) -> int | None:
        """The newest step whose meta is sound: the one that has read most of the data."""
        return next(iter(retention.newest_first(self._known())), None)

    def best(self) -> int:
        """The step with the lowest validation loss, or the newest if none was evaluated. NoCheckpointError if none."""
        return self._best_first()[0]

    def _best_first(self) -> list[int]:
        if not self.steps():
            raise NoCheckpointError(f"{self.directory}: no checkpoint yet; train first, or name another --workdir")
        if not self._known():
            raise self._all_damaged(self._damaged)
        return retention.best_first(self._known())

    def begin(self) -> None:
        """A run begins here: until one of its checkpoints is complete, it may start from step 0 again."""
        by_first((self.directory / UNSAVED).touch)

    def never_saved(self) -> bool:
        """Whether this is the directory of a run that has begun and completed no checkpoint yet."""
        return (self.directory / UNSAVED).exists()

    def _note_saved(self) -> None:
        if is_first() and self._steps_on_disk():
            (self.directory / UNSAVED).unlink(missing_ok=True)

    # --- Saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        params: Any,
        rest: Any,
        meta: Mapping[str, Any],
        val_loss: float | None,
        position: int | None = None,
        val_tokens: int = 0,
    ) -> None:
        """Write a checkpoint of that number in the background.

        The one with the highest `position` (default: the step) counts as the newest. One of the same position is
        replaced, whatever its number; at every moment one of the two is complete. A `val_loss` that is not finite
        counts as None; it was computed on the first `val_tokens` tokens of the validation split, or (0) on all.

        Raises StorageError if this checkpoint, or the one before, could not be written.
        """
        import orbax.checkpoint as ocp

        val_loss = float(val_loss) if val_loss is not None and math.isfinite(val_loss) else None
        mark = Mark(int(step if position is None else position), val_loss, val_tokens)
        newest = self.latest()
        if newest is not None and self._marks[newest].position > mark.position:
            raise StorageError(f"{self.directory}: step {step} not saved: a newer one is there; move it aside")
        if newest is not None and self._marks[newest].position == mark.position:
            step = newest
        elif step in self._steps_on_disk():
            raise StorageError(f"{self.directory}: step {step} not saved: an older one has its number; move it aside")
        values = {
            **meta,
            "format": FORMAT,
            "step": int(step),
            "position": mark.position,
            "checkpoint_val_loss": mark.val_loss,
            "checkpoint_val_tokens": mark.val_tokens,
            "arrays": {"params": integrity.fingerprints(params), "rest": integrity.fingerprints(rest)},
        }
        arrays = {"params": ocp.args.StandardSave(params), "rest": ocp.args.StandardSave(rest)}
        args = ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(integrity.seal(values)))
        try:
            self._manager.wait_until_finished()
            self._note_saved()
            self._empty_trash()
            self.require_room(1, (params, rest))  # an error during a save is only seen at the next one
            replaces = step in self._manager.all_steps()
            if replaces:
                by_first(lambda: (self.directory / str(step)).rename(self.directory / f"{step}{retention.REPLACED}"))
                os.listdir(self.directory)  # for NFS, as above
                self._manager.reload()
            self._marks[step], self._saving = mark, step
            self._manager.save(int(step), args=args, force=True)  # Orbax takes the highest number for the newest
            if replaces:
                self._manager.wait_until_finished()
                by_first(lambda: retention.finish_replacing(self.directory))
            elif jax.default_backend() == "cpu" and sum(x.nbytes for x in jax.tree.leaves((params, rest))) >= LARGE:
                self._manager.wait_until_finished()  # until then the next step cannot reuse the state's memory
                gc.collect()  # nor until Orbax's copies are gone, which it leaves in a circle of references
                give_back_freed()
        except StorageError:
            raise
        except Exception as error:
            raise self._not_saved(f"step {step} not saved", error, _bytes_on_disk((params, rest))) from error

    def _list_files(self) -> None:
        """Orbax calls this from its own thread, when all is written and not yet committed."""
        if is_first():
            with contextlib.suppress(OSError):  # the list is an extra; the save itself reports a full disk
                integrity.write_file_list(self.directory / f"{self._saving}{retention.UNFINISHED}")

    def require_room(self, count: int, state: Any) -> None:
        """Raises StorageError unless the disk has room for `count` more checkpoints of a state."""
        what = f"{count} checkpoints" if count > 1 else "a checkpoint"
        require_room(self.directory, count * _bytes_on_disk(state), what)

    def _empty_trash(self) -> None:
        if is_first() and not self._read_only:  # what cannot be deleted now is left for the next time
            shutil.rmtree(self.directory / retention.DELETED, ignore_errors=True)

    def close(self) -> None:
        """Wait for the last save. Raises StorageError if it failed."""
        try:
            if "_manager" in vars(self):
                self._manager.close()
            if not self._read_only:
                self._note_saved()
            self._empty_trash()
        except Exception as error:
            raise self._not_saved("the last checkpoint was not saved", error) from error

    def _not_saved(self, what: str, error: Exception, need: int | None = None) -> StorageError:
        """An error of one line: the operating system's reason, if the libraries' long text has one."""
        end_if_a_peer_is_lost(error)
        reason = re.search(
            "No space left on device|Read-only file system|File too large|Disk quota exceeded", str(error)
        )
        text = reason[0] if reason else one_line(error)
        return StorageError(f"{self.directory}: {what}: {text} ({room(self.directory, need)}); {MAKE_ROOM}")

    # --- Reading one ----------------------------------------------------------------------------------------------

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON item of a checkpoint.

        Raises DamagedError if it is not what was saved, NoCheckpointError if there is none or it has another format.
        """
        if step not in self._steps_on_disk():
            steps = self.steps()
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise NoCheckpointError(f"{self.directory}/{step}: no such checkpoint; {there}")
        try:
            meta = integrity.read_sealed(self.directory / str(step) / "meta" / "metadata")
        except ValueError as error:
            raise DamagedError(f"meta {error}") from error
        if meta.get("format") != FORMAT:
            raise NoCheckpointError(
                f"{self.directory}/{step}: format {meta.get('format')}, this program reads {FORMAT}; use the program "
                "that wrote it, or start again from step 0 with --fresh"
            )
        if meta.get("step") != step:
            raise DamagedError(f"meta is that of step {meta.get('step')}")
        arrays, loss = meta.get("arrays"), meta.get("checkpoint_val_loss")
        if not isinstance(arrays, dict) or not all(isinstance(arrays.get(item), dict) for item in (*ITEMS, *arrays)):
            raise DamagedError("meta has no table of the arrays")
        if not all(_is_entry(entry) for item in arrays.values() for entry in item.values()):
            raise DamagedError("meta has a table of something else than arrays")
        odd_loss = "checkpoint_val_loss" not in meta or not (loss is None or type(loss) in (int, float))
        if type(meta.get("position")) is not int or odd_loss:
            raise DamagedError("meta has no position or loss")
        kinds = SESSION | {"arithmetic": (dict,), "micro_step": (int,)}
        if odd := [key for key in meta.keys() & kinds if type(meta[key]) not in kinds[key]]:
            raise DamagedError(f"meta has an odd {min(odd)}")
        return meta

    def restore(self, step: int, params: Any, rest: Any, sharding: Placement) -> tuple[Any, Any]:
        """`params` and `rest` of a checkpoint, as trees like the two given ones, laid out as `sharding` says.

        Raises UserError if the checkpoint has other arrays, DamagedError if it is not what was saved, StorageError if
        one of several processes cannot read it.
        """
        return tuple(self._arrays(step, {"params": params, "rest": rest}, sharding).values())

    def restore_params(self, step: int, params: Any, sharding: Placement, weights: str = "trained") -> Any:
        """The weights alone, of WEIGHTS those that `weights` says. Raises as `restore`; UserError if there are none."""
        average = average_in(self.meta(step))
        if weights == "ema" and not average:
            raise UserError(f"{self.directory}/{step}: keeps no average of the weights; take the trained ones")
        item, below = ("rest", average) if average and weights != "trained" else ("params", "")
        return self._arrays(step, {item: params}, sharding, below)[item]

    def _arrays(self, step: int, wanted: dict[str, Any], sharding: Placement, below: str = "") -> dict[str, Any]:
        """The wanted trees, of each item whole, or what is `below` a path of it."""
        stored = self.meta(step)["arrays"]
        self._require_regular(step, stored)
        if seen_by_first(lambda: integrity.changed_files(self.directory / str(step))):
            raise DamagedError("files have changed, `verify` names them")  # else some would wait in Orbax for ever
        for item, tree in wanted.items():
            there = stored[item].items()
            stored[item] = {path.removeprefix(below): entry for path, entry in there if path.startswith(below)}
            integrity.require_same_kind(f"{self.directory}/{step}: {item}/{below}", stored[item], tree)
        return {item: self._read(step, item, stored[item], tree, sharding, below) for item, tree in wanted.items()}

    def _require_regular(self, step: int, stored: dict[str, dict[str, list]]) -> None:
        """Raises DamagedError if there is anything that could block a read, or that never ends."""
        entries = [math.prod(shape) for arrays in stored.values() for shape, *_ in arrays.values()]
        largest, directory = LARGEST + 8 * sum(entries), self.directory / str(step)
        for path in sorted(directory.rglob("*")):
            if not path.is_dir() and not (path.is_file() and path.stat().st_size <= largest):
                raise DamagedError(f"{path.relative_to(directory)} is no regular file, or too large")

    def _read(
        self, step: int, item: str, stored: dict[str, list], tree: Any, sharding: Placement, below: str = ""
    ) -> Any:
        import orbax.checkpoint as ocp

        at = sharding(tree) if callable(sharding) else jax.tree.map(lambda _: sharding, tree)
        target = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, at)
        try:
            if below:
                found = self._read_part(step, item, target, below)
            else:
                args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
                found = self._manager.restore(step, args=args)[item]
        except Exception as error:
            end_if_a_peer_is_lost(error)
            if num_processes() > 1:  # perhaps in this one alone: the others would not go on to the next checkpoint
                where = f"{self.directory}/{step}: {item} cannot be read in process {process_id()}"
                raise StorageError(f"{where}: {one_line(error, 100)}; try again, or move it aside") from error
            raise DamagedError(f"{item} cannot be read: {one_line(error, 100)}") from error
        now = integrity.fingerprints(found)
        different = sorted(path for path in stored.keys() | now.keys() if stored.get(path) != now.get(path))
        if different:
            raise DamagedError(f"{item}/{different[0]} has changed ({len(different)} of {len(stored)} arrays)")
        return found

    def _read_part(self, step: int, item: str, target: dict[str, Any], below: str) -> dict[str, Any]:
        """Of an item the arrays at `below` and their name; the others stay on disk, which the manager cannot do."""
        import orbax.checkpoint as ocp

        whole = self._manager.item_metadata(step)[item]
        pick = lambda path: target.get(path.removeprefix(below), ocp.PLACEHOLDER)
        wanted = jax.tree.unflatten(jax.tree.structure(whole), map(pick, integrity.paths_of(whole)))
        args = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = integrity.paths_of(reader.restore(self.directory / str(step) / item, args=args))
        return {name: found[below + name] for name in target}

    # --- Reading the newest or the best sound one ---------------------------------------------------------------------

    def restore_newest(
        self, target: Callable[[int, dict[str, Any]], tuple[Any, Any]], sharding: Placement, warn: Callable[[str], None]
    ) -> tuple[int, dict[str, Any], Any, Any] | None:
        """Step, meta, `params` and `rest` of the newest sound checkpoint; None if there is no checkpoint at all.

        Damaged ones are renamed, but only after a sound one was restored. `warn` gets a line about each, and one about
        foreign files. `target` takes a step and its meta and gives the trees for `restore`; it may raise to refuse.
        Raises NoCheckpointError if all are damaged; then nothing is renamed.
        """
        if names := retention.strangers(self.directory):
            warn(f"{self.directory}: left alone, as no checkpoints have such names: {', '.join(map(ascii, names))}")
        if not self.steps() and not any(self.directory.glob(f"*{retention.DAMAGED}*")):
            return None

        def read(step: int) -> tuple[dict[str, Any], Any, Any]:
            meta = self.meta(step)
            return meta, *self.restore(step, *target(step, meta), sharding)

        step, found, damaged = self._first_sound(lambda: retention.newest_first(self._known()), read)
        for bad, reason in damaged:
            place = self._set_aside(bad)
            warn(f"{self.directory}/{bad}: damaged: {reason}; set aside as {place.name}, going on from {step}")
        for step_to_delete in retention.superfluous(
            self._known(), self._keep
        ):  # what an interrupted save did not delete
            self._manager.delete(step_to_delete)
        self._empty_trash()
        return step, *found

    def restore_best_params(
        self, params: Any, sharding: Placement, warn: Callable[[str], None], weights: str = "trained"
    ) -> tuple[int, Any, dict[str, Any]]:
        """Step, weights and meta of the best sound checkpoint. Renames nothing.

        `warn` gets a line about each damaged one. Which weights, `restore_params` says. Raises NoCheckpointError if
        there is no checkpoint, or if all are damaged.
        """
        read = lambda step: (self.restore_params(step, params, sharding, weights), self.meta(step))
        step, found, damaged = self._first_sound(self._best_first, read)
        for bad, reason in damaged:
            warn(f"{self.directory}/{bad}: damaged: {reason}; using {step}")
        return step, *found

    def _first_sound(
        self, listed: Callable[[], list[int]], read: Callable[[int], Any]
    ) -> tuple[int, Any, list[tuple[int, str]]]:
        """The first of the steps that `read` can read, what it gave, and what is wrong with each damaged one.

        What a run deletes meanwhile is passed over; if nothing else is left, they are listed again.
        """
        for _ in range(LOOKS):
            steps, damaged = listed(), dict(self._damaged)
            for step in steps:
                try:
                    return step, read(step), sorted(damaged.items())
                except (NoCheckpointError, FileNotFoundError) as error:
                    self._note(step, error, damaged)
            if all(map(self.is_there, steps)):
                raise self._all_damaged(damaged)
            self._look()
        raise NoCheckpointError(f"{self.directory}: each checkpoint was deleted while it was read; try again")

    def _all_damaged(self, damaged: Mapping[int, str]) -> NoCheckpointError:
        found = "; ".join(f"{step}: {reason}" for step, reason in sorted(damaged.items())) or "all were set aside"
        return NoCheckpointError(
            f"{self.directory}: every checkpoint is damaged ({found}); put a copy back, or start again from step 0 "
            "with --fresh, which moves the run aside"
        )

    def _set_aside(self, step: int) -> Path:
        path = self.directory / str(step)
        place = first_free(f"{path}{retention.DAMAGED}")
        by_first(lambda: path.rename(place))
        self._marks.pop(step, None)
        self._damaged.pop(step, None)
        self._manager.reload()
        return place

    def examine(self, step: int) -> Finding | None:
        """Check every file and every array of a checkpoint, on one device; None if it is deleted meanwhile."""
        path, val_loss, changed, size = self.directory / str(step), None, None, 0
        wrong: list[str] = []
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            meta = self.meta(step)
            val_loss = meta["checkpoint_val_loss"]
            self._require_regular(step, meta["arrays"])
            changed = integrity.changed_files(path)
            wrong = [f"{name} has changed" for name in changed or ()]
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            for item in ITEMS:
                try:
                    tree = self._manager.item_metadata(step)[item]
                except Exception as error:
                    raise DamagedError(f"{item} cannot be read: {one_line(error, 100)}") from error
                self._read(step, item, meta["arrays"][item], tree, place)
        except DamagedError as error:
            wrong.insert(0, str(error))
        except (NoCheckpointError, FileNotFoundError):
            if self.is_there(step):
                raise
            return None
        return Finding(val_loss, size, wrong, changed is not None) if self.is_there(step) else None


# --- Silencing Orbax: it logs, with tracebacks, errors that we raise as one line ----------------------------------


def quieten() -> None:
    """Silences Orbax's logs for errors that we report ourselves. It may be called more than once."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").addFilter(_is_news)
    sys.unraisablehook = _print_news
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


# When one read or write fails, Orbax abandons the others: for each that had begun, asyncio or Python itself prints a
# traceback, for each that had not, a warning. This program has no coroutines of its own.


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _print_news(unraisable: "sys.UnraisableHookArgs", print_it: Callable[[Any], Any] = sys.unraisablehook) -> None:
    text = str(unraisable.exc_value)
    if text != "Event loop is closed" and not text.startswith("Encountered error while reading array"):
        print_it(unraisable)
