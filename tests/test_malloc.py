"""The program begins anew with large pages, once and only where that changes anything, and gives memory back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import malloc

ROOT = Path(__file__).parent.parent
ON_DEMAND = "always [madvise] never\n"
START = """
import json, os, sys, types
with open(os.environ["STARTS"], "a") as file:
    print(json.dumps([os.getpid(), sys.orig_argv[1:], os.environ.get("GLIBC_TUNABLES")]), file=file)
if "PRIVILEGED" in os.environ:
    os.environ.pop("GLIBC_TUNABLES", None)
os.confstr = lambda name: "glibc 2.36"
from runtime import malloc
malloc._POLICY = os.environ["POLICY"]
for command in ("train", "sample", "eval", "sweep"):
    fake = sys.modules[f"commands.{command}"] = types.ModuleType(command)
    fake.main = lambda flags: sys.exit(f"{flags} {sys.stdin.read()}")
"""  # what Python runs at each start; the commands say what reached them


@pytest.fixture
def starts(tmp_path):
    """Runs Python on `argv`: its result, and each of its starts as [process id, arguments, GLIBC_TUNABLES]."""
    (tmp_path / "sitecustomize.py").write_text(START)
    log, policy = tmp_path / "starts", tmp_path / "enabled"

    def run(*argv: str, kernel: str = ON_DEMAND, **environment: str) -> tuple[subprocess.CompletedProcess, list[list]]:
        policy.write_text(kernel)
        ours = {malloc.SETTING, malloc._RESTARTED}
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "STARTS": str(log), "POLICY": str(policy)}
        command, environment = [sys.executable, *argv], {**inherited, **paths, **environment}
        pipes = {"input": "typed", "capture_output": True, "text": True}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=30, **pipes)
        return done, [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    "argv",
    [
        ["main.py", "--config.run=a b", "--config.dataset=*.txt"],
        [f"{ROOT}/main.py", "sample", "--prompt=\n"],
        ["-u", "-O", "main.py", "eval", ""],
        ["-m", "main", "train", "-x"],
    ],
)
def test_what_computes_begins_anew_once_as_the_same_process(argv, starts):
    done, ((pid, first, unset), (pid_again, second, setting)) = starts(*argv)
    assert pid == pid_again and first == second == argv
    assert (unset, setting) == (None, "glibc.malloc.hugetlb=1")
    flags = [word for word in argv if word not in ("-u", "-O", "-m", "train", "sample", "eval") and "main" not in word]
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{flags} typed\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["main.py", "--help"],
        ["main.py", "train", "-h"],
        ["main.py", "sweep"],  # each of its runs begins anew by itself
        ["-m", "cProfile", "main.py"],
        ["-m", "pdb", "-c", "continue", "main.py"],
        ["-c", "import main; main.main(['train'])"],
    ],
)
def test_help_other_commands_and_callers_go_on_as_they_are(argv, starts):
    done, seen = starts(*argv)
    assert len(seen) == 1 and "AttributeError" not in done.stdout + done.stderr


@pytest.mark.parametrize("decided", ["", "glibc.malloc.hugetlb=0", "glibc.malloc.arena_max=1"])
def test_who_sets_the_variable_has_decided(decided, starts):
    _, ((_, _, setting),) = starts("main.py", GLIBC_TUNABLES=decided)
    assert setting == decided


@pytest.mark.parametrize("kernel", ["[always] madvise never\n", "always madvise [never]\n", ""])
def test_nothing_where_the_kernel_decides(kernel, starts):
    assert len(starts("main.py", kernel=kernel)[1]) == 1


def test_no_loop_where_the_setting_is_kept_from_the_program(starts):
    done, (_, second) = starts("main.py", PRIVILEGED="1")
    assert done.stderr == "[] typed\n" and second[2] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "library, can", [("glibc 2.35", True), ("glibc 2.4", False), ("glibc 3.0.1", True), ("musl 2.40", False)]
)
def test_the_library_must_know_the_setting(library, can, monkeypatch, tmp_path):
    (tmp_path / "enabled").write_text(ON_DEMAND)
    monkeypatch.setattr(malloc, "_POLICY", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", lambda name: library)
    assert malloc._can_ask() is can
    monkeypatch.setattr(os, "confstr", lambda name: os.stat(tmp_path / "nowhere"))
    assert not malloc._can_ask()
    monkeypatch.delattr(os, "confstr")
    assert not malloc._can_ask()


FREED = """
import re, sys
from pathlib import Path
from runtime.malloc import give_back_freed

resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
pieces = [b"x" * 60_000 for _ in range(2_000)]
last = pieces.pop()  # what lies after them keeps glibc from giving them back by itself
del pieces
before = resident()
give_back_freed()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 80  # of 114 MiB
