"""Many requests in one decode loop: each takes a free row of the batch, and leaves it when its text has ended.

Shapes: B rows, C context, P padded prompt length, V vocabulary, K alternatives, S tokens of a chunk.

Every program has one shape, whatever the requests are: B rows, each with C slots of keys and values, in the first of
which its text begins. So no text depends on what the other rows hold, and nothing is compiled for a request, except for
the first one of each padded length. One thread owns the cache; tokens reach the others by callbacks.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention import Cache, LayerCache
from transformer.config import TransformerConfig
from transformer.half import round_weights, rounded_before
from transformer.model import Params, Transformer, model_of, params_of
from transformer.sampling import CHUNK, NOTHING, Sampling, pick_each, power_of_two
from transformer.xla import jit_for_inputs, random_key

ALTERNATIVES = 20  # the most that the chat endpoint of OpenAI gives
_SHORTEST = 32  # padded prompt: fewer shapes


class Full(Exception):
    """As many requests wait as may."""


class Token(NamedTuple):
    """A token of a text, with log-probabilities at temperature 1: its own, and those of the likeliest ones."""

    id: int
    log_prob: float
    alternatives: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """A text to continue.

    Attributes:
      tokens: ids, at least one; the new ones are added to them. All but the last are in the cache while it is written.
      deliver: takes new tokens as they come, from the engine's thread, and None, "stop", "length" or "error".
      alternatives: how many of the likeliest tokens each new one comes with, at most ALTERNATIVES.
      cancelled: any thread may set it: nothing more is wanted.
    """

    tokens: list[int]
    max_tokens: int
    sampling: Sampling
    deliver: Callable[[list[Token], str | None], None]
    alternatives: int = 0
    cancelled: bool = False
    made: int = field(default=0, init=False)

    @cached_property
    def key(self) -> np.ndarray:
        """The random key of `sample`, for a text that is alone in its batch."""
        return np.asarray(jax.random.key_data(jax.random.fold_in(random_key(self.sampling.seed), 0)))


class Rows(NamedTuple):
    """What the programs know of the texts: arrays [B]."""

    token: Any  # the last one, which is not yet in the cache
    length: Any  # tokens in the cache
    made: Any  # new tokens so far
    left: Any  # tokens still to make; 0 in a free row
    temperature: Any
    top_p: Any
    key: Any  # [B, 2]
    alternatives: Any  # whether they are wanted


_FREE = Request([0], 0, Sampling(0), lambda tokens, finish: None)


def _rows(texts: Sequence[Request | None]) -> Rows:
    rows = [
        (text.tokens[-1], len(text.tokens) - 1, text.made, text.max_tokens - text.made)
        + (float(text.sampling.temperature), float(text.sampling.top_p), text.key, text.alternatives > 0)
        for text in (text or _FREE for text in texts)
    ]
    return Rows(*map(np.array, zip(*rows, strict=True)))


def _draw(model: Transformer, hidden_BD: jax.Array, rows: Rows, banned_V: jax.Array):
    """The next token of each text and its log-probability [B], and the likeliest ones and theirs [B, K]."""
    logits_BV = jnp.where(banned_V, -jnp.inf, model.logits(hidden_BD))
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), rows.made)
    token_B = pick_each(logits_BV, keys_B, rows.temperature, rows.top_p).astype(jnp.int32)
    log_probs_BV = jax.nn.log_softmax(logits_BV)
    B, K = len(token_B), min(ALTERNATIVES, len(banned_V))
    none = lambda: [jnp.zeros((B, K), log_probs_BV.dtype), jnp.zeros((B, K), jnp.int32)]
    best_BK, ids_BK = jax.lax.cond(rows.alternatives.any(), lambda: jax.lax.top_k(log_probs_BV, K), none)
    return token_B, jnp.take_along_axis(log_probs_BV, token_B[:, None], 1)[:, 0], ids_BK, best_BK


@partial(jit_for_inputs, static_argnames="config", donate_argnames="layers")
def _prefill(
    params: Params, layers: list[LayerCache], row, tokens_1P, rows: Rows, banned_V, *, config: TransformerConfig
):
    """Puts one text, padded on the right, into a row of the cache; also its next token, as `_draw`."""
    model = model_of(config, params)
    hidden_1PD, own = model.hidden(tokens_1P, model.empty_cache(jnp.zeros(1, jnp.int32), tokens_1P.shape[1]))

    def put(all_BKCH, own_1KPH):
        room = [(0, large - small) for large, small in zip(all_BKCH.shape, own_1KPH.shape, strict=True)]
        own_1KCH = jnp.pad(own_1KPH, [(0, 0), *room[1:]])  # nothing stays of the row's last text
        return jax.lax.dynamic_update_slice(all_BKCH, own_1KCH, (row, 0, 0, 0))

    return jax.tree.map(put, layers, own.layers), _draw(model, hidden_1PD[:, rows.length[0]], rows, banned_V)


@partial(jit_for_inputs, static_argnames=("config", "ends"), donate_argnames="layers")
def _decode(
    params: Params, layers: list[LayerCache], rows: Rows, banned_V, *, config: TransformerConfig, ends: tuple[int, ...]
):
    """Up to CHUNK tokens of each text: `_draw`'s arrays with a leading axis S, NOTHING after a text's last token."""
    model = model_of(config, params)
    start_B = jnp.zeros_like(rows.length)
    alive = lambda rows: (rows.left > 0) & (rows.length < config.context_len)

    def one_token(carry):
        i, layers, rows, out = carry
        alive_B = alive(rows)
        slot_B = jnp.minimum(rows.length, config.context_len - 1)  # a text that has ended writes where nobody reads
        hidden_B1D, cache = model.hidden(rows.token[:, None], Cache(layers, start_B, slot_B))
        token_B, *told = _draw(model, hidden_B1D[:, 0], rows, banned_V)
        news = jnp.where(alive_B, token_B, NOTHING), *told
        ended_B = jnp.isin(token_B, jnp.array(ends, jnp.int32))
        rows = rows._replace(
            token=jnp.where(alive_B, token_B, rows.token),
            length=rows.length + alive_B,
            made=rows.made + alive_B,
            left=jnp.where(ended_B, 0, rows.left - alive_B),
        )
        return i + 1, cache.layers, rows, tuple(old.at[i].set(new) for old, new in zip(out, news, strict=True))

    SB, SBK = (CHUNK, len(rows.token)), (CHUNK, len(rows.token), min(ALTERNATIVES, config.vocab_size))
    out = jnp.full(SB, NOTHING), jnp.zeros(SB), jnp.zeros(SBK, int), jnp.zeros(SBK)
    unfinished = lambda carry: (carry[0] < CHUNK) & alive(carry[2]).any()
    with rounded_before(config.operand_dtype == "bfloat16"):
        _, layers, _, out = jax.lax.while_loop(unfinished, one_token, (0, layers, rows, out))
    return layers, out


class Engine:
    """Answers requests while its `with` block runs. It compiles its programs first, and raises whatever that raises."""

    def __init__(
        self,
        model: Transformer,
        ends: tuple[int, ...] = (),  # the tokens that end a text; they are delivered too
        unsampled: Sequence[int] = (),  # ids that are never chosen
        rows: int = 8,  # texts that are written at the same time
        queue: int = 256,  # texts that may wait beside them
        warn: Callable[[str], None] = lambda text: None,  # takes a line about what went wrong inside
    ) -> None:
        self.model, self._ends, self._queue, self._warn = model, ends, queue, warn
        self.error: Exception | None = None  # what ended the thread; leaving the block raises it
        self._params, self._run = params_of(model), {"config": model.config}
        half = model.config.operand_dtype != "float32"
        self._weights = round_weights(self._params, rows=rows) if half else self._params  # once, not for each token
        self._banned_V = np.isin(np.arange(model.config.vocab_size), list(unsampled))
        self._waiting: list[Request] = []
        self._news, self._closed = threading.Condition(), False
        self._clear(rows)
        self._enter(0, Request([0], 1, Sampling(0), lambda tokens, finish: None))  # compiles the programs
        self._decode()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def submit(self, *requests: Request) -> None:
        """All of them, or none. Raises Full if too many wait already, those that were given up not counted."""
        with self._news:
            if self._closed:
                raise Full
            self._waiting = [text for text in self._waiting if not text.cancelled]
            if len(self._waiting) + len(requests) > self._queue + self._texts.count(None):
                raise Full
            self._waiting += requests
            self._news.notify()

    @property
    def places(self) -> int:
        """The most texts that can be taken at once."""
        return self._queue + len(self._texts)

    def _next(self) -> Request | None:
        """The next text that is still wanted."""
        with self._news:
            self._waiting = [text for text in self._waiting if not text.cancelled]
            return self._waiting.pop(0) if self._waiting else None

    def _clear(self, rows: int) -> None:
        """A new cache, and nothing in it."""
        self._layers: list[LayerCache] = []  # frees the old one first
        empty = self.model.empty_cache(np.zeros(rows, np.int32), self.model.config.context_len).layers
        self._layers = jax.tree.map(jnp.copy, empty)  # donated one by one, so no two may share memory
        self._texts: list[Request | None] = [None] * rows

    def _work(self) -> None:
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._closed or self._waiting or any(self._texts))
                if self._closed:
                    return
                try:
                    self._round()
                except Exception as error:  # such as too little memory: these texts are lost, the next ones are served
                    self._warn(f"a chunk of text failed: {type(error).__name__}: {error}")
                    failed = self._texts
                    self._clear(len(failed))
                    _tell(failed, [], "error")
        except Exception as error:
            self.error = error
        finally:
            with self._news:
                self._closed, left = True, [*self._texts, *self._waiting]
            _tell(left, [], "error")

    def _round(self) -> None:
        """Fills the free rows with waiting texts, then writes one chunk of each text."""
        for row, text in enumerate(self._texts):
            if text and text.cancelled:
                self._texts[row] = None
            elif text and len(text.tokens) > self.model.config.context_len:
                self._enter(row, text)  # its last half
        while None in self._texts and (text := self._next()):
            self._enter(self._texts.index(None), text)
        if any(self._texts):
            self._decode()

    def _enter(self, row: int, text: Request) -> None:
        """Reads a text into a row, and writes its next token."""
        context_len = self.model.config.context_len
        self._texts[row] = text
        if len(text.tokens) > context_len:
            del text.tokens[: -max(1, context_len // 2)]
        length = len(text.tokens)
        tokens_1P = np.zeros((1, min(context_len, max(_SHORTEST, power_of_two(length)))), np.int32)
        tokens_1P[0, :length] = text.tokens
        arguments = row, tokens_1P, _rows([text]), self._banned_V
        self._layers, drawn = _prefill(self._params, self._layers, *arguments, **self._run)
        self._take(row, *map(np.asarray, drawn))

    def _decode(self) -> None:
        arguments = self._weights, self._layers, _rows(self._texts), self._banned_V
        self._layers, out = _decode(*arguments, ends=self._ends, **self._run)
        out = [np.asarray(array) for array in out]
        for row, text in enumerate(self._texts):
            if text:
                self._take(row, *(array[:, row] for array in out))

    def _take(self, row: int, *drawn_S: np.ndarray) -> None:
        """Delivers a row's new tokens; the last one frees the row."""
        text, tokens = self._texts[row], []
        for token, log_prob, ids, log_probs in zip(*(array.tolist() for array in drawn_S), strict=True):
            if token != NOTHING:
                others = zip(ids[: text.alternatives], log_probs[: text.alternatives], strict=True)
                tokens.append(Token(token, log_prob, list(others)))
        text.tokens += [token.id for token in tokens]
        text.made += len(tokens)
        ended = bool(tokens) and tokens[-1].id in self._ends
        finish = "stop" if ended else "length" if text.made == text.max_tokens else None
        if finish:
            self._texts[row] = None
        _tell([text], tokens, finish)


def _tell(texts: Sequence[Request | None], tokens: list[Token], finish: str | None) -> None:
    for text in filter(None, texts):
        with contextlib.suppress(RuntimeError):  # its event loop has ended
            text.deliver(tokens, finish)
