"""Which optimizer trains which parameters (Muon the 2-D hidden weights, AdamW all others), schedules, accumulation.

The step is one optax transformation. Its `update` takes, besides gradients and parameters:
  tokens: the number of targets that the gradients were summed over, in all micro-batches of this real step;
  real_step: the number of the optimizer step, from 0;
  apply: whether this micro-batch ends a real step that has anything to apply.
"""

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from training.ema import average_weights
from training.muon import scale_by_muon
from training.normuon import normalise_neurons
from training.schedules import Schedule, descend, schedule_of
from transformer.model import Params
from transformer.ranges import BelowOne, Count, CountOrNone, NotNegative, Positive, Range, Share, require

HIDDEN_MATRIX = re.compile(r"blocks\.\d+\.(attention\.(query|key|value|out|gate)|mlp\.(gate|up|down))\.kernel")
EMBEDDING = re.compile(r"(embedding|positions)\.embedding")
VECTOR = re.compile(r".*\.(bias|scale|sink|sink_key|residual_scalars)")
HEAD = "head.kernel"

CHOICES = {
    "hidden_optimizer": ("muon", "normuon", "adamw"),
    "schedule": ("constant", "cosine", "linear", "constant_linear"),
    "newton_schulz": ("classical", "polar_express"),
    "muon_scale": ("aspect", "rms"),
}
# Settings of some builds, at the value at which they did nothing.
REMOVED = [("muon_by_head", False), ("cautious_decay", False), ("decay_schedule", "constant")]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's settings, see `configs/default.py`. Raises ValueError, `<field>: <what is wrong>`."""

    lr: Positive = 3e-4
    muon_lr: Positive = 0.02
    use_muon: bool = True
    hidden_optimizer: str = "muon"
    muon_momentum: BelowOne = 0.95
    muon_momentum_start: BelowOne = 0.95
    muon_momentum_warmup_steps: CountOrNone = 0
    newton_schulz: str = "classical"
    newton_schulz_steps: Annotated[int, Range("from 1 to 100", lambda x: 1 <= x <= 100)] = 5
    muon_scale: str = "aspect"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    decay_embeddings: bool = False
    grad_clip: NotNegative = 1.0
    accumulation_steps: Count = 1
    schedule: str = "constant"
    lr_warmup_ratio: Share = 0.0
    decay_ratio: Share = 0.5
    min_lr_ratio: Share = 0.0
    ema_decay: BelowOne = 0.0

    def __post_init__(self):
        require(vars(self), type(self).__annotations__)
        if len(self.betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas: must be two numbers at least 0 and below 1, got {self.betas}")
        if not self.use_muon and self.hidden_optimizer not in ("muon", "adamw"):
            raise ValueError(f"use_muon: must be True with hidden_optimizer {self.hidden_optimizer}")

    @property
    def hidden(self) -> str:
        """The label in GROUPS of the 2-D hidden weights."""
        return self.hidden_optimizer if self.use_muon else "adamw"


# --- Groups of parameters -----------------------------------------------------------------------------------------


class Group(NamedTuple):
    """The parameters of one optimizer, and how reports name them."""

    title: str  # the optimizer's name
    members: str  # what the parameters are called, in the plural
    rate: str  # the setting with their peak learning rate, under whose name the rate is logged; it ends in lr
    make: Callable[[OptimizerConfig, Mesh | None], optax.GradientTransformation]  # gradients -> updates, at a rate of 1


def _muon(c: OptimizerConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    warmup: dict[str, Any] = {"start_momentum": c.muon_momentum_start, "warmup_steps": c.muon_momentum_warmup_steps}
    iteration: dict[str, Any] = {"newton_schulz": c.newton_schulz, "newton_schulz_steps": c.newton_schulz_steps}
    return scale_by_muon(c.muon_momentum, **warmup, **iteration, scale=c.muon_scale, mesh=mesh)


def _normuon(c: OptimizerConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    return optax.chain(_muon(c, mesh), normalise_neurons(c.muon_scale))


GROUPS = {  # by label, see `labels_of`
    "adamw": Group("AdamW", "other arrays", "lr", lambda c, _: optax.scale_by_adam(*c.betas, c.eps)),
    "muon": Group("Muon", "matrices", "muon_lr", _muon),
    "normuon": Group("NorMuon", "matrices", "muon_lr", _normuon),
}


def labels_of(params: Params, config: OptimizerConfig) -> dict[str, str]:
    """The label in GROUPS of each parameter, by name. Raises ValueError for a new kind: it needs a decision."""
    labels = {}
    for name in params:
        matrix = HIDDEN_MATRIX.fullmatch(name) is not None
        other = [EMBEDDING.fullmatch(name), VECTOR.fullmatch(name), name == HEAD]
        if matrix + sum(map(bool, other)) != 1:
            raise ValueError(f"{name}: must belong to exactly one optimizer group")
        labels[name] = config.hidden if matrix else "adamw"
    return labels


def groups_of(labels: Mapping[str, str]) -> dict[str, Group]:
    """The groups with at least one parameter."""
    return {label: group for label, group in GROUPS.items() if label in labels.values()}


def decayed(name: str, decay_embeddings: bool) -> bool:
    """Whether a parameter decays: matrices do, norms, biases and sinks never, embeddings if asked."""
    return name == HEAD or bool(HIDDEN_MATRIX.fullmatch(name) or (decay_embeddings and EMBEDDING.fullmatch(name)))


def schedule_shape(config: OptimizerConfig, total_steps: int, first_total: int | None = None) -> Schedule:
    """The factor of the peak learning rates at a real step; the warm-up is a share of `first_total`, if that is given:
    a run that was first planned for so many steps."""
    warmup = round(config.lr_warmup_ratio * (total_steps if first_total is None else first_total))
    return schedule_of(config.schedule, total_steps, warmup, config.decay_ratio, config.min_lr_ratio)


# --- The whole step -----------------------------------------------------------------------------------------------


class NormaliseState(NamedTuple):
    grad_norm: jax.Array  # global norm of the mean gradient, before clipping


def normalise_and_clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Summed gradients -> mean over `tokens` -> global norm at most `max_norm` (0: not clipped)."""

    def update(updates, state, params=None, *, tokens, **_):
        norm = optax.tree.norm(updates) / tokens
        factor = (jnp.minimum(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0) / tokens
        return jax.tree.map(lambda g: g * factor, updates), NormaliseState(norm)

    return optax.GradientTransformationExtraArgs(lambda params: NormaliseState(jnp.zeros((), jnp.float32)), update)


def make_optimizer(
    config: OptimizerConfig, params: Params, total_steps: int, mesh: Mesh | None = None, first_total: int | None = None
) -> optax.GradientTransformationExtraArgs | optax.MultiSteps:
    """The optimizer of a run of `total_steps` real steps; only the names and shapes of `params` are read.

    Gradients are sums over tokens, one call for each micro-batch. If `apply` is false, the inner optimizer does not run
    at all: neither within an accumulation (optax.MultiSteps would run it, Newton-Schulz included, and discard the
    result), nor for a step without a finite gradient.
    """
    labels = labels_of(params, config)
    shape = schedule_shape(config, total_steps, first_total)
    mask = lambda tree: {name: decayed(name, config.decay_embeddings) for name in tree}
    decay = optax.add_decayed_weights(config.weight_decay, mask) if config.weight_decay else optax.identity()
    parts: dict[Hashable, optax.GradientTransformation] = {}
    for label, group in groups_of(labels).items():
        rate = descend(getattr(config, group.rate), shape)
        parts[label] = optax.chain(group.make(config, mesh), decay, rate)
    average = [average_weights(config.ema_decay)] if config.ema_decay else []
    inner = optax.chain(normalise_and_clip(config.grad_clip), optax.multi_transform(parts, labels), *average)
    gated = optax.conditionally_mask(inner, lambda step, apply, **_: apply, forward_extra_args=True)
    if config.accumulation_steps == 1:
        return gated  # MultiSteps would need a buffer of the parameters' size
    return optax.MultiSteps(gated, config.accumulation_steps, use_grad_mean=False)


def grad_norm_of(opt_state: Any) -> jax.Array:
    """The gradient norm (before clipping) of the last step that was applied."""
    return optax.tree.get(opt_state, "grad_norm")
