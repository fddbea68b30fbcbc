"""Files that hold no model of ours: one line that names what does not fit, status 2, and no run is left behind."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as torch_files
import torch
from stock import stock
from travel import edit_config, edit_weights, refuse, save

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
FIRST_NORM, GATE = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.gate_proj.weight"

ONE_EXPERT = {"model_type": "gpt_oss", "num_local_experts": 1, "num_experts_per_tok": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of the Llama class, with its weights in one file and in several."""
    model, directory = stock("LlamaForCausalLM", {}), tmp_path_factory.mktemp("saved")
    save(directory / "one file", model)
    save(directory / "shards", model, max_shard_size="9KB")
    return directory


def setting(**changes):
    return lambda directory: edit_config(directory, **changes)


def weights(edit):
    return lambda directory: edit_weights(directory, edit)


def content(name, data):
    return lambda directory: (directory / name).write_bytes(data)


def cut(name):
    return lambda directory: content(name, (directory / name).read_bytes()[:-7])(directory)


def gone(name):
    return lambda directory: (directory / name).unlink()


def pipe(name):
    """Which a reader would wait for."""
    return lambda directory: (gone(name)(directory), os.mkfifo(directory / name))


def eight_bits(directory):
    """One weight in eight bits, as quantised models have them."""
    arrays = torch_files.load_file(directory / WEIGHTS)
    torch_files.save_file(arrays | {GATE: arrays[GATE].to(torch.float8_e4m3fn)}, directory / WEIGHTS)


