"""Programs that one process keeps and the next takes: when they are traced, and that they are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PROCESS = """if True:
    import sys
    import jax
    import edited
    from runtime import processes, programs

    made_of, command, size = sys.argv[1], sys.argv[2] == "command", int(sys.argv[3])
    if command:
        processes.runs_one_command()
    programs.set_up_compile_cache(lambda line: print(line, file=sys.stderr))
    traced = []

    def scaled(tree, x):
        traced.append(1)
        return {"b": jax.numpy.sin(x) * edited.FACTOR, "a": tree["k"] - x.sum()}

    kept = programs.Kept(made_of, jax.devices())
    function = kept.of(jax.jit(scaled, donate_argnums=0), {"a": 0, "b": 0})
    for _ in range(2):
        result = function({"k": jax.numpy.float32(5)}, jax.numpy.arange(size, dtype="float32"))
    if len(sys.argv) > 4:
        result = function({"k": jax.numpy.float32(5)}, jax.numpy.arange(size + 1, dtype="float32"))
    print(len(traced), result["a"], [float(x).hex() for x in result["b"]])
"""


@pytest.fixture
def start(tmp_path: Path):
    """(what it is made of, what the process is, how large, ...) -> how often it was traced, and its result."""
    (tmp_path / "edited.py").write_text("FACTOR = 3\n")
    long_ago = 1_000_000_000
    os.utime(tmp_path / "edited.py", (long_ago, long_ago))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    (tmp_path / "cache").mkdir()

    def start(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-B", "-c", PROCESS, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        traced, result = done.stdout.rstrip().split(" ", 1)
        return int(traced), result

    return start


def test_a_program_is_kept_for_the_next_process_that_runs_one_command(tmp_path, start):
    traced, result = start("a", "command", "4")
    assert traced == 1
    assert start("a", "command", "4") == (0, result)
    assert start("a", "notebook", "4") == (1, result)  # functions may have been exchanged
    assert start("b", "command", "4") == (1, result)  # made of something else, the same program by chance
    assert start("b", "command", "4") == (0, result)
    assert len([*tmp_path.glob("cache/program-*")]) == 1 and len([*tmp_path.glob("cache/start-*")]) == 2


def test_arguments_of_another_shape_are_traced(start):
    start("a", "command", "4")
    _, result = start("c", "command", "5")
    assert start("a", "command", "5") == (1, result)
    traced, larger = start("a", "command", "4", "then one larger")
    assert (traced, larger) == (1, result)


def test_a_changed_file_is_not_run_as_it_was(tmp_path, start):
    _, result = start("a", "command", "4")
    (tmp_path / "edited.py").write_text("FACTOR = 4\n")  # of the same size
    traced, changed = start("a", "command", "4")
    assert traced == 1 and changed != result
    traced, changed = start("a", "command", "4")
    assert traced == 0 and changed != result
    (tmp_path / "sitecustomize.py").write_text("")  # one more file, which could have changed anything
    assert start("a", "command", "4") == (1, changed)
    assert start("a", "command", "4") == (0, changed)


def test_a_file_that_changes_while_the_process_runs_keeps_nothing(tmp_path, start):
    os.utime(tmp_path / "edited.py", (4_000_000_000, 4_000_000_000))
    _, result = start("a", "command", "4")
    assert not [*tmp_path.glob("cache/start-*")]
    assert start("a", "command", "4") == (1, result)


@pytest.mark.parametrize("kind", ["start", "program"])
def test_a_damaged_one_is_compiled_again(tmp_path, start, kind):
    _, result = start("a", "command", "4")
    [path] = tmp_path.glob(f"cache/{kind}-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert start("a", "command", "4") == (1, result)


def test_what_jax_has_read_from_its_cache_is_not_written_again(tmp_path, start):
    """With jax 0.10 to 0.12 on a CPU such a program can be written and read, and then does not run."""
    _, result = start("a", "command", "4")
    [program] = tmp_path.glob("cache/program-*")
    program.unlink()
    assert start("a", "command", "4") == (1, result)
    assert start("a", "command", "4") == (1, result)
    assert not program.exists()
