"""How a step's time and memory grow with batch, context, depth, width and vocabulary.

    python -m benchmarks.scaling

From the model of configs/shakespeare.py one size at a time is changed, the sizes of an axis taking turns. Time is that
of the trainer's step. Memory is what the compiled step holds on each device: arguments and temporary arrays, as XLA
reports them. Beside both stands what is counted from the config alone: FLOPs (`training.cost.flops_per_token`) and
bytes (`counted_bytes`). A slope is that of the straight line that fits best in log-log: 1 is proportional. A step has
fixed costs, so that at the small end measured slopes lie below the counted ones.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks.harness import TrainerStep, about, flags_of, interleaved, override, report, spread, wake_devices
from configs import shakespeare
from reports.plots import save_figure
from runtime.large_pages import restart_with_large_pages
from training.cost import flops_per_token, parameter_counts
from transformer.kernels.choose import choose

VOCAB = 65
HEAD_DIM = 32
AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32, 64),
    "context": (32, 64, 128, 256, 512),
    "depth": (1, 2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "vocabulary": (65, 512, 4096, 32768),
}
COLUMNS = ("ms", "GFLOP", "MB", "MB counted")  # each grows with a slope of its own


def sized(config: ConfigDict, axis: str, size: int) -> tuple[ConfigDict, int]:
    """The config with one size changed, and the vocabulary's size. A head stays as wide as it is."""
    if axis == "vocabulary":
        return config, size
    changes = {
        "batch": {"batch_size": size},
        "context": {"context_len": size},
        "depth": {"num_blocks": size},
        "width": {"embedding_dim": size, "mlp_dim": 4 * size, "num_heads": size // HEAD_DIM, "num_kv_heads": 0},
    }[axis]
    return override(config, changes), VOCAB


def counted_bytes(step: TrainerStep) -> int:
    """What theory has a float32 step hold on each device: nothing here was fitted to what XLA says.

    The state and a gradient for every parameter; of each block and token the inputs of its products, twice the hidden
    width of the MLP and, where attention keeps them, its probabilities; the logits and their gradient.
    """
    c = step.model_config
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(step.state))
    tokens = step.tokens // step.mesh.size
    width = c.num_heads * c.head_dim
    whole = choose(c.attention_kernel, c.context_len, c.num_heads, c.num_kv_heads, c.head_dim, c.dtype) == "plain"
    probs = c.num_heads * c.context_len if whole else 0
    block = 3 * c.embedding_dim + 2 * width + 2 * c.num_kv_heads * c.head_dim + 2 * c.mlp_dim + probs
    activations = tokens * (c.num_blocks * block + 2 * c.vocab_size)
    return state + 4 * (sum(parameter_counts(c).values()) + activations)


def measure(config: ConfigDict, axis: str, sizes: tuple[int, ...], rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each size."""
    made = {size: TrainerStep(*sized(config, axis, size)) for size in sizes}
    batches = {size: step.random_batch() for size, step in made.items()}
    calls = {str(size): partial(step.several, [batches[size]] * steps) for size, step in made.items()}
    seconds = interleaved(calls, rounds, warmup=1)
    rows = []
    for size, step in made.items():
        ms = spread([1000 * value / steps for value in seconds[str(size)]])
        rows.append(
            {
                "axis": axis,
                "size": size,
                "ms": ms["median"],
                "quartiles": f"{ms['low']:.3g} - {ms['high']:.3g}",
                "GFLOP": flops_per_token(step.model_config) * step.tokens / 1e9,
                "MB": step.memory(batches[size]) / 1e6,
                "MB counted": counted_bytes(step) / 1e6,
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def slope(sizes: list[float], values: list[float]) -> float:
    """Of the least-squares line through the points (log size, log value)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each axis: how each column grows with the size."""
    result = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        own = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in own]
        of = {column: f"{slope(sizes, [row[column] for row in own]):.2f}" for column in COLUMNS}
        result.append({"axis": axis, "from": min(sizes), "to": max(sizes), **of})
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time above, memory below, an axis a column; dashed the counts, FLOPs through the last measured point."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3 * len(axes), 5.5), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        own = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in own]
        for panel, measured, counted in zip(panels[:, column], ("ms", "MB"), ("GFLOP", "MB counted"), strict=True):
            scale = own[-1][measured] / own[-1][counted] if counted == "GFLOP" else 1.0
            panel.loglog(sizes, [row[measured] for row in own], "o-", label="measured")
            panel.loglog(sizes, [row[counted] * scale for row in own], "--", color="gray", label="counted")
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[1, column].set_xlabel(axis)
    panels[0, 0].set_ylabel("ms a step (counted: FLOPs)")
    panels[1, 0].set_ylabel("MB on a device")
    panels[0, 0].legend()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument(
        "--most", type=int, default=max(map(len, AXES.values())), help="sizes of an axis, from the left"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed together in each round")
    flags, config = flags_of(parser, shakespeare.get_config(), argv, rounds=7)
    wake_devices(override(config, {"batch_size": math.gcd(*AXES["batch"], config.batch_size)}))
    rows: list[dict[str, Any]] = []
    for axis in flags.axes:
        rows += measure(config, axis, AXES[axis][: flags.most], flags.rounds, flags.steps)
        jax.clear_caches()  # compiled steps hold memory
    note = f"Medians of {flags.rounds} rounds of {flags.steps} steps."
    report("scaling", f"A step of {about(config)}, one size changed at a time", rows, note, flags.out)
    report("scaling_slopes", "Slopes in log-log", slopes(rows), "1 is proportional.", flags.out)
    plot(rows, flags.out / "scaling.png")


if __name__ == "__main__":
    restart_with_large_pages()
    main()
