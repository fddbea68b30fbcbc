"""What heads attend to, how much of it goes to sinks, and how large the residual stream becomes: measured exactly,
outside of training, in any model.

Shapes: L layers, B batch, T query time, S key time, N query heads, K key/value heads, G = N / K, H head_dim, D width of
the residual stream, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from corpus.dataset import Split
from corpus.tokenizer import Tokenizer
from runtime.files import MetricsFile
from runtime.screen.text import Table, printable
from transformer.attention import MASKED, sink_rows, visible
from transformer.config import Execution, TransformerConfig
from transformer.model import Params, Transformer, model_of, params_of


class Measured(NamedTuple):
    """A model on a text, by layer and head. Shares and entropy are means over all queries; NaN is not known."""

    shares: np.ndarray  # [L, N] of attention that goes to the sink; 0 without one
    first: np.ndarray  # [L, N] to the first token of the query's document; in a window only while that is in sight
    separators: np.ndarray  # [L, N] to all other tokens among the separators
    entropy: np.ndarray  # [L, N] of a query's attention, in nats; the sink counts as one more key
    key_norms: np.ndarray  # [L, K] the length of the key at position 0, over the mean length at all others
    value_norms: np.ndarray  # [L, K] the same of values
    largest: np.ndarray  # [L] the largest magnitude in the residual stream after the layer
    kurtosis: np.ndarray  # [L] of all its entries: fourth central moment over squared variance, 3 if they are normal
    where: np.ndarray  # [L, 3] where the largest stands: id of the token, its position, channel


def measure(model: Transformer, tokens_BT: np.ndarray, separator_V: np.ndarray | None = None) -> Measured:
    """Everything that is measured of a model, with sinks or without, computed by the model itself.

    At one position a sink gets exp(sink) / (exp(sink) + sum over visible s' of exp(s_ts')), which `attention.attend`
    discards. `separator_V` says which tokens are separators, see `separators_of`; None: none is.
    """
    marks_BT = np.zeros(tokens_BT.shape, bool) if separator_V is None else separator_V[np.asarray(tokens_BT)]
    return jax.device_get(_measured(model.config, params_of(model), jnp.asarray(tokens_BT), marks_BT))


def separators_of(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens separate, [V]: whitespace alone, a full stop alone or with whitespace, and those that end a text."""
    separator_V = np.array([piece.strip() in (b"", b".") and piece != b"" for piece in tokenizer.pieces])
    separator_V[[*tokenizer.ends]] = True
    return separator_V


def sink_shares_by_position(model: Transformer, tokens_T: jax.Array) -> jax.Array:
    """What each position gives to its sinks, averaged over a layer's heads: [T, L]; 0 without sinks."""
    return _by_position(model.config, params_of(model), tokens_T[None]).T


def attention_maps(model: Transformer, tokens_T: jax.Array) -> jax.Array:
    """All attention probabilities of one text, float32 [L, N, T, 1 + T]: the sink's (0 if none), then each key's."""
    return _maps(model.config, params_of(model), tokens_T)


@partial(jax.jit, static_argnums=0)
def _measured(config: TransformerConfig, params: Params, tokens_BT: jax.Array, separators_BT: jax.Array) -> Measured:
    T, layers = tokens_BT.shape[1], []
    for seen in _look(config, params, tokens_BT):
        number_BT = jnp.zeros_like(tokens_BT) if seen.document_BT is None else seen.document_BT
        first_BT = (jnp.arange(T) == 0) | (number_BT != jnp.roll(number_BT, 1, 1))
        p_BNTS, p_BNT = jnp.exp(seen.log_keys_BNTS), jnp.exp(seen.log_sink_BNT)
        to = lambda marked_BT, p_BNTS=p_BNTS: (p_BNTS * marked_BT[:, None, None]).sum(-1).mean((0, 2))
        surprise = lambda log_p: jnp.where(log_p > -jnp.inf, -log_p * jnp.exp(log_p), 0.0)
        entropy_BNT = surprise(seen.log_keys_BNTS).sum(-1) + surprise(seen.log_sink_BNT)
        lengths = [jnp.linalg.norm(x_BTKH.astype(jnp.float32), axis=-1) for x_BTKH in (seen.k_BTKH, seen.v_BTKH)]
        ratios = [norm_BTK[:, 0].mean(0) / norm_BTK[:, 1:].mean((0, 1)) for norm_BTK in lengths]
        x_BTD = seen.x_BTD.astype(jnp.float32)
        row, position, channel = jnp.unravel_index(jnp.abs(x_BTD).argmax(), x_BTD.shape)
        centred_BTD = x_BTD - x_BTD.mean()
        kurtosis = (centred_BTD**4).mean() / (centred_BTD**2).mean() ** 2
        where = jnp.stack([tokens_BT[row, position], position, channel])
        shares = p_BNT.mean((0, 2)), to(first_BT), to(separators_BT & ~first_BT), entropy_BNT.mean((0, 2))
        layers.append(Measured(*shares, *ratios, jnp.abs(x_BTD).max(), kurtosis, where))
    return jax.tree.map(lambda *found: jnp.stack(found), *layers)


