"""A grid of runs: which they are, where they lie, and that neither a crash nor a signal loses one."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, assert_one_line, run_main, tiny_config
from terminal import Terminal

import config_lib
import main
from commands import sweep

BASE = f"--config={ROOT / 'configs' / 'default.py'}"

# Stands in for main.py: leaves a config and rows as the trainer does. `lr` says how it ends.
STAND_IN = """
import pathlib, signal, sys, time
sys.path.insert(0, {root!r})
import json
flags = dict(word[2:].split("=", 1) for word in sys.argv[2:])
lr, seed = float(flags["config.lr"]), int(flags.get("config.seed", 0))
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
with (workdir / "calls").open("a") as file:
    file.write("called\\n")
if lr == 0.4:
    sys.exit(4)
if lr == 0.9:
    signal.raise_signal(signal.SIGKILL)
size = int(flags.get("config.num_blocks", 4))
saved = {{"config": {{"lr": lr, "seed": seed}}, "flops_per_token": 1e9 * size**3}}
(workdir / "config.json").write_text(json.dumps(saved))
row = {{"step": 1, "tokens": 10, "elapsed_seconds": 1.0, "loss": 2.0, "val_loss": lr + seed}}
(workdir / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
if lr == 0.7 and not (workdir / "stopped").exists():
    def stop(signum, frame):
        with (workdir / "stopped").open("a") as file:
            file.write(f"{{signum}}\\n")
        time.sleep(0.2)
        sys.exit(128 + signum)
    def suspend(signum, frame):  # it takes its view away first
        time.sleep(0.5)
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    signal.signal(signal.SIGTSTP, suspend)
    import os
    (workdir / "ready.part").write_text(str(os.getpid()))
    (workdir / "ready.part").rename(workdir / "ready")
    time.sleep(30)
    sys.exit("no signal came")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """The sweep's directory, with runs that take no time."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "main.py").write_text(STAND_IN.format(root=str(ROOT)))
    monkeypatch.setattr(sweep, "MAIN", tmp_path / "main.py")
    return tmp_path / "grid"


def names(*sets: str, seeds: int = 1, argv: tuple[str, ...] = ()) -> list[str]:
    return [point.name for point in sweep.grid([BASE, *argv], list(sets), seeds)]


def test_the_grid_is_every_pair_with_every_seed():
    points = sweep.grid([BASE, "--config.seed=5"], ["lr=1e-3,0.003", "use_muon=True,False"], 2)
    assert [point.name for point in points] == [
        f"lr={lr},use_muon={muon},seed={seed}" for lr in (0.001, 0.003) for muon in (True, False) for seed in (5, 6)
    ]
    assert [(p.config.lr, p.config.use_muon, p.config.seed) for p in points[:3]] == (
        [(0.001, True, 5), (0.001, True, 6), (0.001, False, 5)]
    )
    assert names(seeds=2) == ["seed=0", "seed=1"]


def test_values_that_hold_commas_are_parted_by_semicolons():
    points = sweep.grid([BASE], ["betas=0.9,0.95;0.8,0.99"], 1)
    assert [point.config.betas for point in points] == [(0.9, 0.95), (0.8, 0.99)]
    assert [p.config.betas for p in sweep.grid([BASE], ["betas=0.9,0.99"], 1)] == [(0.9, 0.99)]
    points = sweep.grid([BASE], ["sample_prompt=a,b;c"], 1)
    assert [point.config.sample_prompt for point in points] == ["a,b", "c"]


def test_directories_are_safe_short_and_tell_values_apart():
    made = names("dataset=books/*.txt,books/?.txt,../x", "sample_prompt=" + "long " * 80, seeds=2)
    assert len(set(made)) == 6
    for name in made:
        assert (
            Path(name).name == name
            and len(name) <= sweep._LONGEST_NAME
            and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+=,-")
        )
    assert made == names("dataset=books/*.txt,books/?.txt,../x", "sample_prompt=" + "long " * 80, seeds=2)
    assert made[0].removesuffix("0") == made[1].removesuffix("1")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--set=lrr=1,2"], ("--set=lrr=1,2", "unknown key", "did you mean lr?")),
        (["--set=lr"], ("--set=lr:", "KEY=VALUE")),
        (["--set=lr=0.1,fast"], ("config.lr: ", "'fast'")),
        (["--set=lr=0.1,"], ("config.lr: ", "''")),
        (["--set=lr=0.1,0"], ("config.lr: must be > 0",)),
        (["--set=num_heads=4,3"], ("config.embedding_dim: 128 is not divisible",)),
        (["--set=lr=0.1,1e-1"], ("lr=0.1,seed=0 is there twice",)),
        (["--set=lr=0.1", "--set=lr=0.2"], ("--set=lr: given twice",)),
        (["--set=seed=1,2"], ("--seeds=N",)),
        (["--seeds=0"], ("--seeds=0: 0 is not a positive integer",)),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_run(flags, words, stand_in, capsys):
    assert main.main(["sweep", BASE, f"--workdir={stand_in}", *flags]) == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert not stand_in.exists()


def calls(directory: Path) -> dict[str, int]:
    return {path.parent.name: path.read_text().count("called") for path in sorted(directory.glob("*/calls"))}


def test_crashes_are_said_and_lose_nothing_and_finished_runs_are_not_made_again(stand_in, capfd):
    argv = ["sweep", BASE, f"--workdir={stand_in}", "--set", "lr=0.4,0.9,0.5", "--seeds=2"]
    assert main.main(argv) == 4
    out, err = capfd.readouterr()
    assert "lr=0.9,seed=1: ended with status 137; the sweep goes on" in err
    assert "4 of 6 runs failed (lr=0.4,seed=0, lr=0.4,seed=1, lr=0.9,seed=0" in err
    assert "run 6 of 6: lr=0.5,seed=1" in out and "1.0000 ± 0.7071" in out  # of 0.5 and 1.5
    assert (stand_in / "compare" / "compare.html").exists()
    assert set(calls(stand_in).values()) == {1} and len(calls(stand_in)) == 6
    finished = stand_in / "lr=0.5,seed=0" / "sweep.json"  # of a build with a setting that is gone
    finished.write_text(json.dumps(json.loads(finished.read_text()) | {"cautious_decay": False}))
    assert main.main(argv) == 4
    assert "run 5 of 6: lr=0.5,seed=0: finished before" in capfd.readouterr().out
    assert [count for _, count in calls(stand_in).items()] == [2, 2, 1, 1, 2, 2]
    main.main([*argv, "--config.max_steps=9"])  # another config is not finished
    assert calls(stand_in)["lr=0.5,seed=0"] == 2


@pytest.mark.parametrize("name", ["lr=0.5,seed=0", "compare"])
def test_a_run_that_is_a_link_out_of_the_sweep_is_refused(name, stand_in, tmp_path, capsys):
    (tmp_path / "outside").mkdir()
    stand_in.mkdir()
    (stand_in / name).symlink_to(tmp_path / "outside")
    assert main.main(["sweep", BASE, f"--workdir={stand_in}", "--set=lr=0.5,0.6"]) == 2
    assert_one_line(capsys.readouterr().err, f"{stand_in / name}: a link that leads out")
    assert list((tmp_path / "outside").iterdir()) == [] and not (stand_in / "lr=0.6,seed=0").exists()


@pytest.mark.parametrize("sent, heard", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_a_signal_reaches_the_run_once_and_ends_the_sweep(sent, heard, stand_in, capfd):
    ready = stand_in / "lr=0.7,seed=0" / "ready"

    def send() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.Signals[sent])

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    argv = ["sweep", BASE, f"--workdir={stand_in}", "--set=lr=0.5,0.7,0.6"]
    assert main.main(argv) == 128 + signal.Signals[sent]
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped in run 2 of 3: lr=0.7,seed=0; the same command goes on" in capfd.readouterr().out
    assert (ready.parent / "stopped").read_text() == f"{signal.Signals[heard].value}\n"
    assert calls(stand_in) == {"lr=0.5,seed=0": 1, "lr=0.7,seed=0": 1}
    assert main.main(argv) == 0
    assert calls(stand_in) == {"lr=0.5,seed=0": 1, "lr=0.6,seed=0": 1, "lr=0.7,seed=0": 2}


def state_of(pid: int) -> str:
    """What the kernel says of a process: S sleeps, T is stopped."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout[:1]


@pytest.mark.once
@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("ps")), reason="needs a shell that stops jobs, and ps")
def test_ctrl_z_stops_the_sweep_and_its_run_and_ctrl_c_ends_both(stand_in):
    """Keys in a real terminal, which signal a whole process group, and a shell that looks after it."""
    code = "import main, pathlib; from commands import sweep; sweep.MAIN = pathlib.Path(%r); "
    argv = ["sweep", BASE, f"--workdir={stand_in}", "--set=lr=0.7,0.6"]
    code = code % str(sweep.MAIN) + f"raise SystemExit(main.main({argv}))"
    line = shlex.join([sys.executable, "-c", code])
    run = stand_in / "lr=0.7,seed=0"

    def wait_until(condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    with Terminal("bash", "--norc", "--noprofile", "-i", cwd=ROOT, PYTHONPATH=str(ROOT), PS1="$ ") as shell:
        shell.wait_for("$ ")
        shell.type(f"{line}\r")
        wait_until((run / "ready").exists)
        child = int((run / "ready").read_text())
        shell.type("\x1a")
        shell.wait_for("Stopped")
        assert state_of(child) == "T"
        shell.type("fg\r")
        wait_until(lambda: state_of(child) == "S")
        shell.type("\x03")
        shell.wait_for("stopped in run 1 of 2: lr=0.7,seed=0; the same command goes on")
        shell.type("echo status $?\r")
        shell.wait_for("status 130")
        assert (run / "stopped").read_text() == f"{signal.SIGINT.value}\n"  # once
        assert state_of(child) == "" and not (stand_in / "lr=0.6,seed=0").exists()


def test_a_runs_own_directory_is_no_sweeps(stand_in, capsys):
    stand_in.mkdir()
    (stand_in / "config.json").write_text("{}")
    assert main.main(["sweep", BASE, f"--workdir={stand_in}"]) == 2
    assert_one_line(capsys.readouterr().err, "is a run's own directory")


@pytest.mark.once
def test_a_real_sweep(tmp_path):
    """Every key that differs reaches the trainer, awkward text and pairs of numbers too."""
    quick = {"max_steps": 2, "use_muon": False, "sample_every": 0}
    config = tiny_config(**quick, sample_prompt=" A", betas=(0.8, 0.9))
    changed = sweep.command_line(config, tmp_path)[4:-1]
    done = run_main("sweep", BASE, *changed, f"--workdir={tmp_path}", "--set=keep=3")
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "keep=3,seed=0"
    saved = json.loads((workdir / "config.json").read_text())["config"]
    assert saved == config_lib.to_dict(config) | {"keep": 3}
    assert json.loads((workdir / "sweep.json").read_text()) == saved
    assert "keep=3,seed=0  " in done.stdout.split("Loss\n")[1]


# --- A list after the config file's colon -------------------------------------------------------------------------

LADDER = f"--config={ROOT / 'configs' / 'ladder.py'}"


def test_a_list_after_the_colon_is_the_slowest_axis():
    points = sweep.grid([f"{LADDER}:2,3", "--config.epochs=1"], ["muon_lr=0.02,0.03"], 2)
    assert [point.name for point in points] == [
        f"ladder={depth},muon_lr={lr},seed={seed}" for depth in (2, 3) for lr in (0.02, 0.03) for seed in (0, 1)
    ]
    middle = [(p.config.num_blocks, p.config.muon_lr, p.config.epochs) for p in points[3:5]]
    assert middle == [(2, 0.03, 1), (3, 0.02, 1)]
    split = ["--config", f"{LADDER.removeprefix('--config=')}:3,2"]
    assert [point.name for point in sweep.grid(split, [], 1)] == ["ladder=3,seed=0", "ladder=2,seed=0"]
    assert [point.name for point in sweep.grid([f"{LADDER}:3"], [], 1)] == ["seed=0"]


def test_any_config_file_with_a_text_can_be_listed_and_a_path_is_one_text(tmp_path):
    file = tmp_path / "named.py"
    text = "from configs import default\ndef get_config(text):\n    config = default.get_config()\n"
    file.write_text(f"{text}    config.sample_prompt = text\n    return config\n")
    prompts = lambda text: {p.name: p.config.sample_prompt for p in sweep.grid([f"--config={file}:{text}"], [], 1)}
    assert prompts("a,b") == {"named=a,seed=0": "a", "named=b,seed=0": "b"}
    assert list(prompts("a,b;c").values()) == ["a,b", "c"]
    run = tmp_path / "lr=1,seed=0"
    run.mkdir()
    assert prompts(str(run)) == {"seed=0": str(run)}
    made = prompts(f"{run};x/y")
    assert list(made.values()) == [str(run), "x/y"] and all(Path(name).name == name for name in made)


@pytest.mark.parametrize(
    "text, flags, words",
    [
        ("2,two", [], ("configs/ladder.py:DEPTH: a whole number", "got 'two'")),
        ("2,4,", [], ("configs/ladder.py:DEPTH: a whole number", "got ''")),
        ("2,4,2", [], ("ladder=2,seed=0 is there twice",)),
        ("2,4,6", ["--until_p=0.01"], ("--until_p: settles one question between two configs, got 3",)),
    ],
)
def test_a_list_that_cannot_be_is_refused_before_the_first_run(text, flags, words, stand_in, capsys):
    assert main.main(["sweep", f"{LADDER}:{text}", f"--workdir={stand_in}", *flags]) == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert not stand_in.exists()


def test_a_ladder_ends_in_its_law_and_a_larger_run_tests_it(stand_in, capfd):
    """The stand-in's loss is the rule's rate, a power of the depth but for rounding, and its FLOPs are depth^3."""
    ends = lambda argv: (main.main(["sweep", f"--workdir={stand_in}", *argv]), capfd.readouterr().out)[1]
    page = stand_in / "compare" / "compare.html"
    assert "alpha" not in ends([f"{LADDER}:16,25"])
    assert "alpha" not in ends([f"{LADDER}:16,25,36", "--set=muon_lr=0.02,0.03"])  # no single ladder
    out = ends([f"{LADDER}:16,25,36"])
    assert "by 3 runs of 3 sizes: A " in out and "Three runs determine no floor E" in out and "Held out" not in out
    out = ends([f"{LADDER}:16,25,36,49"])
    assert "by 4 runs of 4 sizes: E " in out and "Held out, the largest, 1.18e+15 FLOPs, is predicted" in out
    assert "Held out" in page.read_text() and "their law" in page.read_text() and "pair of the same seed" not in out
    assert (page.parent / "scaling_law.png").read_bytes().startswith(b"\x89PNG")
    assert calls(stand_in)["ladder=16,seed=0"] == 1
    assert main.main(["sweep", f"{LADDER}:16,25,36,49", f"--workdir={stand_in}", "--config.lr=0.4"]) == 4
    assert "alpha" not in capfd.readouterr().out


def test_two_depths_can_be_a_question(stand_in, capfd):
    argv = ["sweep", f"{LADDER}:2,4", f"--workdir={stand_in}", "--until_p=0.01", "--most=4"]
    assert main.main(argv) == 0
    assert "ladder=4 ends" in (out := capfd.readouterr().out) and "below ladder=2" in out


# --- Until a question is settled ----------------------------------------------------------------------------------


def test_seeds_are_added_until_the_question_is_settled(stand_in, monkeypatch, capfd):
    """Differences of 0.1 without any spread: the evidence after n pairs is ((n + 1/4) / (1/4))^((n - 1) / 2)."""
    argv = ["sweep", BASE, f"--workdir={stand_in}", "--set=lr=0.5,0.6", "--until_p=0.01"]
    assert main.main([*argv, "--most=3"]) == 0  # 13^1 = 13
    out = capfd.readouterr().out
    assert "Not settled by 3 of at most 3 pairs: lr=0.5 ends 0.1000 below lr=0.6 on the mean, p = 0.077" in out
    assert "A higher --most goes on." in (stand_in / "compare" / "compare.html").read_text()
    assert main.main(argv) == 0  # 17^1.5 = 70, 21^2 = 441
    out = capfd.readouterr().out
    assert "Settled by 5 of at most 12 pairs" in out and "run 6 of 24: lr=0.6,seed=2: finished before" in out
    assert set(calls(stand_in).values()) == {1} and len(calls(stand_in)) == 10
    assert main.main(argv) == 0 and len(calls(stand_in)) == 10
    assert "Settled by 5 of" in capfd.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--set=lr=0.5,0.6,0.7"], ("--until_p: settles one question between two configs, got 3",)),
        (["--set=lr=0.5,0.6", "--until_p=1"], ("--until_p=1", "in the range [1e-09, 0.5]")),
        (["--set=lr=0.5,0.6", "--most=0"], ("--most=0", "positive integer")),
        (["--set=lr=0.5,0.6", "--seeds=3"], ("--seeds: ", "leave it out")),
    ],
)
def test_what_is_no_question_is_refused(flags, words, stand_in, capsys):
    assert main.main(["sweep", BASE, f"--workdir={stand_in}", "--until_p=0.01", *flags]) == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert not stand_in.exists()


def test_a_pair_of_which_a_run_failed_says_nothing(stand_in, capfd):
    """Nor does the table of differences by seed, which holds for a number of seeds that was fixed beforehand."""
    assert main.main(["sweep", BASE, f"--workdir={stand_in}", "--set=lr=0.5,0.4", "--until_p=0.5", "--most=9"]) == 4
    assert len(calls(stand_in)) == 2  # more seeds could settle nothing
    assert "ettled by" not in (out := capfd.readouterr().out) and "Differences by seed" not in out
