"""What the memory of a step is said to be, against the state as built and the step as compiled."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import pytest

import config_lib
from configs import gpt2_124m as gpt2_124m_config
from training import cost
from training.cost import activation_bytes, held_bytes, parameter_counts
from training.optimizer import OptimizerConfig
from training.step import make_step
from transformer.config import TransformerConfig
from transformer.kernels import choose as choice
from transformer.sharding import make_mesh
from transformer.xla import Target, aimed_at

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


def test_the_state_of_normuon_is_counted_exactly():
    step, said = make(MODEL, True, 1, hidden_optimizer="normuon")
    held = 0
    for name, leaf in step.state.params.items():
        held += leaf.size + leaf.shape[1] if step.labels[name] == "normuon" else 2 * leaf.size
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
    assert sum(said.values()) == pytest.approx(need.argument_size_in_bytes + need.temp_size_in_bytes, rel=0.2)


@pytest.fixture(scope="module")
def gpt2_124m():
    """By the rounds of a step: settings and state on one device, without any array."""

    @cache
    def make(rounds):
        config = gpt2_124m_config.get_config()
        config.accumulation_steps = rounds
        model = config_lib.model_config_of(config, 50_257, 50_256)
        settings, mesh = config_lib.optimizer_config(config), make_mesh(devices=jax.devices()[:1])
        return settings, model, make_step(settings, model, 9, jax.random.key(0), mesh).state, mesh

    return make


@pytest.mark.filterwarnings("ignore:attention_kernel")
@pytest.mark.parametrize(
    "target, rows, rounds, kernel, peak",
    [
        (Target("tpu"), 32, 1, "splash", 14.396),
        (Target("cuda", "9.0"), 32, 2, "cudnn", 15.275),
        (Target("cuda", "9.0"), 64, 2, "cudnn", 25.873),
        (Target("cuda", "9.0"), 64, 1, "cudnn", 25.224),
        (Target("cuda", "9.0"), 32, 2, "chunked", 16.972),
        (Target("cuda", "9.0"), 64, 2, "chunked", 30.452),
        (Target("cuda", "9.0"), 64, 1, "chunked", 30.874),
    ],
    ids=["v5e:4x4", "H100:1", "H200:1", "H100:8", "H100:1, in chunks", "H200:1, in chunks", "H100:8, in chunks"],
)
def test_the_sum_is_about_what_compilers_elsewhere_say(monkeypatch, gpt2_124m, target, rows, rounds, kernel, peak):
    """GB of configs/gpt2_124m.py as in launch/README.md, where all devices hold the whole state."""
    monkeypatch.setattr(choice, "_misfit", lambda *_: "")  # cuDNN is not here
    settings, model, state, mesh = gpt2_124m(rounds)
    how = {"attention_kernel": "chunked"} if kernel == "chunked" else {}
    model = dataclasses.replace(model, dtype="bfloat16", **how)
    with aimed_at(target):
        assert cost._kernel(model) == kernel
        said = held_bytes(settings, model, rows, state, mesh)
    assert sum(said.values()) / 1e9 == pytest.approx(peak, rel=0.16)


def test_what_saves_memory_is_said_to():
    said = lambda **changes: activation_bytes(dataclasses.replace(MODEL, **changes), ROWS)
    whole, chunked = said(vocab_size=9_999), said(vocab_size=9_999, loss_chunk=16)
    assert whole["logits"] == 4 * ROWS * 64 * 9_999 == chunked["logits"] * ROWS * 64 / 16
    everything, dots, block = (said(remat=remat, num_blocks=12)["kept"] for remat in ("none", "dots", "block"))
    assert everything > 1.5 * dots > 3 * block
    assert said(dtype="bfloat16")["kept"] < 0.7 * said()["kept"]


def test_the_moment_counts_at_which_most_is_held():
    wide = {"vocab_size": 65, "embedding_dim": 256, "mlp_dim": 1024, "head_dim": 64, "context_len": 4}
    said = [make(dataclasses.replace(MODEL, **changes), False, 1)[1] for changes in (LARGE, {}, wide)]
    parts = [said.keys() - {"parameters", "optimizer", "gradients"} for said in said]
    assert parts == [{"activations", "logits"}, {"activations"}, set()]
    assert said[2]["gradients"] == 2 * said[2]["parameters"]
