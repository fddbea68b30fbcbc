"""Checkpoints on disk. The only file that knows Orbax.

A checkpoint holds three items that are committed together: `params`, which can be read alone, `rest` (all else that
the training state is made of), and `meta`, a JSON object.
"""

import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers as policies

from runtime.errors import NoCheckpointError, StorageError, one_line
from runtime.files import MAKE_ROOM, require_room, room

FORMAT = 1  # of the three items; raised when an older program could not read them
VAL_LOSS = "val_loss"
BYTES_PER_ARRAY = 4096  # what a checkpoint takes beside the numbers
NEVER = 100 * 365 * 86400  # seconds
REPLACED = ".replaced"  # ends the name of a checkpoint that waits for the one that replaces it


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """What to restore into: restored arrays land where `sharding` says."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _bytes_on_disk(state: Any) -> int:
    """What a checkpoint of this state takes at most, as found by measuring small and large ones."""
    return sum(leaf.nbytes + BYTES_PER_ARRAY for leaf in jax.tree.leaves(state))


# When a write fails, Orbax drops the others, and for each of them asyncio or Python itself prints a traceback. We raise
# the error: these are no news.


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _print_news(unraisable: "sys.UnraisableHookArgs", print_it: Callable[[Any], Any] = sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        print_it(unraisable)


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`.

    Kept are the newest `keep` and the one with the lowest validation loss. Saving is asynchronous: an error of the disk
    surfaces at the next save or at `close`. Use as a context manager, so that the last save is waited for.
    """

    def __init__(self, workdir: Path, keep: int = 1, read_only: bool = False):
        """Open `workdir/checkpoints`; `read_only` creates and changes nothing.

        Raises:
          NoCheckpointError: `read_only` and there are none; or one of them is damaged.
        """
        self.directory = workdir.absolute() / "checkpoints"
        if read_only and not self.directory.is_dir():
            raise NoCheckpointError(f"{self.directory}: no checkpoints here; train first, or name another --workdir")
        absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax warns of its own settings, and logs what it raises
        logging.getLogger("asyncio").addFilter(_is_news)
        sys.unraisablehook = _print_news
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[VAL_LOSS], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=lambda metrics: metrics[VAL_LOSS],
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # Creating directories in the background makes a read-only disk hang the exit for minutes.
            # Its time-out goes by the wall clock, which may jump: the watchdog looks after saves that hang.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=NEVER),
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        if not read_only:
            self._finish_replacing()
        try:
            # Reads every validation loss: under `lightweight_initialize` an earlier session's best would be deleted.
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except (OSError, ValueError) as error:
            raise NoCheckpointError(
                f"{self.directory}: a checkpoint cannot be read ({one_line(error)}); move it aside and run again"
            ) from error

    LARGE = 2**29  # bytes of a state that a CPU, whose memory is the step's too, does not write in the background

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int:
        """The step with the lowest validation loss; the newest when none was evaluated.

        Raises:
          NoCheckpointError: there is no checkpoint.
        """
        found = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        if not found:
            raise NoCheckpointError(f"{self.directory}: no checkpoint yet; train first, or name another --workdir")
        losses = {step: metrics[VAL_LOSS] for step, metrics in found.items() if metrics}
        return min(losses, key=lambda step: (losses[step], step)) if losses else max(found)

    def save(self, step: int, params: Any, rest: Any, meta: Mapping[str, Any], val_loss: float | None) -> None:
        """Write a checkpoint, numbered by micro-steps, in the background.

        One of that number is replaced, and at no moment is there neither of the two. A `val_loss` that is not finite
        is as none.

        Raises:
          StorageError: this save, or the one before, could not be written.
        """
        self.require_room(1, (params, rest))  # a disk that is full in the middle of a save is seen at the next one only
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave({"format": FORMAT, "step": int(step), **meta}),
        )
        metrics = {VAL_LOSS: float(val_loss)} if val_loss is not None and math.isfinite(val_loss) else None
        try:
            replaces = step in self._manager.all_steps()
            if replaces:
                self._manager.wait_until_finished()
                (self.directory / str(step)).rename(self.directory / f"{step}{REPLACED}")
                self._manager.reload()
            saved = self._manager.save(int(step), args=args, metrics=metrics)
            if replaces:
                self._manager.wait_until_finished()
                self._finish_replacing()
            elif (
                jax.default_backend() == "cpu" and sum(x.nbytes for x in jax.tree.leaves((params, rest))) >= self.LARGE
            ):
                self._manager.wait_until_finished()  # until then the next step cannot reuse the memory of the state
        except Exception as error:
            raise self._not_saved(f"step {step} not saved", error, _bytes_on_disk((params, rest))) from error
        if not saved:
            raise StorageError(f"{self.directory}: step {step} not saved: a newer one is there; move it aside")

    def require_room(self, count: int, state: Any) -> None:
        """Whether the disk would take `count` more checkpoints of a state.

        Raises:
          StorageError: it would not.
        """
        what = f"{count} checkpoints" if count > 1 else "a checkpoint"
        require_room(self.directory, count * _bytes_on_disk(state), what)

    def _finish_replacing(self) -> None:
        """Remove replaced checkpoints; bring back those whose successor was never completed."""
        for old in self.directory.glob(f"*{REPLACED}"):
            if old.with_suffix("").exists():
                shutil.rmtree(old)
            else:
                old.rename(old.with_suffix(""))

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON item of a checkpoint.

        Raises:
          NoCheckpointError: there is no such checkpoint, or it cannot be read, or its format is another program's.
        """
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if meta.get("format") != FORMAT:
            raise NoCheckpointError(
                f"{self.directory}/{step}: format {meta.get('format')}, this program reads {FORMAT}"
            )
        return meta

    def restore(self, step: int, params: Any, rest: Any, sharding: jax.sharding.Sharding) -> tuple[Any, Any]:
        """`params` and `rest` of a checkpoint, in the shapes and dtypes of the two given trees."""
        found = self._read(
            step,
            params=ocp.args.StandardRestore(_abstract(params, sharding)),
            rest=ocp.args.StandardRestore(_abstract(rest, sharding)),
        )
        return found["params"], found["rest"]

    def restore_params(self, step: int, params: Any, sharding: jax.sharding.Sharding) -> Any:
        """The weights alone."""
        return self._read(step, params=ocp.args.StandardRestore(_abstract(params, sharding)))["params"]

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        steps = self._manager.all_steps()
        if step not in steps:
            there = f"there are {', '.join(map(str, sorted(steps)))}" if steps else "there is none"
            raise NoCheckpointError(f"{self.directory}/{step}: no such checkpoint; {there}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise NoCheckpointError(
                f"{self.directory}/{step}: cannot be read ({one_line(error)}); move it aside and run again"
            ) from error

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
          StorageError: it could not be.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._not_saved("the last checkpoint was not saved", error) from error

    def _not_saved(self, what: str, error: Exception, need: int | None = None) -> StorageError:
        """One line; of the libraries' long one the operating system's reason, if it is in there."""
        reason = re.search(
            "No space left on device|Read-only file system|File too large|Disk quota exceeded", str(error)
        )
        text = reason[0] if reason else one_line(error)
        return StorageError(f"{self.directory}: {what}: {text} ({room(self.directory, need)}); {MAKE_ROOM}")
