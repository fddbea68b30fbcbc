"""Odd surroundings: closed pipes, dumb terminals, other locales, missing devices, jumping clocks, too little memory."""

import itertools
import os
import pwd
import subprocess
import sys
import time

import jax
import pytest
from helpers import ROOT, arguments, assert_one_line, finished_run, losses, make_text, rows, run_main, tiny_config

import main
import train_lib
from commands import sample
from runtime import devices, programs
from runtime.errors import UserError
from training import step

KEY = "c4a5" * 10  # what a W&B key looks like


@pytest.mark.once
def test_a_reader_that_leaves_a_strange_locale_and_an_odd_workdir_stop_nothing(tmp_path):
    """`python main.py ... | head -1`, no terminal, ASCII alone, a relative workdir: blanks, umlauts, `..`, a link."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a run ü").symlink_to("elsewhere")
    (tmp_path / "text.txt").write_text(make_text() + "é☃" * 40, encoding="utf-8")
    config = tiny_config(dataset="text.txt", sample_prompt="☃", max_steps=13, use_muon=False)
    command = ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "-", sys.executable, str(ROOT / "main.py")]
    environment = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    done = subprocess.run(
        [*command, *arguments(config, "gone/../a run ü")],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == b"" and done.returncode in (0, 141)
    assert done.stdout.count(b"\n") == 1
    assert [row["step"] for row in rows(tmp_path / "elsewhere")] == list(range(1, 14))
    assert "☃" in (tmp_path / "a run ü" / "samples.txt").read_text(encoding="utf-8")
    sample = ["sample", "--workdir=a run ü", "--prompt=☃", "--num_tokens=3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *sample],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.startswith(rb"\u2603")


@pytest.mark.parametrize("platform", ["abacus", "cuda"])
def test_a_platform_that_is_not_there_is_refused_in_one_line(tmp_path, platform):
    if platform == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    done = run_main(*arguments(tiny_config(), tmp_path), JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert_one_line(done.stderr, f"error: JAX_PLATFORMS={platform}: ", "cpu", "unset it")


@pytest.mark.once
def test_a_clock_that_jumps_by_a_year_changes_nothing(tmp_path, monkeypatch):
    year, now = 365 * 86400, time.time
    jumps = itertools.cycle([0, year, -year])
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    run = train_lib.train(tiny_config(), tmp_path)
    assert losses(tmp_path) == losses(finished_run().workdir)
    stored = lambda workdir: sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert stored(tmp_path) == stored(finished_run().workdir)  # no save more or less
    assert all(row["tokens_per_second"] > 0 and row["eta_seconds"] >= 0 for row in run.history[1:])
    elapsed = [row["elapsed_seconds"] for row in run.history]
    assert elapsed == sorted(elapsed) and elapsed[-1] < 1000
    again = train_lib.train(tiny_config(max_steps=31), tmp_path)  # the newest is the one of the highest step
    assert again.history[-2]["step"] == 30


def test_a_home_that_cannot_be_written_means_no_compile_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name, value in (("JAX_COMPILATION_CACHE_DIR", ""), ("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))):
        monkeypatch.setenv(name, value)
    settings = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: settings.append(setting))
    said = []
    programs.set_up_compile_cache(said.append)
    assert settings == [] and len(said) == 1 and said[0].startswith("compiled programs are not kept: ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    programs.set_up_compile_cache(pytest.fail)
    assert ("jax_compilation_cache_dir", str(tmp_path / "new" / "transformer-jax")) in settings


def test_a_user_without_a_home_and_a_name_has_no_compile_cache(monkeypatch):
    """As in a container that was started with a number as its user."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    said = []
    programs.set_up_compile_cache(said.append)
    assert len(said) == 1 and said[0].startswith("compiled programs are not kept: HOME: not set, ")
    with sample.line_history():
        pass


