"""What each choice of configs/shakespeare.py costs a step, and what Muon saves.

    python -m benchmarks.recipe

Choices: each is changed alone, and the steps take turns; ratios are taken within a round. `steps in the same time` is
how many steps of the changed config take as long as `--steps_of_a_run` of the config itself: the `max_steps` for a
comparison at equal time.

Muon's cost: steps with Muon, with Muon's momentum but without Newton-Schulz, with AdamW for every parameter, and
gradients alone take turns in one process; differences are taken within a round, as parts of the step with Muon. Muon's
share is the row of AdamW; that of the gradients alone is all that is not gradients: both optimizers, clipping, metrics.

Muon's saving: at several constant rates each, the steps and the seconds of training until an exact loss over the whole
validation split; evaluation is not timed. A rate is a factor of the config's own `lr` and `muon_lr`; with AdamW alone,
the rate itself. `--config.KEY=VALUE` changes any key in all parts; `--parts` names some of them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from optax import GradientTransformation

from benchmarks.harness import TrainerStep, about, flags_of, interleaved, override, report, spread, wake_devices
from configs import shakespeare
from corpus.dataset import Dataset
from input_pipeline import Batches
from run_lib import load_data
from runtime.malloc import restart_with_large_pages
from training.dispatch import throttled
from training.evaluate import Evaluator
from training.muon import scale_by_muon
from training.optimizer import GROUPS, OptimizerConfig
from training.step import make_loss_and_grads
from transformer.xla import compiler_options

PARTS = "choices", "cost", "saving"
ITSELF = "the config itself"
CHOICES: dict[str, dict[str, Any]] = {  # config changes
    "without sinks": {"attention_sink": False},
    "AdamW alone": {"use_muon": False},
    "tied": {"tie_embeddings": True},
    "gelu": {"mlp": "gelu"},
    "learned positions": {"position": "learned"},
    "NorMuon": {"hidden_optimizer": "normuon"},
}


def choices(
    config: ConfigDict, vocab_size: int, names: Sequence[str], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of so many steps in each round, by name; the config itself comes first."""
    configs = {ITSELF: config} | {name: override(config, CHOICES[name]) for name in names}
    made = {name: TrainerStep(each, vocab_size) for name, each in configs.items()}
    calls = {name: partial(step.several, [step.random_batch()] * steps) for name, step in made.items()}
    return interleaved(calls, rounds)


def choice_rows(seconds: Mapping[str, Sequence[float]], steps: int, steps_of_a_run: int) -> list[dict[str, Any]]:
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


def without_newton_schulz(c: OptimizerConfig, mesh: Mesh | None) -> GradientTransformation:
    """Muon whose matrices are scaled and not orthogonalised, which no config asks for."""
    return scale_by_muon(c.muon_momentum, newton_schulz_steps=0, scale=c.muon_scale, mesh=mesh)


