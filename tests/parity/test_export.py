"""Models that leave: what `export` writes is to transformers the same model, and to `import` the same bits."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import ROOT, TINY, assert_one_line, assert_same_bits, make_text, tiny_config
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from travel import LIMIT, call, eval_loss, greedy, logits_of, make_run, refuse, torch_logits, weights_of

import config_lib
import main
import run_lib
from configs import shakespeare, shakespeare_gptoss
from corpus.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, TiktokenTokenizer
from interop.models import exported_as, from_theirs, to_theirs
from interop.weight_files import read_safetensors, write_safetensors
from transformer.config import TransformerConfig
from transformer.sampling import Sampling, generate

RANKS = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"ll": 257, b"er": 258}
TIKTOKEN = TiktokenTokenizer(
    tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=RANKS, special_tokens={END_OF_TEXT: 259})
)
CHAR = CharTokenizer(sorted(set(make_text())))

PROMPT, NUM_TOKENS = "The miller paints\na heron at 5.", 40
SIZES = {"num_blocks": 2, "num_heads": 6, "embedding_dim": 24, "mlp_dim": 40, "context_len": 72}
GPT2 = SIZES | {"attention_sink": False}
LLAMA = SIZES | {"attention_sink": False, "norm": "rmsnorm", "norm_eps": 1e-6, "position": "rope", "mlp": "swiglu"}
LLAMA |= {"num_kv_heads": 2, "head_dim": 10, "mlp_bias": False, "tie_embeddings": False, "rope_theta": 500.0}
QWEN3 = LLAMA | {"qk_norm": "unscaled", "sliding_window": 5, "window_pattern": "LG"}
GPT_OSS = QWEN3 | {"qk_norm": "none", "attention_sink": True, "mlp": "swiglu_clamped", "rope_scaling": "yarn"}
GPT_OSS |= {"yarn_factor": 4.0, "yarn_original_context": 64, "yarn_truncate": False, "yarn_attention_factor": 1.2}
LLAMA3 = {"rope_scaling": "llama3", "yarn_factor": 8.0, "yarn_original_context": 64, "yarn_beta_fast": 4.0}
PLAIN = {"sliding_window": 0, "rope_scaling": "none", "mlp_bias": True, "tie_embeddings": True}
SHAPES = {
    "GPT-2": (GPT2, TIKTOKEN),
    "Llama": (LLAMA | LLAMA3, ByteTokenizer()),
    "Qwen3": (QWEN3, CHAR),
    "gpt-oss": (GPT_OSS, TIKTOKEN),
    "gpt-oss without windows": (GPT_OSS | PLAIN | {"attention_sink": "zero"}, CHAR),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, random_params):
    """Name of a shape -> a run of it and what `export` wrote, made once."""
    made = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            changes, tokenizer = SHAPES[name]
            config = tiny_config(**changes)
            params = random_params(config_lib.model_config_of(config, tokenizer.vocab_size), seed=1)
            if name == "GPT-2":  # whose text ends by itself
                params["embedding.embedding"] *= 1 + (np.arange(tokenizer.vocab_size) == tokenizer.eot)[:, None]
            directory = tmp_path_factory.mktemp("exported")
            made[name] = make_run(directory / "run", config, tokenizer, params), directory / "out"
            assert main.main(["export", f"--workdir={directory / 'run'}", f"--out={directory / 'out'}"]) == 0
        return made[name]

    return make


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_and_writes_the_same(name, exported, agree):
    workdir, out = exported(name)
    model, tokenizer, _, _ = run_lib.load_model(workdir)
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report

    tokens_BT = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (3, 67))
    names = f"transformers {type(theirs).__name__}", "logits of our export"
    agree(*names, logits_of(model, tokens_BT), torch_logits(theirs, tokens_BT), LIMIT)

    their_tokenizer = AutoTokenizer.from_pretrained(out)
    ids = their_tokenizer(PROMPT, return_tensors="pt")
    assert ids["input_ids"][0].tolist() == tokenizer.encode(PROMPT).tolist()
    text = generate(model, tokenizer, [PROMPT], NUM_TOKENS, Sampling(temperature=0))[0]
    their_ids = theirs.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert their_tokenizer.decode(their_ids, skip_special_tokens=tokenizer.eot is not None) == text
    assert (1 < len(their_ids) < NUM_TOKENS) == (name == "GPT-2")


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_what_was_written(name, exported):
    _, out = exported(name)
    written, read = json.loads((out / "config.json").read_text()), AutoConfig.from_pretrained(out)
    in_one = {"rope_theta", "rope_scaling"} & written.keys()  # which version 5 keeps in rope_parameters alone
    assert {key: read.to_dict().get(key, written[key] if key in in_one else None) for key in written} == written
    if in_one:
        rope = {key: value for key, value in written["rope_parameters"].items() if key != "rope_theta"}
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == SHAPES[name][0]["rope_theta"]
        assert written["rope_scaling"] == (rope if "rope_scaling" in SHAPES[name][0] and len(rope) > 1 else None)
    eot = SHAPES[name][1].eot
    start = eot if name == "GPT-2" else None  # the others have a token of its own for it, or none
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (start, eot, None)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == {"char": CHAR.encode(".")[0], "byte": 255}.get(SHAPES[name][1].name, eot)
    assert len(tokenizer) <= read.vocab_size


@pytest.mark.parametrize("name", SHAPES)
def test_an_exported_model_comes_back_with_the_same_bits_and_words(name, exported, tmp_path, capsys):
    (workdir, out), again, out_again = exported(name), tmp_path / "again", tmp_path / "out again"
    call(capsys, "import", f"--from={out}", f"--workdir={again}")
    before, after = weights_of(workdir), weights_of(again)
    filled_in = {key: after.pop(key) for key in after.keys() - before.keys()}
    assert_same_bits(after, before)
    assert all(np.all(value == key.endswith("scale")) for key, value in filled_in.items())
    if name == "Llama":
        assert not filled_in
        assert greedy(capsys, again, PROMPT, NUM_TOKENS) == greedy(capsys, workdir, PROMPT, NUM_TOKENS)
    call(capsys, "export", f"--workdir={again}", f"--out={out_again}")
    files = sorted(path.name for path in out.iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [file for file in files if (out / file).read_bytes() != (out_again / file).read_bytes()] == []


def test_the_recipe_in_the_shape_of_gpt_oss_can_leave(random_params):
    config = config_lib.transformer_config(shakespeare_gptoss.get_config(), vocab_size=65, dtype="float32")
    theirs, weights = to_theirs(config, random_params(config))
    assert theirs["architectures"] == ["GptOssForCausalLM"]
    assert from_theirs(theirs, weights)[0] == dataclasses.replace(config, output_init="normal")


# --- A model that no class holds ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def our_own(tmp_path_factory, random_params) -> Path:
    """A run of a shape that is only ours."""
    config = shakespeare.get_config()
    tiny = tiny_config(num_blocks=2, logit_softcap=7.0)
    config.update({key: tiny[key] for key in (*TINY, "logit_softcap", "dataset", "data_dir")})
    params = random_params(config_lib.model_config_of(config, CHAR.vocab_size))
    return make_run(tmp_path_factory.mktemp("runs") / "run", config, CHAR, params)


def test_any_model_travels_as_safetensors_and_comes_back_with_the_same_bits(our_own, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    call(capsys, "export", f"--workdir={our_own}", f"--out={out}", "--format=safetensors")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    call(capsys, "import", f"--from={out}", f"--workdir={again}")
    assert_same_bits(weights_of(again), weights_of(our_own))
    assert run_lib.read_config(again) == run_lib.read_config(our_own)
    assert run_lib.load_tokenizer(again).fingerprint == CHAR.fingerprint
    assert eval_loss(capsys, again) == eval_loss(capsys, our_own)


BLOCK = "blocks.1.mlp.up.kernel"


@pytest.mark.parametrize(
    "edit, metadata, words",
    [
        (lambda w: w | {BLOCK: w[BLOCK].astype(np.int32)}, {}, f"{BLOCK}: its numbers are int32"),
        (lambda w: w | {BLOCK: w[BLOCK] / np.float32(0)}, {}, f"{BLOCK}: not all of its numbers are finite"),
        (lambda w: w, {"num_blocks": 10**9}, "num_blocks: 1000000000 by the config, 2 by the weights"),
    ],
)
def test_a_damaged_export_of_ours_is_refused(edit, metadata, words, our_own, tmp_path, capsys):
    call(capsys, "export", f"--workdir={our_own}", f"--out={tmp_path / 'out'}", "--format=safetensors")
    path = tmp_path / "out" / "model.safetensors"
    arrays, written = read_safetensors(path)
    with np.errstate(all="ignore"):
        write_safetensors(path, edit(arrays), written | {"config": json.loads(written["config"]) | metadata})
    refuse(capsys, ["import", f"--from={tmp_path / 'out'}", f"--workdir={tmp_path / 'run'}"], words)
    assert not (tmp_path / "run").exists()


def test_a_model_that_no_class_holds_is_refused_and_leaves_nothing(our_own, tmp_path, capsys):
    argv = ["export", f"--workdir={our_own}", f"--out={tmp_path / 'out'}"]
    refuse(capsys, argv, "error: config.qk_norm: ", "mlp 'relu2'", "logit_softcap 7.0", "--format=safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        (GPT2 | {"mlp": "gelu_tanh", "mlp_dim": 96}, []),
        (GPT2 | {"mlp": "gelu_tanh"}, ["mlp_dim other than"]),
        (GPT2 | {"mlp": "relu2", "mlp_dim": 96, "tie_embeddings": False}, ["gelu_tanh for mlp relu2", "untied head"]),
        (LLAMA | LLAMA3, []),
        (LLAMA | {"rope_scaling": "yarn", "yarn_truncate": False}, ["yarn_truncate"]),
        (LLAMA | {"rope_scaling": "yarn", "yarn_attention_factor": 1.5}, ["yarn_attention_factor"]),
        (QWEN3, ["ignore sliding_window in Qwen3"]),
        (QWEN3 | {"sliding_window": 0, "qkv_bias": True}, ["attention biases in Qwen3"]),
        (GPT_OSS | PLAIN, ["quantised"]),
        (GPT_OSS | {"rope_scaling": "none"}, ["quantised"]),
        (GPT_OSS | {"rope_scaling": "none", "window_pattern": "GL"}, ["quantised", "window_pattern GL for LG"]),
    ],
)
def test_what_programs_do_not_read_is_said(changes, words):
    told = exported_as(TransformerConfig(vocab_size=50, **changes)).caveats
    assert len(told) == len(words) and all(word in line for word, line in zip(words, told, strict=True)), told


def test_a_config_says_before_training_how_it_exports(capsys):
    table = (ROOT / "docs" / "configs.md").read_text()
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "finetune", "chat"):  # these have the shape of another run
            continue
        told = call(capsys, "config", f"--config={path}").splitlines()[-1]
        name = re.match(r"exports (as (\w+)|with our names only)", told)
        assert name and f"| `{path.name}` | {name[2] or 'our names only'} |" in table, told


def test_an_export_says_in_one_line_what_is_not_read(exported, tmp_path, capsys):
    for name, words in (("Qwen3", "ignore sliding_window in Qwen3"), ("Llama", None)):
        out = call(capsys, "export", f"--workdir={exported(name)[0]}", f"--out={tmp_path / name}")
        assert ("not read by all programs: " in out) == bool(words) and (words or "wrote") in out


IN_THE_WAY = {
    "GPT-2": [("num_kv_heads", 2), ("head_dim", 10), ("norm", "rmsnorm"), ("mlp", "swiglu"), ("qk_norm", "scaled")]
    + [("sliding_window", 5), ("logit_softcap", 7.0)],
    "Llama": [("num_heads", 10), ("norm", "layernorm"), ("position", "none"), ("mlp", "gelu"), ("mlp", "relu2")]
    + [("mlp", "swiglu_clamped"), ("sliding_window", 5), ("logit_softcap", 7.0)]
    + [("exclusive_attention", True), ("residual_scalars", True)],
    "Qwen3": [("norm", "layernorm"), ("position", "none"), ("mlp", "relu2"), ("mlp_bias", True)]
    + [("logit_softcap", 7.0)],
    "gpt-oss": [("norm", "layernorm"), ("position", "none"), ("position", "learned"), ("mlp", "relu2")]
    + [("mlp", "swiglu"), ("qk_norm", "scaled"), ("qk_norm", "unscaled"), ("logit_softcap", 7.0)],
}


@pytest.mark.parametrize(
    "shape, name, value", [(shape, *setting) for shape in IN_THE_WAY for setting in IN_THE_WAY[shape]]
)
def test_the_setting_that_stands_in_the_way_is_named(shape, name, value):
    config = TransformerConfig(vocab_size=50, **SHAPES[shape][0] | {name: value})
    message = rf"^{name}: no class of transformers has {name} {value!r}; the nearest, \w+, has {name} "
    with pytest.raises(ValueError, match=message):
        to_theirs(config, {})


# --- Where to -------------------------------------------------------------------------------------------------------


def test_what_is_there_is_never_overwritten(our_own, tmp_path, capsys):
    export = ["export", f"--workdir={our_own}", "--format=safetensors"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        refuse(capsys, [*export, f"--out={tmp_path / name}"], f"--out={tmp_path / name}: already exists")
    refuse(capsys, [*export, f"--out={tmp_path / 'file' / 'out'}"], f"--out={tmp_path / 'file' / 'out'}: ", status=5)
    refuse(capsys, export, "--out: missing")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "file", "full"]
    call(capsys, *export, f"--out={tmp_path / 'empty'}")


@pytest.mark.parametrize(
    "error, status",
    [(OSError(28, "No space left on device"), 5), (SafetensorError("full"), 5), (KeyboardInterrupt(), 130)],
)
def test_an_export_that_is_cut_short_leaves_nothing(error, status, our_own, tmp_path, capsys, monkeypatch):
    def half(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("interop.weight_files.save_file", half)
    argv = ["export", f"--workdir={our_own}", f"--out={tmp_path / 'out'}", "--format=safetensors"]
    assert main.main(argv) == status
    assert list(tmp_path.iterdir()) == []
    if status == 5:
        assert_one_line(capsys.readouterr().err, f"--out={tmp_path / 'out'}: ", str(error))
