"""Muon: orthogonalised momentum for the 2-D hidden weights; the devices share the work."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from transformer.sharding import AXES, param_spec

# Coefficients (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, one row for each iteration.
# classical: Keller Jordan, https://kellerjordan.github.io/posts/muon/ (the same row every time).
# polar_express: Amsel et al., arXiv:2505.16932, table of its reference implementation; the last row is repeated.
CLASSICAL = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# If a matrix lacks rank, rounding gives A eigenvalues just below 0, and each A <- P A P multiplies them by up to a^2:
# 8 to 10 iterations in a row would diverge.
GRAM_STEPS = 5
SAFETY = 1.01  # Polar Express: a lower start, and each row but the last relaxed, so that rounding stays in range


def newton_schulz_rows(kind: str, steps: int) -> list[tuple[float, float, float]]:
    """The coefficients of each iteration."""
    if kind == "classical":
        return [CLASSICAL] * steps
    rows = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return [rows[i] if i < len(rows) else POLAR_EXPRESS[-1] for i in range(steps)]


def orthogonalize(x_XMN: jax.Array, kind: str = "classical", steps: int = 5) -> jax.Array:
    """Newton-Schulz: moves the singular values of each matrix of a stack [X, M, N] towards 1, in float32.

    A wide matrix is iterated in Gram form: each iteration multiplies X by a polynomial P of A = X X^T, and P commutes
    with A, so A <- P A P and Q <- P Q can run on the small square matrices alone, with Q X formed once at the end.
    In exact arithmetic the polynomial is the same, with fewer operations if N is larger than M. After GRAM_STEPS
    iterations it starts again from Q X. `kind` and `steps` are those of `newton_schulz_rows`.
    """
    if x_XMN.shape[1] > x_XMN.shape[2]:
        return orthogonalize(x_XMN.mT, kind, steps).mT
    x_XMN = x_XMN.astype(jnp.float32)
    norm_X11 = jnp.linalg.norm(x_XMN, axis=(1, 2), keepdims=True)
    x_XMN = x_XMN / (jnp.maximum(norm_X11, 1e-7) if kind == "classical" else norm_X11 * SAFETY + 1e-7)
    rows = newton_schulz_rows(kind, steps)
    if x_XMN.shape[1] == x_XMN.shape[2]:
        for a, b, c in rows:
            gram_XMM = x_XMN @ x_XMN.mT
            x_XMN = a * x_XMN + (b * gram_XMM + c * gram_XMM @ gram_XMM) @ x_XMN
        return x_XMN
    for start in range(0, len(rows), GRAM_STEPS):
        x_XMN = _iterate_gram(x_XMN, rows[start : start + GRAM_STEPS])
    return x_XMN


def _iterate_gram(x_XMN: jax.Array, rows: list[tuple[float, float, float]]) -> jax.Array:
    gram_XMM = x_XMN @ x_XMN.mT
    identity_MM = jnp.eye(x_XMN.shape[1], dtype=jnp.float32)
    product_XMM = identity_MM
    for i, (a, b, c) in enumerate(rows):
        p_XMM = a * identity_MM + b * gram_XMM + c * gram_XMM @ gram_XMM
        product_XMM = p_XMM @ product_XMM if i else p_XMM
        if i + 1 < len(rows):
            gram_XMM = p_XMM @ (gram_XMM @ p_XMM)
    return product_XMM @ x_XMN


class MuonState(NamedTuple):
    updates: jax.Array  # the number made so far
    momentum: Any


def scale_by_muon(
    momentum: float = 0.95,
    *,
    start_momentum: float | None = None,
    warmup_steps: int = 0,
    newton_schulz: str = "classical",
    newton_schulz_steps: int = 5,
    scale: str = "aspect",
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for matrices [in, out] (Keller Jordan's Muon).

    buf <- m buf + (1 - m) g, update = orthogonalize(m buf + (1 - m) g), scaled by sqrt(max(1, out / in)) ("aspect")
    or by 0.2 sqrt(max(in, out)) ("rms": Moonlight, arXiv:2502.16982). m grows linearly from `start_momentum` to
    `momentum` in `warmup_steps` updates. Matrices of one shape are orthogonalised in one batched call, each on one
    device of the mesh.
    """
    last, first = momentum, momentum if start_momentum is None else start_momentum

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        m = first + (last - first) * (jnp.minimum(state.updates / warmup_steps, 1.0) if warmup_steps else 1.0)
        momentum = jax.tree.map(lambda buf, g: m * buf + (1 - m) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda buf, g: m * buf + (1 - m) * g, momentum, updates)

        named, treedef = jax.tree_util.tree_flatten_with_path(nesterov)
        leaves = [leaf for _, leaf in named]
        alike: dict[tuple, list[int]] = {}  # in shape, and in how they are split
        for i, (path, leaf) in enumerate(named):
            spec = param_spec(path[-1].key, leaf.shape, mesh) if mesh else None
            alike.setdefault((*leaf.shape, spec), []).append(i)
        stacks = [jnp.stack([leaves[i] for i in members]) for members in alike.values()]
        work = lambda x_XMN: orthogonalize(x_XMN, newton_schulz, newton_schulz_steps)
        done = share_out(work, stacks, [spec for *_, spec in alike], mesh)
        for ((n_in, n_out, _), members), done_XMN in zip(alike.items(), done, strict=True):
            factor = math.sqrt(max(1, n_out / n_in)) if scale == "aspect" else 0.2 * math.sqrt(max(n_in, n_out))
            for j, i in enumerate(members):
                leaves[i] = factor * done_XMN[j]
        return jax.tree.unflatten(treedef, leaves), MuonState(state.updates + 1, momentum)

    return optax.GradientTransformation(init, update)


