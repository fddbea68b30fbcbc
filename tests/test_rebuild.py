"""Rebuilding files from packages: its parts on small inputs, and (slow, with the registry) the real thing."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from corpus import fetch, rebuild

REPOSITORY = Path(__file__).parent.parent


def fake_pip(monkeypatch, script: str):
    monkeypatch.setattr(rebuild, "_pip", lambda scratch: [sys.executable, "-c", script])


def test_package_file_is_what_pip_saved(tmp_path, monkeypatch):
    fake_pip(
        monkeypatch,
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "folder.mkdir()\n"
        "(folder / sys.argv[-1]).touch()",
    )
    assert rebuild.package_file("name==1.0", tmp_path).name == "name==1.0"


@pytest.mark.parametrize("script", ["'a warning\\nERROR: first\\nERROR: no match\\nhint: x'", "'uv: no match'"])
def test_pips_own_reason_is_passed_on(tmp_path, monkeypatch, script):
    fake_pip(monkeypatch, f"import sys; sys.exit({script})")
    with pytest.raises(rebuild.FetchError, match=r"no match$"):
        rebuild.package_file("name==1.0", tmp_path)


PLAY = r"""# The Kettle

## ACT I

### SCENE I. A kitchen.

A line before anybody speaks.

_Enter a COOK, with
a kettle_

**First Cook**  
The water sings \-- I hear it;
so lift the lid.

_[not a direction in escaped brackets_

_\[Aside]_
It burns.

**MAID & COOK**  
_\[Aside, both]_
Nobody hears this.
Nor this.

_Exeunt_

### SCENE II. A yard.

**MAID**  
Is it cold here?

_
Thunder_

Then home.
"""


def test_spoken_lines():
    first = ["First Cook:", "The water sings -- I hear it;", "so lift the lid.", "It burns.", "", "MAID:"]
    second = ["", "MAID:", "Is it cold here?", "Then home.", ""]
    assert list(rebuild.spoken_lines(PLAY)) == first + second
    assert list(rebuild.spoken_lines(PLAY, "THE KETTLE")) == [*first, "THE KETTLE", *second]


def runs_without_pip(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """In an environment that has the packages of this one but pip, as uv makes them."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    (tmp_path / "packages").mkdir()
    for path in Path(sysconfig.get_path("platlib")).iterdir():
        if not path.name.startswith("pip"):
            (tmp_path / "packages" / path.name).symlink_to(path)
    command = [str(tmp_path / "bare" / "bin" / "python"), "-c", code]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "packages")}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow  # needs the package registry
@pytest.mark.parametrize("has_pip", [True, False])
def test_tiny_shakespeare_is_rebuilt_byte_for_byte(tmp_path, has_pip):
    code = (
        f"import pathlib; from corpus import rebuild; print(rebuild.tiny_shakespeare(pathlib.Path({str(tmp_path)!r})))"
    )
    if has_pip:
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    else:
        done = runs_without_pip(code, tmp_path)
    if "FetchError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    text = Path(done.stdout.strip()).read_bytes()
    assert hashlib.sha256(text).hexdigest() == fetch.DATASETS["tiny_shakespeare"].sha256


def test_bpe_ranks(tmp_path, monkeypatch):
    encoder = tmp_path / "encoder.json"
    encoder.write_text(json.dumps({"Ġa": 2, "!": 0, "Ċ": 1, "<|endoftext|>": 3}))
    monkeypatch.setattr(rebuild, "wheel_member", lambda *_: encoder)
    tokens = [(b"!", 0), (b"\n", 1), (b" a", 2), (b"  ", 4), (b"   ", 5)]
    for extra_spaces, expected in ((0, tokens[:3]), (2, tokens)):
        lines = rebuild.bpe_ranks(extra_spaces, tmp_path).read_text().splitlines()
        assert [(base64.b64decode(line.split()[0]), int(line.split()[1])) for line in lines] == expected
