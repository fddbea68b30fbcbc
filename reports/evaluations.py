"""Which evaluations are comparable: those on the same tokens, which are the first N of a validation split."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]  # of metrics.jsonl

_FIGURES = ("val_loss", "bits_per_byte", "val_tokens", "ema_val_loss")


def _figures(row: Row) -> dict[float, Row]:
    """The figures of a row's evaluations, by number of tokens; 0 stands for a number that was not stored."""
    found = {}
    for prefix in "prefix_", "":  # the last step's row has the earlier steps' part of the split too
        if row.get(f"{prefix}val_loss") is not None:
            found[row.get(f"{prefix}val_tokens") or 0] = {key: row.get(prefix + key) for key in _FIGURES}
    return found


def on_the_same_tokens(runs: Sequence[list[Row]], alike: bool = True) -> tuple[list[list[Row]], float | None]:
    """The rows of each run with comparable evaluations only, and the number of tokens of these.

    Of the numbers of tokens on which all runs were evaluated, the one with the most evaluations is chosen. If there is
    none, or if the runs' tokens are not `alike`, it is None, and each run keeps the evaluations on the tokens on which
    it was evaluated most often (if not `alike`, on the most tokens).
    """
    counts = [Counter(tokens for row in rows for tokens in _figures(row)) for rows in runs]
    evaluated = [count for count in counts if count]
    shared = set.intersection(*map(set, evaluated)) if evaluated and alike else set()
    common = max(shared, key=lambda tokens: (min(count[tokens] for count in evaluated), tokens), default=None)
    result = []
    for rows, count in zip(runs, counts, strict=True):
        own = max(count, key=lambda tokens: (count[tokens] * alike, tokens), default=None)
        tokens = own if common is None else common
        bare = ({key: value for key, value in row.items() if key not in _FIGURES} for row in rows)
        result.append([plain | _figures(row).get(tokens, {}) for plain, row in zip(bare, rows, strict=True)])
    return result, common
