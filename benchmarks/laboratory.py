"""Sinks, gates and optimizers, each against a control from the same seeds: docs/findings-on-sinks.md and its runs.

    python -m benchmarks.laboratory cost             # what a step of each arm takes, as a ratio to its control's
    python -m benchmarks.laboratory train            # every run that has no row yet, one on each core
    python -m benchmarks.laboratory page             # the page from the rows
    python -m benchmarks.laboratory again main logit 3   # one row anew; is it the same to the bit?

A cell is a config with its arms, each of which changes some keys; all arms of a cell have the same seeds, so the same
batches and, where the shapes agree, the same initial weights. A row, a line of results/laboratory/CELL.jsonl, is one
run: its command, losses over the whole validation split, what its heads do, its loss in longer contexts. `train` goes
on where it stopped. Runs are in float32 on one core; on other processors bits, and so the last digits, may differ.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import run_lib
from benchmarks.harness import ENVIRONMENT, RESULTS, ROOT, TrainerStep, interleaved, machine, override, wake_devices
from configs import shakespeare
from reports.paired import LEVEL, Difference, paired_t
from reports.sinks import measure, scalars_of, separators_of, stretch
from runtime.large_pages import restart_with_large_pages
from training.evaluate import Evaluator
from transformer.model import params_of
from transformer.sharding import make_mesh

ROWS = RESULTS / "laboratory"
PAGE = ROOT / "docs" / "findings-on-sinks.md"
PLACE = ROOT / "runs" / "laboratory"
TOKENIZER = PLACE / "tokenizer"
BASE = "configs/shakespeare.py"
STEPS = 1000
LONGER = 1.1  # of the control's second arm, which tells what more time is worth
SEEDS = range(5)
TUNING = 5  # the seed that chooses optimizers' rates; no other row has it
ALL = {
    "max_steps": STEPS,
    "eval_every": 250,
    "save_every": STEPS,
    "dtype": "float32",
    "cpu_devices": "1",
    "report": False,
    "sample_tokens": 1,
}
FIRST = "no sink, no gate"
FORMS: dict[str, dict[str, Any]] = {
    FIRST: {"attention_sink": "none"},
    "sink: logit": {},
    "sink: zero": {"attention_sink": "zero"},
    "sink: key": {"attention_sink": "key"},
    "gate by head": {"attention_sink": "none", "attention_gate": "head"},
    "gate by channel": {"attention_sink": "none", "attention_gate": "channel"},
    "sink: logit, gate by head": {"attention_gate": "head"},
    "exclusive": {"attention_sink": "none", "exclusive_attention": True},
    "value embeddings": {"attention_sink": "none", "value_embeddings": True},
    "residual scalars": {"attention_sink": "none", "residual_scalars": True},
    "longer": {"attention_sink": "none", "max_steps": round(LONGER * STEPS)},
}
FEW = {name: FORMS[name] for name in (FIRST, "sink: logit", "gate by head")}
HALF = {"float32": {}, "bfloat16 products": {"dtype": "bfloat16_matmul"}}
RECIPE: dict[str, dict[str, Any]] = {
    "shakespeare_best.py": {},
    "gate by channel": {"attention_gate": "channel"},
    "value embeddings": {"value_embeddings": True},
    "residual scalars": {"residual_scalars": True},
    "gelu": {"mlp": "gelu"},
    "dropout 0.1": {"dropout": 0.1},
    "decay 0.2": {"weight_decay": 0.2},
    "exclusive": {"exclusive_attention": True},
    "exclusive, gate by channel": {"exclusive_attention": True, "attention_gate": "channel"},
}
# An optimizer's keys, and the rates that were tried for it.
OPTIMIZERS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "Muon": ({}, "muon_lr", (0.015, 0.03, 0.06)),
    "NorMuon": ({"hidden_optimizer": "normuon"}, "muon_lr", (0.015, 0.03, 0.06)),
    "Muon by head": ({"muon_by_head": True}, "muon_lr", (0.015, 0.03, 0.06)),
    "Muon, decay": ({}, "weight_decay", (0.05, 0.1, 0.2)),
    "Muon, cautious decay": ({"cautious_decay": True}, "weight_decay", (0.05, 0.1, 0.2)),
    "MuonH": ({"hidden_optimizer": "muonh", "output_init": "scaled"}, "muon_lr", (0.01, 0.02, 0.04)),
    "SOAP": ({"hidden_optimizer": "soap"}, "lr", (0.002, 0.004, 0.008)),
    "AdamW": ({"hidden_optimizer": "adamw"}, "lr", (0.001, 0.002, 0.004)),
}


class Cell(NamedTuple):
    """A comparison."""

    about: str
    keys: dict[str, Any]  # on top of BASE and ALL
    arms: Mapping[str, dict[str, Any]]  # the first is what the others are held against
    seeds: Sequence[int] = SEEDS


def cells() -> dict[str, Cell]:
    """All of them. Those of optimizers need rows: rates come from the cell `rates`, steps from `cost`."""
    made = {
        "main": Cell("characters, 4 x 128, context 64", {}, FORMS),
        "context": Cell("the same with a context of 256", {"context_len": 256, "batch_size": 4}, FEW),
        "bpe": Cell("the same with a BPE of 1,024 tokens, learned from the text", {"tokenizer": str(TOKENIZER)}, FEW),
        "rates": Cell("rates of optimizers, one seed", {}, _rates(), [TUNING]),
    }
    larger = {"num_blocks": 6, "num_heads": 5, "embedding_dim": 160, "mlp_dim": 640}
    made["larger"] = Cell("the same with 6 x 160", larger, FEW)
    made["half"] = Cell("products of bfloat16", {}, HALF)
    best = {"context_len": 128, "weight_decay": 0.1, "max_steps": 2300, "eval_every": 575}
    made["recipe"] = Cell("changes of shakespeare_best.py, one seed", best, RECIPE, [TUNING])
    if (tuned := _tuned(made["rates"])) is not None:
        made["optimizers"] = Cell("optimizers of the hidden weights at equal time, sinks on", {}, tuned)
    return made


def _rates() -> dict[str, dict[str, Any]]:
    tried = {}
    for name, (keys, rate, values) in OPTIMIZERS.items():
        tried |= {f"{name}, {rate} {value:g}": keys | {rate: value} for value in values}
    return tried


def _tuned(cell: Cell) -> dict[str, dict[str, Any]] | None:
    """Each optimizer at the best of its rates, for as many steps as take the time of STEPS with Muon."""
    losses = {row["arm"]: row["val_loss"] for row in rows_of("rates")}
    costs = read_costs().get("rates", {})
    if set(cell.arms) - set(losses) or not costs:
        return None
    chosen = {}
    for name, (_, rate, values) in OPTIMIZERS.items():
        tried = [f"{name}, {rate} {value:g}" for value in values]
        best = min(tried, key=losses.__getitem__)
        chosen[name] = cell.arms[best] | {"max_steps": round(STEPS / costs[name])}
    return chosen


# --- Rows ---------------------------------------------------------------------------------------------------------


def rows_of(cell: str) -> list[dict[str, Any]]:
    """The rows of a cell that are there."""
    path = ROWS / f"{cell}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_costs() -> dict[str, dict[str, float]]:
    """By cell and arm: a step's time over that of the cell's first arm."""
    path = ROWS / "cost.json"
    return json.loads(path.read_text())["ratios"] if path.exists() else {}


def command_of(cell: Cell, arm: str, seed: int) -> list[str]:
    """The arguments of the run behind a row, without its directory."""
    keys = ALL | cell.keys | cell.arms[arm] | {"seed": seed}
    keys["save_every"] = keys["max_steps"]
    return ["train", f"--config={BASE}", *(f"--config.{key}={_relative(value)}" for key, value in keys.items())]


def _relative(value: Any) -> Any:
    return value.replace(f"{ROOT}/", "") if isinstance(value, str) else value


def train_one(name: str, arm: str, seed: int) -> dict[str, Any]:
    """A row, from a run in a directory that is removed again."""
    cell = cells()[name]
    if "tokenizer" in cell.keys:
        _learn_tokenizer()
    workdir, words = PLACE / f"run-{threading.get_ident()}", command_of(cell, arm, seed)
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, "main.py", *words, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    with _measuring:
        row = {"cell": name, "arm": arm, "seed": seed, **measured(workdir), "command": " ".join(["main.py", *words])}
    shutil.rmtree(workdir)
    return row | {"machine": {key: machine()[key] for key in ("processor", "versions", "commit")}}


_measuring = threading.Lock()


def measured(workdir: Path) -> dict[str, Any]:
    """What is kept of a run: its losses, what `reports.sinks` measures, and the loss at two and four times its context.

    Longer contexts have the same split in longer windows: each token is seen after up to so many more.
    """
    rows = [row for row in run_lib.read_metrics(workdir, print) if row.get("val_loss") is not None]
    model, tokenizer, config, _ = run_lib.load_model(workdir)
    data = run_lib.load_data(config, lambda text: None, tokenizer)
    heads = scalars_of(measure(model, stretch(data.val, config.context_len), separators_of(tokenizer)))
    longer, mesh = {}, make_mesh(devices=jax.devices()[:1])
    for factor in (2, 4):
        wide = replace(model.config, context_len=factor * config.context_len)
        longer[factor], _ = Evaluator(wide, mesh, config.batch_size)(params_of(model), data.val)
    return {
        "val_loss": rows[-1]["val_loss"],
        "curve": [[row["step"], row["val_loss"]] for row in rows],
        "loss_spikes": rows[-1]["loss_spikes"],
        "heads": {key: float(f"{value:.6g}") for key, value in heads.items()},
        "longer": longer,
    }


@cache
def _learn_tokenizer() -> None:
    if not TOKENIZER.exists():
        words = ["tokenizer", "--dataset=tiny_shakespeare", "--vocab_size=1024", f"--out={TOKENIZER}"]
        subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, env=ENVIRONMENT, check=True)


def train(names: Sequence[str]) -> None:
    """Every row that is missing, the seeds in their order, on all cores, a run on each."""
    ROWS.mkdir(parents=True, exist_ok=True)
    PLACE.mkdir(parents=True, exist_ok=True)
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    pool = ThreadPoolExecutor(cores.qsize(), initializer=lambda: os.sched_setaffinity(0, {cores.get()}))
    with pool:
        for name in names:
            if (cell := cells().get(name)) is None:
                raise SystemExit(f"{name}: needs the rows of `train rates` and `cost rates` first")
            there = {(row["arm"], row["seed"]) for row in rows_of(name)}
            missing = [(arm, seed) for seed in cell.seeds for arm in cell.arms if (arm, seed) not in there]
            for row in pool.map(lambda point, name=name: train_one(name, *point), missing):
                with (ROWS / f"{name}.jsonl").open("a") as file:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                print(f"{name}: {row['arm']}, seed {row['seed']}: {row['val_loss']:.4f}", flush=True)


def again(name: str, arm: str, seed: int) -> None:
    """One row trained anew."""
    [kept] = [row for row in rows_of(name) if (row["arm"], row["seed"]) == (arm, seed)]
    new = json.loads(json.dumps(train_one(name, arm, seed)))
    differing = [key for key in kept if key != "machine" and kept[key] != new[key]]
    print(f"{name}: {arm}, seed {seed}: {kept['val_loss']!r}, anew {new['val_loss']!r}")
    if differing:
        raise SystemExit(f"other {', '.join(differing)}; then on {kept['machine']}, now on {new['machine']}")
    print("the same to the bit")


def cost(names: Sequence[str], rounds: int, steps: int) -> None:
    """Milliseconds of each arm's step, in turns within a cell, as ratios to its first arm's; on one device."""
    ratios = read_costs()
    for name in names:
        if name == "optimizers":
            continue
        cell = cells()[name]
        arms = dict(cell.arms)
        arms.pop("longer", None)
        if name == "rates":
            arms = {each: keys | {rate: values[0]} for each, (keys, rate, values) in OPTIMIZERS.items()}
        vocab_size, config = 1024 if "tokenizer" in cell.keys else 65, override(_base(), ALL | cell.keys)
        made = {arm: TrainerStep(override(config, keys), vocab_size) for arm, keys in arms.items()}
        calls = {arm: partial(step.several, [step.random_batch()] * steps) for arm, step in made.items()}
        seconds = interleaved(calls, rounds)
        first, *_ = seconds.values()
        each = lambda values, first=first: statistics.median(a / b for a, b in zip(values, first, strict=True))
        ratios[name] = {arm: round(each(values), 4) for arm, values in seconds.items()}
        print(name, {arm: f"{1000 * statistics.median(values) / steps:.1f} ms" for arm, values in seconds.items()})
        told = {"machine": machine(), "rounds": rounds, "steps": steps, "ratios": ratios}
        (ROWS / "cost.json").write_text(json.dumps(told, indent=1) + "\n")


def _base() -> ConfigDict:
    return shakespeare.get_config()


# --- The page -----------------------------------------------------------------------------------------------------


def by_arm(name: str, key: str = "val_loss") -> dict[str, dict[int, float]]:
    """A number of each row, by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows_of(name):
        found.setdefault(row["arm"], {})[row["seed"]] = row[key]
    return found


