"""Generation: the cache against recomputation, the choice of the next token, ends of text, streams."""

import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corpus.tokenizer import ByteTokenizer, CharTokenizer
from transformer import sampling
from transformer.config import TransformerConfig
from transformer.half import round_weights
from transformer.model import init_params, model_of, params_of
from transformer.sampling import (
    CHUNK,
    NOTHING,
    Sampling,
    _decode,
    generate,
    generate_tokens,
    pick,
    pick_each,
    prompt_tokens,
    stream,
)
from transformer.xla import compiler_options

V, C = 29, 21  # the context is longer than a chunk, and no power of two
CONFIGS = {
    "rope, window, grouped heads": TransformerConfig(
        vocab_size=V,
        context_len=C,
        num_blocks=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        embedding_dim=10,
        mlp_dim=14,
        position="rope",
        sliding_window=5,
        window_pattern="LG",
        qk_norm="scaled",
        tie_embeddings=False,
    ),
    "half precision": TransformerConfig(
        **{"vocab_size": V, "context_len": C, "num_blocks": 2, "num_heads": 4, "num_kv_heads": 2, "embedding_dim": 20},
        **{"mlp_dim": 14, "tie_embeddings": False, "dtype": "bfloat16_matmul"},
    ),
    "half precision, window, rope": TransformerConfig(
        **{"vocab_size": V, "context_len": C, "num_blocks": 2, "num_heads": 3, "embedding_dim": 12, "mlp_dim": 14},
        **{"sliding_window": 5, "window_pattern": "LG", "dtype": "bfloat16_matmul", "position": "rope"},
        tie_embeddings=False,
    ),
    "sinks with keys, gates, scaled residuals": TransformerConfig(
        **{"vocab_size": V, "context_len": C, "num_blocks": 2, "num_heads": 4, "num_kv_heads": 2, "embedding_dim": 20},
        **{"mlp_dim": 14, "tie_embeddings": False, "sliding_window": 5, "window_pattern": "LG", "sink_pattern": "SN"},
        **{"attention_sink": "key", "attention_gate": "head", "exclusive_attention": True},
        residual_scalars=True,
    ),
    "learned positions": TransformerConfig(
        vocab_size=V, context_len=C, num_blocks=1, num_heads=2, embedding_dim=10, mlp_dim=14, tie_embeddings=False
    ),
}
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def models(random_params):
    return {name: model_of(config, random_params(config)) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def model(models):
    return models["learned positions"]


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, length) for length in lengths]


def tokens_of(model, ids, num_tokens, sampling=GREEDY, **settings):
    """All new tokens at once [B, num_tokens]."""
    return np.concatenate(list(generate_tokens(model, ids, num_tokens, sampling, **settings))).T


@partial(jax.jit, static_argnames="config")
def all_logits(config, params, tokens_BT):
    return model_of(config, params)(tokens_BT)


