"""Muon, AdamW, schedules, clipping and accumulation against torch's, and a whole training by both."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import Parameter
from torch.optim import _muon, lr_scheduler

from training.optimizer import HIDDEN_MATRIX, OptimizerConfig, grad_norm_of, make_optimizer
from transformer.config import TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50

# Every kind of parameter there is; its hidden matrices are square, wide and tall.
MODEL = TransformerConfig(
    vocab_size=31,
    context_len=7,
    num_blocks=1,
    num_heads=9,
    num_kv_heads=3,
    head_dim=5,
    embedding_dim=45,
    mlp_dim=77,
    mlp="swiglu",
    qk_norm="scaled",
    qkv_bias=True,
    tie_embeddings=False,
)


def turned(name, x):
    """A weight [in, out] as torch's [out, in], and back."""
    return x.T if name.endswith("kernel") else x


def torch_parameters(params):
    return {name: Parameter(torch.tensor(turned(name, np.asarray(x)))) for name, x in params.items()}


def from_torch(parameters):
    return {name: turned(name, p.detach().numpy()) for name, p in parameters.items()}


def set_gradients(parameters, grads):
    for name, p in parameters.items():
        p.grad = torch.tensor(turned(name, grads[name]))


def random_gradients(params, scale):
    """One dict a step, of entries as large as `scale` [steps] says."""
    rng = np.random.default_rng(1)
    return [{name: np.float32(s * rng.normal(size=p.shape)) for name, p in params.items()} for s in scale]


SCALE = 10.0 ** (np.arange(STEPS) % 8 - 6)  # from 1e-6 to 10 and again: every epsilon has its turn


def train(config, params, grads, tokens=1.0):
    """Yields our parameters and the gradient's norm after each step."""
    opt = make_optimizer(config, params, len(grads))

    @jax.jit
    def update(params, state, grads, real_step):
        updates, state = opt.update(grads, state, params, tokens=tokens, apply=True, real_step=real_step)
        return optax.apply_updates(params, updates), state, grad_norm_of(state)

    state = opt.init(params)
    for real_step, g in enumerate(grads):
        params, state, norm = update(params, state, g, real_step)
        yield params, norm


