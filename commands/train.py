"""Train a model, or go on where the run in the workdir stopped."""

from absl import flags

import config_lib
import train_lib
from commands.flags import default_workdir, parse_flags
from runtime.distributed import joined
from runtime.errors import UserError
from runtime.screen.console import Console


def _define(values: flags.FlagValues) -> None:
    workdir = "The run's directory; default runs/<config file's name>, or runs/<config.run>."
    flags.DEFINE_string("workdir", None, workdir, values)
    flags.DEFINE_bool("fresh", False, "Move an earlier run in the workdir aside and start again from step 0.", values)
    flags.DEFINE_bool("rebatch", False, "Let a run go on with another batch_size or accumulation_steps.", values)
    coordinator = "HOST:PORT of process 0, where several processes train and no launcher tells."
    flags.DEFINE_string("coordinator", None, coordinator, values)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=values)
    flags.DEFINE_string("profile_steps", None, "FIRST:LAST, write a trace of these steps.", values)


def _profile_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile_steps: expected FIRST:LAST with FIRST < LAST, as 10:15; got {text!r}")
    return int(first), int(last)


def main(argv: list[str]) -> None:
    values = parse_flags("train", __doc__, argv, _define, config=True)
    profile = _profile_steps(values.profile_steps)
    config_lib.check(values.config)
    workdir = values.workdir or default_workdir(argv, values.config)
    processes = values.coordinator, values.num_processes, values.process_id, values.config.peer_seconds
    with joined(*processes, Console().line):
        train_lib.train(values.config, workdir, fresh=values.fresh, profile=profile, rebatch=values.rebatch)
