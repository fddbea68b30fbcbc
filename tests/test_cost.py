"""What the memory of a step is said to be, against the state as built and the step as compiled."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from training import optimizer
from training.cost import memory_bytes
from training.step import init_state, make_train_step
from transformer.config import TransformerConfig
from transformer.model import init_params
from transformer.sharding import make_mesh

ROWS = 8
MODEL = TransformerConfig(
    vocab_size=65, context_len=64, num_blocks=3, num_heads=4, embedding_dim=64, mlp_dim=256, mlp="relu2"
)
LARGE = {"vocab_size": 20_011, "loss_chunk": 32}


def make(config, use_muon, k):
    """The optimizer, its labels, its settings and the state before the first step, without any array."""
    settings = optimizer.OptimizerConfig(use_muon=use_muon, accumulation_steps=k)
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    labels = optimizer.labels_of(params, use_muon)
    opt = optimizer.make_optimizer(settings, params, 9)
    state = jax.eval_shape(partial(init_state, config, opt, labels), jax.random.key(0))
    return opt, labels, settings, state


@pytest.mark.parametrize("use_muon, k", [(True, 1), (False, 1), (True, 4), (False, 4)])
@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "num_kv_heads": 2, "tie_embeddings": False}])
def test_parameters_and_optimizer_are_counted_exactly(changes, use_muon, k):
    config = dataclasses.replace(MODEL, **changes)
    _, _, _, state = make(config, use_muon, k)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)
    said = memory_bytes(config, ROWS, use_muon, k)
    assert said["parameters"] == size(state.params)
    assert said["optimizer"] == size(state.opt_state)


@pytest.mark.parametrize(
    "changes, use_muon, k",
    [
        ({"context_len": 128}, True, 1),
        ({"remat": "block", "context_len": 256}, True, 1),
        ({"remat": "dots", **LARGE}, False, 2),
    ],
    ids=["plain", "chunked attention, blocks again", "large vocabulary in chunks"],
)
def test_the_sum_is_about_what_the_compiled_step_needs(changes, use_muon, k):
    config = dataclasses.replace(MODEL, **changes)
    opt, labels, settings, state = make(config, use_muon, k)
    schedule = optimizer.schedule_shape(settings, 9)
    step = make_train_step(config, opt, schedule, labels, k, jax.random.key(0), make_mesh(devices=jax.devices()[:1]))
    batch_BT1 = jax.ShapeDtypeStruct((ROWS, config.context_len + 1), jnp.int32)
    need = step.lower(state, batch_BT1).compile().memory_analysis()
    said = memory_bytes(config, ROWS, use_muon, k)
    assert said["parameters"] + said["optimizer"] == pytest.approx(need.argument_size_in_bytes, rel=0.02)
    assert sum(said.values()) == pytest.approx(need.argument_size_in_bytes + need.temp_size_in_bytes, rel=0.3)


def test_what_saves_memory_is_said_to():
    said = lambda **changes: memory_bytes(dataclasses.replace(MODEL, **changes), ROWS, True, 1)
    whole, chunked = said(vocab_size=9_999), said(vocab_size=9_999, loss_chunk=16)
    assert whole["logits"] == 2 * 4 * ROWS * 64 * 9_999 == chunked["logits"] * ROWS * 64 / 16
    everything, dots, block = (said(remat=remat, num_blocks=12)["activations"] for remat in ("none", "dots", "block"))
    assert everything > 1.5 * dots > 3 * block
    assert said(dtype="bfloat16")["activations"] < 0.7 * said()["activations"]
