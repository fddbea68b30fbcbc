"""From the corpus that a config names to batches on the devices; a batch is a function of the seed and the step.

So a checkpoint needs only the step, a micro-step from 0, and each of several processes builds its own rows. A batch is
int32 [rows, context_len + 1]: its inputs are `batch[:, :-1]`, its targets `batch[:, 1:]`. IGNORED (-1) fills places
beyond the split's end: not a target, and 0 as an input.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corpus.dataset import Split
from corpus.load_documents import load_dataset as load_dataset
from corpus.shards import ShardedTokens
from runtime.multihost import put
from runtime.processes import num_processes
from transformer.sharding import batch_sharded, replicated

S, T = TypeVar("S"), TypeVar("T")

IGNORED = -1


@dataclass(frozen=True)
class Batches:
    """The training batches of a split, which holds at least one window; each is a function of its step.

    Windows of context_len + 1 tokens start every context_len tokens. The last token of one is the first of the next,
    so an epoch predicts every token but the first exactly once. A batch may span the end of an epoch.

    order: "shuffle" permutes the windows differently in each epoch; "sequential" keeps their order; "random" draws
    windows that start anywhere, with replacement, so that an epoch is only a number of windows.
    offset: windows read so far minus step * batch_size; not 0 in a run whose batch size was changed on the way.
    """

    split: Split
    context_len: int
    batch_size: int
    seed: int
    order: Literal["shuffle", "sequential", "random"] = "shuffle"
    offset: int = 0

    def __call__(self, step: int) -> np.ndarray:
        """The batch of a step: int32 [batch_size, context_len + 1]."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """Rows start to stop - 1 of the batch of a step, for a process that feeds only those."""
        number = self.position(step) + np.arange(start, stop)  # of the window, counted from the run's first
        num_windows = self.split.num_windows(self.context_len)
        seed_key = _hash(np.array([self.seed % 2**64], np.uint64), _U0)
        if self.order == "random":
            starts = _hash(number, seed_key) % np.uint64(self.split.num_tokens - self.context_len)
        elif self.order == "sequential":
            starts = number % num_windows * self.context_len
        else:
            epoch, index = np.divmod(number, num_windows)
            starts = permute(index, num_windows, _hash(epoch, seed_key)) * self.context_len
        return _windows(self.split.tokens, starts.tolist(), len(starts), self.context_len)

    def position(self, step: int) -> int:
        """How many windows were read before a step."""
        return self.offset + step * self.batch_size

    def steps(self, epochs: float) -> int:
        """The step at which `epochs` epochs end, rounded up to a whole batch."""
        windows = Fraction(str(epochs)) * self.split.num_windows(self.context_len)
        return math.ceil((windows - self.offset) / self.batch_size)


def eval_batches(split: Split, context_len: int, batch_size: int, max_tokens: int = 0) -> Iterator[np.ndarray]:
    """Every token of the split but the first, predicted once: int32 [batch_size, context_len + 1] at a time.

    The last batch is filled up with rows of IGNORED. `max_tokens` above 0: the first windows alone, at least one.
    """
    num_windows = split.num_windows(context_len)
    if 0 < max_tokens < split.num_tokens - 1:
        num_windows = min(num_windows, max(1, max_tokens // context_len))
    starts = range(0, num_windows * context_len, context_len)
    for first in range(0, num_windows, batch_size):
        yield _windows(split.tokens, starts[first : first + batch_size], batch_size, context_len)


def _windows(tokens: np.ndarray | ShardedTokens, starts: Sequence[int], num_rows: int, context_len: int) -> np.ndarray:
    """The windows at `starts`. A loop copies whole slices; fancy indexing would build an index for each token."""
    batch = np.full((num_rows, context_len + 1), IGNORED, np.int32)
    for row, start in zip(batch, starts, strict=False):
        window = tokens[start : start + context_len + 1]
        row[: len(window)] = window
    return batch


def prefetch(make: Callable[[S], T], of: Iterable[S], size: int = 2) -> Iterator[T]:
    """Yields make(x) for each x, computed `size` items ahead: JAX dispatches asynchronously, so no thread is needed."""
    ahead: deque[T] = deque()
    for x in of:
        ahead.append(make(x))
        if len(ahead) > size:
            yield ahead.popleft()
    yield from ahead


def place(batches: Batches, mesh: Mesh, most: int, span: range) -> Any:
    """The batches of a dispatch on the devices: where `most` is 1 [B, T + 1], else [most, B, T + 1], of which the first
    len(span) are those of `span`, and that length. One of several processes reads only the rows of its own devices.
    """
    shape, places = (batches.batch_size, batches.context_len + 1), batch_sharded(mesh)
    if most > 1:
        shape, places = (most, *shape), NamedSharding(mesh, PartitionSpec(None, *places.spec))

    def stacked(own: list[np.ndarray]) -> np.ndarray:
        return own[0] if most == 1 else np.stack(own + own[-1:] * (most - len(own)))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[-2].indices(batches.batch_size)
        return stacked([batches.rows(step, start, stop)[:, index[-1]] for step in span])

    if num_processes() > 1:
        placed = jax.make_array_from_callback(shape, places, part)
    else:
        placed = jax.device_put(stacked([batches(step) for step in span]), places)
    return placed if most == 1 else (placed, put(np.asarray(len(span), np.int32), replicated(mesh)))


# Random numbers are hashes of an index, so that no permutation is stored.
_GOLDEN, _MIX1, _MIX2 = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_U0, _U1, _U27, _U30, _U31 = np.array([0, 1, 27, 30, 31], np.uint64)
_ROUND_KEYS = np.array([1, 2, 3], np.uint64)  # each serves two rounds; after only four, neighbours stay related


def permute(index: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """Where each `index` [n] in [0, size) goes under a keyed permutation; `key` is one for all, or one for each.

    An alternating Feistel network in mixed radix (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002):
    index = high * radix + low, radix about sqrt(size). Each round adds a hash of one digit to the other, which can be
    undone. A result outside `size` is permuted again until it lies inside: a bijection still. `size`: 1 to 2**62.
    """
    radix = np.uint64(math.isqrt(size - 1) + 1)
    highs = np.uint64(-(-size // int(radix)))
    key = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    high, low = np.divmod(index.astype(np.uint64), radix)
    for round_key in _ROUND_KEYS:
        low = (low + (_hash(high, key + round_key) >> _U1)) % radix  # the shift leaves room for the sum in 64 bits
        high = (high + (_hash(low, key - round_key) >> _U1)) % highs
    result = (high * radix + low).astype(np.int64)
    outside = result >= size
    if outside.any():
        result[outside] = permute(result[outside], size, key[outside])
    return result


def _hash(number: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """64 well-mixed bits of each number and key: SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    z = number.astype(np.uint64) * _GOLDEN + key
    z = (z ^ (z >> _U30)) * _MIX1
    z = (z ^ (z >> _U27)) * _MIX2
    return z ^ (z >> _U31)
