"""Train a grid of configs and seeds, one run after the other, then compare them. The same command goes on."""

import contextlib
import itertools
import os
import re
import signal
import stat
import statistics
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

import config_lib
import run_lib
from commands.flags import default_workdir, each_argument, parse_flags
from configs import default
from reports import compare
from reports.paired import always_valid_p
from runtime.errors import ExpectedError, Interrupted, UserError
from runtime.files import PROGRAM, read_json, write_json
from runtime.screen.console import Console
from runtime.screen.text import nearest
from runtime.signals import SIGNALS, WARNINGS, hangup_ignored
from runtime.workdir import require_own

MAIN = PROGRAM / "main.py"
FINISHED_FILE = "sweep.json"  # in a run's directory: the config of the run that finished there
_LONGEST_NAME = 120  # characters; file systems take 255 bytes


class Point(NamedTuple):
    """One run of the grid."""

    name: str
    config: ConfigDict


def _define(values: flags.FlagValues) -> None:
    sets = "KEY=A,B,...: the values of a key; with another --set, every pair. Values that hold commas are parted by "
    flags.DEFINE_multi_string("set", [], f"{sets}semicolons: --set 'betas=0.9,0.95;0.9,0.99'.", values)
    flags.DEFINE_integer("seeds", 1, "Runs a point: config.seed and the numbers after it.", 1, None, values)
    until = "Add seeds until the end losses of two configs differ with this always-valid p (arXiv:2310.03722)."
    flags.DEFINE_float("until_p", None, until, 1e-9, 0.5, values)
    flags.DEFINE_integer("most", 12, "Of until_p: seeds a config; a higher number later goes on.", 1, None, values)
    where = "The sweep's directory; default runs/<config file's name>_sweep or runs/<run>."
    flags.DEFINE_string("workdir", None, where, values)
    flags.DEFINE_float("target", None, "As in compare.", flag_values=values)


def _axis(text: str, usual: ConfigDict) -> tuple[str, list[str]]:
    """A key and the texts of its values, from one --set."""
    key, equals, listed = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set={text}: expected KEY=VALUE,VALUE, as lr=1e-3,3e-3")
    if key in ("seed", "run"):
        way = "--seeds=N and --config.seed" if key == "seed" else "--workdir"
        raise UserError(f"--set={text}: {key} is not swept; use {way}")
    if key not in usual:
        raise UserError(f"--set={text}: unknown key {key}{nearest(key, list(usual))}")
    parted = ";" if ";" in listed or isinstance(usual[key], tuple) else ","
    return key, listed.split(parted)


def grid(argv: list[str], sets: list[str], seeds: int) -> list[Point]:
    """Every run of the sweep, checked; the seed changes fastest, then the last --set, last the config file's argument.

    `argv` are all flags.
    """
    axes = [_axis(text, default.get_config()) for text in sets]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise UserError(f"--set={next(key for key in keys if keys.count(key) > 1)}: given twice; use one --set a key")
    points: dict[str, ConfigDict] = {}
    for (argument, own), *texts in itertools.product(each_argument(argv), *(texts for _, texts in axes)):
        chosen = [f"--config.{key}={text}" for key, text in zip(keys, texts, strict=True)]
        config = parse_flags("sweep", __doc__, [*own, *chosen], _define, config=True).config
        for seed in range(config.seed, config.seed + seeds):
            point = config.copy_and_resolve_references()
            point.seed = seed
            config_lib.check(point)
            name = point_name(argument | {key: point[key] for key in keys} | {"seed": seed})
            if name in points:
                raise UserError(f"sweep: {name} is there twice; give each value once")
            points[name] = point
    return [Point(name, config) for name, config in points.items()]


def question(values: flags.FlagValues, argv: list[str]) -> list[Point]:
    """The runs of a sweep with --until_p, pair by pair, the seeds in their order. Raises UserError."""
    if values["seeds"].present:
        raise UserError("--seeds: --until_p adds them one by one; leave it out, and see --most")
    points = grid(argv, values.set, values.most)
    if len(points) != 2 * values.most:
        raise UserError(f"--until_p: settles one question between two configs, got {len(points) // values.most}")
    return [point for pair in zip(points[: values.most], points[values.most :], strict=True) for point in pair]


def answer(paths: Sequence[Path], until_p: float, most: int, console: Console) -> tuple[bool, str]:
    """Whether the last losses of runs, pair by pair, settle which config of the two is better, and that in words."""
    runs = compare.read_runs(paths, console.warn)
    metric = compare.metric_of(runs)
    runs, tokens = compare.comparable(compare.as_judged(runs), metric)
    if metric == "val_loss" and tokens is None:
        raise UserError("--until_p: the runs were not evaluated on the same tokens; set eval_tokens the same in both")
    ends = [run.rows[-1].get(metric) if run.rows else None for run in runs]
    if none := [run.name for run, end in zip(runs, ends, strict=True) if end is None]:
        raise UserError(f"--until_p: {none[0]}: its last row has no finite {metric}; move it aside to train it again")
    differences = [b - a for a, b in zip(ends[::2], ends[1::2], strict=True)]
    p, mean = always_valid_p(differences), statistics.fmean(differences)
    names = [re.sub(r",seed=\d+$", "", path.name) for path in paths[:2]]
    better, other = names if mean > 0 else reversed(names)
    found = f"ettled by {len(differences)} of at most {most} pairs: {better} ends {abs(mean):.4f} below {other} on the "
    found += f"mean, p = {p:.2g} (always valid, as seeds were added until it would be at most {until_p:g})."
    return p <= until_p, f"S{found}" if p <= until_p else f"Not s{found} A higher --most goes on."


