"""Training on meshes of eight simulated devices: the numbers of one device, and no more sent than must be."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import jax
import pytest
from helpers import ROOT, finished_run, rows
from jax.sharding import AbstractMesh

from transformer import sharding
from transformer.sharding import make_mesh, spec_of, undivided

MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "tensor=8", "data=2,sequence=2,tensor=2"]
# Entries of the weights of `mesh_runs.MODEL`: width 40, 8 query heads and 4 key heads of 6, hidden width 72.
MATRICES = {"query": 40 * 48, "key": 40 * 24, "value": 40 * 24, "out": 48 * 40, "up": 40 * 72, "down": 72 * 40}
BLOCKS, OUTSIDE = 2 * sum(MATRICES.values()), 65 * 40 + 16 * 40 + 40 * 65  # embedding, positions, head
STACKS = 8 * (MATRICES["query"] + MATRICES["key"] + MATRICES["out"] + MATRICES["up"] + MATRICES["down"])  # filled up


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What `mesh_runs.py` found, what the trainer printed there, and its directory."""
    directory = tmp_path_factory.mktemp("meshes")
    command = [sys.executable, str(ROOT / "tests" / "mesh_runs.py"), str(directory)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "found.json").read_text()), done.stdout, directory / "run"


@pytest.fixture(scope="module")
def found(runs):
    return runs[0]


def farthest(some, others):
    assert len(some) == len(others) > 0
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def sent(found, mesh):
    """Bytes that a device sends by kind and mesh axes."""
    result = defaultdict(float)
    for kind, axes, _, size in found[mesh]["traffic"]:
        result[kind, axes] += size
    return result


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_as_one_device(found, mesh):
    one, here = found["data=1"], found[mesh]
    assert here["born"] == one["born"]  # to the bit
    assert one["losses"][-1] < one["losses"][0] - 1.5
    assert farthest(one["losses"], here["losses"]) < 1e-5  # sums in another order; Newton-Schulz amplifies rounding
    assert here["moved"] == []  # else the second step would be compiled anew


def test_accumulation_dropout_scan_chunked_loss_and_documents_on_a_mesh(found):
    two, eight = (found[f"more: {mesh}"] for mesh in ("data=2", "fsdp=2,sequence=2,tensor=2"))  # the same rows
    assert two["losses"][-1] < two["losses"][1] - 1
    assert farthest(two["losses"], eight["losses"]) < 1e-5
    assert eight["moved"] == []


