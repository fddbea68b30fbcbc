"""Logits, loss and every gradient against models that this project did not write, on the same weights and tokens."""

import jax
import numpy as np
import pytest
import torch
from original import Original, randomised
from stock import CONTEXT, LLAMA3, YARN, V, arrays, stock

from interop.families import FAMILIES, ORIGINAL_RULES
from interop.models import from_original, from_theirs, join_weights
from training.step import make_loss_and_grads
from transformer.model import model_of
from transformer.sharding import make_mesh

# Both sides compute in float32, whose unit is 6e-8, through some dozen sums each. The gradients of sinks and of norms'
# scales are sums whose terms nearly cancel, which is where the largest differences are.
LIMIT = 1e-5

VARIANTS = [
    ("GPT2LMHeadModel", {}),
    ("GPT2LMHeadModel", {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": None}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"rope_parameters": YARN | {"attention_factor": 0.8, "beta_fast": 2.0}}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("GptOssForCausalLM", {"rope_parameters": YARN | {"truncate": False}}),
    ("GptOssForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 150.0}, "attention_bias": False}),
]


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng([batch, length]).integers(0, V, (batch, length + 1))


def their_side(model: torch.nn.Module, batch_BT1: np.ndarray) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, mean loss, gradients by name."""
    model.zero_grad()
    inputs_BT, targets_BT = torch.tensor(batch_BT1[:, :-1]), torch.tensor(batch_BT1[:, 1:])
    logits_BTV = model(inputs_BT)
    logits_BTV = getattr(logits_BTV, "logits", logits_BTV)
    loss = torch.nn.functional.cross_entropy(logits_BTV.reshape(-1, V), targets_BT.reshape(-1))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits_BTV.detach().numpy(), loss.item(), arrays(gradients)


def our_side(config, params, batch_BT1):
    """The same from the model and the gradients that training uses."""
    params = jax.tree.map(jax.numpy.asarray, params)
    loss_and_grads = make_loss_and_grads(config, make_mesh(devices=jax.devices()[:1]))
    both = lambda p, t: (model_of(config, p)(t[:, :-1]), loss_and_grads(p, t, jax.random.key(0)))
    program = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
    logits_BTV, (total, count, grads) = program(params, batch_BT1)
    return logits_BTV, total / count, {name: np.asarray(g) / count for name, g in grads.items()}


def compare(agree, implementation, model, config, params, rules, shape):
    batch_BT1 = tokens(*shape)
    logits, loss, grads = our_side(config, params, batch_BT1)
    their_logits, their_loss, their_grads = their_side(model, batch_BT1)
    agree(implementation, "logits", logits, their_logits, LIMIT)
    agree(implementation, "loss", loss, their_loss, LIMIT)
    ours = join_weights(rules, config, grads)
    router = {name for name in their_grads if "router" in name}  # the gradient of a choice without alternative is 0
    assert not any(their_grads.pop(name).any() for name in router)
    agree(implementation, "every gradient", ours, their_grads, LIMIT)


@pytest.mark.parametrize("shape", [(1, 1), (1, CONTEXT), (3, 7)], ids=str)
def test_the_original(agree, shape):
    model = randomised(Original(V, CONTEXT, num_blocks=3, num_heads=5, embedding_dim=20, mlp_dim=28), seed=1)
    config, params = from_original(arrays(model.state_dict()), {})
    compare(agree, "the PyTorch original", model, config, params, ORIGINAL_RULES, shape)


@pytest.mark.parametrize("architecture, changes", VARIANTS, ids=lambda x: ",".join(x) if isinstance(x, dict) else x)
def test_the_stock_classes(agree, architecture, changes):
    model = stock(architecture, changes)
    theirs = model.config.to_dict()
    config, params = from_theirs(theirs, arrays(model.state_dict()))
    compare(agree, f"transformers {architecture}", model, config, params, FAMILIES[theirs["model_type"]].rules, (2, 9))
