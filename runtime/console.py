"""What a person sees of a run: a header, a line per logged step, samples, tables, warnings.

On a terminal there are colours, and a live progress bar under the scrolling lines (rich); elsewhere there are plain
lines. `NO_COLOR` is respected, `TERM=dumb` is no terminal. Output that nobody can read any more never stops a run.
"""

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table as RichTable

_LINE_WIDTH = 120
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def printable(text: str) -> str:
    """A text without control characters, which would move a terminal's cursor or worse; tabs and newlines stay."""
    return _CONTROL.sub("?", text)


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


class ProgressBar:
    """The live bar of `Console.progress`, or nothing at all where no person watches."""

    def __init__(self, live: "Progress | None", total: int, start: int) -> None:
        self._live = live
        if live is not None:
            self._task = live.add_task("", total=total, completed=start)

    def update(self, step: int, loss: float | None = None) -> None:
        """Moves the bar to `step`; without a `loss` the last one stays."""
        if self._live is not None:
            text = None if loss is None else f"loss {loss:.4f}"
            self._live.update(self._task, completed=step, description=text)


class Console:
    """Prints a run's output to stdout, and its warnings and errors to stderr; with `silent`, nothing."""

    def __init__(self, silent: bool = False) -> None:
        self._out = _Output(None if silent else sys.stdout)
        self._err = _Output(None if silent else sys.stderr)
        self._live: Progress | None = None
        self._rich = None
        if self._out.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console as RichConsole  # the import is for terminals alone

            self._rich = RichConsole(file=self._out, force_terminal=True, soft_wrap=True)

    def header(self, rows: list[tuple[str, str]]) -> None:
        """A table of names and values; a value of several lines stays in its column."""
        width = max(len(name) for name, _ in rows) + 2
        for name, value in rows:
            for i, text in enumerate(value.split("\n")):
                self._print((f"{name if i == 0 else '':<{width}}", "bold"), (text, ""))

    def line(self, text: str) -> None:
        """One line."""
        self._print((text, ""))

    def table(self, table: Table) -> None:
        """A table and an empty line: as wide as it needs to be in a pipe, folded into the width of a terminal."""
        if table.title:
            self._print((table.title, "bold cyan"))
        lines = ([table.columns] if any(table.columns) else []) + table.rows
        if self._rich is None:
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                cells = [
                    f"{text:<{w}}" if i < table.left else f"{text:>{w}}"
                    for i, (text, w) in enumerate(zip(line, widths, strict=True))
                ]
                self._print(("  ".join(cells), ""))
        else:
            self._rich.print(_rich_table(table), soft_wrap=False)
        self._print(("", ""))

    def step_line(self, row: dict[str, Any], total: int) -> None:
        """One logged step of `total`, at most 120 columns, which line up from step to step.

        `row` has step, loss, grad_norm, lr, step_seconds, tokens_per_second, mfu (or None), elapsed_seconds and
        eta_seconds; val_loss and muon_lr where there are any.
        """
        cells = _cells(row, total)
        gap = "  " if len("  ".join(text for text, _ in cells)) <= _LINE_WIDTH else " "
        self._print(cells[0], *((gap + text, style) for text, style in cells[1:]))

    def sample(self, step: int, text: str) -> None:
        """What the model wrote after `step` steps."""
        self._print((f"  sample at step {step}", "cyan"))
        for line in text.split("\n"):
            self._print(("  | ", "cyan"), (line, ""))

    @contextlib.contextmanager
    def progress(self, total: int, start: int) -> Iterator[ProgressBar]:
        """A bar that shows the way from step `start` to `total`, the loss and the time left, while it is entered."""
        if self._rich is None:
            yield ProgressBar(None, total, start)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._live = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._rich,
            refresh_per_second=4,
            transient=True,
            redirect_stderr=self._err.isatty(),  # what goes to a file does not belong above the bar
        )
        try:
            with self._live:
                yield ProgressBar(self._live, total, start)
        finally:
            self._live = None

    def warn(self, text: str) -> None:
        """One line on stderr: `warning: ...`."""
        self._complain(f"warning: {text}", "yellow")

    def print_error(self, error: BaseException) -> None:
        """One line on stderr: `error: ...`."""
        self._complain(f"error: {error}", "bold red")

    def _print(self, *spans: tuple[str, str]) -> None:
        """One line of (text, rich style) pairs on stdout."""
        spans = tuple((printable(text), style) for text, style in spans)  # a sample may hold escape sequences
        if self._rich is None:
            self._out.write("".join(text for text, _ in spans).rstrip() + "\n")
            self._out.flush()
        else:
            from rich.text import Text

            self._rich.print(Text.assemble(*spans))

    def _complain(self, text: str, style: str) -> None:
        text = printable(" ".join(text.split()))
        if self._live is not None and self._err.isatty():
            self._print((text, style))  # above the bar; written past rich, it would tear the bar
        else:
            self._err.write(text + "\n")
            self._err.flush()


def _rich_table(table: Table) -> "RichTable":
    """The table for a terminal: its texts are texts, no markup."""
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, show_header=any(table.columns), padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, title in enumerate(table.columns):
        number = i >= table.left
        title = "\n".join(title.rsplit(" ", 1)) if number else title  # narrower, for the sake of the first column
        grid.add_column(Text(title), justify="right" if number else "left", overflow="fold")
    for i, row in enumerate(table.rows):
        grid.add_row(*(Text(printable(text)) for text in row), style="bold green" if i in table.bold else None)
    return grid


def _cells(row: dict[str, Any], total: int) -> list[tuple[str, str]]:
    """The columns of a step's line as (text, rich style)."""
    val_loss, muon_lr, mfu, seconds = row.get("val_loss"), row.get("muon_lr"), row["mfu"], row["step_seconds"]
    rates = [f"{rate:.1e}".replace("e-0", "e-") for rate in (row["lr"], muon_lr) if rate is not None]
    if seconds is None:  # the first step of a session, most of which was compilation
        speed, left = ("compiled  ", " " * 12), ""
    else:
        took = f"{_fixed(1000 * seconds, 4)} ms" if seconds < 10 else f"{_fixed(seconds, 4)} s "
        speed, left = (took, f"{human(row['tokens_per_second']):>6} tok/s"), f", {duration(row['eta_seconds'])} left"
    return [
        (f"{row['step']:>{len(str(total))}}/{total}", ""),
        (f"loss {_fixed(row['loss'], 5)}", "bold"),
        (" " * 10 if val_loss is None else f"val {_fixed(val_loss, 5)}", "bold green"),
        (f"grad {_fixed(row['grad_norm'], 4)}", ""),
        (f"lr {'/'.join(rates)}", ""),
        *((text, "") for text in speed),
        ("MFU n/a" if mfu is None else f"MFU {mfu:5.1%}", ""),
        (f"{duration(row['elapsed_seconds'])}{left}", "cyan"),
    ]


def _fixed(x: float, digits: int) -> str:
    """`x` with `digits` significant digits (less below 1) in digits + 1 characters, if it is below 10 ** digits."""
    if not math.isfinite(x) or abs(x) >= 10**digits:
        text = f"{x:.1e}"
    else:
        text = f"{x:.{digits - len(str(int(abs(x))))}f}"
    return f"{text:>{digits + 1}}"


class _Output:
    """A text stream that goes silent when its reader is gone (`| head`, a closed terminal), where others raise.

    What the stream's encoding lacks comes out escaped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None already when the process was started with it closed
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> None:
        text = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(text))

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except (OSError, ValueError):  # ValueError: the stream object was closed
            # Python flushes its streams once more at exit: without this, what they hold would fail again there.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = None
