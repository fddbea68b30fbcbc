"""Sinks, gates and optimizers, each against a control from the same seeds: docs/findings-on-sinks.md and its runs.

    python -m benchmarks.laboratory cost             # what a step of each arm takes, as a ratio to its control's
    python -m benchmarks.laboratory train            # every run that has no row yet, one on each core
    python -m benchmarks.laboratory page             # the tables of the page from the rows
    python -m benchmarks.laboratory again main "sink: zero" 3   # one row anew; is it the same to the bit?

A cell is a config with its arms, each of which changes some keys; all arms of a cell have the same seeds, so the same
batches and the same initial weights, but for those that only one has. A row, a line of results/laboratory/CELL.jsonl,
is one run: its command, losses over the whole validation split, what its heads do, its loss in longer contexts.
`train` goes on where it stopped, and makes a row anew whose command has changed. Runs are in float32, each on one core;
on other processors bits, and so the last digits, may differ.
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax

import run_lib
from benchmarks.harness import (
    ENVIRONMENT,
    RESULTS,
    ROOT,
    TrainerStep,
    interleaved,
    machine,
    override,
    spread,
    wake_devices,
)
from configs import shakespeare
from reports.paired import LEVEL, POWER, Difference, paired_t
from reports.sinks import measure, scalars_of, separators_of, stretch
from runtime.files import MetricsFile, write_json, write_text
from runtime.malloc import restart_with_large_pages
from runtime.workdir import WorkdirLock
from training.evaluate import Evaluator
from transformer.model import params_of
from transformer.sharding import make_mesh

ROWS = RESULTS / "laboratory"
PAGE = ROOT / "docs" / "findings-on-sinks.md"
CONFIG = "configs/shakespeare.py"
PLACE = ROOT / "runs" / "laboratory"
TOKENIZER = "runs/laboratory/tokenizer"  # from ROOT
LEARN_TOKENIZER = f"tokenizer --dataset=tiny_shakespeare --vocab_size=1024 --out={TOKENIZER}"
STEPS = 1000
LONGER = 1.1  # of the control's second arm, which tells what more time is worth
SEEDS = range(5)
TUNING = 5  # the seed that chooses optimizers' rates
ALL = {
    "max_steps": STEPS,
    "eval_every": 250,
    "dtype": "float32",
    "cpu_devices": "1",
    "report": False,
    "sample_tokens": 1,
}
FIRST = "no sink, no gate"
MORE_STEPS = f"{FIRST}, {round(LONGER * STEPS):,} steps"
FORMS: dict[str, dict[str, Any]] = {
    FIRST: {"attention_sink": "none"},
    "sink: logit": {},
    "sink: zero": {"attention_sink": "zero"},
    "sink: key": {"attention_sink": "key"},
    "gate by head": {"attention_sink": "none", "attention_gate": "head"},
    "gate by channel": {"attention_sink": "none", "attention_gate": "channel"},
    "sink: logit, gate by head": {"attention_gate": "head"},
    "exclusive": {"attention_sink": "none", "exclusive_attention": True},
    "residual scalars": {"attention_sink": "none", "residual_scalars": True},
    MORE_STEPS: {"attention_sink": "none", "max_steps": round(LONGER * STEPS)},
}
FEW = {name: FORMS[name] for name in (FIRST, "sink: logit", "gate by head", MORE_STEPS)}
BEST = {name: FORMS[name] for name in ("gate by channel", "residual scalars")}  # at equal tokens and at equal time
_GATED = {"attention_gate": "channel"}
_BOTH = _GATED | {"residual_scalars": True}
_GELU = _BOTH | {"mlp": "gelu"}
RECIPE: dict[str, dict[str, Any]] = {
    "neither gate nor scalars": {},
    "gate by channel": _GATED,
    "gate, residual scalars": _BOTH,
    "gate, residual scalars, exclusive": _GATED | {"exclusive_attention": True, "residual_scalars": True},
    "gate, residual scalars, decay 0.2": _BOTH | {"weight_decay": 0.2},
    "gate, residual scalars, no sink": _BOTH | {"attention_sink": "none"},
    "gate, residual scalars, gelu": _GELU,
    "gate, residual scalars, gelu, muon_lr 0.015": _GELU | {"muon_lr": 0.015},
    "gate, residual scalars, gelu, muon_lr 0.0075": _GELU | {"muon_lr": 0.0075},
    "gate, residual scalars, gelu, NorMuon, muon_lr 0.015": _GELU | {"hidden_optimizer": "normuon", "muon_lr": 0.015},
    "gate, residual scalars, gelu, NorMuon, muon_lr 0.0075": _GELU | {"hidden_optimizer": "normuon", "muon_lr": 0.0075},
    "gate, residual scalars, gelu, NorMuon": _GELU | {"hidden_optimizer": "normuon"},
    "gate, residual scalars, decay 0.05": _BOTH | {"weight_decay": 0.05},
    "gate, residual scalars, batch 12": _BOTH | {"batch_size": 12, "max_steps": 3067, "eval_every": 767},
}


class Optimizer(NamedTuple):
    """An optimizer of the cells `rates` and `optimizers`.

    best: the best of the tried rates, by the rows of `rates`. steps: how many take the same time as STEPS of Muon, by
    `cost rates` before these runs.
    """

    keys: dict[str, Any]
    rate: str
    tried: tuple[float, ...]
    best: float
    steps: int


OPTIMIZERS = {
    "Muon": Optimizer({}, "muon_lr", (0.00375, 0.0075, 0.015, 0.03, 0.06), 0.0075, STEPS),
    "NorMuon": Optimizer({"hidden_optimizer": "normuon"}, "muon_lr", (0.00375, 0.0075, 0.015, 0.03, 0.06), 0.0075, 991),
    "Muon, decay": Optimizer({"muon_lr": 0.0075}, "weight_decay", (0.05, 0.1, 0.2), 0.1, 1002),
    "AdamW": Optimizer({"hidden_optimizer": "adamw"}, "lr", (0.0005, 0.001, 0.002, 0.004), 0.001, 1151),
}


class Cell(NamedTuple):
    """A comparison."""

    keys: dict[str, Any]  # on top of CONFIG and ALL
    arms: Mapping[str, dict[str, Any]]  # the first is what the others are held against
    seeds: Sequence[int] = SEEDS


_LARGER = {"num_blocks": 6, "num_heads": 5, "embedding_dim": 160, "mlp_dim": 640}
_LONG = {"context_len": 128, "weight_decay": 0.1, "max_steps": 2300, "eval_every": 575}
_RATES = {
    f"{name}, {o.rate} {value:g}": o.keys | {o.rate: value} for name, o in OPTIMIZERS.items() for value in o.tried
}
CELLS = {
    "main": Cell({}, FORMS),
    "recipe": Cell(_LONG, RECIPE, [TUNING]),
    "tuned": Cell({"muon_lr": 0.0075}, FEW | BEST | {"exclusive": FORMS["exclusive"]}),
    "context": Cell({"context_len": 256, "batch_size": 4}, FEW),
    "rates": Cell({}, _RATES, [TUNING]),
    "optimizers": Cell({}, {name: o.keys | {o.rate: o.best, "max_steps": o.steps} for name, o in OPTIMIZERS.items()}),
    "bpe": Cell({"tokenizer": TOKENIZER}, FEW),
    "larger": Cell(_LARGER, FEW),
    "half": Cell({}, {"float32": {}, "products of bfloat16": {"dtype": "bfloat16_matmul"}}),
}


# --- Rows ---------------------------------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a cell that are there, those left out that another command than today's has made."""
    if (cell := CELLS.get(name)) is None:
        return []
    rows = MetricsFile(ROWS / f"{name}.jsonl").read(print)
    asked = {(arm, seed): command_of(cell, arm, seed) for arm in cell.arms for seed in cell.seeds}
    return list({key: row for row in rows if asked.get(key := (row["arm"], row["seed"])) == row["command"]}.values())