PROGRAMS = """if True:
    import sys, jax
    from runtime import programs
    programs.set_up_compile_cache(lambda line: print(line, file=sys.stderr))
    found = jax.jit(lambda x: x * 3)(7.0), jax.jit(lambda x: x + 5)(7.0)
    print(*found, jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("damage", ["empty", "cut", "exchanged"])
def test_damaged_compiled_programs_are_removed_once_with_one_line(tmp_path, damage):
    """What a full disk has cut short, or somebody has exchanged: JAX would run one for the other."""

    def start() -> tuple[str, str]:
        command = [sys.executable, "-c", PROGRAMS]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    assert start() == (f"21.0 12.0 {tmp_path}\n", "")
    entries = sorted(tmp_path.glob("jit__lambda*-sealed-cache"))
    assert len(entries) == 2
    contents = [path.read_bytes() for path in entries]
    for path, own, other in zip(entries, contents, contents[::-1], strict=True):
        path.write_bytes({"empty": b"", "cut": own[: len(own) // 2], "exchanged": other}[damage])
    assert start() == (f"21.0 12.0 {tmp_path}\n", f"compiled programs in {tmp_path}: damaged ones were removed\n")
    assert start() == (f"21.0 12.0 {tmp_path}\n", "")
    assert sorted(tmp_path.glob("jit__lambda*-sealed-cache")) == entries


@pytest.mark.once
def test_a_run_with_wandb_out_of_reach_ends_well_and_keeps_the_key_to_itself(tmp_path):
    """The key is looked for in all that the run wrote, packed or not, and in all that it printed."""
    config = tiny_config(wandb_enabled=True, max_steps=8)
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    began = time.monotonic()
    done = run_main(*arguments(config, tmp_path), **environment)
    assert done.returncode == 0 and time.monotonic() - began < 90, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("warning: wandb is offline: http://127.0.0.1:9 does")
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("wandb" in path.parts for path in left) and any("checkpoints" in path.parts for path in left)
    assert not [path for path, content in left.items() if KEY.encode() in content]
    assert KEY not in done.stdout + done.stderr


# --- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, asked",
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.", "4398046511104 bytes"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 35.16GiB.\n[tf-allocator] ...", "35.16GiB"),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 4.00GiB (4294967296B) on device ordinal 0", "4.00GiB"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.89G of 15.75G hbm.", "20.89G"),
    ],
)
def test_out_of_memory_names_the_size_and_the_key_to_lower(tmp_path, monkeypatch, capsys, text, asked):
    def make_train_step(*_, **__):
        def step(*_):
            raise jax.errors.JaxRuntimeError(text)

        return step

    monkeypatch.setattr(step, "make_train_step", make_train_step)
    assert main.main(arguments(tiny_config(), tmp_path)) == 2
    error = capsys.readouterr().err
    assert_one_line(
        error, "error: config.batch_size: out of memory", f"(asked for {asked})", "config.accumulation_steps"
    )


def test_memory_that_numpy_does_not_get_is_the_same(monkeypatch):
    with (
        pytest.raises(UserError, match=r"^a: out of memory \(asked for 1\.00 TiB\); b$"),
        devices.memory_limit("a", "b"),
    ):
        raise MemoryError("Unable to allocate 1.00 TiB for an array with shape (1,)")


def test_another_error_of_the_device_is_a_bug():
    with pytest.raises(jax.errors.JaxRuntimeError), devices.memory_limit("a", "b"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")


@pytest.mark.parametrize("key, value", [("mlp_dim", 2**31 - 1), ("num_blocks", 2**31 - 1), ("batch_size", 2**31 - 1)])
def test_what_no_machine_can_hold_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, key, value):
    monkeypatch.setattr(train_lib, "make_step", None)  # what would come next, and be tried with such sizes
    assert main.main(arguments(tiny_config(**{key: value}), tmp_path)) == 2
    assert_one_line(capsys.readouterr().err, "error: config.", " GiB or more, ", key)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_refused_by_the_device(tmp_path, capsys):
    """Not simulated: XLA is asked for more than there is."""
    if jax.default_backend() != "cpu":
        pytest.skip("sized for a machine's memory")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    config = tiny_config(
        mlp_dim=50_000, batch_size=8 * memory // (4 * 16 * 50_000)
    )  # hidden values of the MLP: 8 times
    assert main.main(arguments(config, tmp_path)) == 2
    assert_one_line(capsys.readouterr().err, "error: config.batch_size: out of memory (asked for ", "bytes)")
