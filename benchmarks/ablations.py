"""What each choice of configs/shakespeare.py costs a step: each is changed alone, and the steps take turns.

    python -m benchmarks.ablations

Ratios are taken within a round. `steps in the same time` is how many steps of the changed config take as long as
`--steps_of_a_run` of the config itself: the `max_steps` for a comparison at equal time.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import TrainerStep, about, flags_of, interleaved, override, report, spread, wake_devices
from configs import shakespeare
from runtime.large_pages import restart_with_large_pages

ITSELF = "the config itself"
CHOICES: dict[str, dict[str, Any]] = {  # config changes
    "without sinks": {"attention_sink": False},
    "AdamW alone": {"use_muon": False},
    "tied": {"tie_embeddings": True},
    "gelu": {"mlp": "gelu"},
    "learned positions": {"position": "learned"},
}
_VOCABULARY = 65  # characters of tiny shakespeare


def cost_rows(seconds: Mapping[str, Sequence[float]], steps: int, steps_of_a_run: int) -> list[dict[str, Any]]:
    """A row for each name from its seconds in each round of `steps` steps, held against the first name."""
    first, *_ = seconds.values()
    rows = []
    for name, values in seconds.items():
        ms = spread([1000 * value / steps for value in values])
        ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
        rows.append(
            {
                "config": name,
                "ms a step": ms["median"],
                "quartiles": f"{ms['low']:.3g} - {ms['high']:.3g}",
                "ratio": f"{ratio:.3f}",
                "steps in the same time": round(steps_of_a_run / ratio),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--steps", type=int, default=10, help="timed together in each round")
    parser.add_argument("--steps_of_a_run", type=int, default=400)
    flags, config = flags_of(parser, shakespeare.get_config(), argv, rounds=15)
    wake_devices(config)
    configs = {ITSELF: config} | {name: override(config, CHOICES[name]) for name in flags.choices}
    made = {name: TrainerStep(each, _VOCABULARY) for name, each in configs.items()}
    calls = {name: partial(step.several, [step.random_batch()] * flags.steps) for name, step in made.items()}
    rows = cost_rows(interleaved(calls, flags.rounds), flags.steps, flags.steps_of_a_run)
    note = f"Medians of {flags.rounds} rounds."
    report("ablations_cost", f"What each choice costs a step, {about(config)}", rows, note, flags.out)


if __name__ == "__main__":
    restart_with_large_pages()
    main()