def taken_out(name: str) -> list[dict[str, Any]]:
    """The rows of a cell's arms that are no longer here; each names the commit at which its command runs."""
    return [row for row in MetricsFile(ROWS / "taken_out.jsonl").read(print) if row["cell"] == name]


def by_arm(name: str) -> dict[str, dict[int, float]]:
    """The last loss of each row, by arm and seed; those taken out come last."""
    found: dict[str, dict[int, float]] = {}
    for row in [*rows_of(name), *taken_out(name)]:
        found.setdefault(row["arm"], {})[row["seed"]] = row["val_loss"]
    return found


def read_costs() -> dict[str, Any]:
    """By cell and arm: a step's time over that of the cell's first arm, as `harness.spread` of the rounds."""
    path = ROWS / "cost.json"
    return json.loads(path.read_text()) if path.exists() else {}


def command_of(cell: Cell, arm: str, seed: int) -> str:
    """The command of a row's run, to be pinned to one core (`taskset -c 0`)."""
    keys = ALL | cell.keys | cell.arms[arm] | {"seed": seed}
    keys["save_every"] = keys["max_steps"]
    flags = (f"--config.{key}={value}" for key, value in keys.items())
    return shlex.join(["main.py", "train", f"--config={CONFIG}", *flags])


def train_one(name: str, arm: str, seed: int, core: int) -> dict[str, Any]:
    """A row, from a run on one core in a directory that is removed again.

    Raises RuntimeError if the run fails.
    """
    command = command_of(CELLS[name], arm, seed)
    os.sched_setaffinity(0, {core})  # of this thread, and so of the process that it starts
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        workdir = Path(folder) / "run"
        words = [sys.executable, *shlex.split(command), f"--workdir={workdir}"]
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
        with _measuring:
            return {"arm": arm, "seed": seed, **measured(workdir), "command": command}


