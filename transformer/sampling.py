"""Generation: prefill of the prompts, then a jitted loop that decodes with the key/value cache.

Shapes: B texts, P padded prompt length, V vocabulary.

A text may outgrow the context. Then its last `context_len // 2` tokens are prefilled again, so that the model never
sees positions that it was not trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention import Cache, LayerCache
from transformer.config import TransformerConfig
from transformer.half import round_weights, rounded_before
from transformer.model import Params, Transformer, model_of, params_of
from transformer.ranges import NotNegative, Range, Share, require
from transformer.xla import jit_for_inputs, random_key

CHUNK = 16  # tokens decoded by one dispatch: few enough to stream, enough to hide the dispatch
FEWEST_SLOTS = 64  # of the cache; it starts small and doubles, since attention reads all of it for each token
NOTHING = -1  # the "token" that a finished text yields

Prompt = str | np.ndarray  # a text, or its ids


class Tokenizer(Protocol):
    """The part of a tokenizer that generation uses."""

    eot: int | None  # the token that ends a text, and after which the next one begins
    ends: tuple[int, ...]  # all tokens that end a text
    unsampled: tuple[int, ...]  # ids that stand for no text

    def encode(self, text: str, replace_unknown: bool = False) -> np.ndarray:
        """Token ids, 1-D."""

    def text_stream(self) -> Any:
        """A decoder: `feed` takes ids and gives their complete characters, `flush` gives the rest."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in this order of settings. Raises ValueError, `<name>: <what is wrong>`.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 is all.
      top_p: only the smallest set of most likely tokens whose probabilities reach this sum (arXiv:1904.09751).
      min_p: only tokens at least this share as likely as the most likely one (arXiv:2407.01082).
      seed: the same seed, model and prompts give the same text.
    """

    temperature: NotNegative = 0.8
    top_k: Annotated[int, Range("at least 0 (0 is all)", lambda x: x >= 0)] = 0
    top_p: Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)] = 1.0
    min_p: Share = 0.0
    seed: Annotated[int, Range("at least 0 and below 2**63", lambda x: 0 <= x < 2**63)] = 0

    def __post_init__(self):
        require(vars(self), type(self).__annotations__)


def pick(
    logits_BV: jax.Array, key: jax.Array, sampling: Sampling, banned_V: jax.Array | None, number: jax.Array
) -> jax.Array:
    """The next token of each text [B]; `number` counts the tokens made, so that each draw has its own randomness."""
    if banned_V is not None:
        logits_BV = jnp.where(banned_V, -jnp.inf, logits_BV)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / sampling.temperature
    B, V = logits_BV.shape
    if 0 < sampling.top_k < V:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        logits_BV = _likeliest(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        floor_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), number))(jnp.arange(B))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def _likeliest(logits_BV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Only the likeliest tokens up to that probability, a number or [B, 1]; the others' logits are minus infinity."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # what more likely tokens already hold
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(before_BV, rank_BV, axis=-1) < top_p, logits_BV, -jnp.inf)


def pick_each(logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """`pick` for texts that each have settings, and a key for this token, of their own; of no other's they depend."""
    scaled_BV = logits_BV / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
    cut_BV = lambda: _likeliest(scaled_BV, jnp.where(top_p_B < 1, top_p_B, jnp.inf)[:, None])
    kept_BV = jax.lax.cond((top_p_B < 1).any(), cut_BV, lambda: scaled_BV)  # sorting costs more than all else here
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    return jnp.where(temperature_B > 0, drawn_B, jnp.argmax(logits_BV, axis=-1))


@partial(jit_for_inputs, static_argnames=("config", "sampling"))
def _prefill(
    params: Params, tokens_BP, start_B, key, banned_V, number, *, config: TransformerConfig, sampling: Sampling
) -> tuple[jax.Array, Cache | None]:
    """Read whole texts, padded on the left up to `start_B`; returns each one's next token, and a cache of P slots."""
    model = model_of(config, params)
    hidden_BPD, cache = model.hidden(tokens_BP, model.empty_cache(start_B, tokens_BP.shape[1]))
    return pick(model.logits(hidden_BPD[:, -1]), key, sampling, banned_V, number), cache


