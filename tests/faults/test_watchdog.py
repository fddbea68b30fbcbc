"""A run that hangs ends in time, and says where it hung."""

import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT, arguments, assert_one_line, finished_run, losses, run_patched, tiny_config

import main
from runtime import watchdog

HANGS = {
    "python": "time.sleep(60)",
    "c code": "ctypes.CDLL(None).sleep(60)",  # as a collective that waits for a peer: outside of the interpreter
    "lock": "lock.acquire()",
}


def watch(tmp_path, *lines: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A process under a watchdog of half a second that runs `lines`, and how long it took from there."""
    code = f"""if True:
        import ctypes, threading, time
        from pathlib import Path
        from runtime.watchdog import Watchdog
        lock = threading.Lock()
        lock.acquire()
        with Watchdog(Path({str(tmp_path)!r}), 0.5) as watchdog:
    """ + "".join(f"        {line}\n    " for line in lines)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize("hang", HANGS)
def test_a_hang_is_ended_with_all_stacks_written(tmp_path, hang):
    done, _ = watch(tmp_path, "watchdog.beat()", "def stuck():", f"  {HANGS[hang]}", "stuck()")
    assert (done.returncode, done.stdout) == (6, "")
    (path,) = tmp_path.glob("hang-*.txt")
    assert_one_line(done.stderr, f"error: {path}: no step was finished in 0.5 s", "config.watchdog_seconds")
    stacks = path.read_text()
    assert "in stuck" in stacks and stacks.count("Thread 0x") >= 2  # the main one, and the watchdog's own


def test_what_may_take_long_is_no_hang(tmp_path):
    done, seconds = watch(
        tmp_path,
        "time.sleep(0.8)",  # before the first step: it compiles
        "for _ in range(8): watchdog.beat(); time.sleep(0.1)",
        "with watchdog.pause(): time.sleep(0.8)",
        "print('alive')",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "") and seconds > 2.4
    assert os.listdir(tmp_path) == []


def test_after_a_pause_it_watches_again(tmp_path):
    done, _ = watch(tmp_path, "watchdog.beat()", "with watchdog.pause(): pass", "time.sleep(60)")
    assert done.returncode == 6


def test_a_process_that_was_stopped_has_not_hung(tmp_path):
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    code = "from pathlib import Path\nfrom runtime.watchdog import Watchdog\nimport time\n"
    code += f"with Watchdog(Path({str(tmp_path)!r}), 0.8) as watchdog:\n watchdog.beat()\n {stop}\n time.sleep(0.2)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        time.sleep(1.5)  # longer than a step may take
        process.send_signal(18)  # SIGCONT
        assert process.wait(20) == 0 and process.stderr.read() == b""


def test_nowhere_to_write_is_no_reason_to_stay(tmp_path):
    done, _ = watch(tmp_path / "gone", "watchdog.beat()", "time.sleep(60)")
    assert done.returncode == 6
    assert_one_line(done.stderr, "gone/hang-")


def test_each_of_several_processes_leaves_its_stacks(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr(watchdog, "exit_at_once", errors.append)
    monkeypatch.setattr(watchdog, "num_processes", lambda: 2)
    monkeypatch.setattr(watchdog.time, "strftime", lambda *_: "TIME")  # both hang in the same second
    for number in range(2):
        monkeypatch.setattr(watchdog, "process_id", lambda number=number: number)
        watchdog.Watchdog(tmp_path, 5)._end()
    assert sorted(os.listdir(tmp_path)) == ["hang-TIME-0.txt", "hang-TIME-1.txt"]
    assert [f"hang-TIME-{i}.txt: no step" in str(error) for i, error in enumerate(errors)] == [True, True]


def test_a_data_loader_that_hangs_ends_the_run_and_the_next_one_goes_on(tmp_path):
    hang = """if True:
        import time, input_pipeline, train_lib
        class Stuck(input_pipeline.Batches):
            def __call__(self, index):
                if index == 17: time.sleep(100)
                return super().__call__(index)
        train_lib.Batches = Stuck
    """
    config = tiny_config(watchdog_seconds=2, sample_every=0)
    done = run_patched(hang, *arguments(config, tmp_path))
    assert done.returncode == 6
    assert_one_line(done.stderr, str(tmp_path), "no step was finished in 2 s")
    (path,) = tmp_path.glob("hang-*.txt")
    assert "__call__" in path.read_text()
    assert main.main(arguments(config, tmp_path)) == 0
    assert losses(tmp_path) == losses(finished_run().workdir)
