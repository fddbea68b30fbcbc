"""What of a batch is learned: all of a text, and of conversations what the assistant says.

Shapes: B sequences, T tokens each; a batch is [B, T + 1].
"""

import jax
import jax.numpy as jnp

from transformer.config import TransformerConfig


def targets_of(config: TransformerConfig, batch_BT1: jax.Array) -> jax.Array:
    """The targets [B, T] of a batch; of conversations, what the assistant says and the end of its turn, else -1."""
    inputs_BT, targets_BT = batch_BT1[:, :-1], batch_BT1[:, 1:]
    if config.answer_start < 0:
        return targets_BT
    place_T = 2 * jnp.arange(inputs_BT.shape[1])
    ends_BT = (inputs_BT == config.answer_end) | (inputs_BT == config.document_start)
    mark_BT = jnp.where(inputs_BT == config.answer_start, place_T + 1, jnp.where(ends_BT, place_T, 0))
    inside_BT = jax.lax.cummax(mark_BT, axis=1) % 2 == 1  # the last mark is odd: an answer has begun
    return jnp.where(inside_BT & (targets_BT != config.document_start), targets_BT, -1)
