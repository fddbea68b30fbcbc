"""Runs side by side: what differs, the losses, what they cost; as tables, curves and a page."""

from pathlib import Path

from absl import flags

from commands.flags import parse_flags
from reports import compare
from runtime.errors import UserError
from runtime.screen.console import Console


def _define(values: flags.FlagValues) -> None:
    target = "The loss whose tokens and seconds are shown; default the worst of the runs' best."
    flags.DEFINE_float("target", None, target, flag_values=values)
    flags.DEFINE_string("out", compare.DEFAULT_OUT, "Where the page and the pictures go.", values)


def main(argv: list[str]) -> None:
    runs: list[str] = []
    values = parse_flags("compare RUN ...", __doc__, argv, _define, words=runs)
    if not runs:
        raise UserError("compare: names no run; write python main.py compare runs/A runs/B")
    compare.compare(runs, Path(values.out), values.target, Console())