def at_equal_time(losses: Mapping[int, float], ratio: float, first: Mapping[int, float]) -> list[float]:
    """Differences by seed from a control that trained `ratio` times as long as `first`.

    What more time is worth is read off the main cell's two controls, seed by seed: the loss falls with the logarithm
    of the steps between them, each with its schedule over its own steps.
    """
    main = by_arm("main")
    share = math.log(ratio) / math.log(LONGER)
    more = {seed: share * (main["longer"][seed] - main[FIRST][seed]) for seed in first}
    return [losses[seed] - first[seed] - more[seed] for seed in sorted(losses)]


def _told(d: Difference, level: float) -> str:
    if d.p >= level:
        return f"nothing; {d.detectable:.4f} would have been found"
    return "lower" if d.mean < 0 else "higher"


def losses_table(name: str) -> list[str]:
    """Losses against the first arm's, and at equal time: lines of Markdown."""
    cell, losses, costs = cells()[name], by_arm(name), read_costs().get(name, {})
    control, *others = [arm for arm in cell.arms if arm in losses]
    level = LEVEL / max(1, len(others) - ("longer" in others))
    timed = name != "optimizers"
    head = ["arm", "val_loss", f"less {control}", "p", "concluded"]
    head += ["a step takes", "difference at equal time", "p"] if timed else ["steps"]
    lines = []
    for arm in (control, *others):
        values = losses[arm]
        words = [arm, f"{statistics.fmean(values.values()):.4f} ± {statistics.stdev(values.values()):.4f}"]
        if arm != control:
            d = paired_t([values[seed] - losses[control][seed] for seed in sorted(values)], level)
            words += [f"{d.mean:+.4f} ± {d.margin:.4f}", f"{d.p:.2g}", _told(d, level)]
        else:
            words += [""] * 3
        if not timed:
            words.append(str(cell.arms[arm].get("max_steps", STEPS)))
        elif arm in (control, "longer"):
            words += [""] * 3
        else:
            d = paired_t(at_equal_time(values, costs[arm], losses[control]), level)
            words += [f"{costs[arm]:.3f}", f"{d.mean:+.4f} ± {d.margin:.4f}", f"{d.p:.2g}"]
        lines.append(words)
    return _table(head, lines)


