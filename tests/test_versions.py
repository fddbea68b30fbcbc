"""Other versions of JAX: what the product rests on that is not promised, and what it does where that is missing."""

import dataclasses
import re
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import ROOT, losses, tiny_config, train_until

import config_lib
import run_lib
import train_lib
from runtime import devices, distributed, processes
from runtime.errors import UserError
from transformer import xla

PAGE = (ROOT / "docs" / "versions.md").read_text()


def test_the_page_lists_every_file_that_reaches_into_jax():
    """`jax._src` and options of XLA by their internal names."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    product = [path for path in tracked.split() if not path.startswith(("tests/", "benchmarks/"))]
    private = [path for path in product if re.search(r"jax\._src|xla_[a-z]+_[a-z]+", (ROOT / path).read_text())]
    assert private and [path for path in private if f"`{path}`" not in PAGE] == []


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="barriers are for CPUs")
def test_where_xla_knows_an_option_no_more_programs_are_compiled_without(monkeypatch):
    assert xla.compiler_options() is not None  # of this version: without them steps are slow
    assert not xla._compiles({"xla_option_that_is_gone": True})
    monkeypatch.setattr(xla, "_compiles", lambda options: False)
    assert xla._options_for_cpu.__wrapped__() is None


def test_barriers_compile_in_a_loop_that_is_small():
    """jaxlib 0.12 hands such loops to a code generator that ends the process on a tuple's barrier."""

    def program(x):
        body = lambda i, xy: xla.materialize((xy[1] * i, xla.materialize(jax.numpy.cos(xy[0]))))
        return jax.lax.fori_loop(0, 3, body, (x, x))

    have = jax.jit(program, compiler_options=xla.compiler_options())(jax.numpy.arange(3.0))
    want = jax.jit(program)(jax.numpy.arange(3.0))
    for mine, theirs in zip(have, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_where_jax_does_not_tell_processes_apart_a_single_one_runs_and_several_are_refused(monkeypatch):
    monkeypatch.delattr("jax._src.distributed.global_state")
    assert (processes.process_id(), processes.num_processes()) == (0, 1)
    with pytest.raises(UserError, match=r"^jax [\d.]+: does not tell one process from another; [^\n]*$"):
        distributed._connect("127.0.0.1:1", 2, 0, 1, pytest.fail)


def test_a_run_says_what_decides_its_bits_and_is_not_as_before(tmp_path, capsys, monkeypatch):
    """To the same losses as ever here, since the checkpoint is the same and a run without dropout draws nothing."""
    config, whole, cut = tiny_config(max_steps=8, sample_every=0), tmp_path / "whole", tmp_path / "cut"
    train_lib.train(config, whole)
    with monkeypatch.context() as patch:
        real = devices.metadata.version
        patch.setattr(devices.metadata, "version", lambda name: "0.0.1" if name == "jax" else real(name))
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true --xla_dump_to=/nowhere")
        train_until(6, config, cut)
    said = lambda: [line for line in capsys.readouterr().err.splitlines() if "session before" in line]
    assert said() == []
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        seed_offset = jax.config.jax_random_seed_offset
        jax.config.update("jax_random_seed_offset", 7)
        try:
            train_until(7, config, cut)
        finally:
            jax.config.update("jax_random_seed_offset", seed_offset)
    changes = f"jax 0.0.1, now {jax.__version__}; jax_random_seed_offset 0, now 7; "
    changes += "XLA_FLAGS --xla_cpu_enable_fast_math=true, now unset"
    line = "warning: not as in the session before: {}; the numbers will differ (docs/exactness.md)"
    assert said() == [line.format(changes)]
    monkeypatch.setenv("XLA_FLAGS", "")
    train_lib.train(config, cut)
    assert said() == [line.format("jax_random_seed_offset 7, now 0")]
    assert losses(cut) == losses(whole)
    train_lib.train(tiny_config(max_steps=9, sample_every=0), cut)
    assert said() == []
    assert run_lib.load_model(cut, 9)[3]["arithmetic"]["dtype"] == "float32"


@pytest.mark.parametrize("name, value", [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_settings_of_random_numbers_are_in_the_record(name, value):
    usual = devices.arithmetic()
    jax.config.update(name, value)
    try:
        changed = devices.arithmetic()
    finally:
        jax.config.update(name, usual[name])
    assert run_lib.other_arithmetic({"arithmetic": usual}, changed) == f"{name} {usual[name]}, now {value}"


def test_where_dropout_is_on_the_devices_are_in_the_record():
    """Each draws for its own rows; without dropout their number moves no more than the last bits."""
    model = config_lib.transformer_config(tiny_config(), 20, "bfloat16")
    mesh = lambda size, data: SimpleNamespace(size=size, shape={"data": data, "fsdp": 1})
    of = lambda dropout, mesh: run_lib.arithmetic_of(dataclasses.replace(model, dropout=dropout), mesh)
    assert of(0.0, mesh(1, 1)) == of(0.0, mesh(2, 2)) and of(0.0, mesh(1, 1))["dtype"] == "bfloat16"
    changed = run_lib.other_arithmetic({"arithmetic": of(0.2, mesh(1, 1))}, of(0.2, mesh(2, 2)))
    assert changed == "dropout by one device, now by 2 of 2 devices"
    assert run_lib.other_arithmetic({"arithmetic": of(0.2, mesh(2, 1))}, of(0.2, mesh(2, 2)))


def test_a_checkpoint_without_the_record_goes_on_without_a_word():
    assert run_lib.other_arithmetic({"step": 4}, devices.arithmetic()) == ""
    assert run_lib.other_arithmetic({"arithmetic": {"jax": jax.__version__}}, devices.arithmetic()) == ""


def test_numbers_of_64_bits_are_refused():
    with jax.enable_x64(True), pytest.raises(UserError, match=r"^JAX_ENABLE_X64: [^\n]*; unset it$"):
        devices.start_jax()