def recompute(model, ids, num_tokens):
    """Greedy continuation without a cache, under the same rule: over context_len, keep the last context_len // 2."""
    params, texts, new = params_of(model), [list(prompt[-C:]) for prompt in ids], []
    for _ in range(num_tokens):
        texts = [text if len(text) <= C else text[-(C // 2) :] for text in texts]
        tokens_BC = np.array([text + [0] * (C - len(text)) for text in texts])
        logits_BCV = np.array(all_logits(model.config, params, tokens_BC))
        new.append([int(logits_BCV[row, len(text) - 1].argmax()) for row, text in enumerate(texts)])
        for text, token in zip(texts, new[-1], strict=True):
            text.append(token)
    return np.array(new).T


# --- The cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_recomputation_over_several_refills(models, name):
    ids = prompts(1, 9, 17, C + 6)
    have = tokens_of(models[name], ids, 70)
    np.testing.assert_array_equal(have, recompute(models[name], ids, 70))
    assert min(len(set(row)) for row in have.tolist()) > 5  # no row that only repeats itself


def test_a_prompt_that_becomes_no_token_begins_as_an_empty_one_does():
    nothing = SimpleNamespace(encode=lambda text, replace_unknown=False: np.array([], np.int32), eot=7)
    assert sampling.prompt_tokens(nothing, "dropped").tolist() == sampling.prompt_tokens(nothing, "").tolist() == [7]


@pytest.mark.parametrize("lengths", [(9,), (1,), (1, 9, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name in CONFIGS if "half" in name])
def test_one_text_and_several_in_half_precision_equal_recomputation(models, name, lengths):
    """A CPU multiplies one row in another way than several."""
    ids = prompts(*lengths)
    np.testing.assert_array_equal(tokens_of(models[name], ids, 50), recompute(models[name], ids, 50))


@pytest.mark.parametrize("rows, kept", [(1, "float32"), (3, "bfloat16")])
def test_weights_are_rounded_once_for_a_text(models, rows, kept, monkeypatch):
    model, rounded = models["half precision"], []
    take = lambda params, rows: rounded.append(round_weights(params, rows=rows)) or rounded[-1]
    monkeypatch.setattr(sampling, "round_weights", take)
    tokens_of(model, prompts(*[9] * rows), 40)
    assert len(rounded) == 1
    for name, value in params_of(model).items():
        have = rounded[0][name]
        if name.endswith(".kernel"):
            assert have.dtype == kept
            np.testing.assert_array_equal(have.astype("float32"), value.astype("bfloat16").astype("float32"))
        else:
            assert have is value
    tokens_of(models["learned positions"], prompts(9), 40)
    assert len(rounded) == 1


def test_a_cache_that_grows_in_mid_text_changes_nothing(model, monkeypatch):
    ids = prompts(1, 9, 5)
    want = tokens_of(model, ids, C - 10)
    sizes, enlarge = [], sampling._enlarge
    monkeypatch.setattr(sampling, "FEWEST_SLOTS", 2)
    monkeypatch.setattr(sampling, "_enlarge", lambda cache, slots: sizes.append(slots) or enlarge(cache, slots))
    np.testing.assert_array_equal(tokens_of(model, ids, C - 10), want)
    assert sizes == [32]


def test_logits_with_the_cache_equal_those_without(models):
    """Texts of different lengths in one padded prefill, then four tokens at a time to the end of the context."""
    model = models["rope, window, grouped heads"]
    lengths_B, T = np.array([2, 4, 1, 3]), 4
    tokens_BC = np.array(prompts(C, C, C, C))
    want_BCV = all_logits(model.config, params_of(model), tokens_BC)

    @jax.jit
    def cached(tokens_BT, cache):
        hidden_BTD, cache = model.hidden(tokens_BT, cache)
        return model.logits(hidden_BTD), cache

    start_B = T - lengths_B
    padding, place_BT = 7, np.arange(T) - start_B[:, None]
    padded_BT = np.where(place_BT >= 0, np.take_along_axis(tokens_BC, np.maximum(place_BT, 0), axis=1), padding)
    have_BTV, cache = cached(padded_BT, model.empty_cache(start_B, C + T))
    for row, length in enumerate(lengths_B):
        np.testing.assert_allclose(have_BTV[row, -length:], want_BCV[row, :length], rtol=1e-5, atol=1e-5)
    for start in range(0, C - 2 * T, T):
        row_B1, place_BT = np.arange(4)[:, None], lengths_B[:, None] + start + np.arange(T)
        have_BTV, cache = cached(tokens_BC[row_B1, place_BT], cache)
        np.testing.assert_allclose(have_BTV, want_BCV[row_B1, place_BT], rtol=1e-5, atol=1e-5)


def test_a_token_writes_into_the_cache_and_copies_none_of_it(random_params):
    """For each user XLA would write a cache of its own, a copy of the whole (`materialize` in `attention.write`)."""
    config = TransformerConfig(V, context_len=64, num_blocks=2, num_heads=4, embedding_dim=128, mlp_dim=512)
    model = model_of(config, random_params(config))
    start_B, done_B, token_B = jnp.zeros(1, int), jnp.zeros(1, bool), jnp.zeros(1, int)
    decode = jax.jit(
        partial(_decode.__wrapped__, config=config, sampling=GREEDY, ends=()),
        donate_argnames=("cache",),
        compiler_options=compiler_options(),
    )
    cache = model.empty_cache(start_B, 64)
    program = decode.lower(params_of(model), cache, token_B, done_B, 3, jax.random.key(0), None, 0).compile().as_text()
    of_the_cache = lambda what: re.findall(rf"f32\[1,4,64,32\]\S* {what}\(", program)
    assert len(of_the_cache("copy")) == 0
    assert len(of_the_cache("dynamic-update-slice")) == 2 * config.num_blocks
    assert not re.search(r"f32\[(1,)?4,32,64\]", program)  # nor are keys or values transposed


def test_a_text_depends_on_its_own_prompt_alone_and_of_that_on_what_fits(model):
    alike = tokens_of(model, [prompts(9)[0]] * 4, 30)
    assert (alike == alike[0]).all()
    mixed = tokens_of(model, prompts(9, 1, 17, C + 6), 30)
    np.testing.assert_array_equal(mixed[0], alike[0])
    ends = tokens_of(model, [prompt[-C:] for prompt in prompts(9, 1, 17, C + 6)], 30)
    np.testing.assert_array_equal(ends, mixed)
    too_far = tokens_of(model, [prompt[-C + 1 :] for prompt in prompts(9, 1, 17, C + 6)], 30)
    assert (too_far[3] != mixed[3]).any()


def test_as_many_tokens_as_asked_for_in_chunks(model):
    ids = prompts(1, 9, 2, 3)
    longest = tokens_of(model, ids, 2 * CHUNK)
    for count in (1, 2, CHUNK, CHUNK + 1, CHUNK + 2):
        chunks = list(generate_tokens(model, ids, count, GREEDY))
        assert max(map(len, chunks)) <= CHUNK
        np.testing.assert_array_equal(np.concatenate(chunks).T, longest[:, :count])
    assert list(generate_tokens(model, ids, 0, GREEDY)) == []
    assert list(generate_tokens(model, [], 5, GREEDY)) == []


ANYTHING = 1e4  # at this temperature all tokens are about equally likely: a text shows its random numbers


def test_other_prompts_and_seeds_compile_nothing_new(model, caplog):
    list(generate_tokens(model, prompts(9, 12), 8, Sampling(ANYTHING, seed=1)))
    with jax.log_compiles():
        list(generate_tokens(model, prompts(16, 1), 5, Sampling(ANYTHING, seed=2)))
        list(generate_tokens(model, prompts(11, 10), 3, Sampling(ANYTHING, seed=3)))
        assert "Compiling" not in caplog.text
        list(generate_tokens(model, prompts(17, 10), 3, Sampling(ANYTHING, seed=3)))
        assert "Compiling" in caplog.text


def test_a_seed_gives_one_text_and_each_row_and_token_has_its_own_draw(model):
    ids = [prompts(9)[0]] * 2
    first, again, other = (tokens_of(model, ids, 40, Sampling(ANYTHING, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    by_chance = 0.2  # of 40 draws among 29
    assert np.mean(first == other) < by_chance and np.mean(first[0] == first[1]) < by_chance
    for lag in range(1, 20):  # nor does a row repeat itself when a chunk or the cache begins anew
        assert np.mean(first[:, lag:] == first[:, :-lag]) < by_chance


# --- The choice of the next token ---------------------------------------------------------------------------------

PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])  # in no order
DRAWS = 4000
KEPT = [  # settings, the tokens they leave, and to which power they raise the probabilities
    ({"temperature": 1.0}, [0, 1, 2, 3, 4], 1),
    ({"temperature": 2.0}, [0, 1, 2, 3, 4], 0.5),
    ({"temperature": 1.0, "top_k": 2}, [1, 3], 1),
    ({"temperature": 1.0, "top_p": 0.69}, [1, 3], 1),
    ({"temperature": 1.0, "top_p": 0.71}, [1, 3, 4], 1),
    ({"temperature": 0.5, "min_p": 0.3}, [1, 3], 2),  # of the squares: temperature comes first
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.8, "min_p": 0.74}, [1, 3], 1),  # 0.8 of what top_k left
]


def frequencies(samplings, *banned):
    """How often each token is drawn, of many rows with the same logits; one program, as that compiles sooner."""
    logits_BV = np.tile(np.log(PROBS) + 3, (DRAWS, 1)).astype(np.float32)  # logits need not be normalised
    draw = jax.jit(lambda banned_V: [pick(logits_BV, jax.random.key(0), s, banned_V, 0) for s in samplings])
    count = lambda tokens_B: np.bincount(tokens_B, minlength=5) / DRAWS
    return [list(map(count, draw(banned_V))) for banned_V in banned]


def test_draws_follow_the_distribution_that_the_settings_leave():
    [drawn] = frequencies([Sampling(**settings) for settings, _, _ in KEPT], None)
    for have, (settings, kept, power) in zip(drawn, KEPT, strict=True):
        want = np.where(np.isin(np.arange(5), kept), PROBS**power, 0)
        assert np.flatnonzero(have).tolist() == kept, settings
        four_deviations = 4 * 0.5 / math.sqrt(DRAWS)
        np.testing.assert_allclose(have, want / want.sum(), atol=four_deviations, err_msg=str(settings))


def test_greedy_in_four_ways():
    settings = [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    free, second = frequencies([Sampling(**s) for s in settings], np.zeros(5, bool), np.arange(5) == 1)
    for have, without_the_first in zip(free, second, strict=True):
        assert have.tolist() == [0, 1, 0, 0, 0] and without_the_first.tolist() == [0, 0, 0, 1, 0]


def test_each_token_has_its_own_draw():
    logits_BV = np.zeros((DRAWS, 5), np.float32)
    draw = jax.jit(lambda number: pick(logits_BV, jax.random.key(0), Sampling(1.0), None, number))
    first, second = draw(0), draw(1)
    assert np.mean(first == second) == pytest.approx(1 / 5, abs=0.03)
    assert np.mean(first[1:] == first[:-1]) == pytest.approx(1 / 5, abs=0.03)


def test_texts_with_settings_of_their_own_draw_as_each_would_alone():
    logits_BV = np.random.default_rng(0).normal(size=(60, V)).astype(np.float32)
    how = [Sampling(temperature, top_p=top_p) for temperature, top_p in [(0.0, 1.0), (ANYTHING, 1.0), (1.0, 0.8)]] * 20
    temperature_B, top_p_B = np.array([[s.temperature, s.top_p] for s in how], np.float32).T
    keys_B = jax.vmap(jax.random.key)(np.arange(60))
    own_B = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 0), 7))(keys_B)
    want_BS = jax.jit(jax.vmap(lambda x_V, key: jnp.array([pick(x_V[None], key, s, None, 7)[0] for s in how[:3]])))(
        logits_BV, keys_B
    )
    have_B = jax.jit(pick_each)(logits_BV, own_B, temperature_B, top_p_B)
    np.testing.assert_array_equal(have_B, want_BS[np.arange(60), np.arange(60) % 3])


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("min_p", 1.1), ("seed", -1)],
)
def test_an_impossible_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Sampling(**{name: value})


