"""The loss of a batch: cross-entropy, whole or in chunks, which never have the logits of all tokens in memory.

Shapes: B sequences, T tokens each, D embedding_dim, V vocabulary; I chunks of C tokens. A batch is [B, T + 1]; inputs
and targets are two slices of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from training.answers import targets_of
from transformer.config import TransformerConfig
from transformer.model import Params, head_logits, model_of
from transformer.sharding import constrain, gather_parameter


def batch_loss(
    config: TransformerConfig, params: Params, batch_BT1: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and the number of targets of a batch [B, T + 1]; -1 is no target. With `key`, dropout is on."""
    gather = lambda name, p: gather_parameter(name, p, config.embedding_dim, config.activation_dtype)
    params = {n: p if n.startswith("blocks.") else gather(n, p) for n, p in params.items()}  # blocks gather their own
    model = model_of(config, params)
    rngs = None if key is None else nnx.Rngs(dropout=key)
    x_BTD, _ = model.hidden(jnp.maximum(batch_BT1[:, :-1], 0), rngs=rngs)
    targets_BT = targets_of(config, batch_BT1)
    if not 0 < config.loss_chunk < targets_BT.size:
        return loss_sum(constrain(model.logits(x_BTD), "BTV"), targets_BT)
    graph, weights = nnx.split(model.output)

    def chunk_loss(weights, x_CD, targets_C):
        return loss_sum(head_logits(nnx.merge(graph, weights), x_CD, config), targets_C)[0]

    return chunked_loss_sum(chunk_loss, weights, x_BTD, targets_BT, config.loss_chunk)


def loss_sum(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy (nats, float32) of logits [..., V], summed over targets [...] >= 0, and the number of these."""
    real = targets >= 0
    return jnp.where(real, token_losses(logits, targets), 0.0).sum(), real.sum()


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy [...] of logits [..., V], in nats; meaningless for a negative target."""
    target = jnp.maximum(targets, 0)[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target, axis=-1)[..., 0]


def chunked_loss_sum(
    chunk_loss: Callable, weights: Any, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`loss_sum` of the logits of x, computed for `chunk` tokens at a time.

    A chunk's gradients are computed in the forward pass, while its logits are in memory, so the backward pass need not
    compute the logits again. Gradients of the weights are summed in float32, whatever their dtype.

    `chunk_loss`: (weights, x [C, D], targets [C]) -> the sum of the C tokens' losses; negative targets add nothing.
    """
    chunks = -(-targets_BT.size // chunk)
    missing = -targets_BT.size % chunks  # all chunks have one size, by tokens without a target
    x_ND = jnp.pad(x_BTD.reshape(-1, x_BTD.shape[-1]), ((0, missing), (0, 0)))
    targets_N = jnp.pad(targets_BT.reshape(-1), (0, missing), constant_values=-1)
    x_ICD = constrain(x_ND.reshape(chunks, -1, x_BTD.shape[-1]), "ICD")
    return _summed(chunk_loss, weights, x_ICD, targets_N.reshape(chunks, -1)), (targets_BT >= 0).sum()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunk_loss, weights, x_ICD, targets_IC):
    add = lambda total, chunk: (total + chunk_loss(weights, *chunk), None)
    return jax.lax.scan(add, jnp.zeros(()), (x_ICD, targets_IC))[0]


def _forward(chunk_loss, weights, x_ICD, targets_IC):
    def add(sums, chunk):
        loss, (dweights, dx_CD) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(weights, *chunk)
        return jax.tree.map(jnp.add, sums, (loss, dweights)), dx_CD

    zeros = jnp.zeros(()), jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    (loss, dweights), dx_ICD = jax.lax.scan(add, zeros, (x_ICD, targets_IC))
    return loss, (jax.tree.map(lambda sum, w: sum.astype(w.dtype), dweights, weights), dx_ICD)


def _backward(_, kept, dloss):
    dweights, dx_ICD = jax.tree.map(lambda gradient: (dloss * gradient).astype(gradient.dtype), kept)
    return dweights, dx_ICD, None


_summed.defvjp(_forward, _backward)
