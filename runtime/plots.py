"""The picture of a run: its losses against the tokens it has seen."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from runtime.console import human
from runtime.files import storage_error

_TRAIN, _VAL, _INK = "#4878a8", "#d1603d", "#333333"
_SMOOTH_FROM = 60  # points; fewer can be read as they are


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

    tokens, losses = _series(rows, "loss")
    if len(losses) < _SMOOTH_FROM:
        axes.plot(tokens, losses, color=_TRAIN, linewidth=1.4, label="training")
    else:
        axes.plot(tokens, losses, color=_TRAIN, linewidth=0.6, alpha=0.35)
        axes.plot(tokens, _smoothed(losses), color=_TRAIN, linewidth=1.6, label="training (smoothed)")

    tokens, losses = _series(rows, "val_loss")
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

    axes.set_title(title, loc="left", color=_INK, fontweight="bold")
    axes.set_xlabel("tokens", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.xaxis.set_major_formatter(lambda value, _: human(value).replace(".0", ""))
    axes.margins(x=0.02)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)

    unfinished = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(unfinished, format="png")
        os.replace(unfinished, path)
    except OSError as error:
        raise storage_error(path, error) from None


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the rows that have a value for `key`."""
    points = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
    tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a window around each point: a fortieth of them, less at the start, where the loss falls fast."""
    at = np.arange(len(values))
    half = np.minimum(at, max(1, len(values) // 80))
    first, end = at - half, np.minimum(at + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)
