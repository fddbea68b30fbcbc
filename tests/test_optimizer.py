"""The optimizer: who is trained by what, Newton-Schulz, Muon and AdamW against numpy, schedules, clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training import muon, optimizer
from training.muon import CLASSICAL, SAFETY, newton_schulz_rows, orthogonalize
from training.optimizer import OptimizerConfig, labels_of, make_optimizer, normalise_and_clip, schedule_shape
from transformer.config import TransformerConfig

# One of every kind of parameter there is.
EVERYTHING = TransformerConfig(
    vocab_size=13,
    context_len=7,
    num_blocks=1,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    embedding_dim=10,
    mlp_dim=14,
    mlp="swiglu",
    qk_norm="scaled",
    qkv_bias=True,
    attention_out_bias=True,
    tie_embeddings=False,
    attention_gate="head",
    residual_scalars=True,
)
HIDDEN = {
    f"blocks.0.{layer}.kernel"
    for layer in (
        *(f"attention.{x}" for x in ("query", "key", "value", "out", "gate")),
        "mlp.up",
        "mlp.gate",
        "mlp.down",
    )
}
EMBEDDINGS = {"embedding.embedding", "positions.embedding"}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


# --- Who goes where -----------------------------------------------------------------------------------------------


def test_muon_gets_the_hidden_matrices_and_adamw_all_else(random_params):
    params = random_params(EVERYTHING)
    labels = labels_of(params, OptimizerConfig())
    assert labels.keys() == params.keys()
    assert {name for name, label in labels.items() if label == "muon"} == HIDDEN
    assert set(labels.values()) == {"muon", "adamw"}
    assert set(labels_of(params, OptimizerConfig(use_muon=False)).values()) == {"adamw"}


@pytest.mark.parametrize("name", ["blocks.0.attention.mixer.kernel", "blocks.1.mlp.table", "head.kernel.bias.kernel"])
def test_a_parameter_that_no_rule_knows_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        labels_of({name: jnp.zeros((2, 3))}, OptimizerConfig())


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_weight_decay_moves_matrices_and_never_norms_biases_or_sinks(random_params, decay_embeddings):
    """Without gradients the decay is all there is; it follows each group's own rate, and both one schedule."""
    params = random_params(EVERYTHING)
    config = OptimizerConfig(
        lr=0.1,
        muon_lr=0.3,
        weight_decay=0.5,
        decay_embeddings=decay_embeddings,
        schedule="linear",
        newton_schulz_steps=1,
    )
    opt, zeros = make_optimizer(config, params, total_steps=8), jax.tree.map(np.zeros_like, params)
    update = jax.jit(lambda **extra: opt.update(zeros, opt.init(params), params, tokens=1.0, apply=True, **extra)[0])
    rate = dict.fromkeys(HIDDEN, 0.3) | {"head.kernel": 0.1} | dict.fromkeys(EMBEDDINGS, 0.1 * decay_embeddings)
    for step, factor in ((0, 1.0), (6, 0.25)):
        for name, moved in update(real_step=step).items():
            want = -factor * rate.get(name, 0.0) * 0.5 * params[name]
            np.testing.assert_allclose(moved, want, rtol=1e-6, err_msg=name)


# --- Newton-Schulz ------------------------------------------------------------------------------------------------

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (24, 24)}
orthogonalize_jit = jax.jit(orthogonalize, static_argnames=("kind", "steps"))


def with_singular_values(shape, values):
    u, _, vt = np.linalg.svd(normal(*shape), full_matrices=False)
    return np.float32(u * values @ vt)