# --- AdamW --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(lr=2**-7, betas=(0.8, 0.97), eps=1e-5, weight_decay=2**-2),
        OptimizerConfig(lr=2**-8, betas=(0.9, 1 - 2**-10), eps=1e-8, weight_decay=2**-3, decay_embeddings=True),
        OptimizerConfig(lr=2**-3, betas=(0.0, 0.9), eps=0.1, weight_decay=2**-6, decay_embeddings=True),
    ],
    ids=lambda config: f"betas={config.betas},eps={config.eps}",
)
def test_adamw(agree, random_params, config):
    """Powers of two, where 1e-6 could not be kept otherwise: some roundings are the same in every step and add up.

    Torch rounds 1 - lr * weight_decay to float32; optax rounds 1 - beta^t, which for 0.999 makes steps 6e-6 too small.
    """
    params = random_params(MODEL)
    grads = random_gradients(params, SCALE)
    *_, (ours, _) = train(dataclasses.replace(config, use_muon=False, grad_clip=0.0), params, grads)

    theirs = torch_parameters(params)
    decayed = ("kernel", "embedding") if config.decay_embeddings else ("kernel",)
    groups = [
        {"params": [p for name, p in theirs.items() if name.endswith(decayed)]},
        {"params": [p for name, p in theirs.items() if not name.endswith(decayed)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, config.lr, config.betas, config.eps, config.weight_decay)
    for g in grads:
        set_gradients(theirs, g)
        adamw.step()
    agree("torch.optim.AdamW", f"parameters after {STEPS} steps", ours, from_torch(theirs), 1e-6)


# --- Muon ---------------------------------------------------------------------------------------------------------

ADJUST = {"aspect": "original", "rms": "match_rms_adamw"}
MUONS = {
    "original": OptimizerConfig(weight_decay=0.3, grad_clip=0.0),
    "match_rms_adamw": OptimizerConfig(muon_lr=0.01, weight_decay=0.1, muon_scale="rms", grad_clip=0.0),
    "original, 4 iterations, momentum warm-up": OptimizerConfig(
        newton_schulz_steps=4, muon_momentum_start=0.7, muon_momentum_warmup_steps=20, grad_clip=0.0
    ),
}


@pytest.fixture(scope="module", params=MUONS)
def muon(request, random_params):
    """(config, ours, theirs): our parameters after 50 steps, and a function that makes torch's."""
    config = MUONS[request.param]
    params = {name: p for name, p in random_params(MODEL).items() if HIDDEN_MATRIX.fullmatch(name)}
    grads = random_gradients(params, SCALE)
    *_, (ours, _) = train(config, params, grads)

    def theirs():
        parameters = torch_parameters(params)
        muon = torch.optim.Muon(
            parameters.values(),
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            ns_steps=config.newton_schulz_steps,
            adjust_lr_fn=ADJUST[config.muon_scale],
        )
        start, end, warmup = config.muon_momentum_start, config.muon_momentum, config.muon_momentum_warmup_steps
        for i, g in enumerate(grads):
            muon.param_groups[0]["momentum"] = start + (end - start) * i / warmup if i < warmup else end
            set_gradients(parameters, g)
            muon.step()
        return from_torch(parameters)

    return config, ours, theirs


def test_muon_with_newton_schulz_in_float32(agree, muon, muon_in_float32):
    _, ours, theirs = muon
    agree("torch.optim.Muon, Newton-Schulz in float32", f"parameters after {STEPS} steps", ours, theirs(), 1e-5)


def test_muon_as_torch_has_it(agree, muon):
    """Within what bfloat16 allows: to first order, with u = 2^-8, half the gap between its numbers at 1.

    X is rounded twice before the first iteration. An iteration X <- a X + (b G + c G G) X rounds G = X X^T, the bracket
    and X. At singular values near 1 these errors are |b + 2c| u, |b + c| u and u of the norm of X, and later iterations
    pass them on at their relative size: a rotation of the singular vectors stays, a change of the values shrinks.

    An orthogonal M x N matrix, M <= N, has norm sqrt(M). The errors of different steps are independent, so their
    squares add (probabilistic rounding error analysis: Higham and Mary, 2019); weight decay only shrinks them.
    """
    config, ours, theirs = muon
    b, c = _muon.DEFAULT_B, _muon.DEFAULT_C
    in_one_step = (2 + config.newton_schulz_steps * (abs(b + 2 * c) + abs(b + c) + 1)) * 2**-8
    for name, want in theirs().items():
        rate = _muon._adjust_lr(config.muon_lr, ADJUST[config.muon_scale], want.T.shape)
        bound = in_one_step * rate * math.sqrt(STEPS * min(want.shape)) / np.linalg.norm(want)
        agree("torch.optim.Muon (bfloat16)", f"parameters after {STEPS} steps", ours[name], want, bound)


# --- Schedules and clipping ---------------------------------------------------------------------------------------

TOTAL, WARMUP, DECAY, LEAST = 40, 7, 16, 0.2


def after_warmup(opt, *rest, starts=()):
    """Torch's schedulers in a row, from the first that warms up."""
    warm = lr_scheduler.LinearLR(opt, start_factor=1 / (WARMUP + 1), total_iters=WARMUP)
    return lr_scheduler.SequentialLR(opt, [warm, *rest], milestones=[WARMUP, *starts])


TORCH_SCHEDULES = {
    "constant": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: min(1, (t + 1) / (WARMUP + 1))),
    "cosine": lambda opt: after_warmup(
        opt, lr_scheduler.CosineAnnealingLR(opt, TOTAL - WARMUP, eta_min=LEAST * opt.defaults["lr"])
    ),
    "linear": lambda opt: after_warmup(opt, lr_scheduler.LinearLR(opt, 1, LEAST, TOTAL - WARMUP)),
    "constant_linear": lambda opt: after_warmup(
        opt,
        lr_scheduler.ConstantLR(opt, factor=1),
        lr_scheduler.LinearLR(opt, 1, LEAST, DECAY),
        starts=[TOTAL - DECAY],
    ),
}


@pytest.mark.parametrize("schedule", TORCH_SCHEDULES)
def test_schedules(agree, schedule):
    """With no gradients and weights of 1, a step moves them by the learning rate times the decay, here 1."""
    config = OptimizerConfig(
        lr=0.1,
        muon_lr=0.3,
        weight_decay=1.0,
        newton_schulz_steps=1,
        schedule=schedule,
        lr_warmup_ratio=WARMUP / TOTAL,
        decay_ratio=DECAY / TOTAL,
        min_lr_ratio=LEAST,
    )
    ones = {"head.kernel": jnp.ones((2, 3)), "blocks.0.mlp.up.kernel": jnp.ones((4, 5))}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    opt = make_optimizer(config, ones, TOTAL)
    update = partial(opt.update, zeros, opt.init(ones), ones, tokens=1.0, apply=True)
    moved = jax.jit(jax.vmap(lambda real_step: update(real_step=real_step)[0]))(jnp.arange(TOTAL))
    for name, peak in (("head.kernel", config.lr), ("blocks.0.mlp.up.kernel", config.muon_lr)):
        sgd = torch.optim.SGD([Parameter(torch.zeros(1))], lr=peak)
        scheduler, rates = TORCH_SCHEDULES[schedule](sgd), []
        for _ in range(TOTAL):
            rates += scheduler.get_last_lr()
            sgd.step()
            scheduler.step()
        ours = -np.asarray(moved[name])[:, 0, 0]
        agree("torch lr_scheduler", "rate at each step", dict(enumerate(ours)), dict(enumerate(rates)), 1e-6)


def test_clipping(agree, random_params):
    """Norms below, at and far above the limit; the large epsilon keeps AdamW's steps in proportion to the gradients."""
    params = random_params(MODEL)
    limit, eps, tokens = 1.7e-3, 1e-3, 11  # so low that the 1e-6 that torch adds to the norm shows
    grads = random_gradients(params, np.ones(6))
    for g, norm in zip(grads, limit * np.array([0.3, 1, 40, 1, 0.01, 2]), strict=True):
        factor = norm / math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in g.values()))
        g.update({name: np.float32(factor * x) for name, x in g.items()})
    config = OptimizerConfig(lr=2.0, eps=eps, use_muon=False, grad_clip=limit)
    sums = [{name: tokens * x for name, x in g.items()} for g in grads]
    theirs = torch_parameters(params)
    adamw = torch.optim.AdamW(theirs.values(), config.lr, config.betas, eps, weight_decay=0)
    for g, (ours, norm) in zip(grads, train(config, params, sums, tokens), strict=True):
        set_gradients(theirs, g)
        agree("torch clip_grad_norm_", "norm", norm, torch.nn.utils.clip_grad_norm_(theirs.values(), limit), 1e-6)
        adamw.step()
        agree("torch clip_grad_norm_", "parameters, 6 steps of AdamW", ours, from_torch(theirs), 1e-6)
