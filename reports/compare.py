"""Runs side by side: what differs in their configs, what they reached, and at what cost. It reads the files of runs,
even while they go on, and needs no device."""

import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import run_lib
from config_lib import written
from reports import scaling_law
from reports.evaluations import on_the_same_tokens
from reports.html import Picture, html_page
from reports.paired import LEVEL, POWER, losses_at, paired_t
from reports.plots import Curve, plot_curves, plot_law
from runtime.errors import UserError
from runtime.files import read_file, write_text
from runtime.screen.console import Console
from runtime.screen.text import Table, human, nearest

DEFAULT_OUT = "runs/compare"
_NAMES_OF_A_RUN = {"seed", "run"}  # runs that differ in no other key are seeds of one config
_ENVIRONMENT = ("device_kind", "device_count", "arithmetic", "git_commit")
_EQUAL = {"tokens": "tokens", "training_seconds": "time", "flops": "FLOPs"}  # key of a row -> in words
_UNITS = {"val_loss": "nats per token", "bits_per_byte": "bits per byte"}
_NONE = "-"


@dataclass(frozen=True)
class RunRecord:
    """What a run's directory says about the run."""

    name: str
    config: dict[str, Any]  # every key, in JSON's types
    environment: dict[str, Any]  # where it ran
    rows: list[dict[str, float | None]]  # of metrics.jsonl, by step; None for a value that is not a finite number,
    # and for flops, the model's so far, if the run did not note what a token takes
    timed_steps: int = 0  # that `max_seconds` were found to be enough for

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("val_loss") is not None]


Result = dict[str, float | None]  # a run in numbers, by the keys of _COLUMNS; None for what is not known yet

# The title of each number's column, in which {} stands for the target, and how a number is written.
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", "{:,.0f}".format),
    "tokens": ("tokens", human),
    "val_loss": ("val_loss", "{:.4f}".format),  # of the last evaluation, nats per token
    "best": ("best", "{:.4f}".format),  # the lowest one
    "best_step": ("at step", "{:,.0f}".format),
    "averaged": ("best, averaged", "{:.4f}".format),  # the lowest of the averaged weights
    "bits_per_byte": ("bits/byte", "{:.4f}".format),  # of the best evaluation
    "tokens_to": ("tokens to {}", human),
    "seconds_to": ("seconds to {}", "{:,.1f}".format),
    "seconds": ("seconds", "{:,.1f}".format),  # of the whole run, all its sessions, without compilation
    "tokens_per_second": ("tokens/s", human),  # the median of the logged ones
    "peak_mib": ("peak MiB", "{:,.0f}".format),
    "sink_share": ("to sinks", "{:.1%}".format),  # of all attention, as all that follows at the last evaluation
    "first_share": ("to first token", "{:.1%}".format),
    "separator_share": ("to separators", "{:.1%}".format),
    "sink_rate": ("sink rate", "{:.2f}".format),  # share of heads that give the first token more than 0.3
    "attention_entropy": ("entropy", "{:.2f}".format),  # nats
    "largest_activation": ("largest activation", "{:.1f}".format),
    "kurtosis": ("kurtosis", "{:.1f}".format),
    "first_key_norm": ("key norm, first", "{:.2f}".format),  # over that of the other positions
    "first_value_norm": ("value norm, first", "{:.2f}".format),
}
_LOSS = ("steps", "tokens", "val_loss", "best", "best_step", "averaged", "bits_per_byte")
_COST = ("tokens_to", "seconds_to", "seconds", "tokens_per_second", "peak_mib")
_ATTENTION = tuple(_COLUMNS)[list(_COLUMNS).index("sink_share") :]
_MEAN_LOSS = ("steps", "val_loss", "best", "averaged", "bits_per_byte")


# --- Reading ------------------------------------------------------------------------------------------------------


def find_runs(paths: Sequence[str | Path], skip: Path, warn: Callable[[str], None]) -> list[Path]:
    """The runs that `paths` name, each once, or that are in such a directory, but for `skip`, which is earlier output.

    `warn` is told of directories that are no runs. Raises UserError if there is none, or a path does not exist.
    """
    found, none = [], []
    for path in map(Path, paths):
        if path.resolve() == skip.resolve():
            continue
        own = path / run_lib.CONFIG_FILE
        inside = [own] if own.exists() else sorted(path.glob(f"*/{own.name}"))
        if not inside and path.exists() and len(paths) > 1:
            none.append(path)
        elif not inside:
            there = [entry.name for entry in path.parent.glob("*") if entry.is_dir()]
            what = f"no {run_lib.CONFIG_FILE} in it" if path.is_dir() else "no such directory"
            raise UserError(f"{path}: no run ({what}){nearest(path.name, there) or '; see runs/'}")
        found += [file.parent for file in inside]
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no run among them; see runs/")
    if none:
        warn(f"left out, for there is no {run_lib.CONFIG_FILE} in it: {', '.join(map(str, none))}")
    return list({path.resolve(): path for path in found}.values())


