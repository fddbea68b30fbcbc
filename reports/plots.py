"""Plots of runs: the losses of one against the tokens that it has read, or those of several runs together."""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reports.evaluations import on_the_same_tokens
from reports.scaling_law import Estimate, Law, Point
from runtime.files import replacing, storing
from runtime.screen.text import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _PAGE_INK = "#333333", "#7a7a7a"  # in PNG files, on white; in a page's pictures, on white or black
_TRAIN, _VAL, _OTHER = "#4878a8", "#d1603d", "#5b9a4f"
_COLORS = (_TRAIN, _VAL, _OTHER, "#8c62a8", "#c9a227", "#3aa6a0", "#b8517f", "#7a6a58")
_KEYS, _SINK = "#4f86bd", _VAL
_PAGE_COLORS = (_KEYS, _SINK, _OTHER)
_DASHES = ("-", "--", ":", "-.")  # the next one when all colours are used
_MOST_LABELS = 16  # in a legend, which must leave room for the curves
_LONGEST_LABEL = 40  # characters
_UNITS = {"val_loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
SMOOTH_FROM = 60  # points; fewer are readable without smoothing
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if the user has no home


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and validation loss (nats per token) of the logged `rows` against tokens into a PNG file."""
    figure, axes = _axes(figsize=(8, 4.5), dpi=150)
    tokens, losses = series(rows, "loss")
    _draw(axes, tokens, losses, _TRAIN, "training" if len(losses) < SMOOTH_FROM else "training (smoothed)")
    [rows], _ = on_the_same_tokens([rows])
    tokens, losses = series(rows, "val_loss")
    if len(losses):
        axes.plot(tokens, losses, "o-", color=_VAL, markersize=4, linewidth=1.0, label="validation")
        x, y = tokens[losses.argmin()], losses.min()
        axes.plot(x, y, "o", color=_VAL, markersize=9, markerfacecolor="none")
        style = {"ha": "right" if x > 0.8 * axes.get_xlim()[1] else "center", "color": _VAL, "fontweight": "bold"}
        axes.annotate(f"best {y:.4f}", (x, y), (0, 14), textcoords="offset points", **style)
    tokens, losses = series(rows, "ema_val_loss")
    if len(losses):
        axes.plot(tokens, losses, ".--", color=_OTHER, linewidth=1.0, label="validation, averaged weights")
    axes.set_title(title, loc="left", color=_INK, fontweight="bold", parse_math=False)
    _dress(axes, "tokens", _UNITS["val_loss"])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    save_figure(figure, path)


class Curve(NamedTuple):
    """One run in a plot of several. Runs with the same label share a colour and a line of the legend."""

    label: str
    rows: list[dict[str, Any]]  # the logged steps in order


def plot_curves(curves: list[Curve], path: Path, x: str, metric: str) -> None:
    """Draws the losses of several runs against `x`, `tokens` or `training_seconds`, into a PNG file.

    Training is a faint line, validation a strong one with dots, both in the unit of `metric` (`val_loss` or
    `bits_per_byte`). The first tenth of each curve, where every loss falls from one height, may be above the plot.
    """
    figure, axes = _axes(figsize=(6.4, 4.6), dpi=180)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    drawn, lines = [], {}  # x and values of each curve; the validation curves by label
    for curve in curves:
        number = labels.index(curve.label)
        style = {"color": _COLORS[number % len(_COLORS)], "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)]}
        at, losses = series(curve.rows, "loss", x)
        ratios = (row[metric] / row["val_loss"] for row in curve.rows if row.get(metric) and row.get("val_loss"))
        losses = next(ratios, 1) * (losses if len(losses) < SMOOTH_FROM else smoothed(losses))
        drawn += [(at, losses), series(curve.rows, metric, x)]
        axes.plot(*drawn[-2], **style, linewidth=0.9, alpha=0.4)
        (lines[curve.label],) = axes.plot(*drawn[-1], **style, marker="o", markersize=3.5, linewidth=1.3)
    seen = np.concatenate([np.zeros(0), *(values[at >= at[-1] / 10] for at, values in drawn if len(at))])
    if len(seen):
        margin = 0.05 * (seen.max() - seen.min() + 1e-9)
        axes.set_ylim(seen.min() - margin, seen.max() + margin)
    axes.set_title("validation (dots) and training (faint)", loc="left", color=_INK, fontsize="small")
    _dress(axes, {"training_seconds": "seconds"}.get(x, x), _UNITS[metric])
    if labels[_MOST_LABELS:]:
        figure.suptitle(f"{len(labels)} configs, the first {_MOST_LABELS} named", fontsize="small", color=_INK)
    # The names of runs are escaped: matplotlib ignores labels that begin with _, and reads $...$ as mathematics.
    shown = labels[:_MOST_LABELS]
    texts = [f"\u200b{label[:_LONGEST_LABEL]}" for label in shown]
    legend = axes.legend([lines[label] for label in shown], texts, frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def plot_law(points: list[Point], law: Law, held_out: tuple[Point, Estimate] | None, path: Path, metric: str) -> None:
    """Draws the last losses of runs of several sizes against FLOPs, and their law, into a PNG file."""
    figure, axes = _axes(figsize=(6.4, 4.6), dpi=180)
    x = np.geomspace(min(points)[0], 4 * max(points)[0])
    value, low, high, *_ = zip(*map(law.at, x), strict=True)
    axes.fill_between(x, low, high, color=_TRAIN, alpha=0.2, linewidth=0, label="law, and its 95 % interval")
    axes.plot(x, value, color=_TRAIN, linewidth=1.3)
    axes.plot(*zip(*points, strict=True), "o", color=_VAL, markersize=3.5, label="runs")
    if held_out:
        (flops, _), by_others = held_out
        around = [[by_others.value - by_others.low], [by_others.high - by_others.value]]
        axes.errorbar(flops, by_others.value, around, fmt="_", color=_OTHER, label="predicted by the smaller ones")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize="small")
    _dress(axes, "FLOPs of the model", _UNITS[metric])
    save_figure(figure, path)


def _draw(axes: "Axes", x: np.ndarray, values: np.ndarray, color: str, label: str, **few: Any) -> None:
    """A curve: many points as a faint line and a smoothed one; few points as one line, with the options `few`."""
    if len(values) < SMOOTH_FROM:
        axes.plot(x, values, color=color, linewidth=1.4, label=label, **few)
    else:
        axes.plot(x, values, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(x, smoothed(values), color=color, linewidth=1.6, label=label)


def _dress(axes: "Axes", x: str, y: str = "", **grid: Any) -> None:
    """What all curves have: named axes, numbers such as 1.2M, a faint grid."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.grid(**{"color": "#dddddd", "linewidth": 0.6} | grid)
    axes.spines[["top", "right"]].set_visible(False)


def _axes(facecolor: str = "white", **size: Any) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure  # slow to import, and most of a run does not need it

    figure = Figure(**size, layout="constrained")
    return figure, figure.add_subplot(facecolor=facecolor)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG file in one step. Raises StorageError if it cannot be written."""
    with storing(path), replacing(path) as unfinished:
        unfinished.write_bytes(_png(figure, transparent=False))


def series(rows: list[dict[str, Any]], key: str, x: str = "tokens") -> np.ndarray:
    """`x` and values of the rows that have a value for `key`: [2, points]."""
    points = [(row[x], row[key]) for row in rows if row.get(key) is not None]
    return np.array(points, dtype=float).reshape(-1, 2).T


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a window around each point: a fortieth of all, fewer at the start, where the loss falls fast."""
    at = np.arange(len(values))
    half = np.minimum(at, max(1, len(values) // 80))
    first, end = at - half, np.minimum(at + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)


# --- A run's page: transparent PNGs in colours that are readable in light and in dark mode ------------------------
# Shapes: L layers, N heads, T query time, E evaluations.

_WIDTH = 4.8  # inches: about what a phone's screen shows without scaling
_MOST_NUMBERS = 10  # columns of a grid whose cells have room for a number
_SINK_COLUMNS = 3  # how wide a sink is drawn, in keys


def plot_series(rows: list[dict[str, Any]], keys: dict[str, str], title: str, log: bool = False) -> bytes | None:
    """The values of `keys` (key -> label) in the logged `rows` against the step; None if there are none.

    Curves of few points get a dot for each. `log` asks for a logarithmic scale.
    """
    figure, axes = _figure(3.1, title)
    for color, (key, label) in zip(_PAGE_COLORS, keys.items(), strict=False):
        steps, values = series(rows, key, "step")
        if len(values):
            _draw(axes, steps, values, color, label, marker=".", markersize=5)
    if not axes.lines:
        return None
    plain = lambda value, _: human(value).replace(".0", "") if value >= 1000 else f"{value:g}"
    if log and all((line.get_ydata() > 0).all() for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, at: plain(value, at) if f"{value:e}"[0] in "235" else "")
    return _curves_by_step(figure, axes, plain, legend=len(keys) > 1)


def plot_shares_over_training(steps: Sequence[int], shares_ELN: np.ndarray, of: str = "the sinks") -> bytes:
    """Each head's share [E, L, N] as a thin line, and each layer's mean as a strong one, the first layer palest."""
    from matplotlib import colormaps

    figure, axes = _figure(3.1, f"attention to {of}, by layer (thin: by head)")
    layers = shares_ELN.shape[1]
    for layer in range(layers):
        color = colormaps["plasma"](0.3 + 0.55 * layer / max(1, layers - 1))
        axes.plot(steps, shares_ELN[:, layer], color=color, linewidth=0.7, alpha=0.45)
        name = f"layer {layer + 1}" if layers <= 8 or layer in (0, layers - 1) else None
        axes.plot(steps, shares_ELN[:, layer].mean(-1), ".-", color=color, linewidth=1.8, label=name)
    axes.set_ylim(bottom=0)
    return _curves_by_step(figure, axes, _percent, legend=True)


def _curves_by_step(figure: "Figure", axes: "Axes", written: Callable[..., str], legend: bool) -> bytes:
    axes.yaxis.set_major_formatter(written)
    _dress(axes, "step", color=_PAGE_INK, alpha=0.25)
    axes.xaxis.label.set_color(_PAGE_INK)
    if legend:
        axes.legend(frameon=False, fontsize="small", labelcolor=_PAGE_INK)
    return _png(figure)


def plot_shares(shares_LN: np.ndarray, of: str) -> bytes:
    """The shares [L, N] as bars: a row for each layer, a column for each head."""
    L, N = shares_LN.shape
    figure, axes = _figure(min(9.0, 0.9 + 0.5 * L), f"share of attention that goes to {of}")
    layer_LN, head_LN = np.indices((L, N))
    floor_LN = L - 1 - layer_LN
    height_LN = 0.6 * shares_LN / max(shares_LN.max(), 1e-9)
    axes.bar(head_LN.ravel(), height_LN.ravel(), bottom=floor_LN.ravel(), width=0.8, color=_SINK)
    if N <= _MOST_NUMBERS:
        for head, top, share in zip(head_LN.flat, (floor_LN + height_LN).flat, shares_LN.flat, strict=True):
            axes.text(head, top + 0.03, _percent(share), ha="center", va="bottom", color=_PAGE_INK, fontsize="small")
    axes.hlines(range(L), -0.5, N - 0.5, color=_PAGE_INK, linewidth=0.6)
    axes.set(xlim=(-0.5, N - 0.5), ylim=(-0.05, L))
    every = range(0, N, -(-N // 12))
    axes.set_xticks(list(every), [str(head + 1) for head in every])
    every = range(0, L, -(-L // 12))
    axes.set_yticks([L - 1 - layer + 0.3 for layer in every], [str(layer + 1) for layer in every])
    axes.set_xlabel("head", color=_PAGE_INK)
    axes.set_ylabel("layer", color=_PAGE_INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _png(figure)


def plot_all_maps(maps_LNTS: np.ndarray, layers: Sequence[int], heads: Sequence[int], sinks: bool) -> bytes:
    """A small attention map for each of these heads; `sinks`: whether the model has any.

    maps_LNTS: probabilities [L, N, T, 1 + T], of which the first is the sink's.
    """
    painted = [_painted(maps_LNTS[layer, head], sinks) for layer in layers for head in heads]
    T, wide = painted[0].shape[:2]
    gap = max(2, T // 12)
    tiles = np.pad(painted, [(0, 0), (0, gap), (0, gap), (0, 0)]).reshape(len(layers), len(heads), T + gap, -1, 4)
    canvas = np.concatenate(np.concatenate(tiles, axis=1), axis=1)[:-gap, :-gap]
    height = _WIDTH * canvas.shape[0] / canvas.shape[1] + 0.4
    figure, axes = _figure(min(12.0, height), "what each head attends to" + (": sink left, then keys" if sinks else ""))
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([j * (wide + gap) + wide / 2 for j in range(len(heads))], [f"head {head + 1}" for head in heads])
    middle = [i * (T + gap) + T / 2 for i in range(len(layers))]
    axes.set_yticks(middle, [f"layer {layer + 1}" for layer in layers], rotation=90, va="center")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return _png(figure)


def plot_map(map_TS: np.ndarray, tokens: list[str], title: str, sinks: bool) -> bytes:
    """One head's attention map [T, 1 + T], the first column the sink's, with its tokens. Each row is one query."""
    picture = _painted(map_TS, sinks)
    figure, axes = _figure(_WIDTH * picture.shape[0] / picture.shape[1] + 0.3, title)
    axes.imshow(picture, interpolation="nearest")
    first = _SINK_COLUMNS + 1 if sinks else 0
    size = float(np.clip(230 / len(tokens), 4, 9))
    ticks = {(_SINK_COLUMNS - 1) / 2: "sink"} if sinks else {}
    ticks |= {first + i: token for i, token in enumerate(tokens)}
    style = {"fontsize": size, "parse_math": False}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90 if max(map(len, tokens)) > 1 else 0, **style)
    axes.set_yticks(range(len(tokens)), tokens, **style)
    if sinks:
        axes.get_xticklabels()[0].set(rotation=90, color=_SINK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _png(figure)


def _painted(map_TS: np.ndarray, sinks: bool) -> np.ndarray:
    """A map as RGBA, with the square root of a probability as opacity, so that small ones are visible."""
    from matplotlib.colors import to_rgb

    tint = lambda color, opacity: np.dstack([np.broadcast_to(to_rgb(color), (*opacity.shape, 3)), opacity])
    opacity_TS = np.maximum(np.sqrt(map_TS), 0.06)
    keys = tint(_KEYS, np.tril(opacity_TS[:, 1:]))
    if not sinks:
        return keys
    sink = tint(_SINK, opacity_TS[:, :1]).repeat(_SINK_COLUMNS, axis=1)
    return np.concatenate([sink, np.zeros_like(sink[:, :1]), keys], axis=1)


def _percent(share: float, _: Any = None) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.1f} %"


def _figure(height: float, title: str) -> tuple["Figure", "Axes"]:
    figure, axes = _axes(figsize=(_WIDTH, height), dpi=160, facecolor="none")
    axes.set_title(title, loc="left", color=_PAGE_INK, fontsize="medium", parse_math=False)
    axes.tick_params(which="both", colors=_PAGE_INK)
    axes.spines[:].set_color(_PAGE_INK)
    return figure, axes


def _png(figure: "Figure", transparent: bool = True) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the font may lack a character of a name
        figure.savefig(file, format="png", transparent=transparent)
    return file.getvalue()
