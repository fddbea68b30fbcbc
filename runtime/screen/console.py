"""What a person sees of a run: a header, a line for each logged step, samples, tables, warnings.

On a terminal `runtime.screen.terminal` draws it, elsewhere there are plain lines. `NO_COLOR` is respected, and
`TERM=dumb` does not count as a terminal. A closed output never stops a run.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TextIO

from runtime.screen import live
from runtime.screen.text import Table, duration, human, printable

if TYPE_CHECKING:
    from runtime.screen.terminal import Terminal

_LINE_WIDTH = 120


class Console(AbstractContextManager):
    """Prints a run's output to stdout, and its warnings and errors to stderr; with `silent`, nothing.

    Leaving the console's `with` block ends the live view.
    """

    def __init__(self, silent: bool = False) -> None:
        self._out = _Output(None if silent else sys.stdout)
        self._err = _Output(None if silent else sys.stderr)
        self._terminal: Terminal | None = None
        if self._out.isatty() and os.environ.get("TERM") != "dumb":
            from runtime.screen import terminal

            # stderr is printed above the live view only if it is a terminal as well
            self._terminal = terminal.Terminal(self._out, redirect_stderr=self._err.isatty())

    def __exit__(self, *_: object) -> None:
        if self._terminal is not None:
            self._terminal.hide()

    def header(self, rows: list[tuple[str, str]], panels: Sequence[Table] = ()) -> None:
        """A table of names and values, which may have several lines. A terminal shows `panels` instead."""
        if self._terminal is not None and panels:
            self._terminal.panels(panels)
            return
        width = max(len(name) for name, _ in rows) + 2
        for name, value in rows:
            for i, text in enumerate(value.split("\n")):
                self._print((f"{name if i == 0 else '':<{width}}", "bold"), (text, ""))

    def line(self, text: str) -> None:
        """One line."""
        self._print((text, ""))

    def table(self, table: Table) -> None:
        """A table and an empty line. A terminal folds it to its width."""
        if table.title:
            self._print((table.title, "bold cyan"))
        lines = ([table.columns] if any(table.columns) else []) + table.rows
        if self._terminal is None:
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                cells = [
                    f"{text:<{w}}" if i < table.left else f"{text:>{w}}"
                    for i, (text, w) in enumerate(zip(line, widths, strict=True))
                ]
                self._print(("  ".join(cells), ""))
        else:
            self._terminal.table(table)
        self._print(("", ""))

    def doing(self, text: str) -> None:
        """Shows on a terminal what is being done, until the next call or the end of the console."""
        if self._terminal is not None:
            self._terminal.doing(text)

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Shows it inside the `with` block, together with the progress bar."""
        return nullcontext() if self._terminal is None else self._terminal.busy(text)

    def step_line(self, row: dict[str, Any], total: int) -> None:
        """One logged step of `total`: a line of at most 120 characters, in columns.

        On a terminal the live view shows it, and only evaluations get a line, which is shorter if the terminal is
        narrow. `row` has step, loss, grad_norm, lr, step_seconds, tokens_per_second, mfu (or None), elapsed_seconds,
        eta_seconds and peak_memory_bytes, perhaps val_loss and ema_val_loss; each key that ends in lr is a rate.
        """
        narrow = self._terminal is not None and self._terminal.width <= _LINE_WIDTH
        left_out = ("grad", "lr", "took", "mfu") if narrow else ()
        cells = [cell for name, cell in _cells(row, total).items() if name not in left_out]
        gap = "  " if len("  ".join(text for text, _ in cells)) <= _LINE_WIDTH else " "
        spans = [cells[0], *((gap + text, style) for text, style in cells[1:])]
        if self._terminal is None:
            self._print(*spans)
        else:
            self._terminal.row(row, spans)

    def sample(self, step: int, text: str) -> None:
        """What the model wrote after `step` steps."""
        if self._terminal is not None:
            self._terminal.sample(f"sample at step {step}", text)
            return
        self._print((f"  sample at step {step}", ""))
        for line in text.split("\n"):
            self._print(("  | ", ""), (line, ""))

    def closing(self, table: Table, command: str) -> None:
        """On a terminal, the end of a run: its results, and the command that samples from it."""
        if self._terminal is not None:
            self._terminal.closing(table, command)

    def progress(self, total: int, start: int, first: str = "") -> AbstractContextManager[Callable[[int], None]]:
        """A bar from `start` to `total` with the time left, and the function that moves it to so many units done.

        `first` says what is done until it moves.
        """
        if self._terminal is not None:
            return self._terminal.progress(total, start, first)
        if first and start < total:
            self.line(first)
        return nullcontext(lambda done: None)

    def warn(self, text: str) -> None:
        """One line on stderr: `warning: ...`."""
        self._complain(f"warning: {text}", "yellow")

    def print_error(self, error: BaseException) -> None:
        """One line on stderr: `error: ...`."""
        self._complain(f"error: {error}", "bold red")

    def _print(self, *spans: tuple[str, str]) -> None:
        """One line of (text, rich style) pairs on stdout."""
        spans = tuple((printable(text), style) for text, style in spans)
        if self._terminal is None:
            self._out.write("".join(text for text, _ in spans).rstrip() + "\n")
            self._out.flush()
        else:
            self._terminal.print(*spans)

    def _complain(self, text: str, style: str) -> None:
        text = printable(" ".join(text.split()))
        with live.drawing:
            if self._terminal is not None and self._terminal.live and self._err.isatty():
                self._print((text, style))  # rich prints it above the live view
            else:
                self._err.write(text + "\n")
                self._err.flush()