def read_runs(paths: Sequence[Path], warn: Callable[[str], None]) -> list[RunRecord]:
    """The runs, named by their paths relative to the directory that they share; `warn` is told of damaged rows.

    Raises UserError if a file cannot be read.
    """
    shared, runs = os.path.commonpath([path.resolve().parent for path in paths]), []
    for path in paths:
        saved = run_lib.read_config_file(path)
        config, rows = run_lib.known_settings(path, saved["config"]), run_lib.read_metrics(path, warn)
        name, environment = os.path.relpath(path.resolve(), shared), {key: saved.get(key) for key in _ENVIRONMENT}
        each = saved.get("flops_per_token")
        rows = [row | {"flops": None if each is None else each * row["tokens"]} for row in rows]
        timed = saved.get("timed_steps", 0)
        runs.append(RunRecord(name, config, environment, rows, timed if type(timed) is int else 0))
    return runs


# --- Numbers ------------------------------------------------------------------------------------------------------


def metric_of(runs: Sequence[RunRecord]) -> str:
    """The metric to compare runs by: nats per token, or bits per byte if the tokenizers differ."""
    return "val_loss" if len({run.config["tokenizer"] for run in runs}) == 1 else "bits_per_byte"


def comparable(runs: Sequence[RunRecord], metric: str) -> tuple[list[RunRecord], float | None]:
    """The runs with comparable evaluations only, and the number of tokens of these; None if the numbers differ."""
    rows, tokens = on_the_same_tokens([run.rows for run in runs], alike=metric == "val_loss")
    return [replace(run, rows=own) for run, own in zip(runs, rows, strict=True)], tokens


