"""Numbers, spans of time and tables as people read them, for whatever shows them."""

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
    """A span of time: 1:23, 2h 05m, 3d 04h; `?` when it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}:{seconds:02}"


def printable(text: str) -> str:
    """The text without what a terminal would obey: a sample may hold escape sequences."""
    return _CONTROL.sub("?", text)


@dataclass(frozen=True)
class Table:
    """Words and numbers in rows, for whoever shows them.

    Args:
      title: the line above it; "" for none.
      columns: headings; "" for all of them: no line of headings.
      rows: a text for each column.
      left: how many columns, from the first, hold words and so begin at the left; the others hold numbers.
      bold: indices of the rows that stand out.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    bold: frozenset[int] = frozenset()


class Curve:
    """A curve that grows, kept small: two neighbours become their mean whenever there are too many.

    Args:
      most: how many values are kept at most.
    """

    def __init__(self, most: int = 512) -> None:
        self._most, self._stride = most, 1
        self._values: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """The next value; one that is not finite is left out."""
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

        The highest bar is the highest value after the first tenth: a loss falls so far at first that one could not see
        it fall later.
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
    """ "; did you mean X?" for the closest of `words`, or nothing where none is `alike` (from 0 to 1)."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=alike)
    return f"; did you mean {close[0]}?" if close else ""
