"""SOAP: Adam in the eigenbases of Shampoo's two factors (Vyas et al., arXiv:2409.11321, algorithms 3 and 4)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from training.muon import share_out
from transformer.sharding import replicated


class SoapState(NamedTuple):
    updates: jax.Array  # the number made so far
    momentum: Any
    square: Any  # of the gradient in the eigenbases
    factors: tuple[Any, Any]  # averages of G G^T [in, in] and of G^T G [out, out]
    bases: tuple[Any, Any]  # their eigenvectors, about, as columns, those of the largest eigenvalues first


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, every: int = 10, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Adam's update of matrices [in, out], with its second moments in bases that follow the gradients.

    With bases A and B: M <- b1 M + (1 - b1) G, V <- b2 V + (1 - b2) (A^T G B)^2, and the update is
    A (A^T M B / (sqrt(V) + eps)) B^T, with Adam's corrections of M and V. Then the factors take G in, and after
    each `every` updates a basis becomes the Q of QR(factor basis), one step of power iteration. The first gradient only
    sets the bases, as in the authors' code. The devices share the decompositions.
    """
    across = lambda a, x, b: a.T @ x @ b

    def init(params):
        zeros = lambda axis: jax.tree.map(lambda p: jnp.zeros_like(p, shape=(p.shape[axis],) * 2), params)
        like = lambda: jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros((), jnp.int32), like(), like(), (zeros(0), zeros(1)), (zeros(0), zeros(1)))

    def update(updates, state, params=None):
        del params
        t, (left, right) = state.updates, state.bases
        old = lambda new, before: jnp.where(t > 0, new, before)
        momentum = jax.tree.map(lambda m, g: old(b1 * m + (1 - b1) * g, m), state.momentum, updates)
        rotated = jax.tree.map(across, left, updates, right)
        square = jax.tree.map(lambda v, g: old(b2 * v + (1 - b2) * g**2, v), state.square, rotated)

        def adam(a, m, b, v):
            count = jnp.maximum(t, 1)
            root = jnp.sqrt(v / (1 - b2**count)) + eps
            return a @ (across(a, m, b) / (1 - b1**count) / root) @ b.T

        made = jax.tree.map(adam, left, momentum, right, square)
        outer = lambda p, x: b2 * p + (1 - b2) * x
        factors = (
            jax.tree.map(lambda p, g: outer(p, g @ g.T), state.factors[0], updates),
            jax.tree.map(lambda p, g: outer(p, g.T @ g), state.factors[1], updates),
        )
        begin = lambda: _decompose(lambda p: jnp.linalg.eigh(p)[1][:, :, ::-1], factors, mesh)
        follow = lambda: _decompose(lambda p: jnp.linalg.qr(p)[0], jax.tree.map(jnp.matmul, factors, state.bases), mesh)
        which = jnp.where(t == 0, 2, t % every == 0)
        bases = jax.lax.switch(which, [lambda: state.bases, follow, begin])
        return made, SoapState(t + 1, momentum, square, factors, bases)

    return optax.GradientTransformation(init, update)


def _decompose(work: Callable[[jax.Array], jax.Array], tree: Any, mesh: Mesh | None) -> Any:
    """`work` on stacks [X, M, M] of the square matrices of a tree, one of each size."""
    leaves, treedef = jax.tree.flatten(tree)
    if mesh is not None:  # they are split as weights of their shape are, from which XLA finds no way to whole matrices
        leaves = jax.lax.with_sharding_constraint(leaves, replicated(mesh))
    alike = {size: [i for i, x in enumerate(leaves) if len(x) == size] for size in map(len, leaves)}
    stacks = [jnp.stack([leaves[i] for i in members]) for members in alike.values()]
    done = share_out([work] * len(stacks), stacks, [PartitionSpec(None, None)] * len(stacks), mesh)
    for members, done_XMM in zip(alike.values(), done, strict=True):
        for j, i in enumerate(members):
            leaves[i] = done_XMM[j]
    return jax.tree.unflatten(treedef, leaves)
