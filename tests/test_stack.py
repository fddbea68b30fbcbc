"""Blocks computed again for the backward pass, or in a loop: the same numbers, less memory, a smaller program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from training.loss import batch_loss
from transformer.config import TransformerConfig
from transformer.stack import run_blocks
from transformer.xla import compiler_options

B, T, V = 2, 9, 13
OPTIONS = {**(compiler_options() or {}), "xla_backend_optimization_level": 0}  # the latter: compiles sooner
MODEL = TransformerConfig(
    vocab_size=V,
    context_len=T,
    num_blocks=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    embedding_dim=10,
    mlp_dim=14,
    mlp="swiglu",
    position="rope",
    qk_norm="scaled",
    qkv_bias=True,
    sliding_window=3,
    window_pattern="LG",
    dropout=0.3,
    residual_scalars=True,
)


def loss_and_grads(config, params):
    """Summed loss and gradients, with dropout, compiled like the training step."""
    batch_BT1 = np.random.default_rng(1).integers(0, V, (B, T + 1)).astype(np.int32)
    loss = lambda params: batch_loss(config, params, batch_BT1, jax.random.key(3))[0]
    return jax.jit(jax.value_and_grad(loss), compiler_options=OPTIONS)(params)


@pytest.fixture(scope="module")
def want(random_params):
    """By attention kernel: what the plain stack gives."""
    params = random_params(MODEL)
    return {k: loss_and_grads(dataclasses.replace(MODEL, attention_kernel=k), params) for k in ("plain", "chunked")}


@pytest.mark.parametrize(
    "kernel, changes",
    [
        ("plain", {"remat": "block"}),
        ("plain", {"remat": "dots"}),
        ("plain", {"scan_blocks": True}),
        ("plain", {"scan_blocks": True, "remat": "dots"}),
        ("chunked", {"remat": "block"}),
        ("chunked", {"scan_blocks": True, "remat": "block"}),
    ],
)
def test_loss_gradients_and_dropout_are_those_of_the_plain_stack(random_params, want, kernel, changes):
    loss, grads = loss_and_grads(dataclasses.replace(MODEL, attention_kernel=kernel, **changes), random_params(MODEL))
    want_loss, want_grads = want[kernel]
    assert loss == pytest.approx(float(want_loss), rel=1e-6)
    assert grads.keys() == want_grads.keys()
    for name, want_grad in want_grads.items():
        assert np.abs(want_grad).max() > 0, name
        np.testing.assert_allclose(grads[name], want_grad, rtol=0, atol=2e-6 * np.abs(want_grad).max(), err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_kernel": "plain"},
        {"attention_kernel": "chunked", "scan_blocks": True, "remat": "block", "tie_embeddings": False},
        {"attention_kernel": "chunked", "num_kv_heads": 6, "sliding_window": 0, "mlp": "gelu", "loss_chunk": 4},
    ],
)
def test_products_in_half_precision_change_gradients_by_their_roundings_alone(random_params, changes):
    config = dataclasses.replace(MODEL, **changes)
    params = random_params(config)
    loss, grads = loss_and_grads(dataclasses.replace(config, dtype="bfloat16_matmul"), params)
    exact_loss, exact_grads = loss_and_grads(config, params)
    assert loss == pytest.approx(float(exact_loss), rel=3e-3)
    flat = lambda grads: np.concatenate([np.ravel(grads[name]) for name in sorted(grads)])
    assert {grad.dtype for grad in grads.values()} == {jnp.dtype("float32")}
    assert 1e-3 < np.linalg.norm(flat(grads) - flat(exact_grads)) / np.linalg.norm(flat(exact_grads)) < 0.03


class Dropping(nnx.Module):
    """A block that only drops, `times` over."""

    def __init__(self, times):
        self.weight, self.dropout, self.times = nnx.Param(jnp.ones(3)), nnx.Dropout(0.5), times

    def __call__(self, x_BTD, turn, rngs):
        for _ in range(self.times):
            x_BTD = x_BTD + self.weight[...] * self.dropout(jnp.ones_like(x_BTD), rngs=rngs)
        return x_BTD, None


@pytest.mark.parametrize("remat, period", [("none", 2), ("block", 0), ("dots", 4)])
def test_random_numbers_go_on_where_the_blocks_stopped(remat, period):
    results = []
    for how in ({}, {"remat": remat, "period": period}):
        rngs = nnx.Rngs(dropout=jax.random.key(0))
        rngs.dropout()
        out_BTD = run_blocks([Dropping(1), Dropping(2)] * 2, jnp.zeros((2, 5, 3)), None, rngs, **how)
        results.append((np.asarray(out_BTD), rngs.dropout()))
    (want_BTD, want_next), (have_BTD, have_next) = results
    np.testing.assert_array_equal(have_BTD, want_BTD)
    assert have_next == want_next and len(np.unique(want_BTD)) > 4


def test_blocks_that_differ_in_more_than_weights_cannot_share_a_loop():
    with pytest.raises(ValueError, match=r"^scan_blocks: .*alike"):
        run_blocks([Dropping(1), Dropping(2)], jnp.zeros((2, 5, 3)), None, None, period=1)


def test_what_is_computed_again_is_not_kept(random_params):
    config = dataclasses.replace(MODEL, num_blocks=8, context_len=64, mlp_dim=40, dropout=0.0)

    def temporary(**changes):
        changed = dataclasses.replace(config, **changes)
        loss = lambda params, batch_BT1: batch_loss(changed, params, batch_BT1, None)[0]
        lowered = jax.jit(jax.grad(loss), compiler_options=OPTIONS).lower(
            random_params(config), jnp.zeros((8, 65), jnp.int32)
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    everything, dots, block, block_in_loop = (
        temporary(**changes)
        for changes in ({}, {"remat": "dots"}, {"remat": "block"}, {"remat": "block", "scan_blocks": True})
    )
    assert dots < 0.6 * everything and block < 0.3 * everything and block_in_loop < 0.4 * everything


def test_the_program_of_a_loop_does_not_grow_with_the_blocks(random_params):
    def dots(num_blocks, **changes):
        config = dataclasses.replace(MODEL, num_blocks=num_blocks, **changes)
        loss = partial(batch_loss, config, batch_BT1=jnp.zeros((B, T + 1), jnp.int32), key=None)
        grads = jax.grad(lambda params: loss(params)[0])
        return str(jax.make_jaxpr(grads)(random_params(config))).count(" dot_general[")

    assert dots(8, scan_blocks=True) == dots(4, scan_blocks=True) < dots(4)


@pytest.mark.parametrize(
    "changes, period",
    [
        ({}, 2),
        ({"sliding_window": 0}, 1),
        ({"window_pattern": "GG"}, 1),
        ({"window_pattern": "GG", "sink_pattern": "SN"}, 2),
        ({"num_blocks": 6, "window_pattern": "LLG"}, 3),
        ({"num_blocks": 12, "window_pattern": "LLG", "sink_pattern": "SN"}, 6),
        ({"num_blocks": 1}, 1),
    ],
)
def test_the_loop_runs_over_the_shortest_pattern_of_windows(changes, period):
    assert dataclasses.replace(MODEL, **changes, scan_blocks=True).period == period


def test_blocks_without_a_pattern_are_refused():
    with pytest.raises(
        ValueError, match=r"^scan_blocks: .*'LLG'.* 4 blocks; use False, or a multiple of their lengths$"
    ):
        dataclasses.replace(MODEL, window_pattern="LLG", scan_blocks=True)
