"""What the memory of a step is said to be, against the state as built and the step as compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from training.cost import activation_bytes, held_bytes, parameter_counts
from training.optimizer import OptimizerConfig
from training.step import make_step
from transformer.config import TransformerConfig
from transformer.sharding import make_mesh

ROWS = 8
MODEL = TransformerConfig(
    vocab_size=65, context_len=64, num_blocks=3, num_heads=4, embedding_dim=64, mlp_dim=256, mlp="relu2"
)
LARGE = {"vocab_size": 20_011, "loss_chunk": 32}


def make(config, use_muon, k, **changes):
    """The step on one device, without any array, and what it is said to hold."""
    settings, mesh = (
        OptimizerConfig(use_muon=use_muon, accumulation_steps=k, **changes),
        make_mesh(devices=jax.devices()[:1]),
    )
    step = make_step(settings, config, 9, jax.random.key(0), mesh)
    return step, held_bytes(settings, config, ROWS, step.state, mesh)


@pytest.mark.parametrize("use_muon, k", [(True, 1), (False, 1), (True, 4), (False, 4)])
@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "num_kv_heads": 2, "tie_embeddings": False}])
def test_parameters_and_optimizer_are_counted_exactly(changes, use_muon, k):
    config = dataclasses.replace(MODEL, **changes)
    step, said = make(config, use_muon, k)
    size = {name: leaf.size for name, leaf in step.state.params.items()}
    arrays = lambda name: 1 if step.labels[name] == "muon" else 2
    assert said["parameters"] == 4 * sum(size.values()) == 4 * sum(parameter_counts(config).values())
    counters = said["optimizer"] - 4 * sum(size[name] * (arrays(name) + (k > 1)) for name in size)
    assert 0 < counters < 100


@pytest.mark.parametrize("hidden", ["normuon", "muonh", "soap"])
def test_the_state_of_other_optimizers_is_counted_exactly(hidden):
    step, said = make(MODEL, True, 1, hidden_optimizer=hidden)
    held = 0
    for name, leaf in step.state.params.items():
        matrix = step.labels[name] == hidden
        held += leaf.size * (2 if hidden == "soap" or not matrix else 1)
        if matrix and hidden == "soap":
            held += 2 * sum(n * n for n in leaf.shape)  # both factors, and their bases
        elif matrix and hidden == "normuon":
            held += leaf.shape[1]
    assert 0 < said["optimizer"] - 4 * held < 100


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
    step, said = make(config, use_muon, k)
    batch_BT1 = jax.ShapeDtypeStruct((ROWS, config.context_len + 1), jnp.int32)
    need = step.run.lower(step.state, batch_BT1).compile().memory_analysis()
    assert said["parameters"] + said["optimizer"] == pytest.approx(need.argument_size_in_bytes, rel=0.02)
    assert sum(said.values()) == pytest.approx(need.argument_size_in_bytes + need.temp_size_in_bytes, rel=0.3)


def test_what_saves_memory_is_said_to():
    said = lambda **changes: activation_bytes(dataclasses.replace(MODEL, **changes), ROWS)
    whole, chunked = said(vocab_size=9_999), said(vocab_size=9_999, loss_chunk=16)
    assert whole["logits"] == 2 * 4 * ROWS * 64 * 9_999 == chunked["logits"] * ROWS * 64 / 16
    everything, dots, block = (said(remat=remat, num_blocks=12)["activations"] for remat in ("none", "dots", "block"))
    assert everything > 1.5 * dots > 3 * block
    assert said(dtype="bfloat16")["activations"] < 0.7 * said()["activations"]