# --- Texts with an end --------------------------------------------------------------------------------------------


class Bytes(ByteTokenizer):
    """Bytes of which one ends a text and one must never be drawn."""

    eot = 4
    unsampled = tuple(b"~")


SCRIPT = "naïve €uros 😀, t~ice: 😀!\4".encode()  # the last token makes the context full
SCRIPTED = TransformerConfig(
    vocab_size=256,
    context_len=len(SCRIPT),
    num_blocks=1,
    num_heads=1,
    embedding_dim=len(SCRIPT),
    mlp_dim=3,
    norm="rmsnorm",
    tie_embeddings=False,
)


@pytest.fixture(scope="module")
def scripted():
    """A model that recites: its token at place i of a text is SCRIPT[i], whatever came before."""
    shapes = jax.eval_shape(partial(init_params, SCRIPTED), jax.random.key(0))
    params = {
        name: jnp.ones(leaf.shape) if name.endswith("scale") else jnp.zeros(leaf.shape) for name, leaf in shapes.items()
    }
    params["positions.embedding"] = jnp.eye(len(SCRIPT))
    params["head.kernel"] = 9.0 * jax.nn.one_hot(jnp.array([*SCRIPT[1:], 4]), 256)
    return model_of(SCRIPTED, params)


def test_end_of_text_ends_a_row_and_nothing_follows(scripted):
    lengths = [4, len(SCRIPT) - 1, 11]
    have = tokens_of(scripted, [np.frombuffer(SCRIPT[:n], np.uint8) for n in lengths], 99, ends=(4,))
    for row, length in zip(have, lengths, strict=True):
        want = list(SCRIPT[length:])
        assert row.tolist() == want + [NOTHING] * (len(row) - len(want))
    assert have.shape[1] <= len(SCRIPT) - 4 + CHUNK  # it stopped where the longest ended


