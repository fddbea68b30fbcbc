"""What of a batch is learned: all of a text, and of conversations what the assistant says."""

from functools import partial

import jax
import jax.numpy as jnp

from corpus.chat import are_answers
from transformer.config import TransformerConfig


def targets_of(config: TransformerConfig, batch_BT1: jax.Array) -> jax.Array:
    """The targets [B, T] of a batch; of conversations, what the assistant says and the end of its turn, else -1."""
    inputs_BT, targets_BT = batch_BT1[:, :-1], batch_BT1[:, 1:]
    if config.answer_start < 0:
        return targets_BT
    tokens, highest = (config.answer_start, config.answer_end, config.document_start), partial(jax.lax.cummax, axis=1)
    return jnp.where(are_answers(inputs_BT, targets_BT, *tokens, jnp, highest), targets_BT, -1)
