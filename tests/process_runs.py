"""Runs of several processes on this machine, for the tests."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT
from xla_flags import SOONER

DEVICES = f"--xla_cpu_multi_thread_eigen=false {SOONER} --xla_force_host_platform_device_count={{}}"
# The signal comes at the step, once the save that has begun is whole; then JAX, which looks once a second, gets time.
HIT = """
import os, pathlib, signal, sys, time, input_pipeline, train_lib
workdir = next(word.partition("=")[2] for word in sys.argv if word.startswith("--workdir="))
def prefetch(make, spans):
    begun = False
    for span, batch in input_pipeline.prefetch(make, spans):
        if begun:
            time.sleep(1)
        elif {step} in span:
            begun = True
            end = time.monotonic() + 60
            while not pathlib.Path(workdir, "checkpoints", "{saved}").exists() and time.monotonic() < end:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.{name})
            time.sleep(3)
        yield span, batch
train_lib.prefetch = prefetch
"""
MAIN = "import sys, main\nsys.exit(main.main(sys.argv[1:]))"


@dataclass
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": DEVICES.format(devices), **more}


def start(argv: list[str], devices: int = 1, patch: str = "") -> subprocess.Popen[str]:
    """`main.py` in a process of its own, changed by the code `patch` beforehand."""
    command = [sys.executable, "-c", f"{patch}\n{MAIN}", *argv]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def ends(processes: list[subprocess.Popen[str]], seconds: float = 100) -> list[Ended]:
    """Wait for all; none is left behind."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def train(argv: list[str], count: int, patches: dict[int, str] | None = None, seconds: float = 100) -> list[Ended]:
    """The train command in `count` processes of a device each; `patches` by number."""
    flags = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    of = lambda i: start([*argv, *flags, f"--process_id={i}"], patch=(patches or {}).get(i, ""))
    return ends([of(i) for i in range(count)], seconds)


SRUN = """#!{python}
# Stands in for SLURM's: sets what it sets, and starts two tasks.
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
assert os.environ["SRUN_CPUS_PER_TASK"] == "5"
job = {{"SLURM_JOB_ID": "{job}", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}}
tasks = [{{**os.environ, **job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}} for i in range(2)]
sys.exit(max([task.wait() for task in [subprocess.Popen(command, env=env) for env in tasks]]))
"""


def slurm(argv: list[str], folder: Path) -> Ended:
    """launch/slurm.sh under a stand-in for `srun`; a job's number gives JAX its port."""
    srun = folder / "srun"
    srun.write_text(SRUN.format(python=sys.executable, job=free_port()))
    srun.chmod(0o755)
    env = environment(
        1, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", PYTHON=sys.executable, SLURM_CPUS_PER_TASK="5"
    )
    script = [str(ROOT / "launch" / "slurm.sh"), *argv]
    return ends(
        [subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)]
    )[0]
