"""How many steps a run makes, where its config says so in seconds or in floating-point operations."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from runtime.checkpoints.integrity import fingerprints
from runtime.errors import UserError
from runtime.multihost import from_all
from training.clock import SideWork
from training.dispatch import throttled
from training.ema import average_of
from training.step import Step
from transformer.model import Params

TRIAL = 3.0  # seconds of steps, at most a tenth of the budget
MOST = 1000  # steps of the trial
EVALUATED = 2**14  # tokens, or those of a batch if it has more
DISK = 1e9  # assumed bytes a second
ENDLESS = 2**31 - 1  # steps; beyond, 32 bits do not count them


def total_steps(
    epochs: int | None, accumulation: int, most: int, timed: int = 0, max_flops: float = 0, flops_a_step: float = 1
) -> int:
    """A run's real steps, by the first of its limits: micro-steps of its epochs, steps, those timed, and its FLOPs.

    0, and None for epochs, is no limit. Raises UserError if the FLOPs are less than a step takes.
    """
    by_epochs = 0 if epochs is None else max(1, math.ceil(epochs / accumulation))
    by_flops = int(min(max_flops / flops_a_step, ENDLESS))
    if max_flops and not by_flops:
        raise UserError(f"config.max_flops: {max_flops:g} is less than the {flops_a_step:g} of a step; raise it")
    return min([ENDLESS, *filter(None, (by_epochs, most, timed, by_flops))])


class Pace(NamedTuple):
    """What a run's work takes, in seconds."""

    step: float  # a real one
    evaluation: float  # a token
    save: float


def measure(
    step: Step,
    key: jax.Array,
    batch_at: Callable[[int], jax.Array],
    accumulation: int,
    evaluate: Callable[[Params], Any],
    evaluated: int,
    seconds: float,
) -> Pace:
    """Make some steps and throw them away: a run of `seconds` depends on their number alone. Compilation is left out.

    `evaluate` reads `evaluated` tokens.
    """

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        work()  # compiles
        began = time.monotonic()
        return work(), time.monotonic() - began

    batches, state, run = [batch_at(i) for i in range(accumulation)], step.init(key), throttled(step.run)

    def a_step_of(count: int) -> float:
        nonlocal state
        began = time.monotonic()
        for _ in range(count):
            for batch in batches:
                state, metrics = run(state, batch)
            jax.block_until_ready(metrics)
        return (time.monotonic() - began) / count

    a_step_of(1)  # compiles
    enough = min(TRIAL, seconds / 10) / max(a_step_of(2), 1e-6)
    a_step = a_step_of(_agreed(min(MOST, max(2, int(enough)))))
    _, an_evaluation = timed(lambda: evaluate(state.params))
    copies = 1 + (average_of(state.opt_state) is not None)
    _, a_save = timed(lambda: fingerprints(state))
    shards = [shard.data for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    return Pace(a_step, copies * an_evaluation / evaluated, a_save + sum(shard.nbytes for shard in shards) / DISK)


def steps_in(seconds: float, pace: Pace, side_work: Mapping[str, SideWork]) -> int:
    """How many steps fit, with the evaluations and saves among them and after the last; all processes say the same.

    One at least. Samples and the report come on top.
    """

    def takes(steps: int) -> float:
        size = lambda name: side_work[name].ahead(0, steps)[1]
        return steps * pace.step + size("evaluation") * pace.evaluation + size("save") * pace.save

    most = int(min(seconds / pace.step + 1, ENDLESS))
    return _agreed(max(1, bisect_right(range(1, most + 1), seconds, key=takes)))


def _agreed(number: int) -> int:
    """The first process's number: each has a clock of its own, and steps are taken together."""
    return int(from_all(np.array([number]))[0, 0])