@partial(jax.jit, static_argnames="slots")
def _enlarge(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` slots."""
    grow = lambda x_BKSH: jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, slots - x_BKSH.shape[2]), (0, 0)))
    return cache._replace(layers=[LayerCache(*map(grow, layer)) for layer in cache.layers])


@partial(jit_for_inputs, static_argnames=("config", "sampling", "ends"), donate_argnames=("cache",))
def _decode(
    params: Params,
    cache: Cache,
    token_B,
    done_B,
    count,
    key,
    banned_V,
    number,
    *,
    config: TransformerConfig,
    sampling: Sampling,
    ends: tuple[int, ...],
):
    """Up to `count` <= CHUNK more tokens [CHUNK, B] after `token_B`; the cache must have room for them."""
    model = model_of(config, params)

    def unfinished(carry):
        i, _, done_B, _, _ = carry
        return (i < count) & ~done_B.all()

    def one_token(carry):
        i, token_B, done_B, cache, out_CB = carry
        hidden_B1D, cache = model.hidden(token_B[:, None], cache)
        next_B = pick(model.logits(hidden_B1D[:, 0]), key, sampling, banned_V, number + i)
        out_CB = out_CB.at[i].set(jnp.where(done_B, NOTHING, next_B))
        for end in ends:
            done_B = done_B | (next_B == end)
        return i + 1, next_B, done_B, cache, out_CB

    begin = 0, token_B, done_B, cache, jnp.full((CHUNK, token_B.shape[0]), NOTHING)
    with rounded_before(config.operand_dtype == "bfloat16"):
        _, token_B, done_B, cache, out_CB = jax.lax.while_loop(unfinished, one_token, begin)
    return out_CB, token_B, done_B, cache


def traced(config: TransformerConfig, params: Params, place: jax.sharding.Sharding) -> dict[str, Any]:
    """The programs that continue one text of a whole context, to be compiled: prefill, and decode of CHUNK tokens.

    Of `params` only names, shapes and dtypes are read; all arrays are where `place` says.
    """
    there = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    array = lambda *shape, dtype="int32": jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    run, params = {"config": config, "sampling": Sampling()}, there(params)
    slots, key = power_of_two(config.context_len), there(jax.eval_shape(jax.random.key, 0))
    prefill = _prefill.trace(params, array(1, slots), array(1), key, None, array(), **run)  # type: ignore[attr-defined]
    token_B, cache = there(prefill.out_info)
    if config.operand_dtype != "float32":
        params = there(round_weights(params, rows=1))
    state = token_B, array(1, dtype="bool"), array(), key, None, array()
    decode = _decode.trace(params, cache, *state, ends=(), **run)  # type: ignore[attr-defined]
    return {"prefill": prefill, "decode": decode}


def power_of_two(least: int) -> int:
    """The next power of two: few sizes mean few compilations."""
    return 1 << (least - 1).bit_length()


def generate_tokens(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    num_tokens: int,
    sampling: Sampling,
    ends: tuple[int, ...] = (),
    unsampled: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Continue a batch of prompts of any lengths; yields arrays [n, B] of n <= CHUNK new tokens.

    Args:
      prompts: token ids, at least one each; only the end of a prompt is read if it is longer than the context.
      ends: the tokens that end a text. The first is yielded, then -1 follows until the whole batch has ended.
      unsampled: ids that are never chosen.
    """
    config = model.config
    params = params_of(model)
    key = random_key(sampling.seed)
    banned_V = jnp.zeros(config.vocab_size, bool).at[jnp.array(list(unsampled), int)].set(True) if unsampled else None
    run = {"config": config, "sampling": replace(sampling, seed=0)}  # the key has the seed: a new seed compiles nothing
    texts = [list(map(int, prompt[-config.context_len :])) for prompt in prompts]
    done_B = np.zeros(len(texts), bool)
    made, weights = 0, None  # rounded once, after the first token
    while made < num_tokens and not done_B.all():
        longest = max(map(len, texts))
        padded = power_of_two(longest)
        tokens_BP = np.array([[0] * (padded - len(text)) + text for text in texts], np.int32)
        start_B = np.array([padded - len(text) for text in texts], np.int32)
        token_B, cache = _prefill(params, tokens_BP, start_B, key, banned_V, made, **run)
        new_CB = np.where(done_B, NOTHING, np.asarray(token_B))[None]
        done_B = done_B | np.isin(new_CB[0], ends)
        slots, used, room = padded, padded, config.context_len - longest
        while True:
            for row, text in enumerate(texts):
                text.extend(int(token) for token in new_CB[:, row] if token != NOTHING)
            made += len(new_CB)
            yield new_CB
            count = min(CHUNK, num_tokens - made, room)
            if count <= 0 or done_B.all():
                break
            if used + count > slots:
                slots = max(FEWEST_SLOTS, power_of_two(used + count))
                cache = _enlarge(cache, slots)
            if weights is None:
                weights = params if config.operand_dtype == "float32" else round_weights(params, rows=len(texts))
            out_CB, token_B, done_now_B, cache = _decode(
                weights, cache, token_B, done_B, count, key, banned_V, made, ends=ends, **run
            )
            new_CB, done_B = np.asarray(out_CB)[:count], np.asarray(done_now_B)
            used, room = used + count, room - count
        for row, text in enumerate(texts):
            if done_B[row]:  # a finished text must not make the batch longer
                texts[row] = text[-1:]
            elif len(text) > config.context_len:
                texts[row] = text[-max(1, config.context_len // 2) :]


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> np.ndarray:
    """A prompt's ids; without any the end-of-text token, or else a newline, or else the first symbol.

    An imported tokenizer may make nothing of a text that is not empty.
    """
    if not isinstance(prompt, str):
        return prompt
    if prompt and len(ids := tokenizer.encode(prompt)):
        return ids
    if tokenizer.eot is not None:
        return np.array([tokenizer.eot])
    newline = tokenizer.encode("\n", replace_unknown=True)
    return newline if len(newline) else np.array([0])


def stream(
    model: Transformer, tokenizer: Tokenizer, prompt: Prompt, num_tokens: int, sampling: Sampling | None = None
) -> Iterator[str]:
    """Continue a prompt; yields complete characters, without the end-of-text token. Raises as `generate`."""
    yield from (text for (text,) in _streams(model, tokenizer, [prompt], num_tokens, sampling) if text)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    num_tokens: int,
    sampling: Sampling | None = None,
) -> list[str]:
    """Continue a batch of prompts; returns the new text of each, up to its end-of-text token.

    Raises UnknownCharacters if a prompt has characters that the tokenizer lacks.
    """
    parts = zip(*_streams(model, tokenizer, prompts, num_tokens, sampling), strict=True)
    return ["".join(texts) for texts in parts]


def _streams(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], num_tokens: int, sampling: Sampling | None
) -> Iterator[list[str]]:
    """The new text of each prompt, in pieces, without the tokens that end a text."""
    ids = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    decoders = [tokenizer.text_stream() for _ in prompts]
    hidden, ends = (NOTHING, *tokenizer.ends), tokenizer.ends
    for new_CB in generate_tokens(model, ids, num_tokens, sampling or Sampling(), ends, tokenizer.unsampled):
        rows = zip(decoders, new_CB.T, strict=True)
        yield [decoder.feed([token for token in tokens if token not in hidden]) for decoder, tokens in rows]
    yield [decoder.flush() for decoder in decoders]
