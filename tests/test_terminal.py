"""What a person sees who watches a run: panels, the live view, what is left when it has ended."""

import io
import math
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, arguments, tiny_config
from screen import Screen, Watched
from terminal import Terminal
from test_console import row

import main
import train_lib
from runtime.screen import live, terminal
from runtime.screen.console import Console
from runtime.screen.text import Curve, Table

FAST = {"max_steps": 14, "eval_every": 7, "sample_every": 7, "save_every": 50, "log_every": 2}


@pytest.fixture
def watched(monkeypatch):
    """Makes a terminal of both streams, when it is called: pytest puts its own in their place before each test."""

    def watch(columns: int = 80, **environment: str) -> Watched:
        stream = Watched()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.delenv("NO_COLOR", raising=False)
        for name, value in ({"TERM": "xterm-256color", "COLUMNS": str(columns)} | environment).items():
            monkeypatch.setenv(name, value)
        return stream

    return watch


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, to be moved; nothing is drawn by itself."""
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    monkeypatch.setattr(terminal, "_REFRESH", 1e-9)
    return moment


def view(console: Console, columns: int) -> list[str]:
    """The live view as it would be drawn now."""
    out = io.StringIO()
    terminal.RichConsole(file=out, width=columns, force_terminal=True).print(console._terminal._view())
    screen = Screen(out.getvalue(), columns)
    assert not screen.wrapped
    return screen.text


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_the_live_view_shows_what_is_known_in_two_lines(columns, watched, now):
    watched(columns)
    with Console() as console:
        console.doing("reading the text")
        now[0] += 3
        assert view(console, columns) == [f"{view(console, columns)[0][0]} reading the text  0:03"]
        with console.progress(400, 0, "compiling the step") as update:
            assert "compiling the step  0:00" in view(console, columns)[0]
            for step in range(1, 201):
                now[0] += 0.5
                if step % 10 == 0:
                    speed = {"step_seconds": 0.5, "tokens_per_second": 2048.0, "eta_seconds": (400 - step) * 0.5}
                    loss = {"loss": 5 - step / 100, "mfu": 0.4123} | ({"val_loss": 4.5} if step == 150 else {})
                    console.step_line(row(step=step, elapsed_seconds=step / 2, **speed, **loss), 400)
                update(step)
            top, numbers = view(console, columns)
            assert top.endswith("200/400  50%  1:40, 1:40 left") and "compiling" not in top
            assert numbers.startswith("loss 3.0000")
            if columns >= 80:
                assert "━" in top
                assert numbers.endswith("val 4.5000  2.0k tok/s  MFU 41.2%  1.3 GB") and "▁  val" in numbers
            with console.busy("evaluating"):
                assert "evaluating" in view(console, columns)[0]
            assert "evaluating" not in view(console, columns)[0]


def test_between_two_rows_the_time_moves_and_the_bar_as_far_as_steps_were_begun(watched, now):
    watched()
    with Console() as console, console.progress(100, 0) as update:
        update(10)
        console.step_line(row(step=10, step_seconds=2.0, elapsed_seconds=30.0, eta_seconds=180.0), 100)
        for step in range(10, 14):  # sent to a device that works on them for two seconds each
            update(step)
        for seconds, shown in [(0, "10/100  10%  0:30, 3:00"), (2, "11/100  11%  0:32, 2:58"), (60, "13/100  13%")]:
            now[0] += seconds
            assert shown in view(console, 80)[0]
        now[0] += 500
        assert "0:00 left" in view(console, 80)[0]  # and not less than none


def test_the_time_left_of_work_without_rows_is_right_within_a_fifth_after_a_tenth(watched, now):
    watched()
    with Console() as console, console.progress(10_000, 2000) as update:
        now[0] += 50  # getting ready is not the work's pace
        for done in range(2000, 10_000, 40):
            update(done)
            if done >= 2000 + 800:
                left = re.search(r"(\d+):(\d\d) left", view(console, 80)[0])
                seconds = 60 * int(left[1]) + int(left[2])
                assert seconds == pytest.approx((10_000 - done) / 40 * 1.5, rel=0.2, abs=1)
            now[0] += 1.4 + 0.2 * (done % 80 == 0)


def test_a_curve_in_characters():
    curve = Curve(most=16)
    assert curve.sparkline(10) == ""
    curve.add(2.0)
    assert curve.sparkline(10) == "▁"
    curve.add(math.nan)
    for i in range(7):
        curve.add(3.0 + i)
    assert curve.sparkline(10) == "▁▂▃▄▅▆▇█"
    assert curve.sparkline(4) == "▁▃▆█"
    curve = Curve(most=16)
    for i in range(1000):
        curve.add(50.0 if i < 60 else 1000 - i)
        assert len(curve.sparkline(100)) < 16
    assert re.fullmatch(r"▁+█+▇+▆+▅+▄+▃+▂+▁+", curve.sparkline(100))


def test_a_loss_that_fell_far_at_first_is_still_seen_to_fall():
    curve = Curve()
    for i in range(100):
        curve.add(10.0 if i < 5 else 2 - i / 100)
    assert len(set(curve.sparkline(50)[5:])) == 8


def test_what_stays_is_above_the_live_view_and_the_view_leaves_nothing(watched):
    stream = watched()
    with Console() as console:
        with console.progress(40, 8) as update:
            update(9)
            console.step_line(row(step=9), 40)
            console.step_line(row(step=10, val_loss=1.75), 40)
            console.sample(10, "ROMEO: [bold]\x1b[31m" + "so " * 40 + "\n\n日本語" * 20)
            console.warn("odd")
            print("a library", file=sys.stderr)
        console.doing("drawing")
        console.closing(Table("Done", ["", ""], [["best step", "[red]30"]], left=2), "python main.py sample")
    screen = Screen(stream.getvalue(), 80)
    assert not screen.wrapped
    lines = screen.text
    assert lines[0].startswith("10/40  loss 1.8234  val 1.7500") and lines[1] == "  sample at step 10"
    assert lines[2].startswith("  │ ROMEO: [bold]?[31mso so") and "  │" in lines
    assert lines[-6:-4] == ["warning: odd", "a library"]
    assert re.fullmatch(r"│ best step  \[red\]30 +│", lines[-3])
    assert lines[-1] == "to sample from it:  python main.py sample"
    assert "\x1b[?25l" not in stream.getvalue()  # the cursor is never hidden
    assert not any("drawing" in line for line in lines)


def test_panels_stand_side_by_side_where_there_is_room(watched):
    tables = [Table(name, ["", ""], [["key", f"value of {name}"]] * n, left=2) for n, name in enumerate("ABCD", 1)]
    for columns, height in (80, 18), (140, 10):
        stream = watched(columns)
        Console().header([("run", "x")], tables)
        screen = Screen(stream.getvalue(), columns)
        assert not screen.wrapped and len(screen.text) == height
        assert screen.text[0].count("╮") == (1 if columns == 80 else 2)


def test_no_color_and_dumb_terminals_are_respected(watched):
    stream = watched()
    Console().sample(3, "text")
    assert "\x1b[36m" in stream.getvalue()
    stream = watched(NO_COLOR="1")
    with Console() as console, console.progress(40, 8) as update:
        update(9)
        console.step_line(row(step=10, val_loss=1.75), 40)
        console.sample(3, "text")
    assert "sample at step 3" in stream.getvalue()
    assert not re.search(r"\x1b\[[\d;]*[34]\d", stream.getvalue())
    stream = watched(TERM="dumb")
    with Console() as console, console.progress(40, 8) as update:
        update(9)
        console.line("plain")
    assert stream.getvalue() == "plain\n"


def test_an_encoding_without_blocks_gets_none(watched):
    stream = watched()
    stream.encoding = "ascii"
    with Console() as console, console.progress(40, 8) as update:
        for step in range(9, 13):
            update(step)
            console.step_line(row(step=step, loss=5.0 - step / 10), 40)
        console._terminal._live.refresh()
        console.sample(3, "text")
        console.closing(Table("Done", ["", ""], [["a", "b"]], left=2), "command")
    assert stream.getvalue().isascii() and "\\" not in stream.getvalue().replace("- \\ | /", "")


def test_a_view_is_set_aside_for_others_and_comes_back(watched):
    watched()
    with Console() as console:
        console.doing("reading")
        with live.set_aside():
            assert not console._terminal.live
        assert console._terminal.live
    with live.set_aside():
        pass
    assert not console._terminal.live


def at_the_same_time(action: Callable[[], object]) -> threading.Thread:
    """Starts it in a thread and lets it come as far as it can."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(0.2)
    return thread


