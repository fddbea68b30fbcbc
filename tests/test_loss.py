"""The loss: its values, and that chunks of it give the same numbers and gradients in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.loss import batch_loss, chunked_loss_sum, loss_sum
from training.step import make_eval_step
from transformer.config import TransformerConfig
from transformer.sharding import make_mesh

B, T, D, V = 3, 7, 10, 19
MODEL = partial(
    TransformerConfig,
    vocab_size=V,
    context_len=T,
    num_blocks=1,
    num_heads=2,
    embedding_dim=D,
    mlp_dim=14,
    position="rope",
    head_dim=4,
)


def batch():
    """[B, T + 1] with targets missing: two in the middle, and the end of the last row."""
    tokens_BT1 = np.random.default_rng(1).integers(0, V, (B, T + 1)).astype(np.int32)
    tokens_BT1[0, 2:4] = tokens_BT1[-1, 5:] = -1
    return tokens_BT1


def test_loss_sum_counts_the_targets_that_are_not_negative():
    logits_BTV = np.random.default_rng(0).normal(size=(2, 3, V)).astype(np.float32)
    targets_BT = np.array([[4, -1, 0], [-1, -1, 12]])
    loss, count = jax.jit(loss_sum)(logits_BTV, targets_BT)
    probs_BTV = np.exp(logits_BTV, dtype=np.float64) / np.exp(logits_BTV, dtype=np.float64).sum(-1, keepdims=True)
    assert count == 3
    assert loss == pytest.approx(-np.log(probs_BTV[[0, 0, 1], [0, 2, 2], [4, 0, 12]]).sum(), rel=1e-6)


def loss_and_grads(params, **changes):
    """Loss and count of a batch, with the gradients of a multiple of the loss and without gradients."""
    loss = partial(batch_loss, MODEL(**changes), batch_BT1=batch(), key=None)
    scaled = lambda params: (lambda total, count: (7 * total, (total, count)))(*loss(params=params))
    (_, (total, count)), grads = jax.jit(jax.value_and_grad(scaled, has_aux=True))(params)
    assert all(gradient.dtype == jnp.float32 for gradient in grads.values()) and grads.keys() == params.keys()
    return [float(total), float(jax.jit(loss)(params=params)[0])], count, grads


# Of 21 tokens: 11 are two chunks, 6 four of which the last is short, 4 six of equal size.
@pytest.mark.parametrize(
    "chunks, changes",
    [((1, 6, 11), {"tie_embeddings": True}), ((4, 20), {"tie_embeddings": False, "logit_softcap": 3.0})],
    ids=["tied", "untied, capped"],
)
def test_chunks_give_the_loss_and_every_gradient_of_the_whole(random_params, chunks, changes):
    params = random_params(MODEL(**changes))
    want, want_count, want_grads = loss_and_grads(params, **changes)
    assert want_count == B * T - 5
    for chunk in chunks:
        losses, count, grads = loss_and_grads(params, **changes, loss_chunk=chunk)
        assert count == want_count and losses == pytest.approx(want, rel=1e-6)
        for name, want_grad in want_grads.items():
            np.testing.assert_allclose(grads[name], want_grad, rtol=0, atol=3e-6 * np.abs(want_grad).max())


@pytest.mark.parametrize("changes", [{"tie_embeddings": True, "logit_softcap": 3.0}, {"tie_embeddings": False}])
def test_chunks_in_bfloat16_are_as_exact_as_the_whole(random_params, changes):
    params = random_params(MODEL(**changes))
    flat = lambda grads: np.concatenate([np.ravel(grads[name]) for name in sorted(grads)])
    exact, _, exact_grads = loss_and_grads(params, **changes)
    error = {}
    for chunk in (0, 6):
        losses, _, grads = loss_and_grads(params, **changes, dtype="bfloat16", loss_chunk=chunk)
        assert losses == pytest.approx(exact, rel=2e-3)
        error[chunk] = np.linalg.norm(flat(grads) - flat(exact_grads)) / np.linalg.norm(flat(exact_grads))
    assert 1e-4 < error[6] < 1.2 * error[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_chunks_are_summed_in_float32(dtype):
    """800 chunks of which each adds 2^-9 of what there is: in bfloat16 nothing would be added after the first ones."""
    x_BTD = jnp.ones((1, 800, 1), jnp.bfloat16)
    targets_BT = jnp.zeros((1, 800), jnp.int32)
    loss = lambda w, x_CD, targets_C: (w.astype(jnp.bfloat16) * x_CD).astype(jnp.float32).sum()
    total = lambda w: chunked_loss_sum(loss, w, x_BTD, targets_BT, 1)[0]
    assert jax.jit(jax.grad(total))(jnp.ones((), dtype)) == 800


def test_the_logits_are_never_there_at_once(random_params):
    vocab_size, tokens = 3001, 64
    need = {}
    for chunk in (0, 8):
        config = MODEL(vocab_size=vocab_size, context_len=tokens, loss_chunk=chunk)
        params = random_params(config)
        batch_BT1 = jnp.zeros((1, tokens + 1), jnp.int32)
        loss = lambda params, config=config, batch_BT1=batch_BT1: batch_loss(config, params, batch_BT1, None)[0]
        programs = (
            jax.jit(jax.grad(loss)).lower(params),
            make_eval_step(config, make_mesh(devices=jax.devices()[:1])).lower(params, batch_BT1),
        )
        need[chunk] = [program.compile().memory_analysis().temp_size_in_bytes for program in programs]
    whole = 4 * vocab_size * tokens
    assert all(bytes_ >= whole for bytes_ in need[0])
    assert need[8][0] < whole and need[8][1] < whole / 4