DAMAGE = {
    "one file": [
        (weights(lambda w: {name: w[name] for name in w if name != FIRST_NORM}), f"{FIRST_NORM}: missing"),
        (weights(lambda w: w | {"model.extra.weight": w[FIRST_NORM]}), "model.extra.weight: this model has no place"),
        (weights(lambda w: w | {GATE: np.ascontiguousarray(w[GATE].T)}), f"{GATE}: its shape is (24, 40)"),
        (weights(lambda w: w | {FIRST_NORM: w[FIRST_NORM][:23]}), f"{FIRST_NORM}: its shape is (23,)"),
        (weights(lambda w: {name: np.rint(w[name]).astype(np.int32) for name in w}), "its numbers are int32"),
        (weights(lambda w: w | {GATE: (w[GATE] > 0).astype(np.uint8)}), f"{GATE}: its numbers are uint8"),
        (eight_bits, f"{GATE} is of type F8_E4M3; fetch it in float32 or bfloat16"),
        (weights(lambda w: w | {GATE: w[GATE] > 0}), f"{GATE}: its numbers are bool"),
        (weights(lambda w: w | {GATE: np.where(w[GATE] == w[GATE].max(), np.nan, w[GATE])}), f"{GATE}: not all of its"),
        (weights(lambda w: w | {GATE: w[GATE].astype(np.float64) * 1e300}), f"{GATE}: not all of its numbers are fin"),
        (weights(lambda w: {n.replace("layers.1", "layers.7"): w[n] for n in w}), "block 1: missing among the weights"),
        (setting(num_hidden_layers=10**5), "num_hidden_layers: 100000 by the config, 3 by the weights"),
        (setting(num_hidden_layers=10**9), "num_hidden_layers: 1000000000 by the config, 3 by the weights"),
        (setting(num_hidden_layers=None), "num_hidden_layers: 32 by the config, 3 by the weights"),
        (setting(tie_word_embeddings=True, vocab_size=36), "model.embed_tokens.weight: its shape is (37, 24)"),
        (weights(lambda w: {n: w[n] for n in w if n != "lm_head.weight"}), "lm_head.weight: missing"),
        (
            setting(rope_parameters={"rope_type": "yarn", "factor": 2, "mscale": -1, "mscale_all_dim": 1}),
            "mscale: must",
        ),
        (setting(model_type="mistral"), "model_type: must be one of gpt2, llama, qwen3, gpt_oss, got 'mistral'"),
        (setting(model_type=None), "model_type: must be one of"),
        (setting(**ONE_EXPERT | {"num_local_experts": 2}), "num_local_experts: must be 1, got 2"),
        (setting(rope_parameters={"rope_type": "longrope"}), "rope_type: must be default, yarn or llama3"),
        (setting(rope_parameters={"rope_theta": "high"}), "rope_theta: must be of type float, got 'high'"),
        (setting(rope_parameters=[1]), "rope_parameters: must be an object"),
        (setting(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor: must be 1"),
        (setting(rope_parameters={"full_attention": {"rope_theta": 5e5}}), "full_attention has settings of its own"),
        (setting(**ONE_EXPERT, layer_types=["linear"]), "layer_types: must be of sliding_attention, full_attention"),
        (setting(**ONE_EXPERT, layer_types=["full_attention"]), "layer_types: 1 of them for 3 layers"),
        (setting(hidden_act=["silu"]), "hidden_act: must be one of silu"),
        (setting(model_type=["llama"]), "model_type: must be one of"),
        (setting(rope_parameters=None, rope_scaling="yarn"), "rope_parameters: must be an object"),
        (setting(quantization_config={"bits": 4}), "quantization_config: "),
        (setting(hidden_act="gelu"), "hidden_act: must be one of silu"),
        (setting(hidden_size="24"), "hidden_size: must be of type int, got '24'"),
        (setting(hidden_size=None), "model.embed_tokens.weight: its shape is (37, 24)"),
        (setting(num_attention_heads=5), "num_kv_heads: 2 does not divide num_heads 5"),
        (setting(max_position_embeddings=0), "context_len: must be at least 1"),
        (setting(tie_word_embeddings=0), "tie_word_embeddings: must be of type bool, got 0"),
        (setting(rms_norm_eps=-1.0), "norm_eps: must be > 0"),
        (content("config.json", b"[]"), "holds no JSON object"),
        (content("config.json", b'{"model_type": "lla'), "config.json: cannot be read"),
        (gone("config.json"), "holds no config.json"),
        (cut(WEIGHTS), f"{WEIGHTS}: cannot be read"),
        (content(WEIGHTS, b"no weights"), f"{WEIGHTS}: cannot be read"),
        (gone(WEIGHTS), f"{WEIGHTS}: cannot be read"),
        (pipe(WEIGHTS), f"{WEIGHTS}: cannot be read"),
        (pipe("tokenizer.json"), "tokenizer.json: "),
        (cut("tokenizer.json"), "tokenizer.json: "),
        (content("tokenizer.json", b"{}"), "tokenizer.json: "),
        (content("tokenizer.json", b"\xff\xfe"), "tokenizer.json: "),
        (shutil.rmtree, "holds no config.json"),
    ],
    "shards": [
        (cut(INDEX), f"{INDEX}: cannot be read"),
        (content(INDEX, b'{"weight_map": []}'), f"{INDEX}: holds no weight_map"),
        (content(INDEX, b'{"weight_map": {"x": "y.safetensors"}}'), "y.safetensors: cannot be read"),
        (gone("model-00002-of-00013.safetensors"), "model-00002-of-00013.safetensors: cannot be read"),
        (cut("model-00001-of-00013.safetensors"), "model-00001-of-00013.safetensors: cannot be read"),
    ],
}


@pytest.mark.parametrize("files, damage, words", [(files, *damage) for files in DAMAGE for damage in DAMAGE[files]])
def test_a_directory_that_does_not_fit_is_refused(files, damage, words, saved, tmp_path, capsys):
    damaged = Path(shutil.copytree(saved / files, tmp_path / "damaged"))
    damage(damaged)
    refuse(capsys, ["import", f"--from={damaged}", f"--workdir={tmp_path / 'run'}"], words)
    assert not (tmp_path / "run").exists()


def test_the_flags_are_needed_and_a_run_is_never_overwritten(saved, tmp_path, capsys):
    source, full = f"--from={saved / 'one file'}", tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    for flags in ([], [source], [f"--workdir={tmp_path / 'run'}"]):
        refuse(capsys, ["import", *flags], "--from and --workdir: both are needed")
    refuse(capsys, ["import", source, f"--workdir={full}"], f"--workdir={full}: holds mine already")
    assert {path.name for path in full.iterdir()} <= {"mine", ".lock"} and (full / "mine").read_text() == "mine"
