"""The pictures of runs: the losses of one against the tokens it has seen, and those of several over each other."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.files import storage_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VAL, _INK = "#4878a8", "#d1603d", "#333333"
_COLORS = ("#4878a8", "#d1603d", "#5b9a4f", "#8c62a8", "#c9a227", "#3aa6a0", "#b8517f", "#7a6a58")
_DASHES = ("-", "--", ":", "-.")  # for the labels that the colours do not reach
_MOST_LABELS = 16  # in a legend that leaves room for the curves
_LONGEST_LABEL = 40  # characters
_UNITS = {"val_loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
SMOOTH_FROM = 60  # points; fewer can be read as they are


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and validation loss (nats per token) against tokens into a PNG file, replaced in one piece.

    Args:
        rows: the logged steps in order, each with `tokens`, `loss` and perhaps `val_loss`; what is missing or None is
            left out.
        path: the file.
        title: the heading.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and most of a run does not need it

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()

    tokens, losses = series(rows, "loss")
    if len(losses) < SMOOTH_FROM:
        axes.plot(tokens, losses, color=_TRAIN, linewidth=1.4, label="training")
    else:
        axes.plot(tokens, losses, color=_TRAIN, linewidth=0.6, alpha=0.35)
        axes.plot(tokens, smoothed(losses), color=_TRAIN, linewidth=1.6, label="training (smoothed)")

    tokens, losses = series(rows, "val_loss")
    if len(losses):
        axes.plot(tokens, losses, "o-", color=_VAL, markersize=4, linewidth=1.0, label="validation")
        best = int(np.argmin(losses))
        axes.plot(tokens[best], losses[best], "o", color=_VAL, markersize=9, markerfacecolor="none")
        axes.annotate(
            f"best {losses[best]:.4f}",
            (tokens[best], losses[best]),
            xytext=(0, 14),
            textcoords="offset points",
            ha="right" if tokens[best] > 0.8 * axes.get_xlim()[1] else "center",
            color=_VAL,
            fontweight="bold",
        )

    axes.set_title(title, loc="left", color=_INK, fontweight="bold", parse_math=False)
    _dress(axes, "tokens", _UNITS["val_loss"])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    save_figure(figure, path)


class Curve(NamedTuple):
    """One run in a picture of several. Those of one label share a colour and a line of the legend."""

    label: str
    rows: list[dict[str, Any]]  # the logged steps in order


def plot_curves(curves: list[Curve], path: Path, x: str, metric: str) -> None:
    """Draws the losses of several runs over each other into a PNG file, replaced in one piece.

    Training is a faint line and validation a strong one with a dot for each evaluation. The first tenth, where
    every loss falls from the same height, may lie above the picture.

    Args:
        curves: the runs.
        path: the file.
        x: what they are drawn against: `tokens` or `elapsed_seconds`.
        metric: `val_loss` (nats per token) or `bits_per_byte`, in which the training loss is drawn too.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(curve.label for curve in curves))
    lines: dict[str, Any] = {}
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for curve in curves:
        number = labels.index(curve.label)
        style = {"color": _COLORS[number % len(_COLORS)], "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)]}
        at, losses = series(curve.rows, "loss", x)
        scale = next(
            (row[metric] / row["val_loss"] for row in curve.rows if row.get(metric) and row.get("val_loss")), 1
        )
        if len(losses) >= SMOOTH_FROM:
            losses = smoothed(losses)
        drawn.append((at, losses * scale))
        axes.plot(*drawn[-1], **style, linewidth=0.9, alpha=0.4)
        drawn.append(series(curve.rows, metric, x))
        (lines[curve.label],) = axes.plot(*drawn[-1], **style, marker="o", markersize=3.5, linewidth=1.3)
    span = max((at[-1] for at, _ in drawn if len(at)), default=0)
    seen = [values[at >= span / 10] for at, values in drawn if len(at)]
    if any(len(values) for values in seen):
        low, high = (
            min(values.min() for values in seen if len(values)),
            max(values.max() for values in seen if len(values)),
        )
        axes.set_ylim(low - 0.05 * (high - low + 1e-9), high + 0.05 * (high - low + 1e-9))
    axes.set_title("validation (dots) and training (faint)", loc="left", color=_INK, fontsize="small")
    _dress(axes, {"elapsed_seconds": "seconds"}.get(x, x), _UNITS[metric])
    if labels[_MOST_LABELS:]:
        figure.suptitle(f"{len(labels)} configs, the first {_MOST_LABELS} named", fontsize="small", color=_INK)
    # As a shield against what a name may hold: matplotlib passes over labels that begin with _, and reads $...$.
    shown = labels[:_MOST_LABELS]
    legend = axes.legend(
        [lines[label] for label in shown],
        [f"\u200b{label[:_LONGEST_LABEL]}" for label in shown],
        frameon=False,
        fontsize="small",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def _dress(axes: "Axes", x: str, y: str) -> None:
    """What all the pictures have: named axes, tokens as 1.2M, a faint grid."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG so that at no moment a half of it is there.

    Raises:
      StorageError: the disk did not take it.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name may hold what the font lacks
            figure.savefig(unfinished, format="png")
        os.replace(unfinished, path)
    except OSError as error:
        raise storage_error(path, error) from None


def series(rows: list[dict[str, Any]], key: str, x: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """`x` and values of the rows that have a value for `key`."""
    points = [(row[x], row[key]) for row in rows if row.get(key) is not None]
    at, values = np.array(points, dtype=float).reshape(-1, 2).T
    return at, values


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a window around each point: a fortieth of them, less at the start, where the loss falls fast."""
    at = np.arange(len(values))
    half = np.minimum(at, max(1, len(values) // 80))
    first, end = at - half, np.minimum(at + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)
