"""Runs on a small disk that fills up or turns read-only. In a mount namespace of its own:

unshare --mount python tests/faults/disks.py OUT

leaves in OUT `results.json`, exit status, stderr and seconds of each case, and what the runs left, a directory each.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from helpers import arguments, tiny_config

import input_pipeline
import main
import train_lib
from runtime.checkpoints.manager import Checkpoints

NO_MOUNT = 77
OUT, DISK = Path(sys.argv[1]), Path(tempfile.mkdtemp())
FILLER = DISK / "filler"
RESULTS: dict[str, list] = {}


def fill(leave: int) -> None:
    """Somebody else's file takes the disk's space, but for `leave` bytes."""
    with FILLER.open("ab", buffering=0) as file:
        try:
            while (free := shutil.disk_usage(DISK).free) > leave:
                file.write(bytes(min(free - leave, 2**20)))
        except OSError:
            pass


def turn_read_only() -> None:
    """As a kernel does to a disk with errors, files open for writing or not: another mount covers the first."""
    cover = tempfile.mkdtemp()  # made ready elsewhere: a file that a save opens through it would keep it writable
    subprocess.run(["mount", "--bind", DISK, cover], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", cover], check=True)
    subprocess.run(["mount", "--move", cover, DISK], check=True)


@contextmanager
def captured(result: dict):
    """What C code writes to stderr too."""
    with tempfile.TemporaryFile("w+") as file:
        saved, began = os.dup(2), time.monotonic()
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            file.seek(0)
            result |= {"stderr": file.read(), "seconds": time.monotonic() - began}


def run(case: str, before_step: int = -1, action: Callable = lambda: None, **changes) -> None:
    """`main.py` with its workdir on the disk, and something happening to that before a step."""

    def prefetch(make, spans):
        for span, batch in input_pipeline.prefetch(make, spans):
            if before_step in span:
                action()
            yield span, batch

    train_lib.prefetch, result = prefetch, {}
    with captured(result):
        result["status"] = main.main(arguments(tiny_config(**changes), DISK / case))
    RESULTS.setdefault(case, []).append(result)


if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", DISK], check=False).returncode:
    sys.exit(NO_MOUNT)

run("full in mid-run", 12, lambda: fill(300_000))
FILLER.unlink()
run("full in mid-run")
shutil.move(DISK / "full in mid-run", OUT)

run("full at the last save", 28, lambda: fill(300_000), save_every=100, eval_every=100, sample_every=0)
FILLER.unlink()
shutil.rmtree(DISK / "full at the last save")

require_room = Checkpoints.require_room


def then_fill(checkpoints, count, state):
    require_room(checkpoints, count, state)
    if checkpoints.latest():
        fill(0)


Checkpoints.require_room = then_fill
run("full during a save", save_every=10, eval_every=100, log_every=100, sample_every=0)
Checkpoints.require_room = require_room
FILLER.unlink()
run("full during a save", save_every=10, eval_every=100, log_every=100, sample_every=0)
shutil.move(DISK / "full during a save", OUT)

fill(300_000)
run("full at the start")
FILLER.unlink()

run("read-only in mid-run", 12, turn_read_only)
shutil.copytree(DISK / "read-only in mid-run", OUT / "read-only in mid-run")
run("read-only at the start")

train_lib.prefetch, result = input_pipeline.prefetch, {}
with captured(result):
    workdir = f"--workdir={DISK / 'read-only in mid-run'}"
    result["status"] = max(main.main([*command, workdir]) for command in (["sample", "--num_tokens=2"], ["eval"]))
RESULTS["read-only and read from"] = [result]
(OUT / "results.json").write_text(json.dumps(RESULTS))
