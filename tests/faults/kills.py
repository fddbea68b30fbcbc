"""python tests/faults/kills.py NUMBER SEED STEPS ARGUMENT ...

runs `main.py ARGUMENT ...` again and again, each time ended by `kill -9` at a random moment, NUMBER times in all, and
then to its end, which is at so many STEPS. Prints what happened as JSON. Each run is a fork of this process, which has
imported everything and used nothing yet: importing would take most of the time.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import orbax.checkpoint  # noqa: F401

import main
import train_lib  # noqa: F401
from commands import train  # noqa: F401

SECONDS = (0.3, 4.0)  # when a run is killed; it takes one or two until it trains


def start(argv: list[str]) -> int:
    """A run in a process of its own; its number."""
    warnings.simplefilter("ignore")  # JAX warns of forks: it has started no thread yet
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main.main(argv))
    return pid


def wait(seconds: float, metrics: Path, step: int) -> None:
    """So many seconds, or until the run has logged the step: a fast machine must not end it before the last kill."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.02)
        logged = metrics.read_bytes().splitlines() if metrics.exists() else []
        if len(logged) > 1 and json.loads(logged[-2]).get("step", 0) >= step:  # the last may be half written
            return


def kill_often(number: int, seed: int, steps: int, argv: list[str]) -> dict[str, int]:
    rng = random.Random(seed)
    workdir = Path(next(word for word in argv if word.startswith("--workdir=")).partition("=")[2])
    checkpoints = workdir / "checkpoints"
    kills = in_a_save = ended = 0
    while kills < number:
        pid = start(argv)
        wait(rng.uniform(*SECONDS), workdir / "metrics.jsonl", steps * (kills + 1) // (number + 1))
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            ended += 1
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        in_a_save += any(checkpoints.glob("*.orbax-checkpoint-tmp"))
    status = os.waitstatus_to_exitcode(os.waitpid(start(argv), 0)[1])
    return {"kills": kills, "in_a_save": in_a_save, "ended_early": ended, "status": status}


if __name__ == "__main__":
    print(json.dumps(kill_often(*map(int, sys.argv[1:4]), sys.argv[4:])))
