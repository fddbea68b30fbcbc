"""Memory of each device and what it sends in a step, for 1 to 256 simulated devices.

    python -m benchmarks.scale

At a fixed model and batch each device gets a smaller share of it; at fixed work per device the batch grows with the
devices. Nothing is run or held: steps are compiled from shapes (`commands.plan`), so that a laptop does.
Memory: parameters and optimizer are exact, the rest is the rule of `training.cost`. Sent: the collectives of the
compiled program, by the rings that send least.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks.harness import about, flags_of, override, report
from commands.plan import plan_step, vocabulary
from configs import gpt2_124m
from reports.plots import save_figure
from runtime import devices
from runtime.malloc import restart_with_large_pages
from runtime.screen.console import Console
from transformer.sharding import make_mesh

WORK = ("fixed model", "fixed work")
LAYOUTS = ("data", "fsdp")


def measure(config: ConfigDict, layout: str, work: str, counts: list[int], rows: int) -> list[dict[str, Any]]:
    """A row for each number of devices.

    Args:
      layout: the mesh axis that all devices are on.
      rows: sequences of each device at fixed work; at a fixed model the largest mesh has so many.
    """
    result = []
    vocab_size, eot = vocabulary(config, Console())
    for n in counts:
        changed = override(config, {"batch_size": rows * (n if work == "fixed work" else max(counts))})
        planned = plan_step(changed, vocab_size, eot, make_mesh(f"{layout}={n}", devices=jax.devices()[:n]))
        memory = planned.memory
        state = memory["parameters"] + memory["optimizer"]
        result.append(
            {
                "layout": layout,
                "work": work,
                "devices": n,
                "sequences": changed.batch_size,
                "state MB": state / 1e6,
                "MB": sum(memory.values()) / 1e6,
                "sent MB": sum(c.sent for c in planned.traffic) / 1e6,
                "collectives": sum(c.count for c in planned.traffic),
            }
        )
        print(result[-1], file=sys.stderr)
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory above, what is sent below; a kind of work a column, a layout a line."""
    figure = Figure(figsize=(4.5 * len(WORK), 6), layout="constrained")
    panels = figure.subplots(2, len(WORK), squeeze=False, sharex=True)
    for column, work in enumerate(WORK):
        for layout in dict.fromkeys(row["layout"] for row in rows):
            own = [row for row in rows if (row["work"], row["layout"]) == (work, layout)]
            counts = [row["devices"] for row in own]
            (line,) = panels[0, column].plot(counts, [row["MB"] / 1000 for row in own], "o-", label=layout)
            states = [row["state MB"] / 1000 for row in own]
            panels[0, column].plot(counts, states, ":", color=line.get_color(), label=f"{layout}: state")
            panels[1, column].plot(counts, [row["sent MB"] / 1000 for row in own], "o-", color=line.get_color())
        panels[0, column].set_title(work + (" per device" if work == "fixed work" else " and batch"))
        panels[1, column].set_xlabel("devices")
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("GB on a device")
    panels[1, 0].set_ylabel("GB sent by a device, a step")
    panels[0, 0].legend()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=256, help="devices; from 1 by doubling")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a device, at fixed work")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    start = override(gpt2_124m.get_config(), {"num_blocks": 2, "dtype": "bfloat16"})
    flags, config = flags_of(parser, start, argv, rounds=1)
    counts = [2**i for i in range(flags.most.bit_length())]
    devices.simulate_cpu_devices(counts[-1])
    rows = [row for layout in flags.layouts for w in WORK for row in measure(config, layout, w, counts, flags.rows)]
    note = "Compiled for simulated devices, not run."
    report("scale", f"A step of {about(config)}, on 1 to {counts[-1]} devices", rows, note, flags.out)
    plot(rows, flags.out / "scale.png")


if __name__ == "__main__":
    restart_with_large_pages()
    main()
