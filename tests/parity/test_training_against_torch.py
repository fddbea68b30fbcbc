"""Muon and AdamW together on one model, here and in torch: accumulation, and fifty steps on real text."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
from helpers import data_of
from original import Original, randomised
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from corpus.dataset import Split
from input_pipeline import IGNORED, Batches
from interop.families import ORIGINAL_RULES
from interop.models import split_weights
from training import step
from training.optimizer import OptimizerConfig, labels_of, make_optimizer, schedule_shape
from transformer.config import TransformerConfig
from transformer.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent.parent
CONFIG = OptimizerConfig(lr=0.005, muon_lr=0.02, weight_decay=0.1, decay_embeddings=True)


def build(settings):
    """The original's model, and ours of the same shape."""
    names = ("vocab_size", "context_len", "num_blocks", "num_heads", "embedding_dim", "mlp_dim")
    shape = dict(zip(names, settings, strict=True))
    return Original(**shape), TransformerConfig(**shape)


def renamed(model_config, tensors):
    """The original's parameters or gradients under our names; copies, as torch changes its own in place."""
    weights = {name: tensor.detach().numpy().copy() for name, tensor in tensors}
    return split_weights(ORIGINAL_RULES, model_config, weights)


def torch_optimizers(model):
    """Muon for the matrices of the blocks, AdamW for all else; norms, biases and sinks do not decay."""
    embeddings = [p for name, p in model.named_parameters() if name.startswith("embed.")]
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    assert len(embeddings) + len(matrices) + len(vectors) == len(list(model.parameters()))
    groups = [{"params": embeddings}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, CONFIG.muon_lr, CONFIG.weight_decay, CONFIG.muon_momentum),
        torch.optim.AdamW(groups, CONFIG.lr, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay),
    ]


def torch_loss(model, batch_BT1, reduction="mean"):
    batch_BT1 = torch.tensor(batch_BT1, dtype=torch.long)
    logits_BTV, target_BT = model(batch_BT1[:, :-1].clamp(min=0)), batch_BT1[:, 1:]
    return cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED, reduction=reduction)


