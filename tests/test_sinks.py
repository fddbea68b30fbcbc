"""What is measured of attention and of the residual stream, against the whole model written down in float64."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_one_line, finished_run

import main
import run_lib
from corpus.dataset import Split
from corpus.tokenizer import CharTokenizer
from reports import sinks
from reports.sinks import attention_maps, measure, separators_of
from transformer.config import TransformerConfig
from transformer.model import model_of

B, T = 2, 7
SIZES = ("vocab_size", "context_len", "num_blocks", "num_heads", "embedding_dim", "mlp_dim")
GROUPED = TransformerConfig(
    **dict(zip(SIZES, (11, 9, 3, 6, 10, 14), strict=True)),
    **{"num_kv_heads": 2, "head_dim": 4, "mlp": "relu2", "norm": "rmsnorm", "position": "rope"},
    **{"qk_norm": "scaled", "sliding_window": 3, "window_pattern": "LG", "document_start": 5},
)
PLAIN = TransformerConfig(**dict(zip(SIZES, (11, 9, 2, 3, 12, 15), strict=True)), qkv_bias=True)
TOKENS_BT = np.array([[3, 1, 4, 5, 9, 2, 6], [5, 8, 9, 7, 5, 0, 10]], np.int32)


class Definition(NamedTuple):
    probs: np.ndarray  # [L, B, N, T, 1 + T], the sink's first
    k: list[np.ndarray]  # by layer [B, T, K, H]
    v: list[np.ndarray]
    x: list[np.ndarray]  # the residual stream after each layer [B, T, D]


def definition(config: TransformerConfig, params) -> Definition:
    """The model on TOKENS_BT, position by position."""
    c = config
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

    def norm(x, name):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p[f"{name}.scale"] + p.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ p[f"{name}.kernel"] + p.get(f"{name}.bias", 0)

    def turned(x_BTNH):
        angle_TH = np.arange(T)[:, None] * c.rope_theta ** (-np.arange(H // 2) / (H // 2))
        z_BTNH = (x_BTNH[..., : H // 2] + 1j * x_BTNH[..., H // 2 :]) * np.exp(1j * angle_TH)[:, None]
        return np.concatenate([z_BTNH.real, z_BTNH.imag], -1)

    x = p["embedding.embedding"][TOKENS_BT]
    if c.position == "learned":
        x = x + p["positions.embedding"][:T]
    found = Definition(np.zeros((c.num_blocks, B, N, T, 1 + T)), [], [], [])
    for layer in range(c.num_blocks):
        block = f"blocks.{layer}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (linear(y, f"{block}.attention.{name}").reshape(B, T, -1, H) for name in ("query", "key", "value"))
        if c.qk_norm == "scaled":
            q, k = (
                z / np.sqrt((z**2).mean(-1, keepdims=True) + c.norm_eps) * p[f"{block}.attention.{name}.scale"]
                for z, name in ((q, "query_norm"), (k, "key_norm"))
            )
        if c.position == "rope":
            q, k = turned(q), turned(k)
        out = np.zeros((B, T, N, H))
        for b, n, t in np.ndindex(B, N, T):
            first = max(0, t - c.window(layer) + 1) if c.window(layer) else 0
            starts = [s for s in range(t + 1) if TOKENS_BT[b, s] == c.document_start]
            first = max(first, *starts[-1:], 0)
            weights = np.exp([q[b, t, n] @ k[b, s, n // (N // K)] / math.sqrt(H) for s in range(first, t + 1)])
            sink = math.exp(p[f"{block}.attention.sink"][n]) if c.has_sinks else 0.0
            found.probs[layer, b, n, t, 0] = sink / (sink + weights.sum())
            found.probs[layer, b, n, t, 1 + first : 2 + t] = weights / (sink + weights.sum())
            out[b, t, n] = found.probs[layer, b, n, t, 1 + first : 2 + t] @ v[b, first : t + 1, n // (N // K)]
        x = x + linear(out.reshape(B, T, N * H), f"{block}.attention.out")
        h = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.up")
        h = np.maximum(h, 0) ** 2 if c.mlp == "relu2" else h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = x + linear(h, f"{block}.mlp.down")
        for kept, array in zip(found[1:], (k, v, x), strict=True):
            kept.append(array)
    return found


SEPARATORS = np.isin(np.arange(11), [2, 5, 9])  # 5 also begins documents, and 9 stands among others only


def kurtosis(x: np.ndarray) -> float:
    deviations = x.ravel() - x.mean()
    return np.mean(deviations**4) / np.var(x) ** 2


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "none"])
@pytest.mark.parametrize("config", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_every_number_is_its_definition(config, sinks, random_params):
    """Windows, documents, grouped queries, rotary and learned positions, QK-norm, biases; every layer and head."""
    config = dataclasses.replace(config, attention_sink=sinks)
    params = random_params(config)
    want, have = definition(config, params), measure(model_of(config, params), TOKENS_BT, SEPARATORS)
    keys_LBNTS = want.probs[..., 1:]
    firsts, separators, entropies = (np.zeros((config.num_blocks, config.num_heads)) for _ in range(3))
    for layer, b, n, t in np.ndindex(*want.probs.shape[:-1]):
        documents = [s for s in range(T) if TOKENS_BT[b, s] == config.document_start]
        for s in range(t + 1):
            first = s == 0 or s in documents
            firsts[layer, n] += first * keys_LBNTS[layer, b, n, t, s] / (B * T)
            separators[layer, n] += (
                (not first and TOKENS_BT[b, s] in (2, 5, 9)) * keys_LBNTS[layer, b, n, t, s] / (B * T)
            )
        entropies[layer, n] -= sum(p * math.log(p) for p in want.probs[layer, b, n, t] if p) / (B * T)
    near = lambda have, want: np.testing.assert_allclose(have, want, rtol=3e-4)
    near(have.shares, want.probs[..., 0].mean((1, 3)))
    near(have.first, firsts)
    near(have.separators, separators)
    near(have.entropy, entropies)
    for of_layers, ratios_LK in ((want.k, have.key_norms), (want.v, have.value_norms)):
        for x_BTKH, ratios_K in zip(of_layers, ratios_LK, strict=True):
            lengths_BTK = np.sqrt((x_BTKH**2).sum(-1))
            near(ratios_K, lengths_BTK[:, 0].sum(0) / B / (lengths_BTK[:, 1:].sum((0, 1)) / (B * (T - 1))))
    for layer, x_BTD in enumerate(want.x):
        near(have.largest[layer], np.abs(x_BTD).max())
        near(have.kurtosis[layer], kurtosis(x_BTD))
        tops = np.argwhere(np.abs(x_BTD) > 0.9999 * np.abs(x_BTD).max())  # documents that begin alike have the same
        assert have.where[layer].tolist() in [[TOKENS_BT[b, t], t, channel] for b, t, channel in tops]
        assert len(set(tops[:, 2])) == 1
    assert have.shares.any() == sinks and np.ptp(have.first) > 0.05  # the heads differ, so a mix-up would show
    maps_LNTS = attention_maps(model_of(config, params), jnp.asarray(TOKENS_BT[1]))
    np.testing.assert_allclose(maps_LNTS, want.probs[:, 1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sink, rate", [("none", 1.0), ("logit", 0.0)])
def test_a_planted_first_token_sink_is_found(sink, rate, random_params):
    """The first position's key is the only one along every query, unless a sink of 400 beats it."""
    config = dataclasses.replace(PLAIN, attention_sink=sink)
    params = random_params(config)
    D = config.embedding_dim
    for block in ("blocks.0", "blocks.1"):
        at = f"{block}.attention"
        params |= {f"{at}.query.kernel": jnp.zeros((D, D)), f"{at}.query.bias": jnp.full(D, 5.0)}
        params |= {f"{at}.key.bias": jnp.zeros(D), f"{at}.key.kernel": jnp.zeros((D, D)).at[0].set(4.0)}
        params |= {f"{block}.attention_norm.scale": jnp.ones(D), f"{block}.attention_norm.bias": jnp.zeros(D)}
        params |= {f"{at}.out.kernel": jnp.zeros((D, D)), f"{block}.mlp.down.kernel": jnp.zeros((15, D))}
        params |= {f"{at}.sink": jnp.full(3, 400.0)} if sink == "logit" else {}
    rows = jnp.zeros((9, D)).at[:, 0].set(-60.0).at[0, 0].set(60.0)  # channel 0 says which position is the first
    measured = measure(model_of(config, params | {"positions.embedding": rows}), TOKENS_BT)
    assert sinks.scalars_of(measured)["sink_rate"] == rate
    assert measured.first.min() > 0.99 if rate else measured.shares.min() > 0.99
    assert (measured.where[:, 2] == 0).all() and (measured.largest > 55).all()


