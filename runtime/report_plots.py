"""The pictures of a run's report, as PNG without a background, in colours that are read on light and on dark.

Shapes: L layers, N heads, T query time, E evaluations.
"""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.console import human
from runtime.plots import SMOOTH_FROM, series, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#7a7a7a"
_KEYS, _SINK, _OTHER = "#4f86bd", "#d1603d", "#5b9a4f"
_COLORS = (_KEYS, _SINK, _OTHER)
_WIDTH = 4.8  # inches: a phone's screen shows it at about its own size
_MOST_NUMBERS = 10  # columns of a grid in which each cell's number can still be read
_SINK_COLUMNS = 3  # how wide a sink is drawn, in keys


def plot_series(rows: list[dict[str, Any]], keys: dict[str, str], title: str, log: bool = False) -> bytes | None:
    """What metrics.jsonl says of `keys` against the step; None where it says nothing.

    Args:
        rows: the logged steps in order.
        keys: what each is called; those with few points get a dot for each.
        log: a logarithmic scale.
    """
    figure, axes = _figure(3.1, title)
    for color, (key, label) in zip(_COLORS, keys.items(), strict=False):
        steps, values = series(rows, key, "step")
        if not len(values):
            continue
        if len(values) < SMOOTH_FROM:
            axes.plot(steps, values, ".-", color=color, linewidth=1.4, markersize=5, label=label)
        else:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
            axes.plot(steps, smoothed(values), color=color, linewidth=1.6, label=label)
    if not axes.lines:
        return None
    plain = lambda value, _: human(value).replace(".0", "") if value >= 1000 else f"{value:g}"
    if log and all((line.get_ydata() > 0).all() for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, at: plain(value, at) if f"{value:e}"[0] in "235" else "")
    axes.yaxis.set_major_formatter(plain)
    _dress(axes, "step")
    if len(keys) > 1:
        axes.legend(frameon=False, fontsize="small", labelcolor=_INK)
    return _png(figure)


def plot_shares_over_training(steps: Sequence[int], shares_ELN: np.ndarray) -> bytes:
    """Each head's share as a thin line, and each layer's mean as a strong one, the first layer palest."""
    from matplotlib import colormaps

    figure, axes = _figure(3.1, "attention to the sinks, by layer (thin: by head)")
    layers = shares_ELN.shape[1]
    for layer in range(layers):
        color = colormaps["plasma"](0.3 + 0.55 * layer / max(1, layers - 1))
        axes.plot(steps, shares_ELN[:, layer], color=color, linewidth=0.7, alpha=0.45)
        name = f"layer {layer + 1}" if layers <= 8 or layer in (0, layers - 1) else None
        axes.plot(steps, shares_ELN[:, layer].mean(-1), ".-", color=color, linewidth=1.8, label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_percent)
    _dress(axes, "step")
    axes.legend(frameon=False, fontsize="small", labelcolor=_INK)
    return _png(figure)


