"""Signs that training goes wrong: gradients that are not finite, losses that jump.

They are seen inside the step; `Divergence`, outside, warns of them, and ends a run that has too many.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from runtime.errors import DivergedError
from training.optimizer import GROUPS
from transformer.model import Params

WINDOW = 128  # real steps that the running mean of the loss looks back on, with fading weights
WARM_UP = 32  # real steps before a loss can be a spike
LEAST_DEVIATION = 0.01  # of the mean: below that, a standard deviation is taken for this much


class Health(NamedTuple):
    """What the step remembers of the numbers it has seen: scalars, saved with the state so that a resume is exact."""

    bad_batches: jax.Array  # micro-batches so far whose loss or gradient was not finite
    bad_leaf: (
        jax.Array
    )  # of the latest of these: the first bad gradient's place among the sorted names; beyond: the loss
    loss_mean: jax.Array  # of recent real steps
    loss_variance: jax.Array
    loss_steps: jax.Array  # real steps in these two
    loss_spikes: jax.Array  # real steps so far whose loss was a spike


def fresh_health() -> Health:
    """Before the first step."""
    count, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Health(count, count, number, number, count, count)


def see_gradients(health: Health, loss: jax.Array, grads: Params) -> tuple[jax.Array, Health]:
    """Whether the loss and every gradient of a micro-batch are finite."""
    finite = jnp.stack([*(jnp.isfinite(grads[name]).all() for name in sorted(grads)), jnp.isfinite(loss)])
    good = finite.all()
    bad_leaf = jnp.where(good, health.bad_leaf, jnp.argmin(finite))
    return good, health._replace(bad_batches=health.bad_batches + ~good, bad_leaf=bad_leaf)


def see_loss(health: Health, loss: jax.Array, counts: jax.Array, sigmas: float) -> tuple[jax.Array, Health]:
    """Whether a real step's loss is more than `sigmas` standard deviations above the mean of recent ones (0: never).

    Mean and variance are exponentially weighted (West, "Updating mean and variance estimates", 1979). Only a loss that
    `counts` enters them, and a spike no higher than the limit it broke: one spike hardly moves them, while a level that
    has changed for good is accepted after some steps.
    """
    deviation = jnp.maximum(jnp.sqrt(health.loss_variance), LEAST_DEVIATION * health.loss_mean)
    limit = health.loss_mean + sigmas * deviation
    spike = counts & (health.loss_steps >= WARM_UP) & (loss > limit) & (sigmas > 0)
    weight = jnp.maximum(1 / (health.loss_steps + 1), 1 / WINDOW)
    away = jnp.where(spike, limit, loss) - health.loss_mean
    return spike, health._replace(
        loss_mean=jnp.where(counts, health.loss_mean + weight * away, health.loss_mean),
        loss_variance=jnp.where(counts, (1 - weight) * (health.loss_variance + weight * away**2), health.loss_variance),
        loss_steps=health.loss_steps + counts,
        loss_spikes=health.loss_spikes + spike,
    )


def first_not_finite(params: Params) -> str | None:
    """The name of the first array that holds a NaN or an infinity."""
    finite = jax.jit(lambda params: {name: jnp.isfinite(p).all() for name, p in params.items()})(params)
    return next((name for name, good in sorted(jax.device_get(finite).items()) if not good), None)


# --- What it says about the run -----------------------------------------------------------------------------------


class Divergence:
    """Looks at the metrics of a step and remembers what it has warned of.

    Args:
      parameters: names of the arrays that are trained.
      before: the metrics of the last step before this session.
      warn: takes one line.
    """

    def __init__(
        self,
        max_bad_steps: int,
        skip_spikes: bool,
        parameters: Sequence[str],
        before: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._max_bad_steps, self._skip_spikes, self._warn = max_bad_steps, skip_spikes, warn
        self._places = [*(f"the gradient of {name}" for name in sorted(parameters)), "the loss"]
        self._seen = {name: int(before[name]) for name in ("bad_batches", "loss_spikes")}

    def check(self, step: int, lr: float, metrics: dict[str, Any]) -> None:
        """Takes `bad_leaf` out of the metrics, which is no number to log.

        Raises:
          DivergedError: `max_bad_steps` real steps in a row had no finite gradient.
        """
        place = self._places[metrics.pop("bad_leaf")]
        new = {name: metrics[name] - seen for name, seen in self._seen.items()}
        self._seen = {name: metrics[name] for name in self._seen}
        if metrics["bad_steps"] >= self._max_bad_steps:
            raise DivergedError(
                f"config.lr: no finite gradient in {metrics['bad_steps']} steps in a row, up to step {step} "
                f"(lr {lr:.3g}; in the last of them {place} was not finite); lower "
                f"{' and '.join(group.rate for group in GROUPS.values())}, or clip harder; the last checkpoint is good"
            )
        if count := new["bad_batches"]:
            what = "batch" if count == 1 else "batches"
            self._warn(f"step {step}: {count} new {what} dropped, in the last {place} was not finite")
        if count := new["loss_spikes"]:
            what = "spike" if count == 1 else "spikes"
            done = "not applied" if self._skip_spikes else "applied; config.skip_spikes=True leaves such steps out"
            self._warn(f"step {step}: {count} new loss {what}, {done}")