def point_name(values: dict[str, Any]) -> str:
    """`key=value,...` in characters that file systems take, with a hash if some had to be replaced or cut."""
    exact = ",".join(f"{key}={config_lib.written(value)}" for key, value in values.items())
    safe = re.sub(r"[^A-Za-z0-9._+=,-]", "_", exact)
    if safe == exact and len(exact) <= _LONGEST_NAME:
        return exact
    seed = f",seed={values['seed']}"  # kept apart, so that names of one config differ only in the seed
    kept = safe.removesuffix(seed)[: _LONGEST_NAME - 30]
    return f"{kept}-{sha256(exact.removesuffix(seed).encode()).hexdigest()[:8]}{seed}"


def command_line(config: ConfigDict, workdir: Path) -> list[str]:
    """The command of the process that trains one run."""
    usual = default.get_config()
    base = f"--config={PROGRAM / 'configs' / 'default.py'}"
    text = lambda value: config_lib.written(value) if isinstance(value, tuple) else str(value)
    changed = [f"--config.{key}={text(value)}" for key, value in config.items() if value != usual[key]]
    return [sys.executable, str(MAIN), "train", base, *changed, f"--workdir={workdir}"]


def run_child(command: list[str]) -> tuple[int, int | None]:
    """Run a process to its end. Returns its exit status, negative if a signal killed it, and the signal to stop for.

    It has its own process group, so that it gets each signal once, from here. A scheduler's warning stops the sweep
    only if it ended the process. Ctrl-Z stops both, and both go on together.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(signum: int, _frame: FrameType | None = None) -> None:
        received.append(signum)
        if child is not None:
            child.send_signal(signum)

    def suspend(signum: int, _frame: FrameType | None = None) -> None:
        if child is not None:
            child.send_signal(signal.SIGTSTP)  # not SIGSTOP: it removes its live view first
            # Wait until it has stopped: a SIGCONT before that would be lost, and nothing would wake it again.
            if hasattr(os, "waitid"):  # macOS has it from Python 3.13 on
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)  # comes back with SIGCONT
        signal.signal(signum, suspend)
        if child is not None:
            child.send_signal(signal.SIGCONT)

    heard = [signum for signum in (*SIGNALS, *WARNINGS) if signum != signal.SIGHUP or not hangup_ignored()]
    handlers: dict[signal.Signals, Any] = dict.fromkeys(heard, forward)
    if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:  # a shell without job control ignores it
        handlers[signal.SIGTSTP] = suspend
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        child = subprocess.Popen(command, process_group=0)
        for signum in list(received):  # signals that came before the process was there
            child.send_signal(signum)
        status = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    stopping = [signum for signum in received if signum not in WARNINGS or status in (128 + signum, -signum)]
    return status, stopping[0] if stopping else None


def main(argv: list[str]) -> None:
    arguments = each_argument(argv)
    values = parse_flags("sweep", __doc__, arguments[0][1], _define, config=True)
    asks = values.until_p is not None
    points = question(values, argv) if asks else grid(argv, values.set, values.seeds)
    usual = default_workdir(argv, values.config)
    sweep_dir = Path(values.workdir or (usual if values.config.run else f"{usual}_sweep"))
    if (sweep_dir / run_lib.CONFIG_FILE).exists():
        raise UserError(f"--workdir={sweep_dir}: is a run's own directory; name another one for the sweep")
    console, own = Console(), sweep_dir.expanduser().resolve()
    for name in ("compare", *(point.name for point in points)):
        require_own(own, own / name, stat.S_ISDIR)
    failed: dict[str, int] = {}
    said = ""
    for number, (name, config) in enumerate(points, 1):
        workdir, place = sweep_dir / name, f"run {number} of {len(points)}: {name}"
        finished, settings = workdir / FINISHED_FILE, config_lib.to_dict(config)
        if finished.exists() and config_lib.without_removed(read_json(finished)) == settings:
            console.line(f"{place}: finished before")
        else:
            console.line(place)
            status, signum = run_child(command_line(config, workdir))
            if status == 0:
                write_json(finished, settings)
            if signum is not None:
                console.line(f"stopped in {place}; the same command goes on from here")
                raise Interrupted(signum)
            if status:
                failed[name] = status if status > 0 else 128 - status
                console.warn(f"{name}: ended with status {failed[name]}{'; the sweep goes on' * (not asks)}")
        if asks and failed:  # which config fails is part of the question
            without = f" Without them: {said}" if said else ""
            said = f"Nothing is settled while runs fail: {name}.{without}"
            break
        if asks and number % 2 == 0:
            tried = [sweep_dir / point.name for point in points[:number]]
            settled, said = answer(tried, values.until_p, values.most, console)
            if settled:
                break
    there = [path for name, _ in points if ((path := sweep_dir / name) / run_lib.CONFIG_FILE).exists()]
    if there:
        console.line("")
        sizes = all(text.isdecimal() for file, _ in arguments for text in file.values())
        ladder = sizes and not failed and len(points) == values.seeds * len(arguments) > values.seeds
        compare.compare(there, sweep_dir / "compare", values.target, console, said, ladder)
    if failed:
        problem = f"{sweep_dir}: {len(failed)} of {len(points)} runs failed ({', '.join(failed)})"
        error = ExpectedError(f"{problem}; mend the cause, then the same command runs those again")
        error.status = next(iter(failed.values()))
        raise error
