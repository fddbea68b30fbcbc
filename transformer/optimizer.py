"""Who is trained by what: Muon for the 2-D hidden weights, AdamW for everything else, schedules, accumulation.

The step is one optax transformation. Its `update` takes, beside gradients and parameters:
  tokens: how many targets the gradients were summed over, in all micro-batches of this real step;
  real_step: the optimizer step this belongs to, from 0;
  apply:  whether this micro-batch ends a real step that has anything to apply.
"""

import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from transformer.model import Params
from transformer.sharding import param_spec, share_out

Schedule = Callable[[Any], Any]  # real step -> factor of the peak learning rate

HIDDEN_MATRIX = re.compile(r"blocks\.\d+\.(attention\.(query|key|value|out)|mlp\.(gate|up|down))\.kernel")
EMBEDDING = re.compile(r"(embedding|positions)\.embedding")
VECTOR = re.compile(r".*\.(bias|scale|sink)")
HEAD = "head.kernel"

CHOICES = {
    "schedule": ("constant", "cosine", "linear", "constant_linear"),
    "newton_schulz": ("classical", "polar_express"),
    "muon_scale": ("aspect", "rms"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizer; `configs/default.py` says what each means."""

    lr: float = 3e-4
    muon_lr: float = 0.02
    use_muon: bool = True
    muon_momentum: float = 0.95
    muon_momentum_start: float = 0.95
    muon_momentum_warmup_steps: int = 0
    newton_schulz: str = "classical"
    newton_schulz_steps: int = 5
    muon_scale: str = "aspect"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_embeddings: bool = False
    grad_clip: float = 1.0
    accumulation_steps: int = 1
    schedule: str = "constant"
    lr_warmup_ratio: float = 0.0
    decay_ratio: float = 0.5
    min_lr_ratio: float = 0.0


# --- Who goes where -----------------------------------------------------------------------------------------------


def labels_of(params: Params, use_muon: bool) -> dict[str, str]:
    """ "muon" or "adamw" for each parameter, by name.

    Raises:
      ValueError: a name that no rule knows, or that two rules claim: a new kind of parameter needs a decision.
    """
    labels = {}
    for name in params:
        matrix = HIDDEN_MATRIX.fullmatch(name) is not None
        other = [EMBEDDING.fullmatch(name), VECTOR.fullmatch(name), name == HEAD]
        if matrix + sum(map(bool, other)) != 1:
            raise ValueError(f"{name}: must belong to exactly one optimizer group")
        labels[name] = "muon" if matrix and use_muon else "adamw"
    return labels


def decayed(name: str, decay_embeddings: bool) -> bool:
    """Whether weight decay touches a parameter: matrices, never norms, biases or sinks; embeddings if asked."""
    return name == HEAD or bool(HIDDEN_MATRIX.fullmatch(name) or (decay_embeddings and EMBEDDING.fullmatch(name)))


# --- Schedules ----------------------------------------------------------------------------------------------------


def schedule_shape(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The factor, 0 to 1, of both peak learning rates at a real step.

    A linear warm-up over `lr_warmup_ratio` of the steps, then `schedule`: constant; cosine or linear to
    `min_lr_ratio`; or constant_linear, which starts its decay `decay_ratio` of all steps before the end.
    """
    warmup = round(config.lr_warmup_ratio * total_steps)
    rest = max(total_steps - warmup, 1)
    one = optax.constant_schedule(1.0)
    match config.schedule:
        case "constant":
            main = one
        case "cosine":
            main = optax.cosine_decay_schedule(1.0, rest, alpha=config.min_lr_ratio)
        case "linear":
            main = optax.linear_schedule(1.0, config.min_lr_ratio, rest)
        case _:
            decay = min(round(config.decay_ratio * total_steps), rest)
            down = optax.linear_schedule(1.0, config.min_lr_ratio, max(decay, 1))
            main = optax.join_schedules([one, down], [rest - decay])
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(1 / (warmup + 1), 1.0, warmup), main], [warmup])


# --- Muon ---------------------------------------------------------------------------------------------------------

# Coefficients (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, one row an iteration.
# classical: Keller Jordan, https://kellerjordan.github.io/posts/muon/ (the same row every time).
# polar_express: Amsel et al., arXiv:2505.16932, table of its reference implementation; after the last row, repeat it.
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
# Where a matrix lacks rank, rounding leaves A eigenvalues just below 0, which each A <- P A P multiplies by up to a^2:
# 8 to 10 iterations in a row would blow up.
GRAM_STEPS = 5
SAFETY = 1.01  # Polar Express: it starts lower and each row but the last is slackened, so that rounding stays in range


def newton_schulz_rows(kind: str, steps: int) -> list[tuple[float, float, float]]:
    """The coefficients of each iteration."""
    if kind == "classical":
        return [CLASSICAL] * steps
    rows = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return [rows[i] if i < len(rows) else POLAR_EXPRESS[-1] for i in range(steps)]