def test_who_holds_what(found):
    shards = {mesh: found[mesh]["shards"] for mesh in ["data=1", *MESHES]}
    assert shards["data=8"] == shards["data=1"]
    kinds = {
        "embedding.embedding": [65, 40],
        "head.kernel": [40, 65],
        **{f"blocks.1.attention.{name}.kernel": [40, n] for name, n in (("query", 48), ("key", 24), ("value", 24))},
        "blocks.1.attention.out.kernel": [48, 40],
        "blocks.1.mlp.up.kernel": [40, 72],
        "blocks.1.mlp.down.kernel": [72, 40],
        "blocks.1.attention_norm.scale": [40],
        "blocks.1.attention.sink": [8],
    }
    divided = {  # width, and what is of heads or hidden
        "fsdp=8": (8, 1),
        "data=2,fsdp=2,tensor=2": (2, 2),
        "tensor=8": (1, 8),
        "data=2,sequence=2,tensor=2": (1, 2),
    }
    for mesh, (width, inner) in divided.items():
        parts = {40: 40 // width, 48: 48 // inner, 24: 24 // inner, 72: 72 // inner, 65: 65}
        for name, shape in kinds.items():
            want = [parts[n] for n in shape] if len(shape) == 2 else shape
            assert shards[mesh][name] == want, (mesh, name)


def test_what_a_mesh_does_not_divide_is_whole_and_named(runs):
    found, printed, _ = runs
    assert found["tensor=8"]["whole"] == ["key_heads 4 (tensor 8)", "vocab 65 (tensor 8)"]
    assert found["fsdp=8"]["whole"] == []
    [first, second] = [line for line in printed.splitlines() if line.startswith("mesh ")]
    whole = "key_heads 2 (tensor 4), query_heads 2 (tensor 4), vocab 34 (tensor 4)"
    assert first.split(None, 1)[1] == f"fsdp=2, tensor=4; not divided, so whole on each device: {whole}"
    assert second.split(None, 1)[1] == "data=2, sequence=4"


def test_data_parallel_sends_gradients_and_what_muon_made_once(found):
    size = sent(found, "data=8")
    parameters = found["data=8"]["held"]["parameters"]
    assert size["all-reduce", "data"] == 2 * 7 / 8 * (parameters + 2 * 4)  # with the loss and its number of targets
    assert size["all-gather", "data"] == 7 / 8 * 4 * STACKS
    assert len(size) == 2  # what all devices have is not exchanged


def test_fully_sharded_sends_what_theory_says(found):
    size = sent(found, "fsdp=8")
    small = found["data=1"]["held"]["parameters"] - 4 * (BLOCKS + OUTSIDE)
    assert size["all-gather", "fsdp"] == 7 / 8 * 4 * (2 * BLOCKS + OUTSIDE)  # blocks forward and backward
    assert size["reduce-scatter", "fsdp"] == 7 / 8 * 4 * (BLOCKS + OUTSIDE)
    assert size["all-to-all", "fsdp"] == 2 * 7 / 8 * 4 * STACKS / 8  # Muon's matrices, there and back
    reduced = size["all-reduce", "fsdp"] - 2 * 7 / 8 * small
    assert 0 <= reduced < 500  # losses, norms and counters
    assert len(size) == 4


def test_tensor_parallel_sends_activations_and_no_weights(found):
    size = sent(found, "tensor=8")
    stream = 2 * 7 / 8 * 4 * 24 * 16 * 40
    megatron = 2 * 4 * stream  # two sums forward and two backward a block (arXiv:1909.08053)
    assert megatron < size["all-reduce", "tensor"] < 1.7 * megatron  # key heads are repeated, and sent back one by one
    assert size["all-to-all", "tensor"] == 2 * 7 / 8 * 4 * STACKS / 8
    weights = 7 / 8 * 4 * BLOCKS
    assert size["all-gather", "tensor"] < weights / 2
    assert len(size) == 3


@pytest.mark.parametrize("mesh", MESHES)
def test_memory_is_about_what_the_compiler_says(found, mesh):
    rule, compiled = sum(found[mesh]["held"].values()), found[mesh]["compiled"]
    assert 0.6 < rule / compiled < 1.5


def test_each_matrix_is_done_once(found):
    for spec, result in found["shared out"].items():
        assert result["right"], spec
        assert sorted(result["shapes"]) == [[1, 6, 4], [2, 2, 8]], spec  # of 5 and 9, on 8 devices


@pytest.mark.parametrize("hidden", ["muon", "normuon"])
def test_optimizers_on_a_mesh_do_as_on_one_device_and_hold_their_share(found, hidden):
    assert found["optimizers"][hidden]["apart"] < 1e-4
    assert found["optimizers"][hidden]["held"] == pytest.approx(1 / 4, rel=0.03)  # but counters and neurons


def test_a_checkpoint_of_one_mesh_is_the_same_bits_on_another(found):
    assert found["restored"] == {"fsdp=8": True, "data=1": True}


def test_a_run_goes_on_with_another_mesh(runs):
    _, printed, workdir = runs
    assert "resuming at step 9" in printed
    history, alone = rows(workdir), finished_run().history
    assert [row["step"] for row in history] == [row["step"] for row in alone]
    assert farthest([row["loss"] for row in history[:20]], [row["loss"] for row in alone[:20]]) < 1e-5
    assert Path(workdir, "samples.txt").read_text().count("--- step") == 3


def test_one_axis_of_a_mesh_splits_one_axis_of_an_array():
    mesh = AbstractMesh((2, 4, 2, 8), ("data", "fsdp", "sequence", "tensor"))
    with pytest.raises(ValueError, match="two axes of one array"):
        spec_of(("mlp", "vocab"), (64, 64), mesh)
    assert tuple(spec_of(("rows", "tokens", "mlp"), (16, 6, 24), mesh)) == (("data", "fsdp"), "sequence", "tensor")
    assert undivided({"head.kernel": jax.ShapeDtypeStruct((40, 65), "float32")}, {"tokens": 7}, mesh) == [
        "tokens 7 (sequence 2)",
        "vocab 65 (tensor 8)",
    ]


class Chip:
    """A device of one of several slices, as far as a mesh asks for it."""

    device_kind, process_index = "cpu", 0

    def __init__(self, number: int, slice_index: int, platform: str = "cpu"):
        self.id, self.slice_index, self.platform = number, slice_index, platform


def test_of_several_slices_only_data_takes_more_than_one():
    chips = [Chip(i, i // 4) for i in range(8)]
    grid = make_mesh("data=2,fsdp=2,tensor=2", devices=chips).devices
    assert [{chip.slice_index for chip in part.flat} for part in grid] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"^mesh: data=1 on 2 TPU slices; make it a multiple of their number$"):
        make_mesh("fsdp=8", devices=chips)


@pytest.mark.parametrize(
    "text, groups",
    [
        ("fsdp=8", [{0, 1}]),
        ("data=2,fsdp=4", [{0}, {1}]),
        ("data=1,fsdp=2,tensor=4", [{0, 1}]),
        ("data=4,fsdp=2", [{0}, {0}, {1}, {1}]),
    ],
)
def test_gpus_of_several_hosts_take_any_mesh(text, groups):
    """JAX numbers GPUs by process, and gives each host's the same slice."""
    grid = make_mesh(text, devices=[Chip(i, i // 4, "gpu") for i in range(8)]).devices
    assert [{chip.slice_index for chip in part.flat} for part in grid] == groups
    assert [chip.id for chip in grid.flat] == list(range(8))


def test_what_is_made_whole_again_is_not_compiled_again(monkeypatch, caplog):
    monkeypatch.setattr(sharding, "is_data_parallel", lambda mesh: False)
    mesh, compiled = make_mesh(devices=jax.devices()), []
    for x in [jax.numpy.ones(size) for size in (3, 3, 5)]:
        with jax.log_compiles(), caplog.at_level("WARNING"):
            assert sharding.whole(x, mesh).sharding.is_fully_replicated
        compiled.append("Compiling" in caplog.text)
        caplog.clear()
    assert compiled == [True, False, True]
