"""Learning rates by the real step."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Schedule = Callable[[Any], Any]  # real step -> factor, 0 to 1


def schedule_of(kind: str, total: int, warmup: int = 0, decay_ratio: float = 0.0, least: float = 0.0) -> Schedule:
    """A linear warm-up over `warmup` of `total` steps, then one of four kinds.

    constant; cosine or linear, to `least`; constant_linear, which falls there in the last `decay_ratio` of all steps.
    """
    rest = max(total - warmup, 1)
    one = optax.constant_schedule(1.0)
    match kind:
        case "constant":
            main = one
        case "cosine":
            main = optax.cosine_decay_schedule(1.0, rest, alpha=least)
        case "linear":
            main = optax.linear_schedule(1.0, least, rest)
        case _:
            decay = min(round(decay_ratio * total), rest)
            down = optax.linear_schedule(1.0, least, max(decay, 1))
            main = optax.join_schedules([one, down], [rest - decay])
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(1 / (warmup + 1), 1.0, warmup), main], [warmup])


def descend(lr: float, shape: Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale by minus the learning rate at `real_step`; optax's schedules would not count steps without an update."""

    def update(updates, state, params=None, *, real_step, **_):
        factor = -lr * shape(real_step)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
