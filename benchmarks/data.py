"""Does the loop wait for the host? How long batches take to make, and what the trainer's loop adds to its steps.

    python -m benchmarks.data

A file of random tokens is memory-mapped (it was just written: most of it is in the system's cache), and its windows are
taken in shuffled order. For each model of `benchmarks.step`, in a process of its own: the time to build a batch and to
place it, against that of a step; what the trainer's way through the file (its `prefetch`, without log rows and
checkpoints) takes longer than the same steps on one batch that is there already, in turns; and how often the devices
had run dry: when the host came to dispatch a step, the one before was done.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.harness import ROOT, TrainerStep, about, flags_of, interleaved, override, report, wake_devices
from benchmarks.step import RECIPE, SHAPES, config_of
from configs import nanogpt_char_cpu
from corpus.dataset import Split
from input_pipeline import Batches, prefetch
from runtime.large_pages import restart_with_large_pages


def random_split(path: Path, num_tokens: int, vocab_size: int) -> Split:
    """A split of so many tokens in a file, written piece by piece."""
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    rng, piece = np.random.default_rng(0), 1_000_000
    tokens = np.memmap(path, dtype, "w+", shape=(num_tokens,))
    for start in range(0, num_tokens, piece):
        tokens[start : start + piece] = rng.integers(0, vocab_size, len(tokens[start : start + piece]), dtype)
    tokens.flush()
    return Split(np.asarray(np.memmap(path, dtype, "r")), 0)


def through_the_file(step: TrainerStep, batches: Batches, start: int, steps: int) -> int:
    """The steps as the trainer makes them; at how many the devices had nothing left to do."""
    dry, metrics = 0, None
    for batch in prefetch(lambda index: step.place(batches(index)), range(start, start + steps)):
        dry += metrics is not None and metrics["loss"].is_ready()
        metrics = step(batch)
    metrics["loss"].block_until_ready()
    return dry


def measure(config: ConfigDict, vocab_size: int, num_tokens: int, rounds: int, seconds: float) -> dict[str, Any]:
    """A row of the table, of rounds that take about so many seconds."""
    wake_devices(config)
    step = TrainerStep(config, vocab_size)
    resident = step.random_batch()
    one = interleaved({"one": partial(step.several, [resident])}, rounds=3)["one"]
    steps = max(3, round(seconds / statistics.median(one)))
    with tempfile.TemporaryDirectory() as folder:
        split = random_split(Path(folder) / "tokens.bin", num_tokens, vocab_size)
        batches = Batches(split, config.context_len, config.batch_size, config.seed)
        made, dry = iter(range(0, 10**9, steps)), []
        taken = interleaved(
            {
                "file": lambda: dry.append(through_the_file(step, batches, next(made), steps)),
                "resident": partial(step.several, [resident] * steps),
            },
            rounds,
            warmup=1,
        )
        build, places = [], []
        for index in range(50):
            start = time.perf_counter()
            batch = batches(index)
            built = time.perf_counter()
            step.place(batch).block_until_ready()
            build.append(built - start)
            places.append(time.perf_counter() - built)
    ms = {name: 1000 * statistics.median(values) / steps for name, values in taken.items()}
    more = statistics.median(f / r - 1 for f, r in zip(taken["file"], taken["resident"], strict=True))
    return {
        "model": about(config),
        "build a batch (ms)": 1000 * statistics.median(build),
        "place it (ms)": 1000 * statistics.median(places),
        "a step (ms)": ms["resident"],
        "from the file (ms)": ms["file"],
        "longer by": f"{more:+.1%}",
        "devices had run dry": f"{sum(dry[1:])} of {rounds * (steps - 1)} steps",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[RECIPE, *SHAPES], help="names of benchmarks.step, or numbers")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="in the file")
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps in a round, about")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    flags, _ = flags_of(parser, nanogpt_char_cpu.get_config(), argv, rounds=5)
    if flags.work:
        config, vocab_size = config_of(flags.work)
        row = measure(override(config, flags.changes), vocab_size, flags.tokens, flags.rounds, flags.seconds)
        return print(json.dumps(row))
    rows = []
    for shape in flags.shapes:  # each with as many devices as its batch allows
        own = [sys.executable, "-m", "benchmarks.data", *(sys.argv[1:] if argv is None else argv), f"--work={shape}"]
        done = subprocess.run(own, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    note = f"A file of {flags.tokens:,} tokens; medians of {flags.rounds} rounds of {flags.seconds:g} s."
    report("data", "Does the loop wait for the host?", rows, note, flags.out)


if __name__ == "__main__":
    restart_with_large_pages()
    main()