def heads_table(name: str) -> list[str]:
    """What heads do and how far the model goes beyond its context, as means over seeds: lines of Markdown."""
    head = ["arm", "to sinks", "to the first token", "sink rate", "to separators", "entropy", "largest activation"]
    head += ["kurtosis", "spikes", "loss at 2 x context", "at 4 x"]
    rows, lines = rows_of(name), []
    for arm in cells()[name].arms:
        of_arm = [row for row in rows if row["arm"] == arm]
        if not of_arm or arm == "longer":
            continue
        mean = lambda key, of_arm=of_arm: statistics.fmean(row["heads"][key] for row in of_arm)
        shares = [f"{mean(key):.1%}" for key in ("sink_share", "first_share")]
        words = [arm, *shares, f"{mean('sink_rate'):.2f}", f"{mean('separator_share'):.1%}"]
        words += [f"{mean('attention_entropy'):.2f}", f"{mean('largest_activation'):.1f}", f"{mean('kurtosis'):.1f}"]
        words.append(str(sum(row["loss_spikes"] for row in of_arm)))
        words += [
            f"{statistics.fmean(row['longer'][factor] - row['val_loss'] for row in of_arm):+.3f}" for factor in "24"
        ]
        lines.append(words)
    return _table(head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(words) + " |" for words in (head, ["---"] * len(head), *lines)]