_measuring = threading.Lock()


def measured(workdir: Path) -> dict[str, Any]:
    """What is kept of a run: its losses, what `reports.sinks` measures, and the loss at two and four times its context.

    Longer contexts are the same split in longer windows, each also as a model sees it that looks back no farther than
    in training.
    """
    rows = [row for row in run_lib.read_metrics(workdir, print) if "val_loss" in row]
    if rows[-1]["val_loss"] is None:
        raise ValueError("its last loss is not finite")
    model, tokenizer, config, _ = run_lib.load_model(workdir, step=rows[-1]["step"])
    data = run_lib.load_data(config, lambda text: None, tokenizer)
    heads = scalars_of(measure(model, stretch(data.val, config.context_len), separators_of(tokenizer)))
    longer, mesh = {}, make_mesh(devices=jax.devices()[:1])
    for factor in (2, 4):
        wide = replace(model.config, context_len=factor * config.context_len)
        for window in (0, config.context_len):
            evaluate = Evaluator(replace(wide, sliding_window=window), mesh, config.batch_size)
            longer.setdefault(str(factor), []).append(evaluate(params_of(model), data.val)[0])
    return {
        "val_loss": rows[-1]["val_loss"],
        "curve": [[row["step"], row["val_loss"]] for row in rows],
        "loss_spikes": rows[-1]["loss_spikes"],
        "heads": {key: float(f"{value:.6g}") for key, value in heads.items()},
        "longer": longer,
    }


