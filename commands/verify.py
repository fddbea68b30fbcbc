"""Check every checkpoint of a run: each file against its hash, each array against its fingerprint."""

from pathlib import Path

from absl import flags

from commands.flags import DEFAULT_WORKDIR, parse_flags
from runtime import devices
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import NoCheckpointError, UserError
from runtime.screen.console import Console

NO_LIST = "ok; no list of files, so the arrays alone were checked"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", DEFAULT_WORKDIR, "The run's directory.", values)


def main(argv: list[str]) -> None:
    values = parse_flags("verify", __doc__, argv, _define)
    workdir, console = Path(values.workdir), Console()
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; name the directory of a run")
    devices.start_jax()
    damaged, examined = [], 0
    with Checkpoints(workdir, read_only=True) as checkpoints:
        if not (steps := checkpoints.steps()):
            raise NoCheckpointError(
                f"{checkpoints.directory}: no checkpoint yet; train first, or name another --workdir"
            )
        console.line(f"{'checkpoint':>10}  {'val_loss':>8}  {'bytes':>13}  state")
        for step in steps:
            if (found := checkpoints.examine(step)) is None:
                console.line(f"{step:>10}  {'':>8}  {'':>13}  deleted meanwhile, by the run itself")
                continue
            examined += 1
            loss = "" if found.val_loss is None else f"{found.val_loss:.4f}"
            more = f" (and {len(found.wrong) - 1} more)" if len(found.wrong) > 1 else ""
            state = f"damaged: {found.wrong[0]}{more}" if found.wrong else "ok" if found.listed else NO_LIST
            console.line(f"{step:>10}  {loss:>8}  {found.size:>13,}  {state}")
            damaged += [step] if found.wrong else []
    if not examined:
        raise NoCheckpointError(f"{checkpoints.directory}: each was deleted while it was read; try again")
    if damaged:
        raise NoCheckpointError(
            f"{checkpoints.directory}: {len(damaged)} of {examined} checkpoints damaged "
            f"({', '.join(map(str, damaged))}); training, sample and eval pass over them as long as one is sound"
        )
