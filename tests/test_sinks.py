"""Shares of attention that sinks get, and attention maps, against the whole model written down in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from corpus.dataset import Split
from reports import sinks
from reports.sinks import attention_maps, sink_shares
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


def definition(config: TransformerConfig, params) -> np.ndarray:
    """All probabilities [L, B, N, T, 1 + T] of the model on TOKENS_BT, the sink's first, position by position."""
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
    found = np.zeros((c.num_blocks, B, N, T, 1 + T))
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
            found[layer, b, n, t, 0] = sink / (sink + weights.sum())
            found[layer, b, n, t, 1 + first : 2 + t] = weights / (sink + weights.sum())
            out[b, t, n] = found[layer, b, n, t, 1 + first : 2 + t] @ v[b, first : t + 1, n // (N // K)]
        x = x + linear(out.reshape(B, T, N * H), f"{block}.attention.out")
        h = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.up")
        h = np.maximum(h, 0) ** 2 if c.mlp == "relu2" else h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = x + linear(h, f"{block}.mlp.down")
    return found


@pytest.mark.parametrize("config", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_shares_and_maps_are_the_definitions(config, random_params):
    """Windows, documents, grouped queries, rotary and learned positions, QK-norm, biases; every head, row and key."""
    params = random_params(config)
    model, want_LBNTS = model_of(config, params), definition(config, params)
    shares_LN = sink_shares(model, jnp.asarray(TOKENS_BT))
    np.testing.assert_allclose(shares_LN, want_LBNTS[..., 0].mean((1, 3)), rtol=2e-5)
    assert np.ptp(want_LBNTS[..., 0].mean((1, 3))) > 0.05  # the heads differ, so a mix-up would show
    maps_LNTS = attention_maps(model, jnp.asarray(TOKENS_BT[1]))
    np.testing.assert_allclose(maps_LNTS, want_LBNTS[:, 1], rtol=1e-4, atol=1e-7)


def test_a_model_that_runs_in_a_loop_or_recomputes_shows_the_same(random_params):
    params = random_params(GROUPED)
    looped = dataclasses.replace(GROUPED, window_pattern="L", scan_blocks=True, remat="block")
    plain = dataclasses.replace(looped, scan_blocks=False, remat="none")
    both = (sink_shares(model_of(config, params), jnp.asarray(TOKENS_BT)) for config in (looped, plain))
    np.testing.assert_array_equal(*both)


def test_without_sinks_the_keys_get_all_and_there_is_no_share(random_params):
    config = dataclasses.replace(PLAIN, attention_sink=False)
    params = random_params(config)
    maps_LNTS = attention_maps(model_of(config, params), jnp.asarray(TOKENS_BT[0]))
    np.testing.assert_allclose(maps_LNTS, definition(config, params)[:, 0], rtol=1e-4, atol=1e-7)
    assert not maps_LNTS[..., 0].any()
    with pytest.raises(ValueError, match="attention_sink"):
        sink_shares(model_of(config, params), jnp.asarray(TOKENS_BT))


@pytest.mark.parametrize(
    "num_tokens, context_len, shape",
    [(5000, 64, (16, 64)), (5000, 100, (10, 100)), (5000, 4096, (1, 1024)), (130, 64, (2, 64)), (40, 64, (1, 40))],
)
def test_the_stretch_is_whole_windows_from_the_start(num_tokens, context_len, shape):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    stretch_BT = sinks.stretch(Split(tokens, None), context_len)
    assert stretch_BT.shape == shape and stretch_BT.dtype == np.int32
    np.testing.assert_array_equal(stretch_BT.ravel(), tokens[: stretch_BT.size])
