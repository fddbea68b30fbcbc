"""Orbax says much that is no news: what we raise as one line, it logs, and drops with tracebacks."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging


def quieten() -> None:
    """Let nothing of that through; called as often as one likes."""
    absl_logging.set_verbosity(absl_logging.FATAL)  # its own settings, and what it raises
    logging.getLogger("asyncio").addFilter(_is_news)
    sys.unraisablehook = _print_news
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


# When a read or a write fails, Orbax drops the others: for each that had begun asyncio or Python itself prints a
# traceback, for each that had not, a warning. Nothing of ours is a coroutine.


def _is_news(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _print_news(unraisable: "sys.UnraisableHookArgs", print_it: Callable[[Any], Any] = sys.unraisablehook) -> None:
    text = str(unraisable.exc_value)
    if text != "Event loop is closed" and not text.startswith("Encountered error while reading array"):
        print_it(unraisable)
