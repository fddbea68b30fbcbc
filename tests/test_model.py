"""The model: what it may see, how it starts, what it counts, and that every setting means what it says."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from training.cost import flops_per_token, parameter_counts
from training.loss import loss_sum
from transformer.config import CHOICES, TransformerConfig
from transformer.model import TokenInfo, Transformer, init_params, model_of, params_of
from transformer.rotary import rope_frequencies

B, T, V = 3, 5, 13
SMALL = TransformerConfig(vocab_size=V, context_len=7, num_blocks=1, num_heads=6, embedding_dim=18, mlp_dim=14)
# Every matrix has one shape, so that its initialiser compiles once.
SQUARE = TransformerConfig(vocab_size=32, context_len=32, num_blocks=1, num_heads=4, embedding_dim=32, mlp_dim=32)

BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
NO_BIASES = dict.fromkeys(BIASES, False)
LLAMA = {"norm": "rmsnorm", "position": "rope", "num_kv_heads": 3, "head_dim": 4, "attention_sink": False, **NO_BIASES}
FAMILIES = {
    "original": {},
    "gpt2": {"mlp": "gelu_tanh", "output_init": "scaled", "attention_sink": False, **BIASES},
    "llama": {"mlp": "swiglu", "tie_embeddings": False, "rope_scaling": "llama3", **LLAMA},
    "qwen3": {"mlp": "swiglu", "qk_norm": "scaled", "rope_theta": 1e6, **LLAMA},
    "gpt-oss": {
        **LLAMA,
        **{"mlp": "swiglu_clamped", "rope_scaling": "yarn", "attention_sink": True, "tie_embeddings": False},
        **{"num_blocks": 2, "sliding_window": 3, "window_pattern": "LG", "dtype": "bfloat16", **BIASES},
    },
    "speedrun": {
        **{"mlp": "relu2", "norm": "rmsnorm", "position": "rope", "qk_norm": "unscaled", "head_dim": 4},
        **{"output_init": "zero", "tie_embeddings": False, "logit_softcap": 2.0},
    },
    "no positions": {"position": "none", "norm_bias": False},
    "sinks with keys, in local layers": {
        **{"position": "rope", "num_kv_heads": 3, "head_dim": 4, "qk_norm": "scaled", "attention_sink": "key"},
        **{"num_blocks": 2, "sliding_window": 3, "window_pattern": "LG", "sink_pattern": "SN"},
        **{"attention_gate": "head", "exclusive_attention": True},
    },
    "scaled residuals": {"num_blocks": 3, "num_kv_heads": 2, "head_dim": 4, "residual_scalars": True},
    "softmax off by one, gated": {"attention_sink": "zero", "attention_gate": "channel", "num_kv_heads": 2},
}


def with_(config=SMALL, **changes):
    return dataclasses.replace(config, **{"num_kv_heads": 0, "head_dim": 0} | changes)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T))


@partial(jax.jit, static_argnames="config")
def forward(config, params, tokens_BT):
    return model_of(config, params)(tokens_BT)


# --- Every setting ------------------------------------------------------------------------------------------------


sigmoid = lambda x: 1 / (1 + np.exp(-x))
FORMULAS = {
    "gelu": lambda up, gate: up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2))),
    "gelu_tanh": lambda up, gate: up * sigmoid(2 * math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)),
    "relu2": lambda up, gate: np.maximum(up, 0) ** 2,
    "swiglu": lambda up, gate: gate * sigmoid(gate) * up,
    "swiglu_clamped": lambda up, gate: (
        (np.clip(up, -7, 7) + 1) * np.minimum(gate, 7) * sigmoid(1.702 * np.minimum(gate, 7))
    ),
}


class Reference:
    """The whole model again: numpy, float64, one head at a time, straight from the settings and the parameters."""

    def __init__(self, config, params):
        self.c, self.p = config, {name: np.float64(value) for name, value in params.items()}

    def linear(self, x, name):
        return x @ self.p[f"{name}.kernel"] + self.p.get(f"{name}.bias", 0)

    def norm(self, x, name, centred):
        x = x - x.mean(-1, keepdims=True) * centred
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.norm_eps)
        return x * self.p.get(f"{name}.scale", 1) + self.p.get(f"{name}.bias", 0)

    def normed(self, x_TH, norm_name):
        return x_TH if self.c.qk_norm == "none" else self.norm(x_TH, norm_name, centred=False)

    def head(self, x_TH, norm_name):
        x_TH = self.normed(x_TH, norm_name)
        if self.c.position != "rope":
            return x_TH
        frequency, scale = rope_frequencies(self.c.head_dim, self.c.rope_theta, self.c.yarn)
        half = self.c.head_dim // 2
        turned = (x_TH[:, :half] + 1j * x_TH[:, half:]) * np.exp(1j * np.arange(len(x_TH))[:, None] * frequency)
        return scale * np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, x_TD, name, window, sinks):
        c, mixed = self.c, []
        q, k, v = (
            np.split(self.linear(x_TD, f"{name}.{part}"), heads, axis=-1)
            for part, heads in (("query", c.num_heads), ("key", c.num_kv_heads), ("value", c.num_kv_heads))
        )
        distance_TS = np.arange(len(x_TD))[:, None] - np.arange(len(x_TD))
        for n in range(c.num_heads):
            shared = n * c.num_kv_heads // c.num_heads
            scores_TS = self.head(q[n], f"{name}.query_norm") @ self.head(k[shared], f"{name}.key_norm").T
            visible_TS = (distance_TS >= 0) & (distance_TS < (window or len(x_TD)))
            weights_TS = visible_TS * np.exp(scores_TS / math.sqrt(c.head_dim))
            sink_T1 = np.zeros((len(x_TD), 1))
            if sinks == "logit":
                sink_T1 = np.exp(sink_T1 + self.p[f"{name}.sink"][n])
            elif sinks == "zero":
                sink_T1 = np.ones_like(sink_T1)
            elif sinks == "key":
                key_H = self.p[f"{name}.sink_key"][shared]
                sink_T1 = np.exp(self.normed(q[n], f"{name}.query_norm") @ key_H / math.sqrt(c.head_dim))[:, None]
            y_TH = weights_TS @ v[shared] / (sink_T1 + weights_TS.sum(-1, keepdims=True))
            if c.exclusive_attention:
                own_TH = v[shared] / np.linalg.norm(v[shared], axis=-1, keepdims=True)
                y_TH = y_TH - (y_TH * own_TH).sum(-1, keepdims=True) * own_TH
            if c.attention_gate == "head":
                y_TH = y_TH * sigmoid(self.linear(x_TD, f"{name}.gate")[:, [n]])
            elif c.attention_gate == "channel":
                y_TH = y_TH * sigmoid(np.split(self.linear(x_TD, f"{name}.gate"), c.num_heads, axis=-1)[n])
            mixed.append(y_TH)
        return self.linear(np.concatenate(mixed, axis=-1), f"{name}.out")

    def mlp(self, x_TD, name):
        gate = self.linear(x_TD, f"{name}.gate") if self.c.mlp.startswith("swiglu") else None
        return self.linear(FORMULAS[self.c.mlp](self.linear(x_TD, f"{name}.up"), gate), f"{name}.down")

    def logits(self, tokens_T):
        c, centred = self.c, self.c.norm == "layernorm"
        x_TD = self.p["embedding.embedding"][tokens_T]
        if c.position == "learned":
            x_TD = x_TD + self.p["positions.embedding"][: len(tokens_T)]
        first_TD = x_TD
        for i in range(c.num_blocks):
            if c.residual_scalars:
                keep, add = self.p[f"blocks.{i}.residual_scalars"]
                x_TD = keep * x_TD + add * first_TD
            window = c.sliding_window if c.window_pattern[i % len(c.window_pattern)] == "L" else 0
            y_TD = self.norm(x_TD, f"blocks.{i}.attention_norm", centred)
            sinks = c.attention_sink if c.sink_pattern[i % len(c.sink_pattern)] == "S" else "none"
            x_TD = x_TD + self.attention(y_TD, f"blocks.{i}.attention", window, sinks)
            x_TD = x_TD + self.mlp(self.norm(x_TD, f"blocks.{i}.mlp_norm", centred), f"blocks.{i}.mlp")
        head_DV = self.p["embedding.embedding"].T if c.tie_embeddings else self.p["head.kernel"]
        logits_TV = self.norm(x_TD, "final_norm", centred) @ head_DV
        return c.logit_softcap * np.tanh(logits_TV / c.logit_softcap) if c.logit_softcap else logits_TV


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_a_table_of_settings_and_computes_what_they_say(random_params, family):
    config = with_(**FAMILIES[family])
    params = random_params(config)
    have_BTV = forward(config, params, tokens())
    want_BTV = np.stack([Reference(config, params).logits(tokens_T) for tokens_T in tokens()])
    assert have_BTV.shape == (B, T, V) and have_BTV.dtype == jnp.float32
    if config.dtype == "float32":
        np.testing.assert_allclose(have_BTV, want_BTV, rtol=1e-4, atol=1e-4)
    else:  # some roundings to 8 bits, of random sign
        assert 1e-4 < np.sqrt(np.mean((have_BTV - want_BTV) ** 2)) / np.std(want_BTV) < 2**-5


def test_gradients_of_residual_scalars_are_those_of_their_definition(random_params):
    """Of every parameter, along a random direction: against a difference quotient in float64."""
    config = with_(**FAMILIES["scaled residuals"])
    params, rng = random_params(config), np.random.default_rng(1)
    weight_BTV = rng.normal(size=(B, T, V))
    have = jax.jit(jax.grad(lambda params: (forward(config, params, tokens()) * weight_BTV).sum()))(params)
    new = {name for name in params if "residual" in name}
    assert len(new) == 3

    def total(name, value):
        reference = Reference(config, params | {name: value})
        return sum((reference.logits(t) * w).sum() for t, w in zip(tokens(), weight_BTV, strict=True))

    for name in new | {"embedding.embedding", "blocks.0.attention.value.kernel", "blocks.1.mlp.up.kernel"}:
        along = rng.normal(size=params[name].shape)
        ahead, behind = (total(name, np.float64(params[name]) + step * along) for step in (1e-5, -1e-5))
        assert np.vdot(have[name], along) == pytest.approx((ahead - behind) / 2e-5, rel=2e-3, abs=2e-3), name


def test_the_families_use_every_choice_there_is():
    used = {name: {getattr(with_(**settings), name) for settings in FAMILIES.values()} for name in CHOICES}
    # Compared with each other in tests/parity/test_attention_forms.py, and in tests/test_stack.py.
    elsewhere = {"attention_kernel": {"auto"}, "remat": {"none"}, "dtype": {"float32", "bfloat16"}}
    assert used == {name: set(values) for name, values in CHOICES.items()} | elsewhere


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("vocab_size", {"vocab_size": 0}),
        ("num_kv_heads", {"num_kv_heads": 4}),
        ("embedding_dim", {"embedding_dim": 20}),
        ("head_dim", {"head_dim": 5, "position": "rope"}),
        ("yarn_beta_fast", {"rope_scaling": "llama3", "yarn_beta_fast": 1.0}),
        ("window_pattern", {"window_pattern": "LX"}),
        ("sink_pattern", {"sink_pattern": "SX"}),
        *((name, {name: "other"}) for name in CHOICES),
    ],
)
def test_an_impossible_shape_names_its_field(field, changes):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        with_(**changes)


def test_windows_follow_the_pattern():
    windows = lambda **changes: [with_(num_blocks=5, **changes).window(layer) for layer in range(5)]
    assert windows(sliding_window=3) == [3, 3, 3, 3, 3]
    assert windows(sliding_window=3, window_pattern="LLG") == [3, 3, 0, 3, 3]
    assert windows(window_pattern="LG") == [0, 0, 0, 0, 0]


# --- What a position may see --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reach", "changes"),
    [
        (7, {}),
        (1 + 2 * 2, {"num_blocks": 2, "sliding_window": 3, "position": "none", "num_kv_heads": 2, "head_dim": 4}),
    ],
    ids=["global", "two layers of window 3"],
)
def test_logits_depend_on_no_later_and_no_too_early_input(random_params, reach, changes):
    """By gradients: d logits[t] / d embedding of the token at s. Each place has a token of its own."""
    config = with_(tie_embeddings=False, **changes)
    params = random_params(config)
    places = np.arange(7)

    def summed_logits(embedding_VD):
        logits_TV = model_of(config, params | {"embedding.embedding": embedding_VD})(places[None])[0]
        return (logits_TV * np.arange(V)).sum(-1)  # a plain sum could cancel

    gradient_TSD = jax.jit(jax.jacrev(summed_logits))(params["embedding.embedding"])[:, :7]
    distance_TS = places[:, None] - places
    np.testing.assert_array_equal(np.any(gradient_TSD, axis=-1), (distance_TS >= 0) & (distance_TS < reach))


# --- How it starts ------------------------------------------------------------------------------------------------


def fresh(**changes):
    config = with_(SQUARE, **BIASES, **changes)
    return config, params_of(Transformer(config, nnx.Rngs(0)))


def test_a_new_model_starts_at_ln_v():
    tokens_BT = np.random.default_rng(0).integers(0, 32, (B, T))
    mean = lambda logits_BTV: float(jax.jit(loss_sum)(logits_BTV, np.roll(tokens_BT, -1))[0]) / (B * T)
    assert mean(forward(*fresh(), tokens_BT)) == pytest.approx(math.log(32), rel=0.02)
    # A head of zeros finds all tokens equally likely, whatever comes in.
    model = model_of(*fresh(output_init="zero", tie_embeddings=False))
    x_BTD = np.random.default_rng(0).normal(size=(B, T, 32)).astype(np.float32)
    assert mean(model.logits(x_BTD)) == pytest.approx(math.log(32), rel=1e-6)


def test_initial_weights():
    spread = lambda **changes: {name: (float(np.mean(p)), float(np.std(p))) for name, p in fresh(**changes)[1].items()}
    near = lambda std: pytest.approx(std, rel=0.1, abs=1e-12)  # 1024 draws: their deviation is known to 2 %
    writes = ("attention.out.kernel", "mlp.down.kernel")
    for output_init, std in (("normal", 0.02), ("scaled", 0.02 / math.sqrt(2)), ("zero", 0.0)):
        for name, (mean, deviation) in spread(output_init=output_init).items():
            if name.endswith(("bias", "sink")):
                assert (mean, deviation) == (0, 0), name
            elif name.endswith("scale"):
                assert (mean, deviation) == (1, 0), name
            else:
                assert deviation == near(std if name.endswith(writes) else 0.02), name
    assert spread(tie_embeddings=False, output_init="scaled")["head.kernel"][1] == near(0.02)
    assert spread(tie_embeddings=False, output_init="zero")["head.kernel"] == (0, 0)


def test_a_gate_leaves_all_other_initial_weights_as_they_were():
    forms = {}, {"attention_gate": "channel"}
    without, with_it = (init_params(with_(SQUARE, num_blocks=3, **more), jax.random.key(5)) for more in forms)
    assert without.keys() < with_it.keys()
    for name, value in without.items():
        np.testing.assert_array_equal(value, with_it[name], err_msg=name)
    new = [np.asarray(value).tobytes() for name, value in with_it.items() if name not in without]
    assert len(set(new)) == len(new) >= 3  # no two begin alike


# --- What it counts -----------------------------------------------------------------------------------------------


def part_of(name):
    parts = {"residual_scalars": "residual scalars", "head.": "head"}
    parts |= {"embedding.": "embedding", "positions.": "positions", "norm": "norms", "sink": "sinks"}
    parts |= {".attention.": "attention", ".mlp.": "mlp"}
    return next(part for sign, part in parts.items() if sign in name.replace("embedding.embedding", "embedding."))


COUNTED = [
    *FAMILIES.values(),
    *({"mlp": mlp, "mlp_bias": bias} for mlp in CHOICES["mlp"] for bias in (True, False)),
    *({"norm": norm, "norm_bias": bias, "qk_norm": "scaled"} for norm in CHOICES["norm"] for bias in (True, False)),
    *({"head_dim": 5, "num_kv_heads": kv, "qkv_bias": bias} for kv in (1, 2, 3, 6) for bias in (True, False)),
    *({"position": position, "head_dim": 4, "attention_out_bias": True} for position in CHOICES["position"]),
    *({"tie_embeddings": tied, "attention_sink": sink} for tied in (True, False) for sink in (True, False)),
]


@pytest.mark.parametrize("changes", COUNTED, ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_parameter_counts_equal_the_built_models(changes):
    config = with_(num_blocks=3, **{name: value for name, value in changes.items() if name != "num_blocks"})
    built = dict.fromkeys(parameter_counts(config), 0)
    for name, leaf in jax.eval_shape(partial(init_params, config), jax.random.key(0)).items():
        built[part_of(name)] += leaf.size
    assert parameter_counts(config) == built


def test_flops_per_token_counted_by_hand():
    config = TransformerConfig(
        vocab_size=11, context_len=8, num_blocks=3, num_heads=4, num_kv_heads=2, head_dim=5, embedding_dim=7, mlp_dim=13
    )
    projections = 7 * 20 + 7 * 10 + 7 * 10 + 20 * 7  # q, k, v, out
    mlp = 7 * 13 + 13 * 7
    attention = 2 * 2 * 4 * 5 * 8  # scores and mix, multiply and add, 4 heads of 5, 8 keys
    assert flops_per_token(config) == 3 * (3 * (2 * (projections + mlp) + attention) + 2 * 7 * 11)
    for gate, width in (("head", 4), ("channel", 20)):
        own = flops_per_token(dataclasses.replace(config, attention_gate=gate)) - flops_per_token(config)
        assert own == 3 * 3 * 2 * 7 * width
    assert flops_per_token(dataclasses.replace(config, residual_scalars=True)) == flops_per_token(config)
    gated = dataclasses.replace(config, mlp="swiglu", sliding_window=3, window_pattern="LG")
    attention = 2 * 2 * 4 * 5 * (3 + 8 + 3)
    assert flops_per_token(gated) == 3 * (3 * 2 * (projections + mlp + 7 * 13) + attention + 2 * 7 * 11)


# --- What each part does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMULAS)
def test_an_mlp_equals_its_formula_where_it_clamps_too(random_params, kind):
    config = with_(mlp=kind)
    params = random_params(config)
    x_BTD = 5 * np.random.default_rng(0).normal(size=(B, T, 18)).astype(np.float32)
    reference = Reference(config, params)
    up_BTF = reference.linear(x_BTD, "blocks.0.mlp.up")
    assert up_BTF.min() < -7 and up_BTF.max() > 7
    have_BTD = jax.jit(model_of(config, params).blocks[0].mlp.__call__)(x_BTD)
    np.testing.assert_allclose(have_BTD, reference.mlp(x_BTD, "blocks.0.mlp"), rtol=1e-4, atol=1e-4)


def test_the_tied_head_is_the_embedding_and_the_softcap_bounds_logits(random_params):
    params = random_params(SMALL)

    @jax.jit
    def outputs(tokens_BT):
        model = model_of(SMALL, params)
        hidden_BTD, _ = model.hidden(tokens_BT)
        capped = model_of(with_(logit_softcap=1.5), params)
        return hidden_BTD, model.logits(hidden_BTD), capped(tokens_BT)

    hidden_BTD, logits_BTV, capped_BTV = outputs(tokens())
    assert "head.kernel" not in params
    np.testing.assert_allclose(logits_BTV, hidden_BTD @ params["embedding.embedding"].T, atol=1e-4)
    assert np.abs(logits_BTV).max() > 3 and np.abs(capped_BTV).max() <= 1.5
    np.testing.assert_allclose(capped_BTV, 1.5 * np.tanh(logits_BTV / 1.5), atol=1e-5)


def test_dropout_is_off_unless_random_numbers_are_given(random_params):
    def program(config, make_rngs=lambda: None):
        run = lambda params, tokens_BT: model_of(config, params)(tokens_BT, rngs=make_rngs())
        return str(jax.make_jaxpr(run)(random_params(config), tokens()))

    assert program(with_(dropout=0.5)) == program(SMALL)
    assert "random_bits" in program(with_(dropout=0.5), lambda: nnx.Rngs(0))


def test_dropout_zeroes_a_share_and_scales_the_rest(random_params):
    """In a block whose MLP adds nothing: what attention adds is kept and enlarged, or dropped; so are embeddings."""
    config = with_(dropout=0.3, norm="rmsnorm", position="none", output_init="zero")
    params = random_params(config)
    params |= {name: 0 * p for name, p in params.items() if "mlp.down" in name}
    x_BTD = np.random.default_rng(0).normal(size=(B, 7, 18)).astype(np.float32)

    @jax.jit
    def added(key):
        block = model_of(config, params).blocks[0]
        run = lambda rngs: block(x_BTD, TokenInfo(None, None, x_BTD), rngs)[0] - x_BTD
        plain, dropped = run(None), run(nnx.Rngs(dropout=key))
        silent = params | {"blocks.0.attention.out.kernel": 0 * params["blocks.0.attention.out.kernel"]}
        embedded, _ = model_of(config, silent).hidden(tokens(), rngs=nnx.Rngs(dropout=key))
        return plain, dropped, embedded

    keys = [jax.random.key(seed, impl="unsafe_rbg") for seed in range(20)]  # the quickest to compile
    plain, dropped, embedded = map(np.array, zip(*map(added, keys), strict=True))
    kept = np.abs(dropped) > 1e-6
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.7, rtol=1e-3, atol=1e-5)
    # 7,560 draws: their share is known to 0.005, that of the 5,400 embedded ones to 0.006.
    assert kept.mean() == pytest.approx(0.7, abs=0.025)
    assert (embedded != 0).mean() == pytest.approx(0.7, abs=0.03)


# --- Parameters by name -------------------------------------------------------------------------------------------


def test_parameters_go_through_a_model_unchanged(random_params):
    params = random_params(SMALL)
    back = params_of(model_of(SMALL, params))
    assert back.keys() == params.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, params[name])


def test_parameters_that_do_not_fit_are_refused_by_name(random_params):
    params = random_params(SMALL)
    sink = "blocks.0.attention.sink"
    without = {name: p for name, p in params.items() if name != sink}
    for odd, said in (
        (without, f"{sink} None is not (6,)"),
        (params | {"extra": jnp.zeros(2)}, "extra (2,) is not None"),
        (params | {sink: jnp.zeros(5)}, f"{sink} (5,) is not (6,)"),
    ):
        with pytest.raises(ValueError) as refused:
            model_of(SMALL, odd)
        assert said in str(refused.value)