def as_judged(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs with the losses of the averaged weights where there are any: those are saved, sampled and exported."""

    def judged(row: dict[str, Any]) -> dict[str, Any]:
        if not row.get("ema_val_loss") or not row.get("val_loss"):
            return row
        ratio = row["ema_val_loss"] / row["val_loss"]
        return row | {metric: row[metric] and row[metric] * ratio for metric in _UNITS if metric in row}

    return [replace(run, rows=list(map(judged, run.rows))) for run in runs]


def result_of(run: RunRecord, metric: str, target: float | None) -> Result:
    """The run in numbers; the cost of reaching `target` is that of the first evaluation at or below it."""
    last, evaluations = run.rows[-1] if run.rows else {}, run.evaluations
    known = lambda key: [row[key] for row in run.rows if row.get(key) is not None]
    best = min(evaluations, key=lambda row: row["val_loss"], default={})
    reached = (row for row in evaluations if row.get(metric) is not None and target is not None)
    first = next((row for row in reached if row[metric] <= target), {})
    speeds, peaks = known("tokens_per_second"), known("peak_memory_bytes")
    return {
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "val_loss": evaluations[-1]["val_loss"] if evaluations else None,
        "best": best.get("val_loss"),
        "best_step": best.get("step"),
        "averaged": min(known("ema_val_loss"), default=None),
        "bits_per_byte": best.get("bits_per_byte"),
        "tokens_to": first.get("tokens"),
        "seconds_to": first.get("training_seconds"),
        "seconds": last.get("training_seconds"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_mib": max(peaks) / 2**20 if peaks else None,
        **{key: (known(key) or [None])[-1] for key in _ATTENTION},
    }


def group_seeds(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs grouped by config, each group under a name: the seeds of one config are together."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = repr(sorted((k, v) for k, v in run.config.items() if k not in _NAMES_OF_A_RUN))
        groups.setdefault(key, []).append(run)
    named: dict[str, list[RunRecord]] = {}
    for group in groups.values():
        name = _shared_name([run.name for run in group])
        named[name if name and name not in named else f"{group[0].name} ..."] = group
    return named


def _shared_name(names: list[str]) -> str:
    """The common prefix of names: "lr=0.1" for "lr=0.1,seed=0" and "lr=0.1,seed=1"; "3 seeds" for "seed=0" ..."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071  a common prefix of characters is meant
    return re.sub(r"[-_,./ ]*(seeds?[-_= ]*\d*)?$", "", shared) or (f"{len(names)} seeds" if "seed" in shared else "")


def mean_and_spread(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """Mean ± sample standard deviation; if some values are missing, how many there are."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"{len(there)} of {len(values)}" if there else _NONE
    spread = f" ± {text(statistics.stdev(there))}" if there[1:] else ""
    return text(statistics.fmean(there)) + spread


# --- Tables -------------------------------------------------------------------------------------------------------


def _config_table(groups: dict[str, list[RunRecord]]) -> Table:
    """What differs between the configs, and the seeds of each. The fewer of keys and configs become the columns."""
    of_group: dict[str, dict[str, str]] = {}
    for name, runs in groups.items():
        texts = {key: written(value) for key, value in runs[0].config.items() if key not in _NAMES_OF_A_RUN}
        texts["seed"] = ", ".join(written(run.config["seed"]) for run in runs)
        seen = {key: sorted({str(run.environment[key])[:40] for run in runs}) for key in _ENVIRONMENT}
        of_group[name] = texts | {key: ", ".join(values) for key, values in seen.items()}
    keys = dict.fromkeys(key for texts in of_group.values() for key in texts)
    differ = [key for key in keys if len({texts.get(key) for texts in of_group.values()}) > 1] or ["seed"]
    if len(differ) > len(of_group):
        rows = [[key, *(texts.get(key, _NONE) for texts in of_group.values())] for key in differ]
        return Table("What differs", ["key", *of_group], rows, left=1 + len(of_group))
    rows = [[name, *(texts.get(key, _NONE) for key in differ)] for name, texts in of_group.items()]
    return Table("What differs", ["config", *differ], rows, left=1 + len(differ))


def _table(
    title: str, first: list[str], named: dict[str, list[Result]], keys: Sequence[str], target: str, score_by: str | None
) -> Table:
    """A row for each name: the numbers of one result, mean and spread of several; the lowest `score_by` is bold."""
    results = [result for several in named.values() for result in several]
    keys = [key for key in keys if key != "averaged" or any(result["averaged"] is not None for result in results)]
    rows = []
    for name, results in named.items():
        cells = [mean_and_spread([result[key] for result in results], _COLUMNS[key][1]) for key in keys]
        rows.append([name, *([str(len(results))] if len(first) > 1 else []), *cells])
    scores = [[result[score_by] if score_by else None for result in results] for results in named.values()]
    score = [math.inf if None in values else statistics.fmean(values) for values in scores]
    best = frozenset({score.index(min(score))} if len(score) > 1 and min(score) < math.inf else ())
    return Table(title, [*first, *(_COLUMNS[key][0].format(target) for key in keys)], rows, bold=best)


# --- Pairs of seeds -----------------------------------------------------------------------------------------------


def _whole(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Those evaluated nearly as far as the farthest; one that failed would bring all pairs to where it stopped.

    How far a run of `max_seconds` goes depends on the machine: it is whole at the end of its own steps.
    """
    last = lambda run, key: run.evaluations[-1][key] if run.evaluations else 0
    farthest = max(last(run, "tokens") for run in runs)
    return [run for run in runs if 0 < run.timed_steps <= last(run, "step") or last(run, "tokens") >= 0.9 * farthest]


def _paired_table(groups: dict[str, list[RunRecord]], metric: str, unit: str) -> tuple[list[Table], list[str]]:
    """Each config against the first one, by seed: differences at equal cost, and in words what they say."""
    whole = {name: _whole(as_judged(group)) for name, group in groups.items()}
    ended = {run.name for group in whole.values() for run in group}
    early = [run.name for group in groups.values() for run in group if run.name not in ended]
    notes = [f"Not among the pairs, as they ended early: {', '.join(early)}."] if early else []
    by_seed = {name: {run.config["seed"]: run for run in reversed(group)} for name, group in whole.items()}
    (base, first), *others = by_seed.items()
    rows, level = [], LEVEL / len(others)
    for name, group in others:
        pairs = [(first[seed], group[seed]) for seed in sorted(first.keys() & group.keys())]
        said: dict[str, list[tuple[str, float]]] = {}  # verdict -> at equal what, and the detectable difference
        if len(pairs) < 2:
            alone = f"{len(pairs) or 'no'} pair of the same seed, so nothing tells chance from a difference"
            notes.append(f"{name} against {base}: {alone}; train more seeds.")
            continue
        for axis, word in _EQUAL.items():
            at = losses_at([run.rows for pair in pairs for run in pair], axis, metric)
            if at is None:
                continue
            d = paired_t([b - a for a, b in zip(at[1][::2], at[1][1::2], strict=True)], level)
            verdict = "nothing" if d.p >= level else "is lower" if d.mean < 0 else "is higher"
            said.setdefault(verdict, []).append((word, d.detectable))
            where = {"time": f"{at[0]:,.1f} s", "FLOPs": f"{at[0]:.3g} FLOPs"}.get(word, f"{human(at[0])} {word}")
            interval = f"{d.mean - d.margin:+.4f} to {d.mean + d.margin:+.4f}"
            tested = [f"{d.mean:+.4f}", interval, f"{d.p:.2g}", f"{d.detectable:.4f}"]
            rows.append([f"{name} - {base}", where, str(d.pairs), *tested])
        notes += _conclusion(f"{name} against {base}", said, unit)
        one, other = (run.config for run in pairs[0])  # but for seeds, those of one config are the same
        keys = [key for key in one if key not in _NAMES_OF_A_RUN and one[key] != other.get(key)]
        if len(keys) > 1:
            notes.append(f"They differ in {', '.join(keys)}: what is concluded is of all these together.")
        alike = lambda key, pairs=pairs: all(a.environment[key] == b.environment[key] for a, b in pairs)
        if elsewhere := [key for key in _ENVIRONMENT if not alike(key)]:
            notes.append(f"Their {', '.join(elsewhere)} differ too, which may be the cause, of times above all.")
    if not rows:
        return [], notes
    interval = f"{100 * (1 - level):.4g} % interval"
    columns = ["pair", "at equal", "pairs", "difference", interval, "p", "detectable"]
    judged = f"Each of {len(others)} comparisons is judged at {level:.2g}, " if len(others) > 1 else "Judged at 0.05, "
    judged += "at each kind of equal cost by itself. "
    notes.append(
        f"{judged}p: paired t-test, for a number of seeds fixed beforehand (else: sweep --until_p). Detectable: what "
        f"so many pairs find with a probability of {POWER:g}. Losses are read off the curves: a run whose rates still "
        "fall at that point is judged too early; give all the same max_steps, max_seconds or max_flops."
    )
    return [Table("Differences by seed", columns, rows, left=2)], notes


def _conclusion(pair: str, said: dict[str, list[tuple[str, float]]], unit: str) -> list[str]:
    parts = []
    for verdict, found in said.items():
        where = ", ".join(word for word, _ in found)
        if verdict != "nothing":
            parts.append(f"the loss {verdict} at equal {where}, by more than chance explains, in this setting")
            continue
        most = max(detectable for _, detectable in found)
        parts.append(
            f"nothing can be concluded at equal {where}, not that they are equal either: a difference below {most:.4f} "
            f"{unit} would often go unseen"
        )
    return [f"{pair}: {'; '.join(parts)}."] if parts else []


def law_of(runs: Sequence[RunRecord], metric: str, path: Path) -> tuple[list[str], list[Picture]]:
    """What runs of three sizes or more say of loss against FLOPs, also drawn into a PNG file; of others nothing."""
    runs, tokens = comparable(as_judged(runs), metric)
    points = [(run.rows[-1]["flops"], run.rows[-1].get(metric)) for run in runs if run.rows]
    ends = [point for point in points if None not in point]
    if len({flops for flops, _ in ends}) < 3 or len(ends) < len(runs) or (tokens is None and metric == "val_loss"):
        return [], []
    notes = scaling_law.told(ends, _UNITS[metric])
    if (law := scaling_law.fit(ends)) is None:
        return notes, []
    plot_law(ends, law, scaling_law.held_out(ends), path, metric)
    return notes, [Picture(read_file(path), "The runs' last losses against FLOPs, and their law")]


def tables_of(runs: Sequence[RunRecord], target: float | None, pairs: bool = True) -> tuple[list[Table], list[str]]:
    """The tables of a comparison, with `pairs` also of differences by seed, and notes to them.

    `target` is in nats per token, or in bits per byte if the tokenizers differ; None means the loss that all reach.
    """
    metric = metric_of(runs)
    ends = {run.name: run.evaluations[-1] for run in runs if run.evaluations}
    runs, tokens = comparable(runs, metric)
    groups = group_seeds(runs)
    compares = tokens is not None or metric != "val_loss" or len(ends) < 2
    score_by = ("best" if metric == "val_loss" else "bits_per_byte") if compares else None
    unit = _UNITS[metric]
    losses = [[row[metric] for row in run.evaluations if row.get(metric) is not None] for run in runs]
    worst = max((min(series) for series in losses if series), default=None)  # of the best: all reach it
    goal = worst if target is None and compares else target
    heading = "a loss" if goal is None else f"{goal:.4f}"
    single = {run.name: [result_of(run, metric, goal)] for run in runs}
    of_ends = {row.get("val_tokens") or 0 for row in ends.values()}
    if len(of_ends) == 1:  # all runs have finished, where they evaluate on more tokens
        single |= {name: [single[name][0] | {"val_loss": row["val_loss"]}] for name, row in ends.items()}
    table = partial(_table, target=heading, score_by=score_by)
    tables = [_config_table(groups), table("Loss", ["run"], single, _LOSS), table("Cost", ["run"], single, _COST)]
    measured = any(result["first_share"] is not None for [result] in single.values())
    if measured:
        tables.append(table("Attention and residual stream", ["run"], single, _ATTENTION, score_by=None))
    whose = ", the worst of the runs' best" if target is None and goal is not None else ""
    notes = ["Losses in nats per token. Seconds without compilation, where the run tells them apart."]
    if goal is not None:
        notes.append(f"To {heading} {unit}{whose}: by the first evaluation there.")
    if pairs and any(row.get("ema_val_loss") for run in runs for row in run.rows):
        notes.append("Of runs that average their weights, pairs compare the averaged ones.")
    if metric != "val_loss":
        notes.append("The tokenizers differ, so only bits per byte compare.")
    if not compares:
        notes.append("The evaluations cover different numbers of tokens: different texts, which do not compare.")
    elif metric == "val_loss" and of_ends - {tokens}:
        which = f"{'Best is' if len(of_ends) == 1 else 'All losses are'} over the first {tokens:,.0f} tokens"
        notes.append(f"{which} of the validation split, which all were evaluated on.")
    if any(len(group) > 1 for group in groups.values()):
        means = {name: [single[run.name][0] for run in group] for name, group in groups.items()}
        table = partial(table, first=["config", "n"], named=means)
        tables += table("Loss, mean over seeds", keys=_MEAN_LOSS), table("Cost, mean over seeds", keys=_COST)
        if measured:
            tables.append(table("Attention, mean over seeds", keys=_ATTENTION, score_by=None))
        notes.append("Means ± sample standard deviation of n runs; 1 of 2: one run has no value.")
    if pairs and compares and len(groups) > 1:
        more, said = _paired_table(groups, metric, unit)
        tables, notes = tables + more, notes + said
    return tables, notes


def compare(
    paths: Sequence[str | Path],
    out: Path,
    target: float | None,
    console: Console,
    settled: str = "",
    ladder: bool = False,
) -> None:
    """Print the comparison of the runs that `paths` name, and write it as a page and pictures into `out`.

    `settled` is what a test says that chose the number of seeds, where those for a fixed one do not hold; in a `ladder`
    the runs differ in size, by one rule, and in seeds. Raises UserError if there is no such run or `out` cannot be
    made, StorageError if a file cannot be written.
    """
    runs = read_runs(find_runs(paths, out, console.warn), console.warn)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; name a directory that can be written") from error
    law, pictures = law_of(runs, metric_of(runs), out / "scaling_law.png") if ladder else ([], [])
    tables, notes = tables_of(runs, target, pairs=not settled and not pictures)
    notes += [settled] * bool(settled) + law
    for table in tables:
        console.table(table)
    for note in notes:
        console.line(note)
    shown = group_seeds(comparable(runs, metric_of(runs))[0])
    curves = [Curve(name, run.rows) for name, group in shown.items() for run in group]
    for x, file in ("tokens", "loss_by_tokens.png"), ("training_seconds", "loss_by_seconds.png"):
        plot_curves(curves, out / file, x, metric_of(runs))
        pictures.append(Picture(read_file(out / file), f"The runs' losses against {x.split('_')[-1]}"))
    tables.sort(key=lambda table: table.columns[0] != "pair" and table.columns[:2] != ["config", "n"])  # of seeds first
    title = f"{len(runs)} runs compared" if len(runs) > 1 else runs[0].name
    write_text(out / "compare.html", html_page(title, [pictures, *tables, *notes]))
    console.line(f"wrote {out / 'compare.html'} and its pictures")
