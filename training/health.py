"""Signs that training goes wrong: gradients that are not finite, losses that jump.

The step detects them; `Divergence`, outside of the step, warns of them, and ends a run that has too many.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from runtime.errors import DivergedError
from training.optimizer import GROUPS
from transformer.model import Params

_RATES = " and ".join(sorted({group.rate for group in GROUPS.values()}))
WINDOW = 128  # real steps: the time constant of the running mean of the loss
WARM_UP = 32  # real steps before a loss can be a spike
FAR_ABOVE = 3.0  # times the loss of a uniform guess: a model with a higher loss has diverged
LEAST_DEVIATION = 0.01  # lower bound of the standard deviation, as a share of the mean


class Health(NamedTuple):
    """What the step remembers of earlier losses and gradients: scalars, saved with the state for an exact resume."""

    bad_batches: jax.Array  # micro-batches so far whose loss or gradient was not finite
    bad_leaf: jax.Array  # in the latest of these: index of the first bad gradient; one past the end means the loss
    loss_mean: jax.Array  # of recent real steps
    loss_variance: jax.Array
    loss_steps: jax.Array  # real steps that entered mean and variance
    loss_spikes: jax.Array  # real steps so far whose loss was a spike


def fresh_health() -> Health:
    """The health before the first step."""
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

    Mean and variance are exponentially weighted (West, "Updating mean and variance estimates", 1979). A loss enters
    them if it `counts`; a spike enters as the limit that it exceeded, so that a single one hardly moves them, and a
    permanently higher level is accepted after some steps.
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
    """The name of the first array with a NaN or an infinity; None if there is none."""
    finite = jax.jit(lambda params: {name: jnp.isfinite(p).all() for name, p in params.items()})(params)
    return next((name for name, good in sorted(jax.device_get(finite).items()) if not good), None)


# --- Warnings -----------------------------------------------------------------------------------------------------


class Divergence:
    """Checks the metrics of steps, and warns of each problem once, in one line.

    `parameters` are the names of the trained arrays, `before` the metrics of the last step before this session.
    """

    def __init__(
        self,
        max_bad_steps: int,
        skip_spikes: bool,
        parameters: Sequence[str],
        before: Mapping[str, Any],
        warn: Callable[[str], None],
        vocab_size: int,
    ) -> None:
        self._vocab_size, self._told_of_loss, self._zero_since = vocab_size, False, 0
        self._max_bad_steps, self._skip_spikes, self._warn = max_bad_steps, skip_spikes, warn
        self._places = [*(f"the gradient of {name}" for name in sorted(parameters)), "the loss"]
        self._seen = {name: int(before[name]) for name in ("bad_batches", "loss_spikes")}

    def check(self, step: int, lr: float, metrics: dict[str, Any]) -> None:
        """Warns of new problems, and removes `bad_leaf` from the metrics, as it is no quantity to log.

        Raises DivergedError if `max_bad_steps` real steps in a row had no finite gradient.
        """
        place = self._places[metrics.pop("bad_leaf")]
        new = {name: metrics[name] - seen for name, seen in self._seen.items()}
        self._seen = {name: metrics[name] for name in self._seen}
        if metrics["bad_steps"] >= self._max_bad_steps:
            raise DivergedError(
                f"config.lr: no finite gradient in {metrics['bad_steps']} steps in a row, up to step {step} "
                f"(lr {lr:.3g}; in the last of them {place} was not finite); lower "
                f"{_RATES}, or clip harder; the last checkpoint is good"
            )
        if count := new["bad_batches"]:
            what = "batch" if count == 1 else "batches"
            self._warn(f"step {step}: {count} new {what} dropped, in the last {place} was not finite")
        if count := new["loss_spikes"]:
            what = "spike" if count == 1 else "spikes"
            done = "not applied" if self._skip_spikes else "applied; config.skip_spikes=True leaves such steps out"
            self._warn(f"step {step}: {count} new loss {what}, {done}")
        self._look_at_size(step, metrics["loss"], metrics["grad_norm"])

    def _look_at_size(self, step: int, loss: float, grad_norm: float) -> None:
        """Warns of a far too high loss and of a zero gradient; again only if it was normal in between."""
        uniform = math.log(self._vocab_size)
        if loss > FAR_ABOVE * uniform and not self._told_of_loss:
            self._warn(
                f"step {step}: loss {loss:.4g}, far above ln {self._vocab_size} = {uniform:.3f} of a uniform guess: "
                f"the run has diverged; lower {_RATES}, or clip harder (grad_clip)"
            )
        self._told_of_loss = loss > FAR_ABOVE * uniform
        if grad_norm != 0:
            self._zero_since = 0
        elif not self._zero_since:
            self._zero_since = step
        elif self._zero_since > 0:
            self._warn(
                f"step {step}: the gradient is exactly 0, as at step {self._zero_since}: nothing is learned any more; "
                f"start a new run with a lower {_RATES}"
            )
            self._zero_since = -1  # warned
