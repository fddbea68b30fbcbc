"""An exponential moving average of the weights, kept beside those that are trained."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.model import Params


class EmaState(NamedTuple):
    count: jax.Array  # real steps that are in the average
    average: Params  # before the first of them: the weights that the run begins with


def average_weights(decay: float) -> optax.GradientTransformationExtraArgs:
    """The end of a chain: leaves the updates alone, and averages the weights to which they lead.

    After step t the average is (1 - decay) / (1 - decay^t) * sum over s <= t of decay^(t - s) * weights_s: optax.ema's
    with debias, which is Adam's correction of its moments (arXiv:1412.6980, section 3). It is kept corrected, as
    average += (1 - decay) / (1 - decay^t) * (weights - average), so that a checkpoint's can be used as it is.
    """

    def update(updates, state, params=None, **_):
        count = optax.safe_increment(state.count)
        share = (1 - decay) / -jnp.expm1(math.log(decay) * count)  # 1 - decay^count, without its rounding
        after = optax.apply_updates(params, updates)
        return updates, EmaState(count, optax.incremental_update(after, state.average, share))

    return optax.GradientTransformationExtraArgs(lambda params: EmaState(jnp.zeros((), jnp.int32), params), update)


def average_of(opt_state: Any) -> Params | None:
    """The averaged weights; None where none are kept."""
    return optax.tree.get(opt_state, "average")


def begin_with(state: Any, params: Params) -> Any:
    """A fresh training state, of these weights instead of its own."""
    opt_state = state.opt_state
    if average_of(opt_state) is not None:  # a copy: the step donates both
        opt_state = optax.tree.set(opt_state, average=jax.tree.map(jnp.copy, params))
    return state._replace(params=params, opt_state=opt_state)