def test_a_model_that_runs_in_a_loop_or_recomputes_shows_the_same(random_params):
    params = random_params(GROUPED)
    looped = dataclasses.replace(GROUPED, window_pattern="L", scan_blocks=True, remat="block")
    plain = dataclasses.replace(looped, scan_blocks=False, remat="none")
    for both in zip(*(measure(model_of(config, params), TOKENS_BT) for config in (looped, plain)), strict=True):
        np.testing.assert_array_equal(*both)


def test_separators_are_whitespace_full_stops_and_ends_of_text():
    assert separators_of(CharTokenizer("\n .,;a")).tolist() == [True, True, True, False, False, False]
    gpt2_like = SimpleNamespace(pieces=[b" .", b"..", b"", b"", b"\t \n", b" a"], ends=(3,))
    assert separators_of(gpt2_like).tolist() == [True, False, False, True, True, False]


def test_what_a_file_holds_comes_back_and_older_rows_lack_what_was_not_measured(tmp_path, random_params):
    config, path = dataclasses.replace(GROUPED, attention_sink="none"), tmp_path / "sinks.jsonl"
    measured = measure(model_of(config, random_params(config)), TOKENS_BT, SEPARATORS)
    older = {"step": 3, "tokens": 9, "shares": np.full((3, 6), 0.5).tolist()}
    newer = {"step": 4, "tokens": 12, **sinks.as_json(measured._replace(kurtosis=np.float32([1, np.inf, 2])))}
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in (older, newer)))
    found = sinks.read_measured(path, config)
    assert list(found) == [3, 4] and np.isnan(found[3].first).all() and (found[3].shares == 0.5).all()
    np.testing.assert_allclose(found[4].kurtosis, [1, np.nan, 2])
    for name in set(measured._fields) - {"kurtosis"}:
        np.testing.assert_allclose(getattr(found[4], name), getattr(measured, name), rtol=1e-6)
    assert sinks.read_measured(path, PLAIN) == {}  # another model's


