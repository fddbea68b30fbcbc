"""What a run prints where no person watches, and outputs that are gone."""

import contextlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.screen.console import Console
from runtime.screen.text import Table, duration, human


def row(**changes) -> dict:
    values = {"step": 300, "tokens": 307200, "loss": 1.8234, "grad_norm": 0.5341, "lr": 0.02, "muon_lr": 0.0004}
    speed = {"step_seconds": 0.0521, "tokens_per_second": 19700.0, "mfu": None}
    times = {"elapsed_seconds": 83.0, "eta_seconds": 250.0, "peak_memory_bytes": 1_300_000_000}
    return values | speed | times | changes


def test_counts_and_spans_of_time():
    assert [human(n) for n in (0, 950, 999.6, 19_700, 999_960, 1.2e6, 3.4e9, 5.6e12)] == (
        ["0", "950", "1.0k", "19.7k", "1.0M", "1.2M", "3.4B", "5.6T"]
    )
    assert [duration(s) for s in (0, 59.6, 83, 3599, 3600, 7500, 100_000, math.inf)] == (
        ["0:00", "1:00", "1:23", "59:59", "1h 00m", "2h 05m", "1d 03h", "?"]
    )


def test_a_step_is_one_line_with_everything_that_is_known(capsys):
    Console().step_line(row(val_loss=1.9012, mfu=0.4123), 5000)
    text = capsys.readouterr().out
    for part in (" 300/5000", "loss 1.8234", "val 1.9012", "grad 0.534", "lr 2.0e-2/4.0e-4", "52.10 ms", "19.7k tok/s"):
        assert part in text
    assert text.endswith("MFU 41.2%  1:23, 4:10 left\n")
    Console().step_line(row(), 5000)
    text = capsys.readouterr().out
    assert "val" not in text and "MFU n/a" in text


@given(
    total=st.integers(1, 10**7),
    loss=st.floats(0, 999) | st.just(math.nan),
    grad_norm=st.floats(0, 1e30),
    lr=st.floats(1e-9, 1),
    step_seconds=st.floats(1e-5, 1e4),
    tokens_per_second=st.floats(0, 1e9),
    mfu=st.none() | st.floats(0, 1),
    eta_seconds=st.floats(0, 1e6) | st.just(math.inf),
)
def test_a_step_fits_120_columns(total, **values):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        Console().step_line(row(step=total, val_loss=values["loss"], **values), total)
    assert out.getvalue().isascii()
    assert len(out.getvalue().splitlines()) == 1
    assert len(out.getvalue()) - 1 <= 120


def test_steps_line_up_with_and_without_validation(capsys):
    console = Console()
    console.step_line(row(), 5000)
    console.step_line(row(step=1000, loss=10.82, val_loss=2.5, grad_norm=12.3, step_seconds=0.9), 5000)
    one, two = capsys.readouterr().out.splitlines()
    assert one.index("MFU") == two.index("MFU")


def test_without_a_terminal_lines_are_plain_and_there_is_no_bar(capsys):
    console = Console()
    with console, console.progress(10, 0, "compiling") as update, console.busy("evaluating"):
        console.doing("reading")
        console.header([("device", "cpu"), ("parameters", "12\n  head 7")], [Table("Box", ["", ""], [["a", "b"]])])
        update(3)
        console.closing(Table("Done", ["", ""], [["a", "b"]]), "command")
        console.sample(3, "ROMEO: [bold]\x1b[31mred\n\nend")
        console.warn("two\nlines")
        console.print_error(UserError("config.lr: bad; mend it"))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "compiling",
        "device      cpu",
        "parameters  12",
        "              head 7",
        "  sample at step 3",
        "  | ROMEO: [bold]?[31mred",
        "  |",
        "  | end",
    ]
    assert err == "warning: two lines\nerror: config.lr: bad; mend it\n"


def test_a_closed_stdout_stops_nothing():
    code = """if True:
        import sys
        from runtime.screen.console import Console
        console = Console()
        with console.progress(2000, 0) as update:
            for step in range(2000):
                console.line(f"line {step}")
                update(step)
        print("the end", file=sys.stderr)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.communicate()[1] == "the end\n"
    assert process.returncode == 0