def clip_and_step(model, optimizers, limit):
    """The gradients' norm, before they are clipped and used up."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return norm.item()


# --- Accumulation -------------------------------------------------------------------------------------------------


def test_accumulation(agree, muon_in_float32):
    """Three micro-batches: torch adds thirds of their means where those count alike, else it takes them at once.

    Both optimizers get gradients of one model, torch's. Nothing is clipped: that would hide what sums are divided by.
    """
    model, model_config = build((13, 7, 1, 3, 15, 22))
    randomised(model, seed=0)
    ours, theirs = renamed(model_config, model.named_parameters()), torch_optimizers(model)
    opt = make_optimizer(dataclasses.replace(CONFIG, accumulation_steps=3, grad_clip=0.0), ours, total_steps=4)
    update, state = jax.jit(opt.update), opt.init(ours)
    for real_step, counts in enumerate([(14, 14, 14), (14, 1, 6), (3, 12, 14), (14, 14, 14)]):
        batches_3BT1 = np.random.default_rng(real_step).integers(0, 13, (3, 2, 8))
        batches_3BT1[..., 1:][np.arange(14).reshape(2, 7) >= np.reshape(counts, (3, 1, 1))] = IGNORED

        for i, batch_BT1 in enumerate(batches_3BT1):
            torch_loss(model, batch_BT1, "sum").backward()
            grads = renamed(model_config, [(name, p.grad) for name, p in model.named_parameters()])
            model.zero_grad()
            extra = {"tokens": float(sum(counts[: i + 1])), "apply": i == 2, "real_step": real_step}
            updates, state = update(grads, state, ours, **extra)
            ours = optax.apply_updates(ours, updates)

        if counts == (14, 14, 14):
            for batch_BT1 in batches_3BT1:
                (torch_loss(model, batch_BT1) / 3).backward()
        else:
            torch_loss(model, batches_3BT1.reshape(6, 8)).backward()
        clip_and_step(model, theirs, math.inf)
        want = renamed(model_config, model.named_parameters())
        agree("torch, accumulated gradients", "parameters, 4 steps of Muon and AdamW", ours, want, 1e-5)


# --- Fifty steps --------------------------------------------------------------------------------------------------

STEPS, WARMUP, LEAST, CONTEXT = 50, 5, 0.1, 32


@pytest.fixture(scope="session")
def shakespeare() -> Split:
    """The tokens to train on."""
    fractions = {"val_fraction": 0.1, "test_fraction": 0.0}
    data = data_of("tiny_shakespeare", "char", data_dir=ROOT / "data", context_len=CONTEXT, **fractions)
    assert data.tokenizer.vocab_size == 65
    return data.train


def our_run(config, model_config, params, batches):
    """Loss and gradient norm [2, STEPS] as training logs them, and the parameters at the end."""
    labels, schedule, mesh = (
        labels_of(params, config),
        schedule_shape(config, STEPS),
        make_mesh(devices=jax.devices()[:1]),
    )
    opt, k = make_optimizer(config, params, STEPS, mesh), config.accumulation_steps
    train_step = step.make_train_step(model_config, opt, schedule, labels, k, jax.random.key(0), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "init_params", lambda config, key: params)
        state = jax.jit(lambda key: step.init_state(model_config, opt, labels, key))(jax.random.key(0))
    rows = []
    for micro_step in range(STEPS * k):
        state, metrics = train_step(state, batches(micro_step))
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.transpose(rows[k - 1 :: k]), state.params


def torch_run(config, model_config, model, batches):
    """The same of the original's model."""
    optimizers, schedulers, k = torch_optimizers(model), [], config.accumulation_steps
    for optimizer in optimizers:
        warm = LinearLR(optimizer, start_factor=1 / (WARMUP + 1), total_iters=WARMUP)
        cosine = CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=LEAST * optimizer.defaults["lr"])
        schedulers.append(SequentialLR(optimizer, [warm, cosine], milestones=[WARMUP]))
    rows = []
    for real_step in range(STEPS):
        losses = [torch_loss(model, batches(real_step * k + i)) / k for i in range(k)]
        for loss in losses:
            loss.backward()
        rows.append([sum(losses).item(), clip_and_step(model, optimizers, config.grad_clip)])
        for scheduler in schedulers:
            scheduler.step()
    return np.transpose(rows), renamed(model_config, model.named_parameters())


def test_fifty_steps_on_real_text(agree, muon_in_float32, shakespeare):
    """Each side by itself from the same weights on the same batches: model, gradients, clipping, rates, optimizers.

    Rounding differs from the first step on, and Muon, which makes the least singular value as large as the others,
    enlarges it: in the parameters, which the loss hardly shows.
    """
    torch.manual_seed(0)
    model, model_config = build((65, CONTEXT, 2, 3, 48, 80))
    params = renamed(model_config, model.named_parameters())
    config = dataclasses.replace(
        CONFIG,
        grad_clip=1.0,
        accumulation_steps=2,
        schedule="cosine",
        lr_warmup_ratio=WARMUP / STEPS,
        min_lr_ratio=LEAST,
    )
    batches = Batches(shakespeare, CONTEXT, batch_size=6, seed=0)
    (our_loss, our_norm), ours = our_run(config, model_config, params, batches)
    (loss, norm), theirs = torch_run(config, model_config, model, batches)
    assert loss[0] > 4.1 and loss[-1] < 2.9 and norm.min() < 1 < norm.max()  # it learns, and clips now and then
    who = "the original, torch.optim.Muon and AdamW"
    agree(who, "loss at each of 50 steps", dict(enumerate(our_loss)), dict(enumerate(loss)), 1e-5)
    agree(who, "gradient norm at each of 50 steps", dict(enumerate(our_norm)), dict(enumerate(norm)), 1e-4)
    agree(who, "parameters after 50 steps", ours, theirs, 1e-3)
