"""A long run that is killed again and again ends in the same bits as one that nobody touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, arguments, assert_same_state, losses, tiny_config

import main
import train_lib


def end_the_same_after(kills: int, steps: int, tmp_path: Path) -> dict[str, int]:
    """Kill a run so often, and compare it with one of so many steps that nobody touched."""
    changes = {
        "save_every": 40,
        "eval_every": 500,
        "eval_tokens": 512,
        "log_every": 10,
        "sample_every": 0,
        "spike_sigmas": 0.0,
    }
    config = tiny_config(max_steps=steps, **changes)
    reference = train_lib.train(config, tmp_path / "reference")
    script = [sys.executable, str(ROOT / "tests" / "faults" / "kills.py"), str(kills), "0", str(steps)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*script, *arguments(config, tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # not even a warning of damage
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{told}")
    assert (told["kills"], told["status"]) == (kills, 0)
    assert losses(tmp_path / "run") == losses(reference.workdir)
    samples = [(path / "samples.txt").read_text() for path in (tmp_path / "run", reference.workdir)]
    assert samples[0] == samples[1]
    assert_same_state(tmp_path / "run", reference, config, steps)
    names = [sorted(p.name for p in (path / "checkpoints").iterdir()) for path in (tmp_path / "run", reference.workdir)]
    assert names[0] == names[1]
    assert main.main(["verify", f"--workdir={tmp_path / 'run'}"]) == 0
    return told


@pytest.mark.once
def test_two_kills_at_random_times(tmp_path):
    end_the_same_after(2, 300, tmp_path)


@pytest.mark.slow
def test_a_hundred_kills_at_random_times(tmp_path):
    told = end_the_same_after(100, 20_000, tmp_path)
    assert told["in_a_save"] >= 10, told
