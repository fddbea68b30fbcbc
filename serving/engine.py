"""Many requests in one decode loop: each takes a free row of the batch, and leaves it when its text has ended.

Shapes: B rows, C context, P padded prompt length, V vocabulary, K alternatives.

Every program has one shape, whatever the requests are: B rows, each with C slots of keys and values, in the first of
which its text begins. So no text depends on what the other rows hold, and no request compiles anything, but for the
first of each padded length. One thread owns the model and the cache; others hand it requests and get tokens by a
callback.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from transformer.attention import Cache, LayerCache
from transformer.config import TransformerConfig
from transformer.half import round_weights, with_rounded_weights
from transformer.model import Params, Transformer, model_of, params_of
from transformer.sampling import CHUNK, NOTHING, Sampling, pick_each, power_of_two
from transformer.xla import jit_where_it_lies

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
    """A text to go on from.

    Attributes:
      tokens: ids, at least one; the new ones are added to them.
      deliver: takes new tokens as they come, from the engine's thread, and None, "stop", "length" or "error".
      alternatives: how many of the likeliest tokens are to be told, at most ALTERNATIVES.
      cancelled: set by anybody: nothing more is wanted.
    """

    tokens: list[int]
    max_tokens: int
    sampling: Sampling
    deliver: Callable[[list[Token], str | None], None]
    alternatives: int = 0
    cancelled: bool = False
    made: int = field(default=0, init=False)


class Rows(NamedTuple):
    """What the programs know of the texts, on the host: arrays [B]."""

    token: Any  # the last one, which is not yet in the cache
    length: Any  # tokens in the cache
    made: Any  # new tokens so far
    left: Any  # to be made; 0 where no text is
    temperature: Any
    top_p: Any
    key: Any  # [B, 2]
    alternatives: Any  # whether they are wanted


def _draw(model: Transformer, hidden_BD: jax.Array, rows: Rows, banned_V: jax.Array):
    """The next token of each text and its log-probability [B], and the likeliest ones and theirs [B, K]."""
    logits_BV = jnp.where(banned_V, -jnp.inf, model.logits(hidden_BD))
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), rows.made)
    token_B = pick_each(logits_BV, keys_B, rows.temperature, rows.top_p).astype(jnp.int32)
    log_probs_BV = jax.nn.log_softmax(logits_BV)
    best = lambda: jax.lax.top_k(log_probs_BV, min(ALTERNATIVES, logits_BV.shape[1]))
    none = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(best))
    best_BK, ids_BK = jax.lax.cond(rows.alternatives.any(), best, none)
    return token_B, jnp.take_along_axis(log_probs_BV, token_B[:, None], 1)[:, 0], ids_BK, best_BK


@partial(jit_where_it_lies, static_argnames="config", donate_argnames="layers")
def _prefill(
    params: Params, layers: list[LayerCache], row, tokens_1P, rows: Rows, banned_V, *, config: TransformerConfig
):
    """Put a text of `rows.length` tokens, padded on the right, into a row of the cache; also its next token."""
    model = model_of(config, params)
    hidden_1PD, own = model.hidden(tokens_1P, model.empty_cache(jnp.zeros(1, jnp.int32), tokens_1P.shape[1]))

    def put(all_BKCH, own_1KPH):
        room = [(0, large - small) for large, small in zip(all_BKCH.shape, own_1KPH.shape, strict=True)]
        own_1KCH = jnp.pad(own_1KPH, [(0, 0), *room[1:]])  # nothing stays of the row's last text
        return jax.lax.dynamic_update_slice(all_BKCH, own_1KCH, (row, 0, 0, 0))

    drawn = _draw(model, hidden_1PD[:, rows.length[0] - 1], rows, banned_V)
    return jax.tree.map(put, layers, own.layers), drawn


@partial(jit_where_it_lies, static_argnames=("config", "ends"), donate_argnames="layers")
def _decode(
    params: Params, layers: list[LayerCache], rows: Rows, banned_V, *, config: TransformerConfig, ends: tuple[int, ...]
):
    """Up to CHUNK tokens of each text: `_draw`'s arrays behind a chunk's axis, NOTHING after a text's last one."""
    model = model_of(config, params)
    start_B = jnp.zeros_like(rows.length)
    alive = lambda rows: (rows.left > 0) & (rows.length < config.context_len)

    def one_token(carry):
        i, layers, rows, out = carry
        alive_B = alive(rows)
        slot_B = jnp.minimum(rows.length, config.context_len - 1)  # what stands still writes where it is not read
        hidden_B1D, cache = model.hidden(rows.token[:, None], Cache(layers, start_B, slot_B))
        drawn = _draw(model, hidden_B1D[:, 0], rows, banned_V)
        ended_B = jnp.isin(drawn[0], jnp.array(ends, jnp.int32))
        out = jax.tree.map(
            lambda old, new: old.at[i].set(new), out, (jnp.where(alive_B, drawn[0], NOTHING), *drawn[1:])
        )
        rows = rows._replace(
            token=jnp.where(alive_B, drawn[0], rows.token),
            length=rows.length + alive_B,
            made=rows.made + alive_B,
            left=jnp.where(ended_B, 0, rows.left - alive_B),
        )
        return i + 1, cache.layers, rows, out

    B, K = len(rows.token), min(ALTERNATIVES, config.vocab_size)
    out = (
        jnp.full((CHUNK, B), NOTHING),
        jnp.zeros((CHUNK, B)),
        jnp.zeros((CHUNK, B, K), int),
        jnp.zeros((CHUNK, B, K)),
    )
    unfinished = lambda carry: (carry[0] < CHUNK) & alive(carry[2]).any()
    with with_rounded_weights() if config.operand_dtype == "bfloat16" else contextlib.nullcontext():
        _, layers, _, out = jax.lax.while_loop(unfinished, one_token, (0, layers, rows, out))
    return layers, out


