"""NorMuon: Muon's update with the neurons evened out by their own second moments (arXiv:2510.05491, algorithm 1)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPS = 1e-10


class NorMuonState(NamedTuple):
    square: Any  # of each neuron, a column of a matrix [in, out]: average of its updates' mean squares, [1, out]


def normalise_neurons(scale: str, decay: float = 0.95) -> optax.GradientTransformation:
    """What follows `scale_by_muon` on matrices [in, out]: each column O / sqrt(v), then the whole to one norm.

    v <- decay v + (1 - decay) mean(O^2), over a column. The norm is 0.2 sqrt(in out) for `scale` "rms", as in the
    paper; for "aspect" it is that of Muon's update, as in the authors' code. A constant factor of O does not matter.
    """

    def init(params):
        return NorMuonState(jax.tree.map(lambda p: jnp.zeros_like(p, shape=(1, p.shape[1])), params))

    def update(updates, state, params=None):
        mean = lambda u, v: decay * v + (1 - decay) * jnp.mean(jnp.square(u), axis=0, keepdims=True)
        square = jax.tree.map(mean, updates, state.square)

        def even(u, v):
            norm, u = 0.2 * math.sqrt(u.size) if scale == "rms" else jnp.linalg.norm(u), u / (jnp.sqrt(v) + EPS)
            return norm / (jnp.linalg.norm(u) + EPS) * u

        return jax.tree.map(even, updates, square), NorMuonState(square)

    return optax.GradientTransformation(init, update)