@partial(jax.jit, static_argnums=0)
def _by_position(config: TransformerConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return jnp.stack([jnp.exp(seen.log_sink_BNT).mean((0, 1)) for seen in _look(config, params, tokens_BT)])


@partial(jax.jit, static_argnums=0)
def _maps(config: TransformerConfig, params: Params, tokens_T: jax.Array) -> jax.Array:
    looks = _look(config, params, tokens_T[None])
    both = [jnp.concatenate([seen.log_sink_BNT[..., None], seen.log_keys_BNTS], -1) for seen in looks]
    return jnp.exp(jnp.concatenate(both))


class _Seen(NamedTuple):
    """What one layer of the running model computes."""

    log_keys_BNTS: jax.Array  # log-probabilities
    log_sink_BNT: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    document_BT: jax.Array | None
    x_BTD: jax.Array  # the residual stream after it


class _Shown(nnx.Module):
    """A block that shows its inside to `see`."""

    def __init__(self, block: nnx.Module, see: Callable[[_Seen], None]):
        self.block, self.see = block, see

    def __call__(self, x_BTD, info, rngs):
        attention, inside = self.block.attention, []

        def attend(x_BTD, info, access):
            q_BTNH, k_BTKH, v_BTKH, sink = attention.project(x_BTD, info)
            found = _log_probabilities(q_BTNH, k_BTKH, sink, attention.window, info.document_BT)
            inside.append((*found, k_BTKH, v_BTKH, info.document_BT))
            return attention(x_BTD, info, access)

        self.block.attention = attend
        x_BTD, cache = self.block(x_BTD, info, rngs)
        self.see(_Seen(*inside[0], x_BTD))
        return x_BTD, cache


def _look(config: TransformerConfig, params: Params, tokens_BT: jax.Array) -> list[_Seen]:
    """What each layer of the running model computes.

    All scores of a layer are in memory at once, so texts may have some thousand tokens.
    """
    seen: list[_Seen] = []
    usual = dataclasses.asdict(Execution(dtype=config.dtype))  # unrolled blocks, and a kernel for texts of any length
    model = model_of(dataclasses.replace(config, **usual), params)
    model.blocks = nnx.List([_Shown(block, seen.append) for block in model.blocks])
    model.hidden(tokens_BT)
    return seen


def _log_probabilities(
    q_BTNH: jax.Array, k_BSKH: jax.Array, sink: jax.Array | None, window: int, document_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores_BNTS = scores_BKGTS.reshape(B, N, T, T)
    mask_BNTS = visible(jnp.arange(T)[None], jnp.arange(T), window)[:, None]
    if document_BT is not None:
        mask_BNTS = mask_BNTS & (document_BT[:, None, :, None] == document_BT[:, None, None])
    sink_BNT = jnp.float32(-jnp.inf) if sink is None else sink_rows(sink, 1)[:, 0, ..., 0]
    total_BNT = jnp.logaddexp(jax.nn.logsumexp(jnp.where(mask_BNTS, scores_BNTS, MASKED), -1), sink_BNT)
    log_keys_BNTS = jnp.where(mask_BNTS, scores_BNTS - total_BNT[..., None], -jnp.inf)
    return log_keys_BNTS, sink_BNT - total_BNT


# --- Over a run: measured at each evaluation, kept in `sinks.jsonl` -----------------------------------------------

TOKENS = 1024  # the first tokens of the validation split, always the same


def stretch(split: Split, context_len: int) -> np.ndarray:
    """The text to measure on, at most TOKENS tokens in whole windows: int32 [B, T]."""
    T = min(context_len, TOKENS, split.num_tokens)
    B = min(TOKENS, split.num_tokens) // T
    return np.asarray(split.tokens[: B * T], np.int32).reshape(B, T)


def read_measured(
    path: Path, model_config: TransformerConfig, warn: Callable[[str], None] = lambda text: None
) -> dict[int, Measured]:
    """What `sinks.jsonl` says by step, NaN where an older build measured less; rows not of this model are left out."""
    c, found = model_config, {}
    L, N, K = c.num_blocks, c.num_heads, c.num_kv_heads
    shapes = Measured(*[(L, N)] * 4, *[(L, K)] * 2, *[(L,)] * 2, (L, 3))._asdict()
    for row in MetricsFile(path).read(warn):
        numbers = {name: row.get(name, np.full(shape, np.nan)) for name, shape in shapes.items()}
        try:
            step, arrays = int(row["step"]), {name: np.array(given, np.float64) for name, given in numbers.items()}
        except (KeyError, TypeError, ValueError):
            continue
        if all(arrays[name].shape == shape for name, shape in shapes.items()) and np.isfinite(arrays["shares"]).all():
            found[step] = Measured(**arrays)
    return found


def as_json(measured: Measured) -> dict[str, Any]:
    """The numbers as JSON can hold them, in seven digits; None for what is not finite."""
    number = lambda x: x if isinstance(x, int) else float(f"{x:.7g}") if math.isfinite(x) else None
    numbers = np.vectorize(number, otypes=[object])
    return {name: numbers(values).tolist() for name, values in measured._asdict().items()}


def append_measured(path: Path, split: Split, tokenizer: Tokenizer, model: Transformer, row: dict[str, Any]) -> None:
    """Measure `model`, on one device, at the step and tokens of the metrics' `row`, which gets `scalars_of` it.

    The file `path` gets a line: a JSON object with `step`, `tokens`, and `Measured`'s arrays. Raises StorageError.
    """
    measured = measure(model, stretch(split, model.config.context_len), separators_of(tokenizer))
    MetricsFile(path).append({"step": row["step"], "tokens": row["tokens"], **as_json(measured)})
    row.update(scalars_of(measured))


# --- In a few words -----------------------------------------------------------------------------------------------

RATE = 0.3  # a head that gives more than this to the first token has made a sink of it (arXiv:2410.10781)


def scalars_of(measured: Measured) -> dict[str, float]:
    """A model in a few numbers: means over layers and heads, the sink rate, and the largest over the layers."""
    m = measured
    means = {"sink_share": m.shares, "first_share": m.first, "separator_share": m.separators}
    means |= {"sink_rate": m.first > RATE, "attention_entropy": m.entropy}
    means |= {"first_key_norm": m.key_norms, "first_value_norm": m.value_norms}
    most = {"largest_activation": m.largest, "kurtosis": m.kurtosis}
    return {name: float(x.mean()) for name, x in means.items()} | {name: float(x.max()) for name, x in most.items()}


def described(measured: Measured, tokenizer: Tokenizer) -> tuple[Table, list[str]]:
    """A table by layer, and what is seen, in two sentences."""
    m, far = measured, scalars_of(measured)
    N, percent = m.first.shape[1], lambda share: f"{share:.1%}"
    at = lambda layer: f"position {int(m.where[layer, 1])} ({token_name(tokenizer, int(m.where[layer, 0]))})"
    many = (m.first > RATE).sum(-1)
    rows = []
    for layer in range(len(many)):
        shares = [percent(x[layer].mean()) for x in (m.shares, m.first, m.separators)]
        stream = f"{m.largest[layer]:.1f}", f"{at(layer)}, channel {int(m.where[layer, 2])}", f"{m.kurtosis[layer]:.1f}"
        entropy, *norms = (f"{x[layer].mean():.2f}" for x in (m.entropy, m.key_norms, m.value_norms))
        rows.append([str(layer + 1), *shares, f"{many[layer]} of {N}", entropy, *stream, *norms])
    columns = ["layer", "to sink", "to first", "to separators", f"heads with first > {RATE:.0%}", "entropy"]
    columns += ["largest", "where", "kurtosis", "key norm, first", "value norm, first"]
    top, (layer, head) = int(m.largest.argmax()), np.unravel_index(m.first.argmax(), m.first.shape)
    attention = (
        f"Of all attention {percent(far['sink_share'])} goes to sinks, {percent(far['first_share'])} to the first "
        f"token and {percent(far['separator_share'])} to separators; {many.sum()} of {m.first.size} heads (sink rate "
        f"{far['sink_rate']:.2f}) give the first token more than {RATE:.0%}, the most head {head + 1} of layer "
        f"{layer + 1} with {percent(m.first[layer, head])}."
    )
    stream = (
        f"The largest activation of the residual stream is {m.largest[top]:.1f}, after layer {top + 1} at {at(top)} "
        f"in channel {int(m.where[top, 2])}, and the highest kurtosis {far['kurtosis']:.1f}, where normal numbers "
        f"have 3; at the first position keys are {far['first_key_norm']:.2f} times as long as elsewhere, and values "
        f"{far['first_value_norm']:.2f} times."
    )
    return Table("By layer", columns, rows), [attention, stream]


_VISIBLE = str.maketrans({"\n": "⏎", " ": "␣", "\t": "⇥"})


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as people can see it."""
    return printable(tokenizer.pieces[token].decode("utf-8", "replace").translate(_VISIBLE)) or f"token {token}"
