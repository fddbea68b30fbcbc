"""Rotary positions: queries and keys are rotated by angles that grow with their position.

Shapes: B batch, T time, N heads, H head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.xla import materialize


class Yarn(NamedTuple):
    """How YaRN stretches rotary positions to a longer context (arXiv:2309.00071, section 3).

    Dimensions that turn more than `beta_fast` times within the original context are kept, those that turn fewer than
    `beta_slow` times are slowed down by `factor`, with a ramp between; `truncate` rounds the ramp's ends to whole
    dimensions. Queries and keys are scaled by `attention_factor`; 0 means the paper's 0.1 ln(factor) + 1. Llama 3
    (arXiv:2407.21783) has a ramp over turns instead of dimensions, and does not scale.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    ramp_over_turns: bool = False


def rope_frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> tuple[np.ndarray, float]:
    """Radians per position of the head_dim / 2 planes (RoFormer, arXiv:2104.09864), and the scale of q and k."""
    plane = np.arange(0, head_dim, 2, dtype=np.float64)
    frequency = theta ** (-plane / head_dim)
    if yarn is None:
        return frequency.astype(np.float32), 1.0

    def plane_turning(times: float) -> float:
        """The (fractional) plane that turns this many times within the original context."""
        return head_dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    if yarn.ramp_over_turns:
        turns = yarn.original_context * frequency / (2 * math.pi)
        ramp = (yarn.beta_fast - turns) / (yarn.beta_fast - yarn.beta_slow)
    else:
        low, high = plane_turning(yarn.beta_fast), plane_turning(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (plane / 2 - low) / max(high - low, 0.001)
    slowed = np.clip(ramp, 0, 1)
    frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
    return frequency.astype(np.float32), yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1.0


def rotation(position_BT: jax.Array, frequency: np.ndarray, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] of position x frequency, in float32; `scale` multiplies both."""
    angle_BT1H = (position_BT[..., None].astype(jnp.float32) * frequency)[:, :, None]
    return materialize((jnp.cos(angle_BT1H) * scale, jnp.sin(angle_BT1H) * scale))


def rotate(x_BTNH: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each plane (x_i, x_{i + H/2}) by its `rotation`, in float32; [B, T, N, H] in the dtype of x."""
    cos, sin = turn
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