def test_a_warning_from_another_thread_waits_until_the_view_has_gone(watched, monkeypatch):
    stream, threads, stop = watched(), [], terminal.Live.stop

    def slow_stop(view):
        threads.append(at_the_same_time(lambda: console.warn("stopping")))
        stop(view)

    monkeypatch.setattr(terminal.Live, "stop", slow_stop)
    with Console() as console:
        with console.progress(40, 8) as update:
            update(9)
            console.step_line(row(step=9), 40)
        threads[0].join()
    assert Screen(stream.getvalue(), 80).text == ["warning: stopping"]


@pytest.mark.parametrize("what", ["evaluation", "download"])
def test_nothing_is_drawn_between_ctrl_z_and_the_stop_and_all_goes_on_afterwards(watched, monkeypatch, what):
    stream, threads, screens, goes_on, shown = watched(), [], [], threading.Event(), []

    def work():
        with console.busy("evaluating") if what == "evaluation" else live.set_aside():
            goes_on.wait()
            shown.append(console._terminal.live)

    def stopped(*_):
        threads.append(at_the_same_time(work))
        screens.append(Screen(stream.getvalue(), 80).text)

    monkeypatch.setattr(signal, "pthread_kill", stopped)
    with Console() as console:
        console.doing("reading")
        live.suspend()
        goes_on.set()
        threads[0].join()
        assert screens == [[]] and shown == [what == "evaluation"]
        assert console._terminal.live and len(Screen(stream.getvalue(), 80).text) == 1
    assert Screen(stream.getvalue(), 80).text == []


