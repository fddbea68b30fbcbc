"""From the shell prompt to a validation loss, or the best loss in a given time.

    python -m benchmarks.time_to_loss                                     # to 1.8857, cold and warm, three seeds
    python -m benchmarks.time_to_loss --config=configs/shakespeare.py --target=1.56 --seconds=142
    python -m benchmarks.time_to_loss --against=50f8da0 --caches warm     # and an earlier build, in turns
    python -m benchmarks.time_to_loss --against=50f8da0 --caches warm --here=--config.dtype=float32

Each run is the whole process `python main.py --config=...`, timed from outside. Its losses are exact: the whole
validation split. Cold is with an empty compile cache, warm with what one run before left. The text must be there
already; packages are installed. With --seconds a run counts for what stood on the disk by then, and is ended.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run(
    config: str, seed: int, cache: Path, overrides: list[str], seconds: float = math.inf, build: Path = ROOT
) -> dict[str, Any]:
    """One run of a build's main.py, ended after so many seconds: how long it took, and the rows of its metrics.

    Each row has, as "at", the seconds from the shell prompt until it stood on the disk.

    Raises:
      SystemExit: main.py failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        metrics = Path(scratch) / "run" / "metrics.jsonl"
        command = [sys.executable, "main.py", f"--config={config}", f"--workdir={metrics.parent}"]
        command += [f"--config.seed={seed}", *overrides]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=build, env=environment, stdout=subprocess.DEVNULL)
        rows: list[dict[str, Any]] = []
        while (running := process.poll() is None) and time.monotonic() - start < seconds:
            rows += read(metrics, len(rows), time.monotonic() - start)
            time.sleep(0.02)
        taken = time.monotonic() - start
        if running:
            process.kill()
            process.wait()
        elif process.returncode:
            raise SystemExit(f"main.py ended with status {process.returncode}")
        return {"seconds": taken, "rows": rows + read(metrics, len(rows), taken)}


def read(metrics: Path, known: int, at: float) -> list[dict[str, Any]]:
    """The rows after the first `known` ones; a line that is being written is left for the next time."""
    lines = metrics.read_text().split("\n")[known:-1] if metrics.exists() else []
    return [{**json.loads(line), "at": at} for line in lines]


def summary(result: dict[str, Any], target: float) -> dict[str, Any]:
    """The cells of a run: its best loss, when the target was reached, and when the process had ended.

    A loss counts from when it stood on the disk: its checkpoint, and the process's end, come a little later.
    """
    evaluated = [row for row in result["rows"] if row.get("val_loss") is not None]
    best = min(evaluated, key=lambda row: row["val_loss"], default=None)
    there = next((row for row in evaluated if row["val_loss"] <= target), None)
    last = result["rows"][-1] if result["rows"] else None
    return {
        "steps": last and last["step"],
        "best val_loss": best and f"{best['val_loss']:.4f}",
        "at step": best and best["step"],
        "to the first logged step (s)": result["rows"][0]["at"] if last else None,
        "whole process (s)": result["seconds"],
        "target on the disk after (s)": "not reached" if there is None else there["at"],
    }


SECONDS = "to the first logged step (s)", "whole process (s)", "target on the disk after (s)"


def medians(rows: list[dict[str, Any]], key: str) -> str:
    """The median of a column for each kind of start."""
    kinds = sorted({row["compile cache"] for row in rows})
    return ", ".join(f"{k} {statistics.median(r[key] for r in rows if r['compile cache'] == k):.1f} s" for k in kinds)


def ratio(rows: list[dict[str, Any]], key: str) -> str:
    """For each kind of start, the median over seeds of this build's seconds over the other's, where both have some."""
    found: dict[str, list[float]] = {}
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        if all(isinstance(row[key], float) for row in (ours, theirs)):
            found.setdefault(ours["compile cache"], []).append(ours[key] / theirs[key])
    return ", ".join(f"{kind} {statistics.median(values):.2f}" for kind, values in found.items()) or "not reached"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shakespeare_fast.py")
    parser.add_argument("--target", type=float, default=1.8857, help="validation loss in nats per token")
    parser.add_argument("--seconds", type=float, default=math.inf, help="the time that a run may take")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--caches", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--against", metavar="REVISION", help="an earlier build to time beside, as git names it")
    parser.add_argument("--here", action="append", default=[], metavar="FLAG", help="for this build's main.py alone")
    parser.add_argument("--out", type=Path, help="the folder of the JSON; default benchmarks/results")
    flags, overrides = parser.parse_known_args(argv)

    from benchmarks.harness import RESULTS, build_of, report

    rows, earlier = [], build_of(flags.against) if flags.against else nullcontext()
    with tempfile.TemporaryDirectory() as folder, earlier as place:
        builds = {"this": ROOT} | ({flags.against: place} if place else {})
        caches = {(build, seed): Path(folder) / f"{build}-{seed}" for build in builds for seed in flags.seeds}
        if not any(word.startswith("--config.data_dir") for word in overrides):
            overrides = [f"--config.data_dir={ROOT / 'data'}", *overrides]
        own = {build: overrides + flags.here * (build == "this") for build in builds}
        filled = {build: caches[build, flags.seeds[0]] for build in builds}  # by a run that does not count, if not cold
        if "cold" not in flags.caches:
            for build, where in builds.items():
                run(flags.config, flags.seeds[0], filled[build], own[build], build=where)
        for kind, seed, (build, where) in itertools.product(sorted(flags.caches), flags.seeds, builds.items()):
            cache = filled[build] if kind == "warm" else caches[build, seed]
            result = run(flags.config, seed, cache, own[build], flags.seconds, where)
            about = {"build": build} if place else {}
            rows.append({**about, "compile cache": kind, "seed": seed, **summary(result, flags.target)})
            print(rows[-1], file=sys.stderr)
    words = [f"Whole process, medians: {medians(rows, 'whole process (s)')}."]
    if place:
        words = [f"{key}, this build over {flags.against}: {ratio(rows, key)}." for key in SECONDS]
    limit = f", ended after {flags.seconds:.0f} s" if flags.seconds < math.inf else ""
    name = f"time_to_loss_{Path(flags.config).stem}" + "_against" * bool(place)
    name += "_here" * bool(flags.here)
    title = f"{flags.config} to a validation loss of {flags.target}{limit}{'; this with '.join(['', *flags.here])}"
    report(name, title, rows, " ".join(words), flags.out or RESULTS)


if __name__ == "__main__":
    main()