def rates_table(_: str) -> list[str]:
    """The loss at each rate that was tried: lines of Markdown."""
    losses, lines = by_arm("rates"), []
    for name, (_, rate, values) in OPTIMIZERS.items():
        tried = {value: losses[f"{name}, {rate} {value:g}"][TUNING] for value in values}
        best = min(tried.values())
        told = [
            f"**{loss:.4f}** at {value:g}" if loss == best else f"{loss:.4f} at {value:g}"
            for value, loss in tried.items()
        ]
        lines.append([name, f"`{rate}`", ", ".join(told)])
    return _table(["optimizer", "rate", f"val_loss after {STEPS} steps, seed {TUNING}"], lines)


_BLOCK = re.compile(r"(<!-- (losses|heads|rates) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rebuilt(page: str) -> str:
    """The page with every table between `<!-- KIND CELL -->` and `<!-- end -->` made anew from the rows."""

    def table(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        cell, arms = cells().get(name), by_arm(name)
        missing = cell is None or sum(len(arms.get(arm, {})) < len(cell.seeds) for arm in cell.arms)
        lines = ["Not trained to its end yet."] if missing else TABLES[kind](name)
        return begin + "\n" + "\n".join(lines) + "\n\n" + end

    return _BLOCK.sub(table, page)


TABLES = {"losses": losses_table, "heads": heads_table, "rates": rates_table}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.laboratory", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("cost", "train"):
        each = commands.add_parser(command)
        each.add_argument("cells", nargs="*", help="default: all")
        if command == "cost":
            each.add_argument("--rounds", type=int, default=15)
            each.add_argument("--steps", type=int, default=10, help="timed together")
    commands.add_parser("page")
    one = commands.add_parser("again")
    one.add_argument("row", nargs=3, metavar=("CELL", "ARM", "SEED"))
    flags = parser.parse_args(argv)
    if flags.command == "cost":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as the runs have it
    wake_devices(override(_base(), ALL))
    if flags.command == "cost":
        cost(flags.cells or list(cells()), flags.rounds, flags.steps)
    elif flags.command == "train":
        for name in flags.cells or ORDER:
            train([name])
    elif flags.command == "again":
        PLACE.mkdir(parents=True, exist_ok=True)
        again(flags.row[0], flags.row[1], int(flags.row[2]))
    else:
        PAGE.write_text(rebuilt(PAGE.read_text()))


ORDER = ("main", "recipe", "context", "rates", "optimizers", "bpe", "larger", "half")

if __name__ == "__main__":
    restart_with_large_pages()
    main()