def train(names: Sequence[str]) -> None:
    """Every row that is missing, cell by cell, the seeds in their order, on all cores, a run on each.

    Raises SystemExit if runs failed, when all others have their rows.
    """
    for folder in (ROWS, PLACE):
        folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    told = {key: about[key] for key in ("processor", "versions", "commit", "setting")}
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    writing, failed = threading.Lock(), []

    def make(name: str, arm: str, seed: int) -> None:
        core = cores.get()
        try:
            row = train_one(name, arm, seed, core) | {"machine": told}
            with writing:
                MetricsFile(ROWS / f"{name}.jsonl").append(row)
            print(f"{name}: {arm}, seed {seed}: {row['val_loss']:.4f}", flush=True)
        except Exception as error:  # whatever it was, the other runs are not to blame
            failed.append(f"{name}: {arm}, seed {seed}: {error}")
        finally:
            cores.put(core)

    with WorkdirLock(PLACE, print), ThreadPoolExecutor(cores.qsize()) as pool:
        for name in names:
            learn_tokenizer(cell := CELLS[name])
            kept = rows_of(name)
            there = {(row["arm"], row["seed"]) for row in kept}
            if stale := len(MetricsFile(path := ROWS / f"{name}.jsonl").read(print)) - len(kept):
                print(f"{path}: {stale} rows of other commands than today's are dropped")
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            missing = [(arm, seed) for seed in cell.seeds for arm in cell.arms if (arm, seed) not in there]
            list(pool.map(lambda point, name=name: make(name, *point), missing))
    if failed:
        raise SystemExit("\n".join(failed))


def again(name: str, arm: str, seed: int) -> None:
    """One row trained anew. Raises SystemExit if there is none, or if it differs."""
    kept = next((row for row in rows_of(name) if (row["arm"], row["seed"]) == (arm, seed)), None)
    if kept is None:
        raise SystemExit(f"{name}, {arm}, {seed}: no such row")
    learn_tokenizer(CELLS[name])
    new = json.loads(json.dumps(train_one(name, arm, seed, min(os.sched_getaffinity(0)))))
    print(f"{name}: {arm}, seed {seed}: {kept['val_loss']!r}, anew {new['val_loss']!r}")
    if differing := [key for key in new if kept[key] != new[key]]:
        raise SystemExit(f"other {', '.join(differing)}; the row is of {kept['machine']}")
    print("the same to the bit")


def learn_tokenizer(cell: Cell) -> None:
    """The vocabulary of a cell that wants one of its own, which is the same each time."""
    if "tokenizer" in cell.keys and not (ROOT / TOKENIZER / "tokenizer.json").exists():
        words = [sys.executable, "main.py", *shlex.split(LEARN_TOKENIZER)]
        subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True)


def cost(names: Sequence[str], rounds: int, steps: int) -> None:
    """What each arm's step takes, in turns within a cell, over its first arm's; on one core."""
    for name in names:
        learn_tokenizer(cell := CELLS[name])
        arms = {arm: keys for arm, keys in cell.arms.items() if arm != MORE_STEPS}
        if name == "rates":
            arms = {each: o.keys | {o.rate: o.tried[0]} for each, o in OPTIMIZERS.items()}
        config = override(shakespeare.get_config(), ALL | cell.keys)
        vocab_size = run_lib.load_data(config, print).tokenizer.vocab_size
        made = {arm: TrainerStep(override(config, keys), vocab_size) for arm, keys in arms.items()}
        calls = {arm: partial(step.several, [step.random_batch()] * steps) for arm, step in made.items()}
        seconds = interleaved(calls, rounds)
        first, *_ = seconds.values()
        ratios = {arm: spread([a / b for a, b in zip(x, first, strict=True)]) for arm, x in seconds.items()}
        print(name, {arm: f"{1000 * statistics.median(values) / steps:.1f} ms" for arm, values in seconds.items()})
        told, before = {"machine": machine(), "steps": steps}, read_costs().get(name, {})
        taken = [arm for arm in before if arm not in told | ratios]
        gone = {arm: {"machine": before["machine"]} | before[arm] for arm in taken}
        write_json(ROWS / "cost.json", read_costs() | {name: told | ratios | gone})