def iterate(x_MN, kind, steps):
    """The plain iteration, one matrix at a time, in float64."""
    x_MN = x_MN.astype(np.float64) / (np.linalg.norm(x_MN) * (SAFETY if kind == "polar_express" else 1))
    for a, b, c in newton_schulz_rows(kind, steps):
        gram_MM = x_MN @ x_MN.T
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return x_MN


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("kind", "steps", "low", "high"), [("classical", 5, 0.68, 1.14), ("polar_express", 8, 1 - 1e-5, 1 + 1e-5)]
)
def test_newton_schulz(kind, steps, low, high, shape):
    """Singular values near 1; the plain iteration's result whatever the form, the batch, the side and the size."""
    values = np.geomspace(1, 0.02, 24)
    x_XMN = np.stack(
        [with_singular_values(shape, values), 1e4 * with_singular_values(shape, values**0.5), 1e-3 * normal(*shape)]
    )
    y_XMN = np.array(orthogonalize_jit(x_XMN, kind, steps))
    new_values = np.linalg.svd(y_XMN[:2], compute_uv=False)
    assert low < new_values.min() and new_values.max() < high
    for x_MN, y_MN in zip(x_XMN, y_XMN, strict=True):
        np.testing.assert_allclose(y_MN, iterate(x_MN, kind, steps), atol=2e-5)
    np.testing.assert_allclose(orthogonalize_jit(x_XMN.mT, kind, steps).mT, y_XMN, atol=2e-5)


@pytest.mark.parametrize("kind", ["classical", "polar_express"])
def test_newton_schulz_stays_bounded_where_a_matrix_lacks_rank(kind):
    """In Gram form rounding can leave eigenvalues below zero, which then grow with each iteration."""
    outer = normal(24, 1) * normal(1, 40)
    x_XMN = np.stack([outer, with_singular_values((24, 40), np.geomspace(1, 1e-8, 24)), 0 * outer])
    y_XMN = orthogonalize_jit(x_XMN, kind, 12)
    largest = np.linalg.svd(np.array(y_XMN), compute_uv=False).max(-1)
    assert np.all(largest < 1.21) and largest[2] == 0


def test_newton_schulz_rows():
    assert newton_schulz_rows("classical", 3) == [CLASSICAL] * 3
    rows = newton_schulz_rows("polar_express", 10)
    assert rows[7:] == [(1.875, -1.25, 0.375)] * 3
    assert len(set(rows)) == 8


# --- The whole step against numpy ---------------------------------------------------------------------------------


def global_norm(grads):
    return math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))


