"""Other versions of JAX: what the product rests on that is not promised, and what it does where that is missing."""

import json
import re
import subprocess

import jax
import numpy as np
import pytest
from helpers import ROOT, losses, tiny_config, train_until

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
        body = lambda i, xy: xla.settle((xy[1] * i, xla.settle(jax.numpy.cos(xy[0]))))
        return jax.lax.fori_loop(0, 3, body, (x, x))

    have = jax.jit(program, compiler_options=xla.compiler_options())(jax.numpy.arange(3.0))
    want = jax.jit(program)(jax.numpy.arange(3.0))
    for mine, theirs in zip(have, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_where_jax_does_not_tell_whether_it_is_awake_it_counts_as_asleep(monkeypatch):
    monkeypatch.delattr("jax._src.xla_bridge.backends_are_initialized")
    assert not devices._awake()


def test_where_jax_does_not_tell_processes_apart_a_single_one_runs_and_several_are_refused(monkeypatch):
    monkeypatch.delattr("jax._src.distributed.global_state")
    assert (processes.process_id(), processes.num_processes()) == (0, 1)
    with pytest.raises(UserError, match=r"^jax [\d.]+: does not tell one process from another; [^\n]*$"):
        distributed._connect("127.0.0.1:1", 2, 0, 1, pytest.fail)


def test_a_run_says_that_it_goes_on_under_other_versions(tmp_path, capsys):
    """To the same losses as ever, since the checkpoint is the same."""
    config, whole, cut = tiny_config(max_steps=8), tmp_path / "whole", tmp_path / "cut"
    train_lib.train(config, whole)
    train_until(6, config, cut)
    saved = json.loads((cut / run_lib.CONFIG_FILE).read_text())
    saved["packages"] |= {"jax": "0.0.1", "numpy": "1.0"}  # numpy draws the batches, by methods that never change
    (cut / run_lib.CONFIG_FILE).write_text(json.dumps(saved))
    capsys.readouterr()
    train_lib.train(config, cut)
    said = [line for line in capsys.readouterr().err.splitlines() if "versions" in line]
    change = f"jax 0.0.1, now {jax.__version__}"
    assert said == [f"warning: other versions than in the session before ({change}): the last bits may differ"]
    assert losses(cut) == losses(whole)
    assert run_lib.other_versions(cut) == ""


@pytest.mark.parametrize("text", ["", "[]", '{"packages": 1}', '{"packages": {}}', '{"config": {}}'])
def test_a_run_without_a_record_of_versions_has_none(tmp_path, text):
    (tmp_path / run_lib.CONFIG_FILE).write_text(text)
    assert run_lib.other_versions(tmp_path) == ""