# --- The page -----------------------------------------------------------------------------------------------------


def at_equal_time(losses: Mapping[int, float], ratio: float, first: Mapping[int, float], more: Mapping[int, float]):
    """Differences by seed from a control that trained `ratio` times as long as `first`.

    What more time is worth is read off the control of `more`, LONGER times the steps, seed by seed: between the two the
    loss falls with the logarithm of the steps, each having its schedule over its own.
    """
    share = math.log(ratio) / math.log(LONGER)
    return [losses[seed] - first[seed] - share * (more[seed] - first[seed]) for seed in sorted(losses)]


def _told(d: Difference, level: float) -> str:
    if d.p >= level:
        return f"not told apart; {d.detectable:.4f} would have been, {POWER:.0%} of the time"
    return "lower" if d.mean < 0 else "higher"


def _shown(arm: str, gone: bool) -> str:
    return arm + " (taken out)" * gone


def losses_table(name: str) -> list[str]:
    """Losses against the first arm's, at equal steps and at equal time: lines of Markdown."""
    cell, losses, costs = CELLS[name], by_arm(name), read_costs().get(name, {})
    gone = {row["arm"]: int(re.search(r"max_steps=(\d+)", row["command"])[1]) for row in taken_out(name)}
    control, *others = [*cell.arms, *gone]
    if len(cell.seeds) == 1:
        (seed,), first = cell.seeds, losses[control]
        differences = {arm: losses[arm][seed] - first[seed] for arm in others}
        rows = [[_shown(arm, arm in gone), f"{losses[arm][seed]:.4f}", f"{differences[arm]:+.4f}"] for arm in others]
        return _table(["arm", f"val_loss, seed {seed}", "difference"], [[control, f"{first[seed]:.4f}", ""], *rows])
    longer = losses.get(MORE_STEPS)
    compared = [arm for arm in others if arm != MORE_STEPS]
    level = LEVEL / len(compared)
    sure = f"± {1 - level:.1%} interval"
    head = ["arm", "val_loss ± deviation", f"difference {sure}", "p", f"at p < {level:.2g}"]
    if longer:
        head += ["a step takes (quartiles)", f"difference at equal time {sure}", "p", f"at p < {level:.2g}"]
    else:
        head.append("steps")
    lines = []
    for arm in [control, *others]:
        values = losses[arm]
        words = [
            _shown(arm, arm in gone),
            f"{statistics.fmean(values.values()):.4f} ± {statistics.stdev(values.values()):.4f}",
        ]
        pairs = []
        if arm in compared:
            pairs.append([values[seed] - losses[control][seed] for seed in sorted(values)])
            if longer:
                pairs.append(at_equal_time(values, costs[arm]["median"], losses[control], longer))
        for number, differences in enumerate(pairs):
            d = paired_t(differences, level)
            if number:
                words.append("{median:.3f} ({low:.3f} - {high:.3f})".format(**costs[arm]))
            words += [f"{d.mean:+.4f} ± {d.margin:.4f}", f"{d.p:.2g}", _told(d, level)]
        if not longer:
            steps = gone.get(arm) or cell.arms[arm].get("max_steps", STEPS)
            words += [""] * (5 - len(words)) + [str(steps)]
        lines.append(words + [""] * (len(head) - len(words)))
    return _table(head, lines)


