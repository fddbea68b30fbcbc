"""Types of settings that say which numbers are allowed."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple


class Range(NamedTuple):
    """A range of allowed numbers."""

    words: str  # for the message, after "must be"
    holds: Callable[[float], bool]


Count = Annotated[int, Range("at least 1 and below 2147483648", lambda x: 1 <= x < 2**31)]
CountOrNone = Annotated[int, Range("at least 0 and below 2147483648", lambda x: 0 <= x < 2**31)]
Positive = Annotated[float, Range("> 0 and finite", lambda x: x > 0 and math.isfinite(x))]
AboveOne = Annotated[float, Range("> 1 and finite", lambda x: x > 1 and math.isfinite(x))]
NotNegative = Annotated[float, Range("at least 0 and finite", lambda x: x >= 0 and math.isfinite(x))]
BelowOne = Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]
Share = Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]


def require(settings: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raises ValueError, `<setting>: must be <words>, got <value>`, if a setting is outside the range of its type."""
    for name, kind in types.items():
        for allowed in getattr(kind, "__metadata__", ()):
            if not allowed.holds(settings[name]):
                raise ValueError(f"{name}: must be {allowed.words}, got {settings[name]}")