def plot_shares(shares_LN: np.ndarray) -> bytes:
    """The shares as bars: a row for each layer, a column for each head."""
    L, N = shares_LN.shape
    figure, axes = _figure(min(9.0, 0.9 + 0.5 * L), "share of attention that goes to the sink")
    layer_LN, head_LN = np.indices((L, N))
    floor_LN = L - 1 - layer_LN
    height_LN = 0.6 * shares_LN / max(shares_LN.max(), 1e-9)
    axes.bar(head_LN.ravel(), height_LN.ravel(), bottom=floor_LN.ravel(), width=0.8, color=_SINK)
    if N <= _MOST_NUMBERS:
        for head, top, share in zip(head_LN.flat, (floor_LN + height_LN).flat, shares_LN.flat, strict=True):
            axes.text(head, top + 0.03, _percent(share), ha="center", va="bottom", color=_INK, fontsize="small")
    axes.hlines(range(L), -0.5, N - 0.5, color=_INK, linewidth=0.6)
    axes.set(xlim=(-0.5, N - 0.5), ylim=(-0.05, L))
    every = range(0, N, -(-N // 12))
    axes.set_xticks(list(every), [str(head + 1) for head in every])
    every = range(0, L, -(-L // 12))
    axes.set_yticks([L - 1 - layer + 0.3 for layer in every], [str(layer + 1) for layer in every])
    axes.set_xlabel("head", color=_INK)
    axes.set_ylabel("layer", color=_INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _png(figure)


def plot_all_maps(maps_LNTS: np.ndarray, layers: Sequence[int], heads: Sequence[int], sinks: bool) -> bytes:
    """A small attention map for each of these heads.

    Args:
        maps_LNTS: probabilities [L, N, T, 1 + T], of which the first is the sink's.
        sinks: whether there are any to be drawn.
    """
    rows = [[_painted(maps_LNTS[layer, head], sinks) for head in heads] for layer in layers]
    T, wide = rows[0][0].shape[:2]
    gap = max(2, T // 12)
    canvas = np.zeros((len(layers) * (T + gap) - gap, len(heads) * (wide + gap) - gap, 4))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas[i * (T + gap) : i * (T + gap) + T, j * (wide + gap) : j * (wide + gap) + wide] = picture
    height = _WIDTH * canvas.shape[0] / canvas.shape[1] + 0.4
    figure, axes = _figure(min(12.0, height), "what each head attends to" + (": sink left, then keys" if sinks else ""))
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([j * (wide + gap) + wide / 2 for j in range(len(heads))], [f"head {head + 1}" for head in heads])
    axes.set_yticks([i * (T + gap) + T / 2 for i in range(len(layers))], [f"layer {layer + 1}" for layer in layers])
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="y", labelrotation=90)
    for label in axes.get_yticklabels():
        label.set_verticalalignment("center")
    axes.spines[:].set_visible(False)
    return _png(figure)


def plot_map(map_TS: np.ndarray, tokens: list[str], title: str, sinks: bool) -> bytes:
    """One head's attention map, its tokens beside it: [T, 1 + T], the first the sink's. Each row is one query."""
    picture = _painted(map_TS, sinks)
    figure, axes = _figure(_WIDTH * picture.shape[0] / picture.shape[1] + 0.3, title)
    axes.imshow(picture, interpolation="nearest")
    first = _SINK_COLUMNS + 1 if sinks else 0
    size = float(np.clip(230 / len(tokens), 4, 9))
    ticks = {first + i: token for i, token in enumerate(tokens)}
    if sinks:
        ticks = {(_SINK_COLUMNS - 1) / 2: "sink"} | ticks
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=size, rotation=90 if max(map(len, tokens)) > 1 else 0)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=size)
    if sinks:
        axes.get_xticklabels()[0].set(rotation=90, color=_SINK)
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set_parse_math(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _png(figure)


def _painted(map_TS: np.ndarray, sinks: bool) -> np.ndarray:
    """A map as RGBA; the square root of a probability is how opaque it is, so that small ones are seen as well."""
    keys = _tint(_KEYS, np.sqrt(map_TS[:, 1:]))
    keys[..., 3] = np.where(np.tri(len(keys), dtype=bool), np.maximum(keys[..., 3], 0.06), 0)
    if not sinks:
        return keys
    sink = _tint(_SINK, np.maximum(np.sqrt(map_TS[:, :1]), 0.06)).repeat(_SINK_COLUMNS, axis=1)
    return np.concatenate([sink, np.zeros_like(sink[:, :1]), keys], axis=1)


def _tint(color: str, opacity: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.concatenate([np.broadcast_to(to_rgb(color), (*opacity.shape, 3)), opacity[..., None]], axis=-1)


def _percent(share: float, _: Any = None) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.1f} %"


def _figure(height: float, title: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure  # slow to import, and most of a run does not need it

    figure = Figure(figsize=(_WIDTH, height), dpi=160, layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, loc="left", color=_INK, fontsize="medium", parse_math=False)
    axes.tick_params(which="both", colors=_INK)
    axes.spines[:].set_color(_INK)
    return figure, axes


def _dress(axes: "Axes", x: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(x, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.grid(color=_INK, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a token may hold what the font lacks
        figure.savefig(file, format="png", transparent=True)
    return file.getvalue()