def _cells(row: dict[str, Any], total: int) -> dict[str, tuple[str, str]]:
    """The columns of a step's line as (text, rich style)."""
    val_loss, mfu, seconds = row.get("val_loss"), row["mfu"], row["step_seconds"]
    ema_loss = row.get("ema_val_loss")
    rates = [f"{rate:.1e}".replace("e-0", "e-") for name, rate in row.items() if name.endswith("lr")]
    if seconds is None:  # the first step of a session, most of which was compilation
        took, rate, left = "compiled  ", " " * 12, ""
    else:
        took = f"{_fixed(1000 * seconds, 4)} ms" if seconds < 10 else f"{_fixed(seconds, 4)} s "
        rate, left = f"{human(row['tokens_per_second']):>6} tok/s", f", {duration(row['eta_seconds'])} left"
    return {
        "step": (f"{row['step']:>{len(str(total))}}/{total}", ""),
        "loss": (f"loss {_fixed(row['loss'], 5)}", "bold"),
        "val": (" " * 10 if val_loss is None else f"val {_fixed(val_loss, 5)}", "bold green"),
        "grad": (f"grad {_fixed(row['grad_norm'], 4)}", ""),
        "lr": (f"lr {'/'.join(rates)}", ""),
        "took": (took, ""),
        "rate": (rate, ""),
        **({} if ema_loss is not None else {"mfu": ("MFU n/a" if mfu is None else f"MFU {mfu:5.1%}", "")}),
        "time": (f"{duration(row['elapsed_seconds'])}{left}", "cyan"),
        **({} if ema_loss is None else {"ema": (f"ema {_fixed(ema_loss, 5)}", "bold green")}),  # in the room of MFU
    }


def _fixed(x: float, digits: int) -> str:
    """`x` with `digits` significant digits (fewer below 1), in digits + 1 characters if it is below 10 ** digits."""
    if not math.isfinite(x) or abs(x) >= 10**digits:
        text = f"{x:.1e}"
    else:
        text = f"{x:.{digits - len(str(int(abs(x))))}f}"
    return f"{text:>{digits + 1}}"


class _Output:
    """A text stream that becomes silent, and does not raise, when its reader is gone (`| head`, a closed terminal).

    Characters that the stream's encoding lacks are escaped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None if the process was started with a closed stream
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
            # Python flushes its streams again at exit: without this, it would fail there once more
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = None