@pytest.mark.parametrize(
    "num_tokens, context_len, shape",
    [(5000, 64, (16, 64)), (5000, 100, (10, 100)), (5000, 4096, (1, 1024)), (130, 64, (2, 64)), (40, 64, (1, 40))],
)
def test_the_stretch_is_whole_windows_from_the_start(num_tokens, context_len, shape):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    stretch_BT = sinks.stretch(Split(tokens, None), context_len)
    assert stretch_BT.shape == shape and stretch_BT.dtype == np.int32
    np.testing.assert_array_equal(stretch_BT.ravel(), tokens[: stretch_BT.size])


# --- The command ---------------------------------------------------------------------------------------------------


def test_the_command_measures_a_run_on_its_validation_text_or_another(tmp_path, capsys):
    run, out = finished_run(), tmp_path / "measured.json"
    capsys.readouterr()
    assert main.main(["sinks", f"--workdir={run.workdir}", f"--out={out}"]) == 0
    *table, seen = capsys.readouterr().out.rstrip().splitlines()
    found, config = json.loads(out.read_text()), run_lib.read_config(run.workdir)
    data = run_lib.load_data(config, print)
    model = run_lib.load_model(run.workdir)[0]
    want = measure(model, sinks.stretch(data.val, config.context_len), separators_of(run.tokenizer))
    about = {"workdir": str(run.workdir), "dataset": config.dataset, "tokens": 1024, "context_len": 16}
    assert about | sinks.scalars_of(want) | sinks.as_json(want) == {
        k: found[k] for k in found if k not in ("seen", "step")
    }
    assert seen == " ".join(found["seen"]) and seen.count(". ") == 1 and f"{want.largest.max():.1f}" in seen
    assert f"{want.shares.mean():.1%} goes to sinks" in seen and f"{want.first.mean():.1%}" in table[2].split()
    other = tmp_path / "other.txt"
    other.write_text("My aunt paints it at 3.\n" * 9)
    assert main.main(["sinks", f"--workdir={run.workdir}", "--step=28", f"--dataset={other}"]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1] != seen
    for flag, said in ((f"--out={out}", "is there already"), (f"--workdir={tmp_path / 'none'}", "no such directory")):
        assert main.main(["sinks", f"--workdir={run.workdir}", flag]) == 2
        assert_one_line(capsys.readouterr().err, said)
    assert json.loads(out.read_text()) == found
