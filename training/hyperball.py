"""Hyperball: weights and updates of fixed Frobenius norms in place of weight decay (arXiv:2606.16899).

W <- R Norm(W - lr R Norm(u)), with Norm(x) = x / ||x|| and R the norm of the initial W; u is any optimizer's update. So
lr is the length of a step as a share of the norm. W keeps its norm but for rounding (1e-6 in 2,000 steps), so ||W||
stands for R, and a run that begins with weights of another needs no note of theirs. A matrix of zeros would stay one.
"""

import jax
import jax.numpy as jnp
import optax


def _per_matrix(function):
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates, params))


def unit_norm() -> optax.GradientTransformation:
    """Each update divided by its norm; before the learning rate."""
    return _per_matrix(lambda u, _: u / jnp.maximum(jnp.linalg.norm(u), 1e-30))


def keep_norm() -> optax.GradientTransformation:
    """From -lr Norm(u) to the update that lands on the sphere of the weights; after the learning rate."""

    def onto_sphere(step, w):
        norm = jnp.linalg.norm(w)
        moved = w + norm * step
        return norm / jnp.maximum(jnp.linalg.norm(moved), 1e-30) * moved - w

    return _per_matrix(onto_sphere)