@pytest.mark.parametrize(
    ("muon_scale", "wide", "tall"),
    [("aspect", math.sqrt(5 / 3), 1.0), ("rms", 0.2 * math.sqrt(5), 0.2 * math.sqrt(5))],
    ids=["aspect", "rms"],
)
def test_a_step_equals_its_restatement(monkeypatch, muon_scale, wide, tall):
    """Muon (Keller Jordan's, without its orthogonalisation), AdamW, clipping, decay and schedules, over six steps.

    One of the steps has nothing to apply: it moves nothing but the schedule.
    """
    monkeypatch.setattr(muon, "orthogonalize", lambda x_XMN, *_: x_XMN)
    scales = {"blocks.0.mlp.up.kernel": wide, "blocks.0.mlp.gate.kernel": wide, "blocks.0.mlp.down.kernel": tall}
    shapes = dict.fromkeys(scales, (3, 5)) | {"blocks.0.mlp.down.kernel": (5, 3)}
    shapes |= {"head.kernel": (3, 7), "embedding.embedding": (7, 3), "blocks.0.attention.sink": (4,)}
    params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    config = OptimizerConfig(
        lr=0.1,
        muon_lr=0.2,
        muon_momentum=0.95,
        muon_momentum_start=0.7,
        muon_momentum_warmup_steps=3,
        muon_scale=muon_scale,
        betas=(0.8, 0.9),
        eps=1e-3,
        weight_decay=0.3,
        grad_clip=2.0,
        schedule="linear",
    )
    opt = make_optimizer(config, params, total_steps=6)
    update = jax.jit(opt.update)
    state = jax.jit(opt.init)(params)

    want = {name: p.astype(np.float64) for name, p in params.items()}
    buf, mean, square = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(3))
    applied = 0
    for step in range(6):
        size = 30.0 if step % 2 else 1.0  # clipped, not clipped
        sums = {name: size * normal(*shape, seed=100 * step + i) for i, (name, shape) in enumerate(shapes.items())}
        updates, state = update(sums, state, params, tokens=11.0, real_step=step, apply=step != 3)
        params = optax.apply_updates(params, updates)
        if step != 3:
            norm = global_norm(sums) / 11
            assert (norm > 2.0) == (step % 2 == 1)
            assert optimizer.grad_norm_of(state) == pytest.approx(norm, rel=1e-5)
            m = 0.7 + 0.25 * min(applied / 3, 1)
            applied += 1
            factor = 1 - step / 6
            for name in shapes:
                g = sums[name].astype(np.float64) / 11 * min(1, 2.0 / norm)
                if name in scales:
                    buf[name] += (1 - m) * (g - buf[name])
                    direction = scales[name] * (g + m * (buf[name] - g))
                else:
                    mean[name] = 0.8 * mean[name] + 0.2 * g
                    square[name] = 0.9 * square[name] + 0.1 * g**2
                    direction = mean[name] / (1 - 0.8**applied)
                    direction /= np.sqrt(square[name] / (1 - 0.9**applied)) + 1e-3
                if name.endswith("kernel"):
                    direction += 0.3 * want[name]
                want[name] -= factor * (0.2 if name in scales else 0.1) * direction
        for name in shapes:
            np.testing.assert_allclose(params[name], want[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} at {step}")


def test_clipping():
    grads = {"a": normal(3, 4), "b": normal(5)}
    norm = global_norm(grads) / 7
    for limit, factor in ((0.0, 1.0), (2 * norm, 1.0), (norm / 2, 0.5)):
        clip = normalise_and_clip(limit)
        clipped, state = jax.jit(clip.update)(grads, clip.init(None), tokens=7.0)
        assert state.grad_norm == pytest.approx(norm, rel=1e-6)
        for name, g in grads.items():
            np.testing.assert_allclose(clipped[name], factor * g / 7, rtol=1e-5)


# --- Schedules ----------------------------------------------------------------------------------------------------

WARMUP = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0}  # 4 of 20 steps


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({"schedule": "constant"}, {0: 1, 19: 1}),
        ({"schedule": "constant", "lr_warmup_ratio": 0.2}, WARMUP | {5: 1, 20: 1}),
        ({"schedule": "cosine"}, {0: 1, 5: (1 + math.sqrt(0.5)) / 2, 10: 0.5, 20: 0}),
        ({"schedule": "cosine", "lr_warmup_ratio": 0.2, "min_lr_ratio": 0.1}, WARMUP | {12: 0.55, 20: 0.1, 25: 0.1}),
        ({"schedule": "linear", "lr_warmup_ratio": 0.2, "min_lr_ratio": 0.1}, WARMUP | {8: 0.775, 12: 0.55, 20: 0.1}),
        ({"schedule": "constant_linear", "decay_ratio": 0.4}, {0: 1, 12: 1, 13: 0.875, 16: 0.5, 19: 0.125, 20: 0}),
        (
            {"schedule": "constant_linear", "decay_ratio": 1.0, "lr_warmup_ratio": 0.2, "min_lr_ratio": 0.1},
            WARMUP | {12: 0.55, 20: 0.1},
        ),
        ({"schedule": "constant_linear", "decay_ratio": 0.0}, {0: 1, 19: 1}),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if "schedule" in value else "",
)
def test_schedule_at_points_computed_by_hand(settings, points):
    shape = schedule_shape(OptimizerConfig(**settings), total_steps=20)
    factors = jax.jit(jax.vmap(shape))(jnp.array(list(points)))
    np.testing.assert_allclose(factors, list(points.values()), atol=1e-6)
