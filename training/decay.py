"""Decoupled weight decay, also with a schedule of its own or cautious (arXiv:2510.12402); before the learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from training.schedules import schedule_of


def decay_weights(
    rate: float, mask: Callable[[Any], Any], kind: str, total_steps: int, cautious: bool
) -> optax.GradientTransformation:
    """u + rate schedule(real_step) w for the weights w of `mask`, with a schedule of that kind, beside the rates' own.

    A cautious decay leaves out the entries in which u and w differ in sign: there the optimizer makes |w| larger.
    """
    if not rate:
        return optax.identity()
    if kind == "constant" and not cautious:
        return optax.add_decayed_weights(rate, mask)
    shape = schedule_of(kind, total_steps)

    def update(updates, state, params=None, **extra):
        factor = rate * shape(extra["real_step"])
        add = lambda u, w: u + factor * (jnp.where(u * w >= 0, w, 0.0) if cautious else w)
        return jax.tree.map(add, updates, params), state

    return optax.masked(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), mask)