def cost(config: ConfigDict, vocab_size: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each variant and for the gradients: milliseconds a step, and what is left out by it."""
    step = lambda use_muon: TrainerStep(override(config, {"use_muon": use_muon}), vocab_size)
    made = {"Muon": (first := step(True))}
    with mock.patch.dict(GROUPS, muon=GROUPS["muon"]._replace(make=without_newton_schulz)):
        made["Muon without Newton-Schulz"] = step(True)
    made["AdamW"] = step(False)
    calls = {name: partial(step.several, [step.random_batch()] * steps) for name, step in made.items()}
    gradients = jax.jit(make_loss_and_grads(first.model_config, first.mesh), compiler_options=compiler_options())
    batch, key = first.random_batch(), jax.random.key(0)

    one = throttled(lambda params, batch_BT1: (params, gradients(params, batch_BT1, key)))

    def gradients_alone() -> None:
        for _ in range(steps):
            _, result = one(first.state.params, batch)
        jax.block_until_ready(result)

    calls["gradients alone"] = gradients_alone
    return cost_rows({name: [1000 * s / steps for s in values] for name, values in interleaved(calls, rounds).items()})


def cost_rows(milliseconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the first table from the milliseconds a step of each variant in each round."""
    whole, rows = np.array(milliseconds["Muon"]), []
    for name, values in milliseconds.items():
        more = spread(list(whole - np.array(values)))
        ms = spread(values)
        rows.append(
            {
                "step": name,
                "ms": ms["median"],
                "quartiles": f"{ms['low']:.3g} - {ms['high']:.3g}",
                "a step with Muon takes longer by (ms)": more["median"],
                "of that step": f"{np.median((whole - np.array(values)) / whole):.0%}",
            }
        )
    return rows


def steps_to(config: ConfigDict, data: Dataset, targets: list[float], every: int) -> dict[float, tuple[int, float]]:
    """Steps and seconds until each validation loss that was reached, looked at every so many steps."""
    step = TrainerStep(config, data.tokenizer.vocab_size)
    batches = Batches(data.train, config.context_len, config.batch_size, config.seed, config.order)
    evaluate = Evaluator(step.model_config, step.mesh, config.batch_size)
    step.several([step.random_batch()])  # compiles
    step.reset()
    seconds, reached = 0.0, {}
    for start in range(0, config.max_steps, every):
        placed = [step.place(batches(i)) for i in range(start, start + every)]
        began = time.perf_counter()
        step.several(placed)
        seconds += time.perf_counter() - began
        loss, _ = evaluate(step.state.params, data.val)
        reached |= {target: (start + every, seconds) for target in targets if loss <= target and target not in reached}
        if len(reached) == len(targets):
            break
    return reached


def saving(
    config: ConfigDict,
    data: Dataset,
    runs: dict[str, dict[str, float]],
    targets: list[float],
    every: int,
    seeds: list[int],
) -> list[dict[str, Any]]:
    """A row for each of `runs`, which are config changes by name."""
    rows = []
    for name, changes in runs.items():
        results = [
            steps_to(override(config, {**changes, "schedule": "constant", "seed": seed}), data, targets, every)
            for seed in seeds
        ]
        row: dict[str, Any] = {"optimizer": name}
        for target in targets:
            found = [result[target] for result in results if target in result]
            all_did = len(found) == len(seeds)
            row[f"steps to {target:g}"] = (
                f"{np.median([steps for steps, _ in found]):,.0f}" if all_did else "not reached"
            )
            row[f"seconds to {target:g}"] = f"{np.median([s for _, s in found]):.1f}" if all_did else ""
        print(row, file=sys.stderr)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--steps_of_a_run", type=int, default=400)
    parser.add_argument("--targets", type=float, nargs="+", default=[2.0, 1.8], help="validation losses, nats a token")
    parser.add_argument("--muon_factors", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of lr and muon_lr")
    parser.add_argument("--adamw_rates", type=float, nargs="+", default=[0.001, 0.002, 0.004, 0.008])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=10, help="timed together in each round")
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    flags, config = flags_of(parser, shakespeare.get_config(), argv, rounds=15)
    if "max_steps" not in flags.changes:
        config.max_steps = 600
    wake_devices(config)
    data = load_data(config, lambda text: print(text, file=sys.stderr))
    vocab_size, note = data.tokenizer.vocab_size, f"Medians of {flags.rounds} rounds."
    if "choices" in flags.parts:
        seconds = choices(config, vocab_size, flags.choices, flags.rounds, flags.steps)
        rows = choice_rows(seconds, flags.steps, flags.steps_of_a_run)
        report("ablations_cost", f"What each choice costs a step, {about(config)}", rows, note, flags.out)
    if "cost" in flags.parts:
        rows = cost(config, vocab_size, flags.rounds, flags.steps)
        report("optimizer_cost", f"What Muon costs a step, {about(config)}", rows, note, flags.out)
    if "saving" not in flags.parts:
        return
    runs = {f"Muon, rates x {f:g}": {"lr": config.lr * f, "muon_lr": config.muon_lr * f} for f in flags.muon_factors}
    runs |= {f"AdamW, {rate:g}": {"lr": rate, "use_muon": False} for rate in flags.adamw_rates}
    rows = saving(config, data, runs, flags.targets, flags.every, flags.seeds)
    note = f"At most {config.max_steps} steps; seeds {', '.join(map(str, flags.seeds))}; looked at every {flags.every}."
    report("optimizer_saving", f"What Muon saves, constant rates, {about(config)}", rows, note, flags.out)


if __name__ == "__main__":
    restart_with_large_pages()
    main()
