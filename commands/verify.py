"""Check every checkpoint of a run: each file against its hash, each array against its fingerprint."""

from pathlib import Path

from absl import flags

import config_lib
from runtime import devices
from runtime.checkpoint import Checkpoints, DamagedError
from runtime.console import Console
from runtime.errors import NoCheckpointError, UserError

NO_LIST = "ok; no list of files, so the arrays alone were checked"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", config_lib.DEFAULT_WORKDIR, "The run's directory.", flag_values=values)


def main(argv: list[str]) -> None:
    values = config_lib.parse_flags("verify", __doc__, argv, _define)
    workdir, console = Path(values.workdir), Console()
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; name the directory of a run")
    devices.wake_up()
    damaged = []
    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise NoCheckpointError(f"{checkpoints.directory}: no checkpoint yet; train first, or name another --workdir")
        console.line(f"{'step':>8}  {'val_loss':>8}  {'size':>10}  state")
        for step in steps:
            try:
                meta = checkpoints.meta(step)
                k, val_loss = meta["config"]["accumulation_steps"], meta["checkpoint_val_loss"]
                shown = f"{step / k:g}"
            except DamagedError:
                shown, val_loss = f"{step}?", None
            wrong, listed = checkpoints.examine(step)
            damaged += [step] if wrong else []
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            state = f"damaged: {wrong[0]}{more}" if wrong else "ok" if listed else NO_LIST
            loss = "" if val_loss is None else f"{val_loss:.4f}"
            console.line(f"{shown:>8}  {loss:>8}  {checkpoints.size(step):>10,}  {state}")
    if damaged:
        names = ", ".join(map(str, damaged))
        raise NoCheckpointError(
            f"{checkpoints.directory}: {len(damaged)} of {len(steps)} checkpoints damaged ({names}); training, sample "
            "and eval pass over them as long as one is sound"
        )
