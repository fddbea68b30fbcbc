"""`pip install .`: one package, a command, and a run from any directory, whose data go to the user's folder."""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, make_text

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def call(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A fresh one with this product's wheel in it; what that needs is read from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # building leaves files beside it
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "data", "wandb", "build", "*.egg-info"))
    call(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}", source)
    call(sys.executable, "-m", "venv", "--without-pip", folder / "environment")
    (wheel,) = folder.glob("*.whl")
    python = folder / "environment" / "bin" / "python"
    call(*PIP, f"--python={python}", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
    assert {path.name.split("-")[0] for path in packages.iterdir()} == {"transformer_jax"}
    (packages / "needed.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "environment"


@pytest.mark.once
def test_the_command_trains_and_samples_from_another_directory(environment, tmp_path):
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    (here / "text.txt").write_text(make_text())
    changes = {**TINY, "dataset": "text.txt", "max_steps": 10, "run": "ten"}
    keys = [f"--config.{key}={value}" for key, value in changes.items()]
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")
    }
    place = {"cwd": here, "env": kept | {"XDG_CACHE_HOME": str(cache)}}
    command = environment / "bin" / "transformer-jax"
    assert "sample at step 10" in call(command, "--config=shakespeare", *keys, **place)
    assert call(command, "sample", "--workdir=runs/ten", "--prompt=A ", "--num_tokens=5", **place)
    steps = [json.loads(line)["step"] for line in (here / "runs" / "ten" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
    assert {path.name for path in here.iterdir()} == {"text.txt", "runs"}
    assert (cache / "transformer-jax" / "data").is_dir() and len(list((cache / "transformer-jax").iterdir())) > 1
