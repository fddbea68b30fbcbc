"""The console on a terminal: panels, samples with a margin, and a live view at the bottom, all drawn by rich.

A thread draws the live view from values that it was given; it never asks the trainer or a device. The cursor stays
visible, so that the terminal is intact even after SIGKILL.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, cast

from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table as RichTable
from rich.text import Text

from runtime.screen import live
from runtime.screen.text import Curve, Table, duration, human, printable

WIDE = 120  # columns; on a narrower terminal panels are not side by side
_NARROW = 80
_REFRESH = 4  # a second
_SURE_AFTER = 2.0  # seconds of work after which its pace predicts the end

Span = tuple[str, str]  # a text and its rich style


class _Screen(RichConsole):
    def show_cursor(self, show: bool = True) -> bool:
        return False  # the cursor always stays visible


class Bar:
    """The progress of some work, in units: `start` of `total` at first; `begin` is called at the first update."""

    def __init__(self, total: int, start: int, begin: Callable[[], None]) -> None:
        self.total, self._done, self.moved, self._begin = total, start, False, begin
        self._row: dict[str, Any] | None = None
        self._val_loss: float | None = None
        self._losses = Curve()

    def update(self, done: int) -> None:
        """So much is done, or sent to the device. It only stores the number."""
        if not self.moved:
            self._first, self._first_at, self.moved = done, time.monotonic(), True
            self._begin()
        self._done = done

    def add(self, row: dict[str, Any]) -> bool:
        """Adds a logged step; returns whether it is the first, with which the line of numbers appears."""
        first = self._row is None
        self._row, self._row_at = row, time.monotonic()
        self._losses.add(row["loss"])
        self._val_loss = row.get("val_loss", self._val_loss)
        return first

    def done(self) -> float:
        """Units done by now, estimated by the clock since the last row, but never more than `update` was told."""
        if not self._row or not self._row["step_seconds"]:
            return self._done
        since = (time.monotonic() - self._row_at) / self._row["step_seconds"]
        return max(self._row["step"], min(self._done, self._row["step"] + since))

    def times(self) -> str:
        """The time elapsed and the time left."""
        now = time.monotonic()
        if self._row and self._row["step_seconds"]:
            since = now - self._row_at
            left = max(0.0, self._row["eta_seconds"] - since)
            return f"{duration(self._row['elapsed_seconds'] + since)}, {duration(left)} left"
        if not self._row and self.moved and self._done > self._first and now - self._first_at > _SURE_AFTER:
            left = (now - self._first_at) / (self._done - self._first) * (self.total - self._done)
            return f"{duration(left)} left"
        return ""

    def numbers(self, width: int, ascii_only: bool) -> Text:
        """The newest numbers in one line, with as much of the loss curve as there is room for."""
        if (row := self._row) is None:
            return Text()
        cells = [(f"{row['peak_memory_bytes'] / 1e9:.1f} GB", "")]
        if row["mfu"] is not None:
            cells.insert(0, (f"MFU {row['mfu']:.1%}", ""))
        if row["tokens_per_second"] is not None:
            cells.insert(0, (f"{human(row['tokens_per_second'])} tok/s", ""))
        if self._val_loss is not None:
            cells.insert(0, (f"val {self._val_loss:.4f}", "bold green"))
        line = Text.assemble("loss ", (f"{row['loss']:.4f}", "bold"))
        while len(line) + sum(2 + len(text) for text, _ in cells) > width:
            cells.pop()
        rest = Text.assemble(*(("  " + text, style) for text, style in cells))
        room = min(width - len(line) - len(rest) - 1, 60)
        if room >= 8 and not ascii_only:
            line.append(" " + self._losses.sparkline(room), "cyan")
        return line + rest


class Terminal:
    """Draws on the terminal `out` for `runtime.screen.console.Console`, whose methods say what these show.

    redirect_stderr: stderr is a terminal too, so what libraries write to it is printed above the live view.
    """

    def __init__(self, out: Any, redirect_stderr: bool) -> None:
        self._rich = _Screen(file=cast(IO[str], out), force_terminal=True)
        self._redirect_stderr = redirect_stderr
        self._live: Live | None = None
        self._bar: Bar | None = None
        self._doing, self._since = "", 0.0
        self._ascii = not self._rich.encoding.startswith("utf")
        self._spinner = Spinner("line" if self._ascii else "dots", style="cyan")

    @property
    def width(self) -> int:
        return self._rich.width

    @property
    def live(self) -> bool:
        """Whether the live view is shown; all output must then go through rich."""
        return self._live is not None

    # --- What stays -----------------------------------------------------------------------------------------------

    def print(self, *spans: Span) -> None:
        """One line, which the terminal itself folds, so that it can be copied as one."""
        self._print(Text.assemble(*spans), soft_wrap=True)

    def panels(self, panels: Sequence[Table]) -> None:
        """Tables of names and values in boxes, two side by side if there is room."""
        boxes = [_box(table) for table in panels]
        if self.width < WIDE:
            self._print(*boxes, sep="\n")
            return
        width = self.width // 2 - 1
        for pair in zip(boxes[::2], boxes[1::2], strict=True):
            height = max(len(self._rich.render_lines(box, self._rich.options.update_width(width))) for box in pair)
            for box in pair:
                box.height = height
            self._print(Columns(pair, width=width, padding=(0, 1)))

    def table(self, table: Table) -> None:
        """Folded to the width of the terminal; its texts are not read as markup."""
        grid = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        grid.show_header = any(table.columns)
        for i, title in enumerate(table.columns):
            number = i >= table.left
            title = "\n".join(title.rsplit(" ", 1)) if number else title  # narrower, to leave room for the first column
            grid.add_column(Text(title), justify="right" if number else "left", overflow="fold")
        for i, row in enumerate(table.rows):
            grid.add_row(*(Text(printable(text)) for text in row), style="bold green" if i in table.bold else None)
        self._print(grid)

    def sample(self, title: str, text: str) -> None:
        lines = [Text("  " + title, "cyan")]
        for paragraph in printable(text).split("\n"):
            for line in Text(paragraph).wrap(self._rich, self.width - 5) or [Text()]:
                line.rstrip()
                lines.append(Text.assemble(("  │ " if not self._ascii else "  | ", "cyan"), line))
        self._print(Group(*lines))

    def closing(self, table: Table, command: str) -> None:
        self._print(_box(table, "green"), width=min(self.width, _NARROW))
        self.print(("to sample from it:  ", ""), (command, "bold green"))

    def _print(self, *what: RenderableType, **options: Any) -> None:
        with live.drawing:
            self._rich.print(*what, **options)

    # --- What moves -----------------------------------------------------------------------------------------------

    def doing(self, text: str) -> None:
        self._doing, self._since = text, time.monotonic()
        with live.drawing:
            if self._live is None:
                self.show()
            else:
                self._live.refresh()

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        before = self._doing, self._since
        with live.drawing:  # while Ctrl-Z hides the view, `live` would wrongly be False
            alone = not self.live
            self.doing(text)
        try:
            yield
        finally:
            if alone:
                self.hide()
            self._doing, self._since = before

    @contextlib.contextmanager
    def progress(self, total: int, start: int, first: str) -> Iterator[Callable[[int], None]]:
        self._bar = Bar(total, start, lambda: self.doing(""))
        self.doing(first)
        try:
            yield self._bar.update
        finally:
            self._bar = None
            self.hide()

    def row(self, row: dict[str, Any], spans: Sequence[Span]) -> None:
        """A logged step; an evaluation also gets a line that stays."""
        if self._bar:
            grows = self._bar.add(row)
            with live.drawing:
                if grows and self._live is not None:
                    self._live.refresh()  # the view grows here, not in rich's thread while a line is printed
        if "val_loss" in row:
            self.print(*spans)

    def show(self) -> None:
        with live.drawing:
            self._live = Live(
                get_renderable=self._view,
                console=self._rich,
                refresh_per_second=_REFRESH,
                transient=True,
                redirect_stderr=self._redirect_stderr,
            )
            self._live.start(refresh=True)
            live.note(self, True)

    def hide(self) -> None:
        with live.drawing:
            live.note(self, False)
            view, self._live = self._live, None
            if view is not None:
                view.stop()

    def _view(self) -> RenderableType:
        """What is shown now: at most two lines, none wider than the terminal."""
        width, now = self.width - len("^C") - 1, time.monotonic()  # otherwise the key's echo would wrap to a new line
        spinner, bar = cast(Text, self._spinner.render(now)), self._bar
        if bar is None or not bar.moved:
            return _cut(Text.assemble(spinner, f" {self._doing}  {duration(now - self._since)}"), width)
        done = bar.done()
        left = Text.assemble(spinner, " ", (f"{self._doing}  " if self._doing else ""))
        right = Text(f"  {int(done):,}/{bar.total:,}  {done / max(bar.total, 1):.0%}  {bar.times()}".rstrip())
        line = RichTable.grid()
        room = width - len(left) - len(right)
        if room >= 4:
            line.add_row(left, ProgressBar(bar.total, done, width=room), right)
        else:
            line.add_row(_cut(left + right, width))
        numbers = bar.numbers(width, self._ascii)
        return Group(line, _cut(numbers, width)) if numbers else line


def _cut(text: Text, width: int) -> Text:
    text.truncate(width)
    return text


def _box(table: Table, style: str = "cyan") -> Panel:
    grid = RichTable.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for name, value in table.rows:
        grid.add_row(Text(printable(name), "bold"), Text(printable(value)))
    return Panel(grid, title=Text(table.title, f"bold {style}"), title_align="left", border_style="dim")
