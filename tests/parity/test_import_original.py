"""Checkpoints of the PyTorch original: model.pt and metadata.json become a run, and nothing in them is run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from original import Original, randomised
from stock import CONTEXT, V
from travel import CHAR, LIMIT, call, logits_of, refuse, text_file, torch_logits, weights_of

import run_lib

pytestmark = pytest.mark.usefixtures("encoded_texts_lie_in_scratch")

SHAPE = {"num_blocks": 2, "num_heads": 5, "embedding_dim": 20, "mlp_dim": 28}
METADATA = {"vocab_size": V, "context_len": CONTEXT, **SHAPE, "tokenizer": "char", "lr": 0.02}
NESTED = {"step": 9, "config": {"model": SHAPE, "data": {"tokenizer": "char"}}}
SINK = "Attention_Layers.sink_scalar"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return randomised(Original(V, CONTEXT, **SHAPE), seed=5)


@pytest.fixture
def importing(tmp_path):
    """Writes (what torch shall save, metadata) and gives the command that imports them into tmp_path / "run"."""

    def write(saved: object, metadata: object = METADATA) -> list[str]:
        torch.save(saved, tmp_path / "model.pt")
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        return ["import", f"--from={tmp_path}", f"--workdir={tmp_path / 'run'}", f"--dataset={text_file()}"]

    return write


def same_logits(agree, workdir: Path, model: torch.nn.Module) -> None:
    tokens_BT = np.random.default_rng(0).integers(0, V, (3, CONTEXT))
    ours, tokenizer, _, _ = run_lib.load_model(workdir)
    names = "the PyTorch original", "logits, imported"
    agree(*names, logits_of(ours, tokens_BT), torch_logits(model, tokens_BT), LIMIT)
    assert tokenizer.fingerprint == CHAR.fingerprint


def test_it_becomes_a_run_with_the_same_logits(model, importing, tmp_path, capsys, agree):
    call(capsys, *importing(model.state_dict()))
    assert run_lib.load_model(tmp_path / "run")[0].config.tie_embeddings
    same_logits(agree, tmp_path / "run", model)


def test_a_head_of_its_own_stays_one(importing, tmp_path, capsys, agree):
    untied = Original(V, CONTEXT, **SHAPE)
    untied.deembed.W_D = torch.nn.Linear(SHAPE["embedding_dim"], V, bias=False)
    randomised(untied, seed=6)
    call(capsys, *importing(untied.state_dict()))
    assert not run_lib.load_model(tmp_path / "run")[0].config.tie_embeddings
    same_logits(agree, tmp_path / "run", untied)


def compiled(state):
    return {f"_orig_mod.{name}": value for name, value in state.items()}


def with_sinks_4d(state):
    return {name: value[None, :, None, None] if SINK in name else value for name, value in state.items()}


def without_head(state):
    return {name: value for name, value in state.items() if name != "deembed.W_D.weight"}


def as_parameters(state):
    return {name: torch.nn.Parameter(value, "causal_mask" not in name) for name, value in state.items()}


@pytest.mark.parametrize("metadata", [METADATA, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("form", [compiled, with_sinks_4d, without_head, as_parameters])
def test_other_forms_of_the_file_hold_the_same_model(form, metadata, model, importing, tmp_path, capsys):
    call(capsys, *importing(model.state_dict()))
    (tmp_path / "run").rename(tmp_path / "plain")
    call(capsys, *importing(form(model.state_dict()), metadata))
    assert_same_bits(weights_of(tmp_path / "run"), weights_of(tmp_path / "plain"))
    assert run_lib.read_config(tmp_path / "run") == run_lib.read_config(tmp_path / "plain")


def test_without_sinks_metadata_says_how_many_heads(model, importing, tmp_path, capsys):
    no_sinks = {name: value for name, value in model.state_dict().items() if SINK not in name}
    refuse(capsys, importing(no_sinks, {"tokenizer": "char"}), "num_heads: cannot be told")
    call(capsys, *importing(no_sinks, NESTED))
    config = run_lib.read_config(tmp_path / "run")
    assert (config.num_heads, config.attention_sink) == (5, "none")


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["vocab_size", "context_len", *SHAPE])
def test_a_contradiction_is_named(key, model, importing, tmp_path, capsys):
    argv = importing(model.state_dict(), METADATA | {key: 3})
    refuse(capsys, argv, f"{key}: 3 in metadata.json, {METADATA[key]} by the weights")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {name: s[name] for name in s if "W_Q" not in name}, "blocks.0.Attention_Layers.W_Q.weight: missing"),
        (
            lambda s: {name: s[name] for name in s if "blocks.1.layer_norm2" not in name},
            "blocks.1.layer_norm2.weight: ",
        ),
        (lambda s: s | {"blocks.1.extra": torch.ones(2)}, "blocks.1.extra: this model has no place for it"),
        (lambda s: s | {f"blocks.1.{SINK}": torch.ones(6)}, f"blocks.1.{SINK}: its shape is (6,)"),
        (lambda s: {n.replace("blocks.1", "blocks.99999999"): s[n] for n in s}, "block 1: missing among the weights"),
        (lambda s: s | {"embed.W_E.weight": s["embed.W_E.weight"].long()}, "embed.W_E.weight: its numbers are int64"),
        (lambda s: s | {"embed.W_E.weight": s["embed.W_E.weight"] / 0}, "embed.W_E.weight: not all of its numbers"),
        (lambda s: {"model": s, "step": 3}, "holds no state_dict of tensors"),
        (lambda s: {0: torch.ones(2)}, "holds no state_dict of tensors"),
        (lambda s: torch.ones(2), "holds no state_dict of tensors"),
    ],
)
def test_what_does_not_fit_is_named(change, words, model, importing, tmp_path, capsys):
    refuse(capsys, importing(change(model.state_dict())), words)
    assert not (tmp_path / "run").exists()


class Opens:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_would_run_something_is_refused_and_not_run(model, importing, tmp_path, capsys):
    refuse(capsys, importing(model.state_dict() | {"extra": Opens(tmp_path / "created")}), "model.pt: cannot be read")
    assert not (tmp_path / "created").exists() and not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_is_named(model, importing, tmp_path, capsys, monkeypatch):
    argv = importing(model.state_dict())
    (tmp_path / "metadata.json").write_text("{")
    refuse(capsys, argv, "metadata.json: cannot be read")
    (tmp_path / "metadata.json").unlink()
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:900])
    refuse(capsys, argv, "model.pt: cannot be read")
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    refuse(capsys, argv, "model.pt: reading it needs PyTorch; pip install torch")