# --- Over the devices ---------------------------------------------------------------------------------------------


def share_out(
    work: Callable, stacks: Sequence[jax.Array], specs: Sequence[PartitionSpec], mesh: Mesh | None
) -> list[jax.Array]:
    """`work` on each of the stacks [X, M, N] of matrices; each device does an equal part of every stack.

    `work` takes and returns stacks of any length. Without a mesh, or on one device, it is simply called.

    `specs` say how the matrices [M, N] of each stack are split, before and after. For each axis that splits them, one
    all-to-all gives each device some whole matrices, and another splits the results again. Devices with the same
    matrices exchange their results; if all have the same, in one flat all-gather.
    """
    if mesh is None or mesh.size == 1:
        return list(map(work, stacks))

    def on_each_device(*whole: jax.Array) -> list[jax.Array]:  # cut here: XLA would exchange what all devices have
        sizes, index = [len(x) // mesh.size for x in whole], jax.lax.axis_index(AXES)
        parts = [jax.lax.dynamic_slice_in_dim(x, index * n, n) for x, n in zip(whole, sizes, strict=True)]
        flat, unravel = ravel_pytree(list(map(work, parts)))
        done = jax.vmap(unravel)(jax.lax.all_gather(flat, AXES))
        return [x.reshape(-1, *x.shape[2:]) for x in done]

    def on_each_part(*parts: jax.Array) -> list[jax.Array]:
        return [_on_whole_matrices(work, part, spec) for part, spec in zip(parts, specs, strict=True)]

    padded = [jnp.pad(stack, ((0, -len(stack) % mesh.size), (0, 0), (0, 0))) for stack in stacks]
    if any(name for spec in specs for name in spec):
        splits = [PartitionSpec(None, *spec) for spec in specs]
        mapped = jax.shard_map(on_each_part, mesh=mesh, in_specs=tuple(splits), out_specs=splits, check_vma=False)
    else:
        same = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
        mapped = jax.shard_map(on_each_device, mesh=mesh, **same, check_vma=False)
    return [x[: len(stack)] for x, stack in zip(mapped(*padded), stacks, strict=True)]


def _on_whole_matrices(work: Callable[[jax.Array], jax.Array], part_Xmn: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`work` on matrices of which this device holds a part (`spec`); returns the same part of the results."""
    exchanges = [(name, axis) for axis, name in enumerate(spec, 1) if name]  # one mesh axis splits an axis of a matrix
    x = part_Xmn
    for name, axis in exchanges:
        x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=axis, tiled=True)
    same = tuple(axis for axis in AXES if axis not in dict(exchanges))  # devices that differ in these have the same
    if (count := jax.lax.axis_size(same)) > 1:
        own = len(x) // count
        x = work(jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(same) * own, own))
        x = jax.lax.all_gather(x, same, tiled=True)
    else:
        x = work(x)
    for name, axis in reversed(exchanges):
        x = jax.lax.all_to_all(x, name, split_axis=axis, concat_axis=0, tiled=True)
    return x
