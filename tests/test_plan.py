"""Planning: what is read from a compiled program, and the command with eight simulated devices."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import ROOT, tiny_config
from xla_flags import SOONER

import config_lib
import main
import run_lib
from commands.plan import MEMORY, fits, fitted, plan_step, smaller, vocabulary
from configs import gpt2_124m, llama_1b
from interop.models import to_theirs
from runtime.errors import UserError
from runtime.screen.console import Console
from runtime.screen.text import duration, human
from training.compilers import devices_of, facts_of
from training.cost import flops_per_token, parameter_counts, peak_flops
from training.traffic import axes_of_group, collectives, cycles, sent_bytes
from transformer.config import TransformerConfig
from transformer.sharding import make_mesh

HLO = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[6,4])) -> (s32[], bf16[6,4]) {
  %gathered = bf16[24,4]{1,0} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%open_body (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %cheap = f32[3] add(%y, %y), backend_config={"window_config":{"estimated_cycles":"1000"}}
  %moved = f32[3]{0} collective-permute(%y), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

%branch (p: f32[5]) -> f32[5] {
  %scattered.2 = f32[5]{0} reduce-scatter(%z), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%below (p: (s32[], f32[3])) -> pred[] {
  %bound.1 = s32[]{:T(128)} constant(6), metadata={op_name="scan"}
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%counter, %bound.1), direction=LT, metadata={op_name="lt"}
}

%told_body (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %told = f32[3]{0} all-to-all(%y), channel_id=7, replica_groups={{0,1},{2,3}}
  %made = f32[3] fusion(%y), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"20"}}
}

%fused (p: f32[3]) -> f32[3] {
  %inner = f32[3] add(%p, %p), backend_config={"window_config":{"estimated_cycles":"9"}}
}

%other (p: f32[5]) -> f32[5] {
  %dear = f32[5] add(%p, %p), backend_config={"window_config":{"estimated_cycles":"300"}}
}

%never_called (p: f32[5]) -> f32[5] {
  %lost = f32[1000]{0} all-reduce(%z), channel_id=9, replica_groups={}, to_apply=%add
}

ENTRY %main.7 (p: f32[8]) -> f32[8] {
  %w = (s32[], bf16[6,4]{1,0}) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %o = (s32[], f32[3]{0}) while(%t), condition=%c, body=%open_body
  %v = (s32[], f32[3]{0}) while(%t), condition=%below, body=%told_body
  %i = f32[5]{0} conditional(%q, %a, %b), branch_computations={%branch, %other}
  %swap = (f32[2,3]{1,0}, /*index=1*/f32[2,3]{1,0}) all-to-all(%e, %f), channel_id=1, replica_groups={{0,4},{1,5}}
  %alone = f32[9]{0} all-reduce(%g), channel_id=6, replica_groups={{0},{1}}, to_apply=%add
  ROOT %psum = f32[10]{0} all-reduce(%swap), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops():
    assert {(c.op, c.group, c.count, c.sent, c.in_open_loop, c.in_branch) for c in collectives(HLO, 8)} == {
        ("all-gather", (0, 2, 4, 6), 7, 7 * 24 * 4 * 2 * 3 / 4, False, False),
        ("collective-permute", (0, 1), 1, 12.0, True, False),
        ("all-to-all", (0, 1), 6, 6 * 12 / 2, False, False),
        ("reduce-scatter", (0, 1), 1, 20.0, False, True),
        ("all-to-all", (0, 4), 1, 48 / 2, False, False),
        ("all-reduce", tuple(range(8)), 1, 2 * 40 * 7 / 8, False, False),
    }


def test_the_cycles_of_a_fusion_are_its_own_and_those_of_a_loop_counted_as_often_as_it_runs():
    assert cycles(HLO) == {"each": 1000 + 6 * 20, "in_branch": 300}
    assert cycles(ELSEWHERE) is None


ELSEWHERE = """HloModule jit_step

