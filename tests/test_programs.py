"""Programs that one process keeps and the next takes: when they are traced, and that they are the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, arguments, assert_one_line, losses, run_main, tiny_config

PROCESS = """if True:
    import os, sys
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
        factor = edited.FACTOR * float(os.environ.get("FACTOR", 1))
        return {"b": jax.numpy.sin(x) * factor, "a": tree["k"] - x.sum() + jax.random.uniform(tree["key"])}

    kept = programs.Kept(made_of, jax.devices())
    function = kept.of(jax.jit(scaled, donate_argnums=1), {"a": 0, "b": 0})
    for count in range(size, size + len(sys.argv) - 3):
        for _ in range(2):
            tree = {"k": jax.numpy.float32(5), "key": jax.random.key(0)}
            result = function(tree, jax.numpy.arange(count, dtype="float32"))
        before = before if count > size else len(traced)
    if not kept.is_current():
        sys.exit("not what it is traced to now")
    print(["taken", "traced"][before], result["a"], [float(x).hex() for x in result["b"]])
"""


@pytest.fixture
def start(tmp_path: Path):
    """(what it is made of, what the process is, how large, ...) -> whether it was traced or taken, and its result."""
    (tmp_path / "edited.py").write_text("FACTOR = 3\n")
    (tmp_path / "cache").mkdir()
    paths = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def start(*words: str, fails: str = "", **environment: str) -> tuple[str, str]:
        command = [sys.executable, "-B", "-c", PROCESS, *words]
        variables = os.environ | paths | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if fails:
            assert done.returncode == 1 and fails in done.stderr and done.stderr.count("\n") == 1
            return "failed", ""
        assert (done.returncode, done.stderr) == (0, "")
        first, result = done.stdout.rstrip().split(" ", 1)
        return first, result

    return start


def test_a_program_is_kept_for_the_next_process_that_runs_one_command(tmp_path, start):
    first, result = start("a", "command", "4")
    assert first == "traced"
    assert start("a", "command", "4") == ("taken", result)
    assert start("a", "notebook", "4") == ("traced", result)  # functions may have been exchanged
    assert start("b", "command", "4") == ("traced", result)  # made of something else, the same program by chance
    assert start("b", "command", "4") == ("taken", result)
    assert start("a", "command", "4", JAX_DEBUG_NANS="true") == ("traced", result)
    assert len([*tmp_path.glob("cache/program-*")]) == 1 and len([*tmp_path.glob("cache/start-*")]) == 2


@pytest.mark.once
def test_arguments_of_another_shape_are_traced_and_kept(start):
    start("a", "command", "4")
    _, result = start("c", "command", "5")
    assert start("a", "command", "5") == ("traced", result)
    assert start("a", "command", "5") == ("taken", result)
    start("a", "command", "4")
    assert start("a", "command", "4", "then one larger") == ("taken", result)


@pytest.mark.once
def test_a_changed_file_is_not_run_as_it_was(tmp_path, start):
    first, result = start("a", "command", "4")
    before = (tmp_path / "edited.py").stat()
    (tmp_path / "edited.py").write_text("FACTOR = 4\n")  # of the same size, and then of the same time
    os.utime(tmp_path / "edited.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    first, changed = start("a", "command", "4")
    assert first == "traced" and changed != result
    assert start("a", "command", "4") == ("taken", changed)


@pytest.mark.once
def test_a_file_that_only_one_of_the_processes_loads_keeps_them_apart(tmp_path, start):
    """It may have exchanged functions, and is still there, and unchanged, when the other starts."""
    patch = tmp_path / "sitecustomize.py"
    patch.write_text("import edited; edited.FACTOR = 7")
    _, patched = start("a", "command", "4")
    patch.rename(aside := tmp_path / "aside.py")
    first, plain = start("a", "command", "4")
    assert first == "traced" and plain != patched
    aside.rename(patch)
    assert start("a", "command", "4")[1] == patched


@pytest.mark.once
def test_what_no_file_tells_is_found_when_it_is_traced_again(tmp_path, start):
    """As a variable of the environment which the source reads, or a file of numbers."""
    _, result = start("a", "command", "4", FACTOR="1")
    start("a", "command", "4", FACTOR="2", fails="not what it is traced to now")
    first, changed = start("a", "command", "4", FACTOR="2")
    assert first == "traced" and changed != result
    assert start("a", "command", "4", FACTOR="2") == ("taken", changed)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["start", "program"])
def test_a_damaged_one_is_removed_and_compiled_again(tmp_path, start, kind):
    _, result = start("a", "command", "4")
    [path] = tmp_path.glob(f"cache/{kind}-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert start("a", "command", "4") == ("traced", result)
    assert path.exists() is (kind == "start")  # a program that JAX has read from its cache is not written again


@pytest.mark.once
def test_what_jax_has_read_from_its_cache_is_not_written_again(tmp_path, start):
    """With jax 0.10 to 0.12 on a CPU such a program can be written and read, and then does not run."""
    _, result = start("a", "command", "4")
    [program] = tmp_path.glob("cache/program-*")
    program.unlink()
    assert start("a", "command", "4") == ("traced", result)
    assert not program.exists()


# --- In a run -----------------------------------------------------------------------------------------------------

PATCH = """if True:
    import os
    import jax
    plain = jax.nn.logsumexp
    jax.nn.logsumexp = lambda *args, **options: float(os.environ["FACTOR"]) * plain(*args, **options)
"""


@pytest.fixture
def train(tmp_path: Path):
    """Runs `main.py train` with the changes in a new workdir, on one cache: its process, and that workdir."""
    (tmp_path / "cache").mkdir()

    def train(fails: bool = False, variables: dict[str, str] | None = None, **changes: Any) -> Path:
        workdir = tmp_path / f"run{len([*tmp_path.iterdir()])}"
        settings = {"max_steps": 4, "eval_every": 4, "log_every": 4, "report": False, "sample_every": 0} | changes
        config = tiny_config(cpu_devices="2", **settings)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")} | (variables or {})
        done = run_main(*arguments(config, workdir), **environment)
        assert done.returncode == (2 if fails else 0), done.stderr
        if fails:
            assert_one_line(done.stderr, "compiled programs", "they are removed", "start it again")
        return workdir

    return train


@pytest.mark.once
def test_runs_of_other_seeds_meshes_and_lengths_of_dispatches_take_no_program_of_each_other(train):
    """In a loop the seed is in the program, even without dropout."""
    alone = losses(train(steps_per_dispatch=1))
    for changes in ({"steps_per_dispatch": 2}, {"steps_per_dispatch": 2, "seed": 1}, {"mesh": "fsdp=2"}):
        train(**changes)
    assert losses(train(steps_per_dispatch=1)) == alone


@pytest.mark.once
def test_a_stale_program_ends_the_run_before_it_saves(tmp_path, train):
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(PATCH)
    one, two = ({"PYTHONPATH": str(tmp_path / "patch"), "FACTOR": factor} for factor in ("1", "2"))
    train(variables=one)
    workdir = train(fails=True, variables=two, log_every=4, save_every=1)
    assert not [*(workdir / "checkpoints").glob("[0-9]*")]