def orthogonalize(x_XMN: jax.Array, config: OptimizerConfig) -> jax.Array:
    """Newton-Schulz: push the singular values of each matrix of a stack [X, M, N] towards 1, in float32.

    A wide matrix is iterated in Gram form: each iteration multiplies X by a polynomial P of A = X X^T, and P commutes
    with A, so A <- P A P and Q <- P Q can run on the small square matrices alone, with Q X formed once at the end.
    The same polynomial in exact arithmetic, fewer operations when N is larger than M. After GRAM_STEPS iterations it
    starts again from Q X.
    """
    if x_XMN.shape[1] > x_XMN.shape[2]:
        return orthogonalize(x_XMN.mT, config).mT
    x_XMN = x_XMN.astype(jnp.float32)
    norm_X11 = jnp.linalg.norm(x_XMN, axis=(1, 2), keepdims=True)
    x_XMN = x_XMN / (jnp.maximum(norm_X11, 1e-7) if config.newton_schulz == "classical" else norm_X11 * SAFETY + 1e-7)
    rows = newton_schulz_rows(config.newton_schulz, config.newton_schulz_steps)
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
    updates: jax.Array  # made so far
    momentum: Any


def scale_by_muon(config: OptimizerConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for matrices [in, out] (Keller Jordan's Muon).

    buf <- m buf + (1 - m) g, update = orthogonalize(m buf + (1 - m) g), scaled by sqrt(max(1, out / in)) ("aspect")
    or by 0.2 sqrt(max(in, out)) ("rms": Moonlight, arXiv:2502.16982). Matrices of one shape are orthogonalised in one
    batched call, each on one device of the mesh.
    """

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        warm = jnp.minimum(state.updates / max(config.muon_momentum_warmup_steps, 1), 1.0)
        warm = warm if config.muon_momentum_warmup_steps else 1.0
        m = config.muon_momentum_start + (config.muon_momentum - config.muon_momentum_start) * warm
        momentum = jax.tree.map(lambda buf, g: m * buf + (1 - m) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda buf, g: m * buf + (1 - m) * g, momentum, updates)

        named, treedef = jax.tree_util.tree_flatten_with_path(nesterov)
        leaves = [leaf for _, leaf in named]
        alike: dict[tuple, list[int]] = {}  # in shape, and in how they are split
        for i, (path, leaf) in enumerate(named):
            spec = param_spec(path[-1].key, leaf.shape, mesh) if mesh else None
            alike.setdefault((*leaf.shape, spec), []).append(i)
        stacks = [jnp.stack([leaves[i] for i in members]) for members in alike.values()]
        done = share_out(lambda x_XMN: orthogonalize(x_XMN, config), stacks, [spec for *_, spec in alike], mesh)
        for ((n_in, n_out, _), members), done_XMN in zip(alike.items(), done, strict=True):
            wide = math.sqrt(max(1, n_out / n_in))
            scale = wide if config.muon_scale == "aspect" else 0.2 * math.sqrt(max(n_in, n_out))
            for j, i in enumerate(members):
                leaves[i] = scale * done_XMN[j]
        return jax.tree.unflatten(treedef, leaves), MuonState(state.updates + 1, momentum)

    return optax.GradientTransformation(init, update)


# --- The whole step -----------------------------------------------------------------------------------------------


class NormaliseState(NamedTuple):
    grad_norm: jax.Array  # global norm of the mean gradient, before clipping


def normalise_and_clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Summed gradients -> mean over `tokens` -> global norm at most `max_norm` (0: not clipped)."""

    def init(params):
        del params
        return NormaliseState(jnp.zeros((), jnp.float32))

    def update(updates, state, params=None, **extra):
        del state, params
        tokens = extra["tokens"]
        norm = optax.tree.norm(updates) / tokens
        factor = (jnp.minimum(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0) / tokens
        return jax.tree.map(lambda g: g * factor, updates), NormaliseState(norm)

    return optax.GradientTransformationExtraArgs(init, update)


def descend(lr: float, shape: Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale by minus the learning rate of `real_step`.

    optax's own schedules count the updates that were made, which lags behind when a step had nothing to apply.
    """

    def update(updates, state, params=None, **extra):
        del params
        factor = -lr * shape(extra["real_step"])
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig, params: Params, total_steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs | optax.MultiSteps:
    """The optimizer of a run of `total_steps` real steps; only the names and shapes of `params` are read.

    Gradients come in as sums over tokens, one call a micro-batch. When `apply` is false the inner optimizer does not
    run at all: not in the middle of an accumulation (where optax.MultiSteps would run it and throw the result away,
    Newton-Schulz included), and not for a step that has no finite gradient.
    """
    labels = labels_of(params, config.use_muon)
    shape = schedule_shape(config, total_steps)
    b1, b2 = config.betas

    def decay() -> optax.GradientTransformation:
        mask = lambda tree: {name: decayed(name, config.decay_embeddings) for name in tree}
        return optax.add_decayed_weights(config.weight_decay, mask) if config.weight_decay else optax.identity()

    groups: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(scale_by_muon(config, mesh), decay(), descend(config.muon_lr, shape)),
        "adamw": optax.chain(optax.scale_by_adam(b1, b2, config.eps), decay(), descend(config.lr, shape)),
    }
    groups = {label: groups[label] for label in sorted(set(labels.values()))}
    inner = optax.chain(normalise_and_clip(config.grad_clip), optax.multi_transform(groups, labels))
    gated = optax.conditionally_mask(inner, lambda step, apply, **_: apply, forward_extra_args=True)
    if config.accumulation_steps == 1:
        return gated  # MultiSteps would keep a buffer of the parameters' size for nothing
    return optax.MultiSteps(gated, config.accumulation_steps, use_grad_mean=False)


def grad_norm_of(opt_state: Any) -> jax.Array:
    """The gradient norm (before clipping) of the last step that was applied."""
    return optax.tree.get(opt_state, "grad_norm")
