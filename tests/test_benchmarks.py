"""The benchmarks: their arithmetic against numbers worked out by hand, and each of them walked through in small."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SCRATCH, make_text

from benchmarks import gpu, harness, recipe, step, tables, time_to_loss
from configs import default

TINY = {"num_blocks": 1, "num_heads": 2, "embedding_dim": 16, "mlp_dim": 24, "context_len": 8, "batch_size": 4}
OVERRIDES = [f"--config.{key}={value}" for key, value in (TINY | {"newton_schulz_steps": 1}).items()]


def run_benchmark(name: str, *arguments: object) -> str:
    """What a benchmark prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def text() -> Path:
    path = SCRATCH / "benchmark_text.txt"
    path.write_text(make_text(100), encoding="utf-8")
    return path


# --- Arithmetic -----------------------------------------------------------------------------------------------------


def test_spread_is_median_and_quartiles():
    assert harness.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "low": 1.5, "high": 4.5, "count": 5}
    assert harness.spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0, "count": 1}


def test_things_compared_take_turns():
    order = []
    seconds = harness.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warmup=1)
    assert order == ["a", "b"] * 4 and {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_step_is_compared_with_that_of_an_earlier_build():
    seconds = {"here": [0.02, 0.03, 0.01], "torch eager": [0.05], step.EARLIER: [0.08, 0.06, 0.04]}
    ours, theirs, before = step.rows_of("1,16,2,24,8,4,50", seconds, rate=1e9)
    assert (ours["times as fast as the best torch"], ours[f"as {step.EARLIER}"]) == ("2.50", "3.00")
    assert theirs[f"as {step.EARLIER}"] == before[f"as {step.EARLIER}"] == ""
    assert f"as {step.EARLIER}" not in step.rows_of("1,16,2,24,8,4,50", {"here": [0.02]}, rate=1e9)[0]


def test_a_build_of_the_past_is_there_and_gone_again():
    with harness.build_of("HEAD") as place:
        assert (place / "main.py").is_file() and place != ROOT
    assert not place.exists() and str(place) not in subprocess.check_output(["git", "worktree", "list"], text=True)


def test_shares_of_a_step_are_taken_within_a_round():
    """The second round is slow for all: medians of each column alone would give other differences."""
    rows = recipe.cost_rows(
        {"Muon": [10.0, 40.0, 12.0], "AdamW": [8.0, 30.0, 9.0], "gradients alone": [5.0, 20.0, 6.0]}
    )
    assert [row["a step with Muon takes longer by (ms)"] for row in rows] == [0.0, 3.0, 6.0]
    assert [row["of that step"] for row in rows] == ["0%", "25%", "50%"]
    assert [row["ms"] for row in rows] == [12.0, 9.0, 6.0]


def test_a_ratio_is_taken_within_a_round_and_says_how_many_steps_take_as_long():
    rows = recipe.choice_rows({"base": [1.0, 2.0, 4.0], "other": [1.25, 2.5, 3.0]}, steps=10, steps_of_a_run=400)
    assert [row["ms a step"] for row in rows] == [200.0, 250.0]
    assert [row["ratio"] for row in rows] == ["1.000", "1.250"]
    assert [row["steps in the same time"] for row in rows] == [400, 320]


def test_the_best_loss_is_the_one_that_stood_on_the_disk():
    rows = [
        {"step": 10, "at": 3.0},
        {"step": 20, "val_loss": 1.9, "at": 5.0},
        {"step": 30, "val_loss": 1.7, "at": 7.0},
        {"step": 40, "val_loss": 1.8, "at": 9.0},
    ]
    cells = time_to_loss.summary({"seconds": 11.0, "rows": rows}, target=1.85)
    assert list(cells.values()) == [40, "1.7000", 30, 3.0, 11.0, 7.0]
    assert (
        time_to_loss.summary({"seconds": 2.0, "rows": rows[:1]}, 1.85)["target on the disk after (s)"] == "not reached"
    )
    assert time_to_loss.summary({"seconds": 2.0, "rows": []}, 1.85)["steps"] is None


def test_a_row_that_is_being_written_is_read_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert time_to_loss.read(path, 0, 1.0) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert time_to_loss.read(path, 1, 4.0) == [{"step": 2, "at": 4.0}]


def test_any_key_of_the_config_can_be_changed(capsys):
    base = default.get_config()
    words = [
        "--config.lr=1",
        "--config.use_muon=False",
        "--config.tokenizer=byte",
        "--config.betas=0.5,0.6",
        "--rounds=3",
    ]
    flags, config = harness.flags_of(argparse.ArgumentParser(), base, words, rounds=9)
    assert (config.lr, config.use_muon, config.tokenizer, config.betas) == (1.0, False, "byte", (0.5, 0.6))
    assert flags.rounds == 3 and set(flags.changes) == {"lr", "use_muon", "tokenizer", "betas"}
    assert base.use_muon and base.lr != 1.0
    for wrong in (
        "--config.nothing=1",
        "--config.num_blocks=two",
        "--config.num_blocks=2.5",
        "--config.use_muon=3",
        "--lr=1",
        "stray",
    ):
        with pytest.raises(SystemExit) as exit:
            harness.flags_of(argparse.ArgumentParser(), base, [wrong], rounds=9)
        assert exit.value.code == 2 and wrong in capsys.readouterr().err


def test_the_limits_of_the_gpu_call_stay_under_nine_minutes():
    assert sum(gpu.LIMITS.values()) < 9 * 60 and set(gpu.LIMITS) == set(gpu.PARTS)


@pytest.mark.once
def test_attention_that_is_wrong_stops_the_timing(monkeypatch):
    from transformer.kernels import choose

    right = choose.causal_attention
    monkeypatch.setattr(gpu, "attention_cases", lambda tiny: [{"B": 2, "T": 5, "N": 6, "K": 3, "H": 8, "window": 0}])
    gpu.gradients(tiny=True)
    monkeypatch.setattr(choose, "causal_attention", lambda *x: right(*x) * 1.02)
    with pytest.raises(SystemExit, match="wrong"):
        gpu.gradients(tiny=True)


# --- Walked through in small ----------------------------------------------------------------------------------------


def test_every_kept_result_is_a_table(capsys):
    tables.main([])
    printed = capsys.readouterr().out
    kept = sorted(harness.RESULTS.glob("*.json"))
    assert kept and printed.count("\n| --- |") == len(kept)
    for path in kept:
        result = json.loads(path.read_text())
        assert result["title"] in printed and result["machine"]["versions"]["jax"] in printed


@pytest.mark.slow
def test_the_parts_of_the_recipe(tmp_path, text):
    corpus = [f"--config.dataset={text}", "--config.val_fraction=0.4", f"--config.data_dir={tmp_path}"]
    few = ["--rounds=2", "--steps=2", "--every=2", "--muon_factors=1", "--adamw_rates=0.004", "--choices", "tied"]
    keys = [*OVERRIDES, *corpus, "--config.max_steps=4"]
    run_benchmark("recipe", *keys, *few, "--targets", 9.0, 0.1, f"--out={tmp_path}")
    rows = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert [row["config"] for row in rows["ablations_cost"]] == [recipe.ITSELF, "tied"]
    names = ["Muon", "Muon without Newton-Schulz", "AdamW", "gradients alone"]
    assert [row["step"] for row in rows["optimizer_cost"]] == names
    saved = rows["optimizer_saving"]
    assert saved and all(row["steps to 9"] == "2" and row["steps to 0.1"] == "not reached" for row in saved)


def test_an_earlier_build_is_a_ratio_of_each_seed():
    key, rows = "to the first logged step (s)", []
    for cache, seconds in (("cold", [2.0, 4.0, 3.0, 4.0, 9.0, 10.0]), ("warm", [1.0, 4.0, None, 3.0])):
        rows += [{"compile cache": cache, key: x} for x in seconds]
    assert time_to_loss.ratio(rows, key) == "cold 0.75, warm 0.25"
    assert time_to_loss.ratio([{"compile cache": "warm", key: "not reached"}] * 2, key) == "not reached"


@pytest.mark.once
def test_time_to_a_loss(tmp_path, text):
    run = ["--seeds", 5, "--caches", "cold", "--target=9", f"--out={tmp_path}"]
    keys = ["--config.max_steps=2", "--config.log_every=1", f"--config.dataset={text}", "--config.val_fraction=0.4"]
    run_benchmark("time_to_loss", *run, *keys, *OVERRIDES, f"--config.data_dir={tmp_path}")
    (row,) = json.loads((tmp_path / "time_to_loss_shakespeare_fast.json").read_text())["rows"]
    assert row["steps"] == 2 and 0 < row["target on the disk after (s)"] <= row["whole process (s)"]


def test_a_side_that_does_not_start_is_not_ready(capfd):
    with harness.workers({"side": ["benchmarks.nothing"]}) as made:
        assert made["side"].ready == ""
        with pytest.raises(SystemExit, match=r"benchmarks\.nothing ended"):
            made["side"].ask(1)
    assert "benchmarks.nothing" in capfd.readouterr().err


def test_a_row_of_decoding_has_the_first_token_s_time_and_the_rate_of_all(monkeypatch):
    pytest.importorskip("torch")
    from benchmarks import decode

    seconds = {("transformers", 1): [0.004, 0.005, 0.009], ("transformers", 8): [0.02, 0.03, 0.08]}
    seconds |= {("here", 1): [0.002, 0.001, 0.003], ("here", 8): [0.005, 0.01, 0.02]}

    class Side:
        def __init__(self, name):
            self.ready = json.dumps([[1, 2], [3, 4 + (name == "here")]])
            self.ask = lambda length: str(seconds[name, length].pop(0))

    started = lambda commands: contextlib.nullcontext({name: Side(name) for name in commands})
    monkeypatch.setattr(decode, "workers", started)
    row = decode.compare((1, 16, 2, decode.PROMPT + 8), 2, False, 3)
    assert row["first token, transformers (ms)"] == 5 and row["here (ms)"] == 2
    assert row["tokens/s, transformers"] == pytest.approx(2 * 8 / 0.03) and row["here"] == pytest.approx(2 * 8 / 0.01)
    assert row["times as fast"] == pytest.approx(4) and row["same"] == "1 of 2" and row["new tokens"] == 8


@pytest.mark.slow
def test_sides_take_turns_in_processes_of_their_own(tmp_path):
    few = ["--rounds=2", f"--out={tmp_path}"]
    run_benchmark("decode", *few, "--shape=1,16,2,24", "--batch=2")
    row, half = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert (row["precision"], half["precision"]) == ("float32", "bfloat16") and half["times as fast"] > 0
    assert row["same"] == "2 of 2" and row["new tokens"] == 8 and row["times as fast"] > 0
    run_benchmark("step", *few, "--shapes=1,16,2,24,8,4,50", "--sides", "here", "torch eager", "--block=0.05")
    ours, theirs = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert (ours["side"], theirs["side"]) == ("here", "torch eager") and theirs["ms a step"] > 0
    assert float(ours["times as fast as the best torch"]) == pytest.approx(
        theirs["ms a step"] / ours["ms a step"], abs=0.006
    )


@pytest.mark.slow
def test_all_parts_of_the_gpu_benchmark_in_small(tmp_path):
    printed = run_benchmark("gpu", "--tiny", f"--out={tmp_path}")
    assert json.loads(printed.splitlines()[-1]) == {"failed": []}
    assert {path.stem for path in tmp_path.glob("*.json")} == {f"gpu_{part}" for part in gpu.PARTS}


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path):
    """Even though the grandchild ignores all but SIGKILL and outlives its parent."""
    path = tmp_path / "pid"
    inner = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]).wait()"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_alone([sys.executable, "-c", outer], dict(os.environ), 1.5)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{path.read_text()}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended, and waits for init to collect it
            return
        time.sleep(0.02)
    assert time.monotonic() < deadline


def test_data_that_is_not_there_is_said_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for part in ("char", "enwik8"):
        _, (row,), _ = gpu.PARTS[part](tiny=False)
        assert row["outcome"].endswith("is not there: not run")


def test_gpu_parts_that_fail_or_hang_take_nothing_with_them(tmp_path, monkeypatch, capsys):
    def run(command, environment, seconds):
        part = command[3].removeprefix("--work=")
        if part == "step":
            raise subprocess.TimeoutExpired(command, seconds)
        return 3 if part == "char" else 0

    monkeypatch.setattr(gpu, "run_alone", run)
    assert gpu.main([f"--out={tmp_path}"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"failed": ["step", "char"]}
    monkeypatch.setattr(gpu, "run_alone", lambda *_: 1)
    assert gpu.main([f"--out={tmp_path}"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"failed": ["gradients"]}, "timed all the same"
