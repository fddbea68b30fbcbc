"""Run directories that anybody may have sent, damaged in any way, under every command that reads them."""

import contextlib
import faulthandler
import io
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from damage import damage_run, snapshot
from helpers import arguments, tiny_config

import config_lib
import main
import train_lib
from commands import sweep
from runtime.files import write_json

SEED, PAIRS, SECONDS = 20261129, 2000, 10
COMMANDS = (  # in turn; those that draw and that train take longest
    *("compare", "eval", "sample", "verify", "export", "report", "compare"),
    *("eval", "sample", "verify", "export", "sweep", "sample", "verify"),
)
FINE = {0, 2, 3}
SMALL = {"max_steps": 15, "report": True, "sample_every": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def make_place(place: Path) -> Path:
    """A finished run `sound` as a sweep has it, and what does not belong to it, `outside`."""
    config = tiny_config(**SMALL)
    train_lib.train(config, place / "sound")
    write_json(place / "sound" / sweep.FINISHED_FILE, config_lib.to_dict(config))
    (place / "outside" / "deleted").mkdir(parents=True)
    (place / "outside" / "mine").write_text("mine")
    return place


def command_line(command: str, run: Path, place: Path, rng: random.Random) -> list[str]:
    """A command that reads the run, and writes nowhere but into it and `out`."""
    out = f"--out={place / 'out'}"
    if command == "compare":
        return [command, str(run), str(place / "sound"), out]
    if command == "sweep":
        return [command, *arguments(tiny_config(**SMALL), run.parent)]
    more = {
        "sample": ["--prompt=My", "--num_tokens=2"],
        "eval": [],
        "export": [out, f"--format={rng.choice(['hf', 'safetensors'])}"],
    }.get(command, [])
    return [command, f"--workdir={run}", *more]


def run_one(number: int, place: Path) -> tuple[str, int, str]:
    """One pair: what was done, the status, and what is wrong with that, if anything."""
    rng = random.Random(f"{SEED} {number}")
    command, grid = COMMANDS[number % len(COMMANDS)], place / "grid"
    for left in (grid, place / "out"):
        shutil.rmtree(left, ignore_errors=True)
    run = Path(shutil.copytree(place / "sound", grid / "seed=0", symlinks=True))
    done = f"{number}: {command}: {damage_run(run, place / 'outside', rng)}"
    others = lambda: (
        snapshot(place / "sound"),
        snapshot(place / "outside"),
        {p.name for p in place.iterdir()} - {"out"},
    )
    before, began, output = others(), time.process_time(), io.StringIO()
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)  # of what waits for ever; capsys has no fd
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
            status = main.main(command_line(command, run, place, rng))
    except BaseException:
        return done, -1, traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds, lines = time.process_time() - began, output.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    most = 2 if command == "sweep" else 1  # that of the run, and its own
    wrong = {
        f"status {status}": status not in FINE or bool(status) != bool(errors) or len(errors) > most,
        "more than lines": any(not line.startswith(("error: ", "warning: ")) for line in lines),
        "touched what is not its own": others() != before,
        f"computed for {seconds:.1f} s": seconds > SECONDS,
    }
    return (
        done,
        status,
        "; ".join([*(what for what, so in wrong.items() if so), *(lines if any(wrong.values()) else [])]),
    )


def run_many(numbers: range, place: Path, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """The statuses of many pairs, none of which went wrong."""
    monkeypatch.setattr(sweep, "run_child", lambda command: (main.main(command[2:]), None))  # no process of its own
    found = [run_one(number, place) for number in numbers]
    assert [(done, wrong) for done, _, wrong in found if wrong] == []
    return Counter(status for _, status, _ in found)


@pytest.mark.once
def test_some_commands_on_some_damaged_directories(place, monkeypatch):
    assert set(run_many(range(len(COMMANDS)), place, monkeypatch)) <= FINE


@pytest.mark.slow
def test_two_thousand_pairs_of_a_command_and_a_damaged_directory(place, capsys, monkeypatch):
    began = time.monotonic()
    found = run_many(range(PAIRS), place, monkeypatch)
    with capsys.disabled():
        print(f"\n{PAIRS} damaged directories in {time.monotonic() - began:.0f} s, by status: {dict(found)}")
    assert all(found[status] > PAIRS / 20 for status in FINE)