def heads_table(name: str) -> list[str]:
    """What heads do and how far the model goes beyond its context, as means over seeds: lines of Markdown."""
    head = ["arm", "to sinks", "to the first token", "sink rate", "to separators", "entropy", "largest activation"]
    head += ["kurtosis", "spikes", "loss at 2 x context", "without tokens farther away", "at 4 x", "without"]
    rows, lines = [*rows_of(name), *(others := taken_out(name))], []
    gone = dict.fromkeys(row["arm"] for row in others)
    for arm in [*CELLS[name].arms, *gone]:
        of_arm = [row for row in rows if row["arm"] == arm]
        mean = lambda key, of_arm=of_arm: statistics.fmean(row["heads"][key] for row in of_arm)
        shares = [f"{mean(key):.1%}" for key in ("sink_share", "first_share")]
        words = [_shown(arm, arm in gone), *shares, f"{mean('sink_rate'):.2f}", f"{mean('separator_share'):.1%}"]
        words += [f"{mean('attention_entropy'):.2f}", f"{mean('largest_activation'):.1f}", f"{mean('kurtosis'):.1f}"]
        words.append(str(sum(row["loss_spikes"] for row in of_arm)))
        beyond = lambda factor, number, of_arm=of_arm: statistics.fmean(r["longer"][factor][number] for r in of_arm)
        words += [f"{beyond(factor, number):.4f}" for factor in "24" for number in (0, 1)]
        lines.append(words)
    return _table(head, lines)


def rates_table(name: str) -> list[str]:
    """The loss at each rate that was tried: lines of Markdown."""
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for arm, losses in by_arm(name).items():
        optimizer, _, at = arm.rpartition(", ")
        rate, value = at.split(" ")
        tried.setdefault((optimizer, rate), {})[float(value)] = losses[TUNING]
    lines = []
    for (optimizer, rate), found in tried.items():
        best = min(found.values())
        shown = lambda loss, best=best: f"**{loss:.4f}**" if loss == best else f"{loss:.4f}"
        told = [f"{shown(loss)} at {value:g}" for value, loss in sorted(found.items())]
        lines.append([_shown(optimizer, optimizer not in OPTIMIZERS), f"`{rate}`", ", ".join(told)])
    return _table(["optimizer", "rate", f"val_loss after {STEPS} steps, seed {TUNING}"], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(words) + " |" for words in (head, ["---"] * len(head), *lines)]


_BLOCK = re.compile(r"(<!-- (losses|heads|rates) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {"losses": losses_table, "heads": heads_table, "rates": rates_table}


def rebuilt(page: str) -> str:
    """The page with every table between `<!-- KIND CELL -->` and `<!-- end -->` made anew from the rows."""

    def table(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        cell, arms = CELLS[name], by_arm(name)
        missing = any(len(arms.get(arm, {})) < len(cell.seeds) for arm in cell.arms)
        timed = set(arms) - {MORE_STEPS} if MORE_STEPS in arms else set()
        missing |= not timed <= read_costs().get(name, {}).keys()
        lines = ["Not trained and timed to its end yet."] if missing else TABLES[kind](name)
        return begin + "\n" + "\n".join(lines) + "\n\n" + end

    return _BLOCK.sub(table, page)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.laboratory", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("cost", "train"):
        each = commands.add_parser(command)
        each.add_argument("cells", nargs="*", choices=[*CELLS, []], metavar="CELL", help=", ".join(CELLS))
        if command == "cost":
            each.add_argument("--rounds", type=int, default=15)
            each.add_argument("--steps", type=int, default=10, help="timed together")
    commands.add_parser("page")
    one = commands.add_parser("again")
    one.add_argument("row", nargs=3, metavar=("CELL", "ARM", "SEED"))
    flags = parser.parse_args(argv)
    PLACE.mkdir(parents=True, exist_ok=True)
    if flags.command == "cost":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as the runs have it
    if flags.command == "page":
        PAGE.write_text(rebuilt(PAGE.read_text()))
        return
    wake_devices(override(shakespeare.get_config(), ALL))
    if flags.command == "again":
        again(flags.row[0], flags.row[1], int(flags.row[2]))
    elif flags.command == "train":
        train(flags.cells or [*CELLS])
    else:
        cost(flags.cells or [name for name in CELLS if name not in ("recipe", "optimizers")], flags.rounds, flags.steps)


if __name__ == "__main__":
    restart_with_large_pages()
    main()