def test_a_finished_text_that_fills_the_context_does_not_slow_the_others(scripted):
    ids = [np.frombuffer(SCRIPT[:n], np.uint8) for n in (len(SCRIPT) - 1, 9, 10)]
    chunks = list(generate_tokens(scripted, ids, 99, GREEDY, ends=(4,)))
    assert [len(chunk) for chunk in chunks][:4] == [1, 1, 1, CHUNK]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 25, 99])
def test_a_stream_gives_the_text_of_generate_in_whole_characters(scripted, num_tokens):
    pieces = list(stream(scripted, Bytes(), "n", num_tokens, GREEDY))
    # Where the model wants what must not be drawn, all else is equally unlikely, and the first of equals is taken.
    written = SCRIPT[1 : 1 + num_tokens].removesuffix(b"\4").replace(b"~", b"\0")
    assert "".join(pieces) == written.decode(errors="replace")
    assert generate(scripted, Bytes(), ["n"], num_tokens, GREEDY) == ["".join(pieces)]
    assert "\ufffd" not in "".join(pieces[:-1])  # only the end may cut a character
    assert len(pieces) > 1 or num_tokens < 2


def test_an_empty_prompt_is_what_a_text_starts_after():
    assert prompt_tokens(Bytes(), "").tolist() == [4]
    assert prompt_tokens(CharTokenizer("ab\n"), "").tolist() == [2]
    assert prompt_tokens(CharTokenizer("ab"), "").tolist() == [0]
    assert prompt_tokens(CharTokenizer("ab"), "b").tolist() == [1]