%async_computation (x: f32[6]) -> f32[48] {
  ROOT %wide = f32[48]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%piece (x: bf16[4,9]) -> bf16[8,9] {
  %gather.1 = bf16[8,9]{1,0:T(8,128)S(1)} all-gather(%x), replica_groups={{0,1},{2,3}}, attributes={chain_id="3"}
}

%piece.2 (x: bf16[4,9]) -> bf16[8,9] {
  %gather.2 = bf16[8,9]{1,0:T(8,128)} all-gather(%x), replica_groups={{0,1},{2,3}}, attributes={chain_id="3"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %started = ((f32[6]), f32[48], u32[]) async-start(%p), calls=%async_computation
  %f = bf16[8,9] fusion(%p), kind=kCustom, calls=%piece
  %g = bf16[8,9] fusion(%f), kind=kCustom, calls=%piece.2
  %two = ((f32[2]{0}, bf16[5,7]{1}), (f32[4]{0}, bf16[10,7]{1})) all-gather-start(%p, %q), replica_groups=[4,2]<=[8]
  %two.done = (f32[4]{0}, bf16[10,7]{1,0}) all-gather-done(%two)
  %sum = (f32[11]{0}, f32[13]{0}) all-reduce-start(%a, %b), replica_groups={{0,3},{1,2}}, to_apply=%add
  %sum.done = (f32[11]{0}, f32[13]{0}) all-reduce-done(%sum)
  %swap = ((f32[8,3]{1,0}), f32[8,3]{1,0}) all-to-all-start(%c), replica_groups={{0,4},{1,5}}, dimensions={0}
  %moved = (f32[17]{0}, f32[17]{0}, u32[], u32[]) collective-permute-start(%d), source_target_pairs={{1,0},{0,1}}
  %cut = ((f32[38]{0}), f32[19]{0}) reduce-scatter-start(%e), replica_groups={{0,6},{1,7}}, to_apply=%add
  %named = f32[23] all-reduce(%h), replica_groups=mesh['a'=2,'b'=4] {'b'}, use_global_device_ids=true, to_apply=%add
  %turned = f32[29] all-reduce(%h), replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a','b'}
  %part = f32[31] all-reduce(%h), replica_groups=mesh['a'=8] {'a':(2)2}, use_global_device_ids=true, to_apply=%add
  %listed = f32[37] all-reduce(%h), replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,5,3,7) {'a'}, to_apply=%add
}
"""


def test_collectives_of_the_compilers_of_gpus_and_tpus_are_counted_once():
    assert {(c.op, c.group, c.count, c.sent) for c in collectives(ELSEWHERE, 8)} == {
        ("all-gather", tuple(range(8)), 1, 48 * 4 * 7 / 8),
        ("all-gather", (0, 1), 2, 8 * 9 * 2 / 2 + (4 * 4 + 10 * 7 * 2) / 2),  # one in two pieces, and one of two arrays
        ("all-reduce", (0, 3), 1, (11 + 13) * 4.0),
        ("all-to-all", (0, 4), 1, 8 * 3 * 4 / 2),
        ("collective-permute", (0, 1), 1, 17 * 4.0),
        ("reduce-scatter", (0, 6), 1, 19 * 4.0),
        ("all-reduce", (0, 1, 2, 3), 1, 2 * 23 * 4 * 3 / 4),
        ("all-reduce", (0, 1), 2, (29 + 37) * 4.0),
        ("all-reduce", (0, 2), 1, 31 * 4.0),
    }


BETWEEN = """HloModule jit_step

ENTRY %main (p: f32[8]) -> f32[8] {
  %part = f32[5,12]{1,0:T(8,128)} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11}}, to_apply=%add
  %s = (f32[60]{0:T(1,128)}, u32[], token[]) send(%a, %k), is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (f32[60]{0:T(1,128)}, u32[], token[]) recv(%k), is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %t = (bf16[7,9]{1,0}, u32[], token[]) send(%b, %k), frontend_attributes={_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %u = (bf16[21]{0}, u32[], token[]) send(%c, %k), frontend_attributes={_xla_megascale_target={{100000,100003,200000,200003,300000,300003}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  %v = (f32[11]{0}, u32[], token[]) send(%d, %k), frontend_attributes={_xla_megascale_target={{100000->200000},{100003->200003},{200000->300000}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %w = (f32[9]{0}, u32[], token[]) send(%e, %k), frontend_attributes={_xla_megascale_target={{100000,300000},{100003,300003}},_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501


def test_what_slices_send_to_each_other_through_their_hosts():
    between = {(c.op, c.group): (c.count, c.sent) for c in collectives(BETWEEN, 12) if c.between_slices}
    assert between == {
        ("all-reduce", (0, 4, 8)): (1, pytest.approx(2 * 60 * 4 * 2 / 3)),
        ("all-gather", (0, 4, 8)): (1, pytest.approx(7 * 9 * 2 * 2)),  # its own part, to two others
        ("all-to-all", (0, 4, 8)): (1, pytest.approx(21 * 2 * 2 / 3)),
        ("collective-permute", (0, 4)): (1, 11 * 4),
        ("all-reduce", (0, 8)): (1, 9 * 4),
    }
    (within,) = (c for c in collectives(BETWEEN, 12) if not c.between_slices)
    assert (within.group, within.sent) == ((0, 1, 2, 3), 5 * 12 * 4 * 3)


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
    # In four micro-steps gradients are summed four times; what the optimizer sends, once.
    in_four = plan("--config.mesh=data=8", "--config.batch_size=8", "--config.accumulation_steps=4").stdout
    again = {line.split()[0]: line for line in in_four.splitlines() if line.strip()}
    assert float(again["all-reduce"].split()[1]) == pytest.approx(4 * sent, abs=6e-4) and " 4 among 8" in in_four
    assert again["all-gather"] == found["all-gather"]
    # The days: the model's FLOPs at a quarter of what eight A100s can do.
    step, run = (line for line in out.splitlines() if line.endswith("assumed"))
    seconds = flops_per_token(model) / (0.25 * 8 * 312e12)
    assert f"{human(1 / seconds)} tokens/s" in step
    assert f"1.0T tokens in {duration(1e12 * seconds)}" in run and "MFU of 25%" in out


NOT_INSTALLED = "--compile_for={}: its compiler is not installed; pip install -r {}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mfu=1.5"], "--mfu: must be above 0 and at most 1"),
        (["--tokens=-1"], "--tokens, --devices: must not be negative"),
        (["--config.mesh=data=3", "--config.batch_size=4"], "--devices: JAX is already running with"),
        (["--config.mesh=fsdp=2,data"], "config.mesh: "),
        (["--fit"], "--fit: needs --compile_for"),
        (["--compile_for=H100:4", "--devices=8"], "--devices, --hardware: --compile_for names the devices"),
        (["--compile_for=H100"], "--compile_for: 'H100' names no devices; give a TPU slice (v4, v5e, "),
        (["--compile_for=V100:8"], "--compile_for: 'V100:8' names no devices"),
        (["--compile_for=H100:2x2"], "--compile_for: 'H100:2x2' names no devices"),
        (["--compile_for=cpu:0"], "--compile_for: 'cpu:0' names no devices"),
        (["--compile_for=v5e:4x4*2"], NOT_INSTALLED.format("v5e:4x4*2", "requirements-tpu-compiler.txt")),
        (["--compile_for=A100:8"], NOT_INSTALLED.format("A100:8", "requirements-gpu-compiler.txt")),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags, message, capsys, monkeypatch):
    jax.devices()
    monkeypatch.setattr("training.compilers.importlib.util.find_spec", lambda name: None)
    assert main.main(["plan", "--config=configs/gpt2_124m.py", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "options", "there"),
    [
        ("v5e:1x1", {"topology_name": "v5e:1x1", "chips_per_host_bounds": [1, 1, 1]}, 15.75 * 2**30),
        ("v5e:2x4*3", {"topology_name": "v5e:2x4", "num_slices": 3}, 15.75 * 2**30),
        ("v4:2x2x2", {"topology_name": "v4:2x2x2", "chip_config_name": "megacore"}, 30.75 * 2**30),
        ("tpu7x:2x2x1", {"topology_name": "tpu7x:2x2x1", "chips_per_host_bounds": [2, 2, 1]}, 94.75 * 2**30),
        ("H200:8", {"topology": "1x8x1"}, 141e9),
    ],
)
def test_devices_that_are_not_here_by_name(monkeypatch, name, options, there):
    asked = {}
    compilers = "training.compilers."
    monkeypatch.setattr(compilers + "importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(compilers + "os.environ", {})
    monkeypatch.setattr(
        compilers + "topologies.get_topology_desc",
        lambda **options: asked.update(options) or SimpleNamespace(devices=()),
    )
    assert devices_of(name) == ([], there)
    assert asked.pop("platform") == ("cuda" if name == "H200:8" else "tpu")
    assert ("target_config" in asked) == (name == "H200:8")
    assert "core_count: 132" in (config := asked.pop("target_config", "core_count: 132")) and "{{" not in config
    assert asked == options


def elsewhere(out: Path, *flags: str) -> int:
    """A plan in this process, for its own kind of device."""
    config = tiny_config(tokenizer="byte", batch_size=12, max_steps=1000)
    keys = ("dataset", "data_dir", "tokenizer", "batch_size", "num_blocks", "num_heads", "embedding_dim", "mlp_dim")
    changes = [f"--config.{key}={config[key]}" for key in (*keys, "context_len")]
    command = ["plan", "--config=configs/default.py", *changes, f"--compile_for=cpu:{jax.device_count()}"]
    return main.main([*command, f"--out={out}", *flags])


def test_a_plan_as_json_is_compiled_once(tmp_path, capsys):
    plans = []
    for name in ("first", "second"):
        assert elsewhere(tmp_path / name, "--config.dtype=bfloat16", "--config.use_muon=False") == 0
        plans.append(json.loads((tmp_path / name).read_text()))
    out = capsys.readouterr().out
    first, second = plans
    assert [p.pop("kept") for plan in plans for p in plan["programs"].values()] == 4 * [False] + 4 * [True]
    assert first == second and first.keys() >= {"fits", "memory_bytes", "by_rule", "attention", "changes", "config"}
    assert (
        list(first["programs"]) == ["step", "evaluation", "prefill", "decode"]
        and first["fits"]
        and first["memory_bytes"] is None
    )
    step, evaluation, prefill, decode = first["programs"].values()
    assert (
        step["peak_bytes"] == step["argument_bytes"] + step["temp_bytes"] + step["output_bytes"] - step["alias_bytes"]
    )
    state = first["by_rule"]["parameters"] + first["by_rule"]["optimizer"]
    assert state <= step["argument_bytes"] < state + 12 * 17 * 4 + 1000  # the state, the batch, counters
    assert step["donated"] == first["state_arrays"] > 20 and evaluation["donated"] == 0
    assert step["flops"] > prefill["flops"] > decode["flops"] > 0 and step["collectives"] == [] == list(step["kernels"])
    assert out.count(", at an earlier call") == 4 and " of the state's " in out


def test_fit_takes_the_first_change_that_fits_and_stops_in_time(tmp_path, monkeypatch, capsys):
    compiled = []

    def facts_of(lowered, devices):
        compiled.append(lowered)
        sizes = dict.fromkeys(("peak", "argument", "output", "alias", "temp"), 10)
        words = "Used 20.00G of 15.75G hbm"
        told = {"refused": words, "needed_bytes": 20 * 2**30} if len(compiled) < enough else {"kernels": {"k": 1}}
        sizes = {f"{name}_bytes": size for name, size in sizes.items()} if len(compiled) >= enough else {}
        return (
            told
            | sizes
            | {"compile_seconds": 1.0, "kept": False, "flops": None, "cycles": None, "donated": 3, "collectives": []}
        )

    monkeypatch.setattr("commands.plan.facts_of", facts_of)
    enough = 4
    assert elsewhere(tmp_path / "plan", "--fit") == 0
    out = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan").read_text())
    changes = {"loss_chunk": 2048, "remat": "dots", "batch_size": 6, "accumulation_steps": 2}
    assert plan["changes"] == changes and plan["fits"] and len(compiled) == 3 + 4  # the other programs too, once
    assert plan["tokens"] == 12 * 16 and {key: plan["config"][key] for key in changes} == changes
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("try ")] == [
        f"try {i} of at most 8" for i in (1, 2, 3)
    ]
    assert "it fits with --config.loss_chunk=2048 --config.remat=dots" in out
    compiled.clear()
    enough = 100
    monkeypatch.setattr("commands.plan.MOST_TRIES", 3)
    assert elsewhere(tmp_path / "plan", "--fit", "--config.batch_size=4096") == 0
    assert len(compiled) == 1 + 3 and not json.loads((tmp_path / "plan").read_text())["fits"]
    out = capsys.readouterr().out
    assert "does NOT fit: Used 20.00G of 15.75G hbm" in out and "it does not fit; the last that was tried:" in out
    compiled.clear()
    asked = "--config.micro_batch=auto", "--config.batch_size=9"
    assert elsewhere(tmp_path / "plan", "--fit", *asked) == 0  # 9 has one part that is smaller than all, and 1
    out = capsys.readouterr().out
    assert "try 3 of at most 3: --config.loss_chunk=2048 --config.remat=dots --config.batch_size=3" in out
    assert "tried: --config.micro_batch= --config.loss_chunk=2048" in out  # with it, batch_size would be refused


def test_fit_goes_on_where_a_compiler_fails_and_stops_where_nothing_helps(monkeypatch, capsys):
    tried = []

    def planned(config, *_):
        tried.append(config.remat)
        if config.remat == "dots":
            raise UserError("its compiler fails: INTERNAL")
        return first if config.remat == "block" else too_large

    first = plan_step(tiny_config(max_steps=3, batch_size=8), 256, None, make_mesh(devices=jax.devices()[:1]))
    refused = {"refused": "too large", "compile_seconds": 1.0}
    too_large, whole = (replace(first, programs=first.programs | {name: refused}) for name in ("step", "decode"))
    monkeypatch.setattr("commands.plan._planned", planned)
    found, changes = fitted(too_large, (256, None), jax.devices()[:1], 1e12, Console())
    assert found is first and changes["remat"] == "block" and tried == ["none", "dots", "dots", "dots", "block"]
    assert capsys.readouterr().out.count("INTERNAL") == 3
    assert fitted(whole, (256, None), jax.devices()[:1], 1e12, Console()) == (whole, {}) and len(tried) == 5


class Refused:
    """A program that raises when it is lowered or compiled."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def as_text(self):
        return f"module of a program that raises {self.error!r}"

    def lower(self):
        return self.go_on("lower")

    def compile(self):
        return self.go_on("compile")

    def go_on(self, name):
        if name == self.at:
            raise self.error
        return self


@pytest.mark.parametrize(
    "at, error",
    [
        ("lower", NotImplementedError("no rule for\n   'erf_inv'")),
        ("compile", jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile:\nbad layout")),
        ("compile", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.")),
    ],
)
def test_what_a_compiler_cannot_do_ends_in_its_own_words(tmp_path, monkeypatch, capsys, at, error):
    monkeypatch.setattr("commands.plan.traced", lambda *_: Refused(at, error))
    assert elsewhere(tmp_path / "plan") == 2
    words = " ".join(str(error).split())
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: cpu: its compiler fails: {words}; try another ")
    assert not (tmp_path / "plan").exists()


def test_an_answer_is_of_its_devices_and_settings(tmp_path, monkeypatch):
    """The same text for one slice of a TPU and for two is another question, and so is one under other settings."""
    monkeypatch.setattr("training.compilers.user_cache", lambda: tmp_path)
    asked = []
    monkeypatch.setattr("training.compilers._compiled", lambda lowered, devices: asked.append(devices) or {})
    program = Refused("never", ValueError(str(tmp_path)))
    on = lambda *slices: np.array(
        [SimpleNamespace(device_kind="TPU", platform="tpu", slice_index=i, coords=(0,)) for i in slices]
    )
    assert [facts_of(program, on(*slices))["kept"] for slices in ((0, 0), (0, 1), (0, 0))] == [False, False, True]
    for number, name in enumerate(("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL")):
        monkeypatch.setenv(name, "--xla_other")
        assert not facts_of(program, on(0, 0))["kept"] and len(asked) == 3 + number


def test_a_plan_whose_file_cannot_be_made_is_refused_before_it_is_made(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "not there" / "plan.json"):
        assert elsewhere(out) == 2
    assert capsys.readouterr().err.count("no file can be made there") == 2


def test_a_cache_at_an_address_makes_no_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.compilers.jax.config", SimpleNamespace(jax_compilation_cache_dir="gs://bucket/x"))
    monkeypatch.setattr("training.compilers.user_cache", lambda: tmp_path / "home")
    monkeypatch.setattr("training.compilers._compiled", lambda *_: {})
    device = SimpleNamespace(device_kind="TPU", platform="tpu")
    assert not facts_of(Refused("never", ValueError()), np.array([device]))["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_of_several_slices_only_data_takes_more_than_one():
    devices = [SimpleNamespace(slice_index=i // 4, platform="tpu") for i in range(8)]
    shape = {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    mesh = SimpleNamespace(size=8, shape=shape, devices=np.array(devices))
    assert {change.get("mesh") for change in smaller(tiny_config(batch_size=64), mesh)} == {None, "data=2,fsdp=4"}
    mesh.shape = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert {change.get("mesh") for change in smaller(tiny_config(batch_size=64), mesh)} == {None}
    mesh.devices = mesh.devices[:4]
    assert {change.get("mesh") for change in smaller(tiny_config(batch_size=64), mesh)} == {None, "fsdp=4,tensor=2"}
    with pytest.raises(UserError, match=r"^config\.mesh: data=1 on 2 TPU slices; make it a multiple"):
        config_lib.mesh_of(tiny_config(mesh="fsdp=8"), devices)


def test_one_verdict_on_memory_whoever_asks():
    told = plan_step(tiny_config(max_steps=3), 256, None, make_mesh(devices=jax.devices()))
    rule = sum(told.memory.values())
    assert told.needed == rule and fits(told, rule) and not fits(told, rule - 1)
    assert replace(told, own_compiler=True).needed not in (None, rule)
    half = replace(told, model=replace(told.model, dtype="bfloat16"))
    assert half.beside("decode") - told.beside("decode") == told.matrices > 0 == half.beside("step")


def test_a_run_from_weights_is_planned_with_their_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib, "load_tokenizer", lambda path: SimpleNamespace(vocab_size=77, eot=5))
    assert vocabulary(tiny_config(init_from=str(tmp_path), tokenizer="gpt2"), None) == (77, 5)
    assert vocabulary(tiny_config(init_from="elsewhere", tokenizer="gpt2"), None) == (50_257, 50_256)


def test_what_needs_too_much_memory_is_a_finding_with_its_sizes():
    words = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.89G of 15.75G hbm. Exceeded by 5.14G."
    found = facts_of(Refused("compile", jax.errors.JaxRuntimeError(words)), np.array(jax.devices()))
    assert (found["refused"], found["needed_bytes"]) == (words, int(20.89 * 2**30))
    assert found["available_bytes"] == int(15.75 * 2**30)


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