def test_the_echo_of_a_key_ends_in_no_row_that_stays(watched):
    stream = watched()
    with Console() as console:
        with console.progress(100, 0) as update:
            for step in range(100):
                update(step)
                console.step_line(row(step=step), 100)
            console._terminal._live.refresh()
            stream.write("^C")
            console.warn("stopping")
        stream.write("^Z")
    assert Screen(stream.getvalue(), 80).text == ["warning: stopping", "^Z"]


def test_the_first_row_grows_the_view_before_a_line_is_printed(watched, monkeypatch):
    stream, render = watched(), terminal.RichConsole.render

    def slow_render(rich, what, *options):  # rich's own thread draws between where a line goes and the line
        if isinstance(what, terminal.Text) and "1.75" in what.plain and not drawn:
            drawn.append(True)
            at_the_same_time(console._terminal._live.refresh)
        return render(rich, what, *options)

    drawn: list[bool] = []
    with Console() as console, console.progress(40, 8) as update:
        update(9)
        monkeypatch.setattr(terminal.RichConsole, "render", slow_render)
        console.step_line(row(step=10, val_loss=1.75), 40)
    assert drawn and len(Screen(stream.getvalue(), 80).text) == 1


# --- Whole runs -------------------------------------------------------------------------------------------------------


def check_end(lines: list[str], workdir: Path) -> None:
    """Everything that stays of a run of FAST, and nothing else below it."""
    text = "\n".join(lines)
    for title in ("Model", "Data", "Optimizer", "Devices", "Done"):
        assert f"─ {title} ─" in text
    assert [line.split()[0] for line in lines if re.match(r" *\d+/14 ", line)] == ["7/14", "14/14"]
    assert text.count("  sample at step ") == 2
    assert re.search(r"best step +\d+, validation loss \d\.\d{4} ", text) and "compiling" not in text
    last = next(i for i, line in enumerate(lines) if line.startswith("to sample from it:"))
    command = "".join(lines[last:]).removeprefix("to sample from it:  ")
    assert command == f"python main.py sample --workdir={workdir}"


def test_a_run_on_a_wide_terminal(watched, tmp_path):
    stream = watched(140)
    train_lib.train(tiny_config(**FAST), tmp_path)
    screen = Screen(stream.getvalue(), 140)
    check_end(screen.text, tmp_path)
    assert all(line.startswith("to sample from it:") for line in screen.wrapped)
    for phase in ("starting the devices", "reading the text", "making the weights", "compiling the step"):
        assert phase in stream.getvalue()


def test_ctrl_z_and_ctrl_c_leave_the_terminal_to_the_shell(tmp_path):
    config = tiny_config(**FAST | {"max_steps": 1_000_000, "eval_every": 1_000_000, "sample_every": 0})
    command = shlex.join([sys.executable, str(ROOT / "main.py"), *arguments(config, tmp_path / "run")])
    with Terminal("bash", "--norc", "-i", columns=80, PS1="$ ", PYTHONPATH=str(ROOT)) as shell:
        shell.wait_for("$ ")
        shell.type(f"{command}\n")
        shell.wait_for("loading JAX")
        shell.wait_for("starting the devices")
        shell.wait_for("tok/s")
        shell.type("\x1a")
        shell.wait_for("Stopped")
        assert not any("tok/s" in line or "━" in line for line in Screen(shell.seen, 80).text)
        shell.wait_for("$ ")
        shell.type("fg\n")
        shell.wait_for("tok/s")
        shell.type("\x03")
        shell.wait_for("goes on from here")
        shell.wait_for("$ ")
        shell.type("echo status $?\n")
        shell.wait_for("status 130")
        shell.type("exit\n")
        shell.end()
    lines = Screen(shell.seen, 80).text
    stopping = next(i for i, line in enumerate(lines) if line.startswith("warning: stopping: this step is finished"))
    assert re.fullmatch(r"saved step \d+; the same command goes on from here", lines[stopping + 2])
    assert lines[stopping + 3 : stopping + 5] == ["$ echo status $?", "status 130"]
    assert not any("tok/s" in line or "━" in line for line in lines)
    assert "\x1b[?25l" not in shell.seen


def test_an_error_comes_when_the_view_has_ended(watched, tmp_path):
    stream = watched()
    assert main.main(arguments(tiny_config(dataset=str(tmp_path / "none.txt")), tmp_path / "run")) == 2
    assert "reading the text" in stream.getvalue()
    assert "".join(Screen(stream.getvalue(), 80).text).startswith(f"error: config.dataset: no file '{tmp_path}/none.")
