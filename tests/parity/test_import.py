"""Models that arrive: what transformers saved becomes a run with the same bits and the same losses."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import ROOT, arguments, assert_same_bits, rows
from stock import CONTEXT, LLAMA3, STOCK, YARN, V, arrays, stock
from transformers import AutoModelForCausalLM
from travel import (
    CHAR,
    LIMIT,
    call,
    edit_config,
    edit_weights,
    eval_loss,
    greedy,
    logits_of,
    read_model,
    refuse,
    save,
    text_file,
    torch_logits,
    torch_loss,
    val_batches,
    weights_of,
)

import config_lib
import main
import run_lib
from configs import finetune
from corpus.tokenizer import tokenizer_from_dict
from input_pipeline import Batches
from interop.families import FAMILIES
from interop.models import join_weights
from transformer.model import model_of
from transformer.sampling import Sampling, generate

pytestmark = pytest.mark.usefixtures("encoded_texts_lie_in_scratch")

TEXT = text_file()
GPT2, LLAMA, QWEN3, GPT_OSS = STOCK


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return stock(LLAMA, {"eos_token_id": None, "num_hidden_layers": 2})


@pytest.fixture(scope="module")
def llama_run(llama, tmp_path_factory) -> Path:
    """A run of it. Nobody changes its directory."""
    directory = tmp_path_factory.mktemp("llama")
    flags = f"--from={save(directory / 'saved', llama)}", f"--workdir={directory / 'run'}", f"--dataset={TEXT}"
    assert main.main(["import", *flags]) == 0
    return directory / "run"


@pytest.mark.parametrize("architecture", STOCK)
@pytest.mark.parametrize(
    "tied, dtype, size",
    [(True, torch.float32, "9KB"), (False, torch.bfloat16, "1GB")],
    ids=["sharded", "bfloat16"],
)
def test_a_model_becomes_a_run(architecture, tied, dtype, size, tmp_path, capsys, agree):
    model = stock(architecture, {"tie_word_embeddings": tied}).to(dtype)
    saved, workdir = save(tmp_path / "saved", model, max_shard_size=size), tmp_path / "run"
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (size == "9KB")
    call(capsys, "import", f"--from={saved}", f"--workdir={workdir}", f"--dataset={TEXT}")
    config, family = run_lib.load_model(workdir)[0].config, FAMILIES[model.config.model_type]
    assert config.tie_embeddings == tied and run_lib.read_config(workdir).dataset == str(TEXT)
    ours, theirs = join_weights(family.rules, config, weights_of(workdir)), arrays(model.float().state_dict())
    nothing_of_ours = {name for name in theirs if "router" in name or (tied and name == "lm_head.weight")}
    assert_same_bits(ours, {name: value for name, value in theirs.items() if name not in nothing_of_ours})
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    names = f"transformers {architecture}", "validation loss, imported"
    agree(*names, eval_loss(capsys, workdir), torch_loss(model, val_batches(workdir)), LIMIT)


# --- Older files ----------------------------------------------------------------------------------------------------


def without_defaults(directory: Path) -> None:
    """Only what the class would not assume by itself."""
    written = json.loads((directory / "config.json").read_text())
    default = type(stock(written["architectures"][0], {}).config)().to_dict()
    needed = {key for key in written if key in ("model_type", "eos_token_id") or written[key] != default.get(key)}
    edit_config(directory, **dict.fromkeys(written.keys() - needed))


def rope_at_the_top(directory: Path) -> None:
    scaling = {"type" if key == "rope_type" else key: YARN[key] for key in YARN.keys() - {"rope_theta"}}
    edit_config(directory, rope_parameters=None, rope_theta=YARN["rope_theta"], rope_scaling=scaling)


def theta_beside_the_rest(directory: Path) -> None:
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    edit_config(directory, rope_theta=rope.pop("rope_theta"), rope_parameters=rope)


def without_rope(directory: Path) -> None:
    edit_config(directory, rope_parameters=None)


def without_window(directory: Path) -> None:
    edit_config(directory, sliding_window=None)


def without_layer_types(directory: Path) -> None:
    edit_config(directory, layer_types=None)


def gpt2_without_head(directory: Path) -> None:
    mask = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), np.float32))
    buffers = {f"h.{n}.attn.{name}": mask for n in range(2) for name in ("bias", "masked_bias")}
    edit_weights(directory, lambda old: {name.removeprefix("transformer."): old[name] for name in old} | buffers)


def llama_with_buffers(directory: Path) -> None:
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32) for n in range(3)}
    edit_weights(directory, lambda old: old | buffers)


def tied_with_a_head(directory: Path) -> None:
    edit_weights(directory, lambda old: old | {"lm_head.weight": old["model.embed_tokens.weight"]})


@pytest.mark.parametrize(
    "architecture, changes, age",
    [
        (GPT2, {}, gpt2_without_head),
        *((architecture, {}, without_defaults) for architecture in (GPT2, LLAMA, QWEN3)),
        (GPT_OSS, {"rope_parameters": YARN}, without_defaults),
        (LLAMA, {"rope_parameters": YARN}, rope_at_the_top),
        (GPT_OSS, {"rope_parameters": YARN}, rope_at_the_top),
        (LLAMA, {"rope_parameters": YARN}, theta_beside_the_rest),
        (GPT_OSS, {}, without_rope),
        (LLAMA, {}, without_rope),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, without_window),
        (LLAMA, {}, llama_with_buffers),
        (LLAMA, {"tie_word_embeddings": True}, tied_with_a_head),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, without_layer_types),
        (GPT_OSS, {}, without_layer_types),
    ],
)
def test_older_files_are_the_same_model(architecture, changes, age, tmp_path):
    model = stock(architecture, changes)
    new, old = save(tmp_path / "new", model), save(tmp_path / "old", model)
    age(old)
    assert any((old / name).read_bytes() != (new / name).read_bytes() for name in ("config.json", "model.safetensors"))
    (want, want_params, _), (have, have_params, _) = read_model(new), read_model(old)
    assert have == want
    assert_same_bits(have_params, want_params)


# --- Files that say two things: read as transformers reads them -----------------------------------------------------


def head_alone(directory: Path) -> None:
    edit_weights(
        directory,
        lambda old: {"lm_head.weight" if "embed" in name or "wte" in name else name: old[name] for name in old},
    )


def head_that_differs(directory: Path) -> None:
    embedding = lambda old: next(old[name] for name in old if "embed" in name or "wte" in name)
    edit_weights(directory, lambda old: old | {"lm_head.weight": embedding(old)[::-1].copy()})


def stale_index(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def rope(**changes):
    return lambda directory: edit_config(directory, **changes)


OLD_YARN = YARN | {"factor": 8.0, "beta_fast": 4}  # as a hand puts it beside what was there
WITHOUT_BASE = {key: OLD_YARN[key] for key in OLD_YARN.keys() - {"rope_theta"}}
DEEPSEEK = YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    "architecture, changes, edit",
    [
        *((architecture, {"tie_word_embeddings": True}, head_alone) for architecture in (GPT2, LLAMA)),
        *((architecture, {"tie_word_embeddings": True}, head_that_differs) for architecture in (GPT2, QWEN3)),
        (LLAMA, {}, stale_index),
        (LLAMA, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, None),
        (GPT_OSS, {"rope_parameters": DEEPSEEK}, None),
        (LLAMA, {"rope_parameters": DEEPSEEK | {"mscale_all_dim": 0}}, None),
        (LLAMA, {"rope_parameters": DEEPSEEK | {"attention_factor": 1.5}}, None),
        (LLAMA, {"rope_parameters": LLAMA3 | {"mscale": 2.0}}, None),
        (LLAMA, {"rope_parameters": YARN | {"beta_fast": 0, "beta_slow": 0}}, None),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, rope(rope_scaling=OLD_YARN)),
        (LLAMA, {"rope_parameters": YARN}, rope(rope_scaling=OLD_YARN)),
        (LLAMA, {"rope_parameters": YARN}, rope(rope_scaling={})),
        (LLAMA, {}, rope(rope_parameters={}, rope_theta=77.0, rope_scaling=WITHOUT_BASE)),
        (GPT_OSS, {}, rope(rope_parameters={})),
        (GPT_OSS, {}, rope(rope_parameters={}, rope_scaling=OLD_YARN)),
    ],
)
def test_what_files_say_twice_or_in_part_is_read_as_transformers_reads_it(architecture, changes, edit, tmp_path, agree):
    saved = save(tmp_path / "saved", stock(architecture, changes))
    if edit:
        edit(saved)
    config, params, _ = read_model(saved)
    ours = model_of(config_lib.model_config_of(config, V), {name: jax.numpy.asarray(x) for name, x in params.items()})
    theirs = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager", experts_implementation="eager")
    tokens_BT = np.random.default_rng(0).integers(0, V, (3, CONTEXT))
    agree(
        f"transformers {architecture}",
        "logits, imported",
        logits_of(ours, tokens_BT),
        torch_logits(theirs, tokens_BT),
        LIMIT,
    )


# --- Tokenizer and context ------------------------------------------------------------------------------------------


NO_FILE = object()


@pytest.mark.parametrize(
    "config, generation, ends",
    [
        *((eos, NO_FILE, ends) for eos, ends in ((None, ()), (3, (3,)), ([5, 7, 5], (5, 7)), ([], ()), (V, ()))),
        *((0, eos, ends) for eos, ends in ((None, ()), (1, (1,)), ([0, 1], (0, 1)), ([2], (2,)))),
    ],
)
def test_texts_end_where_transformers_ends_them(config, generation, ends, llama, tmp_path):
    saved = save(tmp_path / "saved", llama)
    edit_config(saved, eos_token_id=config)
    if generation is NO_FILE:
        (saved / "generation_config.json").unlink()
    else:
        edit_config(saved, "generation_config.json", eos_token_id=generation)
    theirs = AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id
    listed = theirs if isinstance(theirs, list) else [theirs]
    assert tuple(dict.fromkeys(end for end in listed if end is not None and end < V)) == ends
    tokenizer = read_model(saved)[2]
    assert (tokenizer.ends, tokenizer.eot) == (ends, ends[0] if ends else None)
    assert tokenizer.name == ("imported" if ends else "char") and not {*ends} & {*tokenizer.unsampled}
    assert tokenizer_from_dict(tokenizer.to_dict()).ends == ends
    assert tokenizer.encode("CAB").tolist() == [3, 1, 2]


def test_each_end_ends_a_text_and_leaves_with_the_model(tmp_path, capsys):
    model = stock(GPT2, {"eos_token_id": [3, 20]})
    saved, workdir, out = save(tmp_path / "saved", model), tmp_path / "run", tmp_path / "out"
    call(capsys, "import", f"--from={saved}", f"--workdir={workdir}", f"--dataset={TEXT}")
    ours, tokenizer, _, _ = run_lib.load_model(workdir)
    written = set()
    for prompt in CHAR.symbols:
        ids = torch.tensor([tokenizer.encode(prompt).tolist()])
        theirs = model.generate(ids, max_new_tokens=CONTEXT - 1, do_sample=False)[0, 1:].tolist()
        written.add(theirs.pop() if theirs[-1] in (3, 20) else None)
        assert generate(ours, tokenizer, [prompt], CONTEXT - 1, Sampling(temperature=0)) == [tokenizer.decode(theirs)]
    assert written >= {3, 20}
    call(capsys, "export", f"--workdir={workdir}", f"--out={out}")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [3, 20]


def test_a_tokenizer_that_is_named_may_end_texts_elsewhere(tmp_path, capsys):
    stock(LLAMA, {"vocab_size": 256, "eos_token_id": 7}).save_pretrained(tmp_path / "saved")
    flags = f"--from={tmp_path / 'saved'}", f"--workdir={tmp_path / 'run'}", "--tokenizer=byte"
    assert "in its files [7] end a text, with --tokenizer=byte []" in call(capsys, "import", *flags)


def test_an_import_that_is_cut_short_can_be_run_again(llama, llama_run, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    argv = ["import", f"--from={save(tmp_path / 'saved', llama)}", f"--workdir={workdir}", f"--dataset={TEXT}"]
    module, rename = importlib.import_module("commands.import"), Path.rename

    def cut(*_):
        raise KeyboardInterrupt

    def cut_late(path, target):
        return cut() if path.name == "tokenizer.json" else rename(path, target)

    for where, name, stand_in in ((module, "write_json", cut), (Path, "rename", cut_late)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, stand_in)
            assert main.main(argv) == 130
        capsys.readouterr()
    refuse(capsys, ["sample", f"--workdir={workdir}"], "config.json")
    (workdir / "mine").write_text("mine")
    refuse(capsys, argv, f"--workdir={workdir}: holds mine already")
    (workdir / "mine").unlink()
    assert "was cut short" in call(capsys, *argv)
    assert_same_bits(weights_of(workdir), weights_of(llama_run))
    assert {path.name for path in workdir.iterdir()} == {path.name for path in llama_run.iterdir()}


def test_files_without_a_tokenizer_need_the_name_of_one_that_fits(tmp_path, capsys):
    stock(LLAMA, {"vocab_size": 256}).save_pretrained(tmp_path / "saved")
    argv = ["import", f"--from={tmp_path / 'saved'}", f"--workdir={tmp_path / 'run'}", f"--dataset={TEXT}"]
    refuse(capsys, argv, "--tokenizer: ", "no tokenizer.json")
    refuse(capsys, [*argv, "--tokenizer=char"], "--tokenizer=char: has 37 tokens, the model 256")
    refuse(capsys, [*argv, "--tokenizer=chat"], "unknown tokenizer 'chat'", "did you mean char?")
    assert not (tmp_path / "run").exists()
    call(capsys, *argv, "--tokenizer=byte")
    assert run_lib.load_tokenizer(tmp_path / "run").name == run_lib.read_config(tmp_path / "run").tokenizer == "byte"


def test_a_context_can_be_cut_and_not_stretched(tmp_path, capsys):
    saved, workdir = save(tmp_path / "saved", stock(GPT2, {})), tmp_path / "run"
    argv = ["import", f"--from={saved}", f"--workdir={workdir}", f"--dataset={TEXT}"]
    for length in (0, CONTEXT + 1):
        refuse(capsys, [*argv, f"--context_len={length}"], f"--context_len: must be from 1 to the model's {CONTEXT}")
    assert not workdir.exists()
    call(capsys, *argv, "--context_len=7")
    whole, cut = read_model(saved)[1], weights_of(workdir)
    assert run_lib.read_config(workdir).context_len == 7
    assert_same_bits(cut, whole | {"positions.embedding": whole["positions.embedding"][:7]})


# --- An imported run is a run ---------------------------------------------------------------------------------------


def test_it_writes_text(llama_run, capsys):
    assert len(greedy(capsys, llama_run, "BAC", 20)) == len("BAC") + 20 + len("\n")


@pytest.mark.parametrize("way", ["finetune", "init_from"])
def test_training_goes_on_from_its_weights(way, llama, llama_run, tmp_path, capsys, agree):
    workdir, config = tmp_path / "run", finetune.get_config(str(llama_run))
    changes = {"dataset": str(TEXT), "order": "sequential", "max_steps": 12, "lr": 0.001, "log_every": 1}
    changes |= {"sample_tokens": 0, "cpu_devices": "1"}
    config.update(changes)
    if way == "init_from":
        argv = arguments(config, workdir)
    else:
        argv = [f"--config={ROOT / 'configs' / 'finetune.py'}:{llama_run}", f"--workdir={workdir}"]
        argv += [f"--config.{key}={value}" for key, value in changes.items()]
    call(capsys, *argv)
    data, logged = run_lib.load_data(config, print, run_lib.load_tokenizer(llama_run)), rows(workdir)
    first_batch = Batches(data.train, CONTEXT, config.batch_size, config.seed, config.order)(0)
    names = "transformers LlamaForCausalLM", "first loss of a fine-tuning"
    agree(*names, logged[0]["loss"], torch_loss(llama, [first_batch]), LIMIT)
    assert len(logged) == 12 and logged[-1]["val_loss"] < torch_loss(llama, val_batches(llama_run)) - 0.1


def test_training_inside_it_is_refused(llama_run, capsys):
    files = lambda: {path: path.stat().st_mtime_ns for path in llama_run.rglob("*") if path.name != ".lock"}
    before = files()
    argv = [f"--config={ROOT / 'configs' / 'finetune.py'}:{llama_run}", f"--workdir={llama_run}"]
    refuse(capsys, [*argv, "--config.cpu_devices=1"], f"workdir {llama_run}: holds imported weights", "another")
    assert files() == before
