"""Planning: what is read from a compiled program, and the command with eight simulated devices."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import ROOT, tiny_config
from xla_flags import SOONER

import config_lib
import main
from commands.plan import MEMORY
from configs import gpt2_124m, llama_1b
from interop.models import to_theirs
from runtime.screen.text import duration, human
from training.cost import flops_per_token, parameter_counts, peak_flops
from training.traffic import axes_of_group, collectives, sent_bytes
from transformer.config import TransformerConfig

HLO = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[6,4])) -> (s32[], bf16[6,4]) {
  %gathered = bf16[24,4]{1,0} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%open_body (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %moved = f32[3]{0} collective-permute(%y), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

%branch (p: f32[5]) -> f32[5] {
  %scattered.2 = f32[5]{0} reduce-scatter(%z), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%never_called (p: f32[5]) -> f32[5] {
  %lost = f32[1000]{0} all-reduce(%z), channel_id=9, replica_groups={}, to_apply=%add
}

ENTRY %main.7 (p: f32[8]) -> f32[8] {
  %w = (s32[], bf16[6,4]{1,0}) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %o = (s32[], f32[3]{0}) while(%t), condition=%c, body=%open_body
  %i = f32[5]{0} conditional(%q, %a, %b), branch_computations={%branch, %other}
  %swap = (f32[2,3]{1,0}, /*index=1*/f32[2,3]{1,0}) all-to-all(%e, %f), channel_id=1, replica_groups={{0,4},{1,5}}
  %alone = f32[9]{0} all-reduce(%g), channel_id=6, replica_groups={{0},{1}}, to_apply=%add
  ROOT %psum = f32[10]{0} all-reduce(%swap), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops():
    assert {(c.op, c.group, c.count, c.sent, c.in_open_loop) for c in collectives(HLO, 8)} == {
        ("all-gather", (0, 2, 4, 6), 7, 7 * 24 * 4 * 2 * 3 / 4, False),
        ("collective-permute", (0, 1), 1, 12.0, True),
        ("reduce-scatter", (0, 1), 1, 20.0, False),
        ("all-to-all", (0, 4), 1, 48 / 2, False),
        ("all-reduce", tuple(range(8)), 1, 2 * 40 * 7 / 8, False),
    }


def test_what_a_collective_sends_and_among_whom():
    # Scattered and gathered again is reduced; a gather and an exchange of as much send the same.
    assert sent_bytes("all-reduce", 800, 8) == sent_bytes("reduce-scatter", 100, 8) + sent_bytes("all-gather", 800, 8)
    assert sent_bytes("all-to-all", 800, 8) == 700
    shape = {"data": 2, "fsdp": 3, "sequence": 1, "tensor": 4}
    assert axes_of_group((0, 1, 2, 3), shape) == "tensor"
    assert axes_of_group((1, 5, 9), shape) == "fsdp"
    assert axes_of_group((2, 14), shape) == "data"
    assert axes_of_group((0, 4, 8, 12, 16, 20), shape) == "data+fsdp"


def test_the_table_holds_devices_whose_peak_is_known():
    assert all(peak_flops(name) for name in MEMORY)


@pytest.mark.parametrize(("module", "theirs", "millions"), [(gpt2_124m, "gpt_oss", 123.6), (llama_1b, "llama", 1076.1)])
def test_the_large_configs_export_to_the_class_they_name(random_params, module, theirs, millions):
    config = module.get_config()
    model = config_lib.transformer_config(config, 50_257, "bfloat16", document_start=50_256)
    assert sum(parameter_counts(model).values()) / 1e6 == pytest.approx(millions, abs=0.05)
    small = replace(model, vocab_size=17, num_blocks=2, num_heads=4, num_kv_heads=2, embedding_dim=24, head_dim=6)
    small = replace(small, mlp_dim=20, dtype="float32")
    assert (
        to_theirs(small, {name: np.asarray(p) for name, p in random_params(small).items()})[0]["model_type"] == theirs
    )


def plan(*flags: str) -> subprocess.CompletedProcess:
    config = tiny_config(tokenizer="byte", batch_size=16, max_steps=1000)
    keys = ("dataset", "data_dir", "tokenizer", "batch_size", "max_steps", "num_blocks", "num_heads", "embedding_dim")
    keys += ("mlp_dim", "context_len", "cpu_devices")
    changes = [f"--config.{key}={config[key]}" for key in keys]
    command = [sys.executable, "main.py", "plan", "--config=configs/default.py", *changes, *flags]
    environment = os.environ | {"XLA_FLAGS": SOONER}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_the_plan_of_eight_devices():
    done = plan("--config.mesh=data=8", "--hardware=A100", "--mfu=0.25", "--tokens=1e12")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    model = TransformerConfig(256, 16, 1, 2, 0, 32, 0, 48)
    parameters = sum(parameter_counts(model).values())
    found = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert re.search(r"8 x A100: data=8\b", found["mesh"])
    assert float(found["parameters"].split()[1]) == pytest.approx(parameters * 4 / 1e6, abs=6e-4)
    # Gradients, loss and count of targets travel together, once; nothing else is summed.
    sent = 2 * 7 / 8 * 4 * (parameters + 2) / 1e6
    assert (
        float(found["all-reduce"].split()[1]) == pytest.approx(sent, abs=6e-4) and " 1 among 8" in found["all-reduce"]
    )
    assert "fits" in out and "does NOT" not in out
    assert all(mark in out for mark in ("exact", "rule", "compiled", "data sheet", "counted"))
    # The days: the model's FLOPs at a quarter of what eight A100s can do.
    step, run = (line for line in out.splitlines() if line.endswith("assumed"))
    seconds = flops_per_token(model) / (0.25 * 8 * 312e12)
    assert f"{human(1 / seconds)} tokens/s" in step
    assert f"1.0T tokens in {duration(1e12 * seconds)}" in run and "MFU of 25%" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mfu=1.5"], "--mfu: must be above 0 and at most 1"),
        (["--tokens=-1"], "--tokens, --devices: must not be negative"),
        (["--config.mesh=data=3", "--config.batch_size=4"], "--devices: JAX is already running with"),
        (["--config.mesh=fsdp=2,data"], "config.mesh: "),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags, message, capsys):
    jax.devices()
    assert main.main(["plan", "--config=configs/gpt2_124m.py", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.slow
def test_scale_in_small(tmp_path):
    command = ["-m", "benchmarks.scale", "--most=4", f"--out={tmp_path}", "--config.embedding_dim=96"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=240)
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    own = [row for row in rows if row["layout"] == "data"]
    assert [(row["work"], row["devices"]) for row in own] == [
        (w, n) for w in ("fixed model", "fixed work") for n in (1, 2, 4)
    ]
    assert own[0]["sent MB"] == 0 < own[1]["sent MB"] and own[0]["MB"] > own[2]["MB"]
    state = {(row["layout"], row["devices"]): row["state MB"] for row in rows}
    assert state["data", 4] == state["data", 1] and state["fsdp", 4] < 0.27 * state["fsdp", 1]
    assert [row["sequences"] for row in own] == [8, 8, 8, 2, 4, 8] and (tmp_path / "scale.png").stat().st_size > 1000
