"""Numbers, durations and tables as people read them."""

import difflib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_BARS = "▁▂▃▄▅▆▇█"


def human(n: float) -> str:
    """A count in at most six characters: 950, 19.7k, 1.2M, 3.4B, 5.6T."""
    for decimals, unit in (0, ""), (1, "k"), (1, "M"), (1, "B"):
        text = f"{n:.{decimals}f}"
        if abs(float(text)) < 1000:
            return text + unit
        n /= 1000
    return f"{n:.1f}T"


def duration(seconds: float) -> str:
    """A duration: 1:23, 2h 05m, 3d 04h; `?` if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}:{seconds:02}"


def printable(text: str) -> str:
    """The text without control characters, because a sample may hold escape sequences."""
    return _CONTROL.sub("?", text)


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str  # the line above it; "" for none
    columns: list[str]  # headings; if all are "", there is no line of headings
    rows: list[list[str]]  # a text for each column
    left: int = 1  # so many first columns hold words, aligned left; the others hold numbers, aligned right
    bold: frozenset[int] = frozenset()  # indices of rows to print in bold


class Curve:
    """A curve that grows and keeps at most `most` values: pairs of neighbours become their mean when it is full."""

    def __init__(self, most: int = 512) -> None:
        self._most, self._stride = most, 1
        self._values: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Adds a value, unless it is not finite."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) == self._stride:
            self._values.append(_mean(self._pending))
            self._pending = []
        if len(self._values) == self._most:
            self._values = [_mean(self._values[i : i + 2]) for i in range(0, self._most, 2)]
            self._stride *= 2

    def sparkline(self, width: int) -> str:
        """The curve in at most `width` characters, each the mean of its share of the values.

        The scale ends at the highest value after the first tenth: a loss falls so far at first that its later fall
        would not be visible.
        """
        values, count = self._values, len(self._values)
        edges = [round(i * count / width) for i in range(width + 1)] if count > width else range(count + 1)
        means = [_mean(values[a:b]) for a, b in itertools.pairwise(edges)]
        if not means:
            return ""
        low, high = min(means), max(means[len(means) // 10 :])
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0
        return "".join(_BARS[min(round((value - low) * scale), len(_BARS) - 1)] for value in means)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def nearest(word: str, words: Sequence[str], alike: float = 0.6) -> str:
    """ "; did you mean X?" for the closest of `words`, or "" if none has a similarity of `alike` (0 to 1)."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=alike)
    return f"; did you mean {close[0]}?" if close else ""