class Engine:
    """Answers requests until it is left; the model is its own meanwhile.

    Args:
      ends: the tokens that end a text; they are delivered too.
      unsampled: ids that are never chosen.
      rows: texts that are written at the same time.
      queue: requests and calls that may wait beside them.
      warn: takes a line about what went wrong inside.

    Raises:
      whatever the programs raise that are compiled here at once, such as of a device without memory.
    """

    def __init__(
        self,
        model: Transformer,
        ends: tuple[int, ...] = (),
        unsampled: Sequence[int] = (),
        rows: int = 8,
        queue: int = 256,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self._queue, self._warn = model, queue, warn
        self._params, self._run = params_of(model), {"config": model.config}
        half = model.config.operand_dtype != "float32"
        self._weights = round_weights(self._params, rows=rows) if half else self._params  # once, not for each token
        self._ends = ends
        self._banned_V = np.isin(np.arange(model.config.vocab_size), list(unsampled))
        self._texts: list[Request | None] = [None] * rows
        self._clear()
        self._waiting: deque[Request | tuple[Callable[[], Any], Future]] = deque()
        self._news, self._closed = threading.Condition(), False
        self._enter(0, Request([0], 2, Sampling(0), lambda tokens, finish: None))  # compiles the programs
        self._decode()
        self._texts = [None] * rows
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def submit(self, *requests: Request) -> None:
        """All of them, or none.

        Raises:
          Full: too many wait already.
        """
        self._add(requests)

    def call(self, function: Callable[[], Any]) -> Future:
        """The result of a function that runs in the engine's thread, between two chunks.

        Raises:
          Full: too many wait already.
        """
        future: Future = Future()
        self._add([(function, future)])
        return future

    def _add(self, items: Sequence[Any]) -> None:
        with self._news:
            if self._closed or len(self._waiting) + len(items) > self._queue + self._texts.count(None):
                raise Full
            self._waiting.extend(items)
            self._news.notify()

    def _clear(self) -> None:
        """Empty rows, and a cache for them."""
        B, config = len(self._texts), self.model.config
        self._texts = [None] * B
        empty = self.model.empty_cache(np.zeros(B, np.int32), config.context_len).layers
        self._layers = jax.tree.map(jnp.copy, empty)  # each is given away by itself
        counts, shares = (lambda: np.zeros(B, np.int32)), (lambda: np.ones(B, np.float32))
        key = np.zeros((B, *jax.random.key_data(jax.random.key(0)).shape), np.uint32)
        self._rows = Rows(counts(), counts(), counts(), counts(), shares(), shares(), key, np.zeros(B, bool))

    def _work(self) -> None:
        while True:
            with self._news:
                while not (self._closed or self._waiting or any(self._texts)):
                    self._news.wait()
                if self._closed:
                    return
            try:
                self._round()
            except Exception as error:  # as of a device without memory: those who were served are told, others come
                self._warn(f"a chunk of text failed: {type(error).__name__}: {error}")
                failed = [text for text in self._texts if text]
                self._clear()
                for text in failed:
                    self._tell(text, [], "error")

    def _round(self) -> None:
        """Fill the free rows with those who wait, then write one chunk."""
        for row, text in enumerate(self._texts):
            if text and text.cancelled:
                self._leave(row)
            elif text and self._rows.length[row] == self.model.config.context_len:
                self._enter(row, text)  # anew, from its last half
        while self._waiting and (isinstance(self._waiting[0], tuple) or None in self._texts):
            item = self._waiting.popleft()
            if isinstance(item, tuple):
                function, future = item
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function())
                    except Exception as error:
                        future.set_exception(error)
            elif not item.cancelled:
                self._enter(self._texts.index(None), item)
        if self._rows.left.any():
            self._decode()

    def _enter(self, row: int, text: Request) -> None:
        """Read a text into a row, and write its next token."""
        context_len, rows = self.model.config.context_len, self._rows
        self._texts[row] = text
        if len(text.tokens) > context_len:
            del text.tokens[: -max(1, context_len // 2)]
        length = len(text.tokens)
        tokens_1P = np.zeros((1, min(context_len, max(_SHORTEST, power_of_two(length)))), np.int32)
        tokens_1P[0, :length] = text.tokens
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(text.sampling.seed), 0))  # as of a text alone
        how = text.sampling.temperature, text.sampling.top_p, key, text.alternatives > 0
        values = Rows(0, length, text.made, text.max_tokens - text.made, *how)
        for array, value in zip(rows, values, strict=True):
            array[row] = value
        own = Rows(*(array[row : row + 1] for array in rows))
        self._layers, drawn = _prefill(self._params, self._layers, row, tokens_1P, own, self._banned_V, **self._run)
        self._take(row, *(np.asarray(array)[None] for array in drawn))

    def _decode(self) -> None:
        old = Rows(*map(np.copy, self._rows))  # the program reads them while they are changed here
        self._layers, out = _decode(self._weights, self._layers, old, self._banned_V, ends=self._ends, **self._run)
        out = [np.asarray(array) for array in out]
        for row, text in enumerate(self._texts):
            if text:
                self._rows.length[row] += (out[0][:, row] != NOTHING).sum()
                self._take(row, *(array[:, row : row + 1] for array in out))

    def _take(self, row: int, ids_C1, log_probs_C1, best_ids_C1K, best_C1K) -> None:
        """Hand a row's new tokens to whom they belong; the last one makes it free."""
        text, rows = self._texts[row], self._rows
        count = int((ids_C1 != NOTHING).sum())
        ids, likely = ids_C1[:count, 0].tolist(), text.alternatives
        best = [
            list(zip(ids[0, :likely].tolist(), best[0, :likely].tolist(), strict=True))
            for ids, best in zip(best_ids_C1K[:count], best_C1K[:count], strict=True)
        ]
        tokens = [Token(*parts) for parts in zip(ids, log_probs_C1[:count, 0].tolist(), best, strict=True)]
        text.tokens += ids
        text.made += count
        rows.made[row], rows.left[row] = text.made, text.max_tokens - text.made
        if ids:
            rows.token[row] = ids[-1]
        finish = "stop" if ids and ids[-1] in self._ends else "length" if not rows.left[row] else None
        self._tell(text, tokens, finish)
        if finish:
            self._leave(row)

    def _leave(self, row: int) -> None:
        self._texts[row], self._rows.left[row], self._rows.alternatives[row], self._rows.top_p[row] = None, 0, False, 1

    def _tell(self, text: Request, tokens: list[Token], finish: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # who asked is gone
            text.deliver(tokens, finish)
