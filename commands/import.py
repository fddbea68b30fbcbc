"""Make a run of a model that was saved elsewhere: a directory of transformers' GPT-2, Llama, Qwen3 or gpt-oss class, a
checkpoint of the PyTorch original (model.pt, metadata.json), or what `export --format=safetensors` wrote."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

import config_lib
import run_lib
from commands.flags import parse_flags
from configs import default
from corpus.load_text import new_tokenizer
from corpus.tokenizer import Tokenizer, check_tokenizer_name, tokenizer_from_dict
from interop.families import Arrays
from interop.models import as_float32, config_from, from_original, from_theirs, require_blocks
from interop.tokenizer_json import from_tokenizers
from interop.weight_files import WEIGHTS, read_metadata, read_safetensors, read_torch, read_weights
from runtime import devices
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import UserError, one_line
from runtime.files import parse_json, read_file, read_json, write_json
from runtime.screen.console import Console
from runtime.workdir import WorkdirLock, prepare_workdir
from training.cost import parameter_counts
from transformer.model import model_of

UNFINISHED = ".import"  # a run is made in this folder of its directory until it is complete
MADE_HERE = "checkpoints", run_lib.TOKENIZER_FILE, run_lib.CONFIG_FILE
Model = tuple[ConfigDict, Arrays, Tokenizer]
LONG_CONTEXT = 8192  # tokens; a longer key/value cache is large enough to mention


def _define(values: flags.FlagValues) -> None:
    define = {"flag_values": values}
    flags.DEFINE_string("from", None, "The directory with the model's files.", **define)
    flags.DEFINE_string("workdir", None, "The new run's directory.", **define)
    flags.DEFINE_string("tokenizer", None, "char, byte or a tiktoken encoding, where the files hold none.", **define)
    flags.DEFINE_string("dataset", None, "The text to evaluate on; char takes its alphabet.", **define)
    flags.DEFINE_integer("context_len", None, "A shorter context than the model has.", **define)


def main(argv: list[str]) -> None:
    values = parse_flags("import", __doc__, argv, _define)
    source = values["from"].value
    if not source or not values.workdir:
        raise UserError("--from and --workdir: both are needed: where the model lies, and where the run shall be")
    console = Console()
    devices.start_jax()
    config, params, tokenizer = read_model(Path(source), values.tokenizer, values.dataset, console.line)
    if values.context_len is not None:
        config, params = shorten(config, params, values.context_len)
    model_config = run_lib.model_config_for(config, tokenizer)
    workdir = prepare_workdir(values.workdir, run_lib.FILES)
    with WorkdirLock(workdir, console.warn):
        unfinished = _room_for_it(workdir, console.line)
        settings = config_lib.to_dict(config)
        with Checkpoints(unfinished) as checkpoints:
            meta = {**run_lib.identity(config, tokenizer), run_lib.IMPORTED_FROM: str(source)}
            rest = {"micro_step": np.zeros((), np.int32)}  # there is no state of an optimizer
            checkpoints.save(0, params, rest, meta, None)
        write_json(unfinished / run_lib.TOKENIZER_FILE, tokenizer.to_dict())
        write_json(unfinished / run_lib.CONFIG_FILE, {"config": settings, **devices.environment()})
        for name in MADE_HERE:
            (unfinished / name).rename(workdir / name)
        unfinished.rmdir()
    count, long = sum(parameter_counts(model_config).values()), config.context_len
    console.line(f"imported {count:,} parameters from {source} into {workdir}")
    if long > LONG_CONTEXT:
        console.line(f"its context is {long:,} tokens, for which `sample` keeps room; --context_len cuts it")


def _room_for_it(workdir: Path, say: Callable[[str], None]) -> Path:
    """A new directory in `workdir` to make the run in, once what an interrupted import left is removed."""
    unfinished = workdir / UNFINISHED
    ours = {".lock", UNFINISHED, *MADE_HERE} if unfinished.is_dir() else {".lock"}
    if others := {entry.name for entry in workdir.iterdir()} - ours:
        raise UserError(f"--workdir={workdir}: holds {min(others)} already; name a new directory")
    if unfinished.is_dir():
        say(f"an import into {workdir} was cut short; this one takes its place")
        shutil.rmtree(unfinished)
        shutil.rmtree(workdir / MADE_HERE[0], ignore_errors=True)
        for name in MADE_HERE[1:]:
            (workdir / name).unlink(missing_ok=True)
    unfinished.mkdir()
    return unfinished


def read_model(source: Path, tokenizer: str | None, dataset: str | None, say: Callable[[str], None]) -> Model:
    """A run's config, parameters and tokenizer from the files in `source`, of whichever kind; UserError if not so."""
    weights, metadata = source / WEIGHTS, read_metadata(source / WEIGHTS)
    try:
        if metadata.get("format") == run_lib.EXPORT_FORMAT:
            if tokenizer:
                raise UserError(f"--tokenizer: {source} holds the model's own; leave the flag out")
            return _from_export(weights, metadata, dataset)
        if (source / "config.json").exists():
            theirs = read_json(source / "config.json")
            model_config, params = from_theirs(theirs, read_weights(source))
            if config_from(theirs).tie_embeddings and not model_config.tie_embeddings:
                say("its head differs from its embedding, though config.json ties them: both are kept")
        elif (source / "model.pt").exists():
            theirs = _flat(read_json(source / "metadata.json")) if (source / "metadata.json").exists() else {}
            model_config, params = from_original(read_torch(source / "model.pt"), theirs)
            tokenizer = tokenizer or theirs.get("tokenizer")
        else:
            raise UserError(f"--from={source}: holds no config.json with {WEIGHTS}, and no model.pt; name a directory")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--from={source}: {one_line(error)}; this model cannot be imported") from error
    config = default.get_config()
    config.update({name: value for name, value in dataclasses.asdict(model_config).items() if name in config})
    config.update({"dtype": "auto"} | ({"dataset": dataset} if dataset else {}))
    ends = _ends_of_text(source, theirs, model_config.vocab_size)
    vocabulary = _tokenizer(source, tokenizer, config, model_config.vocab_size, ends, say)
    config.tokenizer = vocabulary.name
    config_lib.check(config)
    return config, params, vocabulary


def shorten(config: ConfigDict, params: Arrays, context_len: int) -> tuple[ConfigDict, Arrays]:
    """The same model with a shorter context. Raises UserError if it would be longer, or empty."""
    if not 1 <= context_len <= config.context_len:
        raise UserError(f"--context_len: must be from 1 to the model's {config.context_len}, got {context_len}")
    config.context_len, table = context_len, "positions.embedding"
    return config, params | ({table: params[table][:context_len]} if table in params else {})


def _from_export(weights: Path, metadata: Mapping[str, str], dataset: str | None) -> Model:
    config = config_lib.from_dict(parse_json(metadata["config"]))
    tokenizer = tokenizer_from_dict(parse_json(metadata["tokenizer"]))
    if dataset:
        config.dataset = dataset
    params = read_safetensors(weights)[0]
    require_blocks("num_blocks", config.num_blocks, params)
    params = {name: as_float32(name, value) for name, value in params.items()}
    model_of(run_lib.model_config_for(config, tokenizer), params)  # checks names and shapes
    return config, params, tokenizer


def _flat(value: Any) -> dict[str, Any]:
    """The innermost keys of nested objects."""
    found: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        found |= _flat(item) if isinstance(item, dict) else {key: item}
    return found


def _ends_of_text(source: Path, theirs: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The ids at which transformers stops: those in generation_config.json, or without that file in config.json."""
    file = source / "generation_config.json"
    told = read_json(file) if file.exists() else theirs
    ends = told.get("eos_token_id") if isinstance(told, Mapping) else None
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(end for end in ends if type(end) is int and 0 <= end < vocab_size))


def _tokenizer(
    source: Path, name: str | None, config: ConfigDict, vocab_size: int, ends: list[int], say: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer in the files, or the one called `name`."""
    file, name = source / "tokenizer.json", None if name == "imported" else name
    if name is None and not file.exists():
        raise UserError(f"--tokenizer: {source} holds no tokenizer.json; name one, as --tokenizer=gpt2")
    if name is None:
        try:
            eot, more_ends = (ends[0], ends[1:]) if ends else (None, [])
            return from_tokenizers(read_file(file).decode("utf-8"), vocab_size, eot, more_ends, say)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {one_line(error)}; give --tokenizer=NAME instead") from error
    check_tokenizer_name(name)
    if name == "char":  # its vocabulary is the characters of the text
        config = config.copy_and_resolve_references()
        config.update({"tokenizer": name, "context_len": 1})
        tokenizer = run_lib.load_data(config, say).tokenizer
    else:
        tokenizer = new_tokenizer(name, run_lib.data_dir_of(config), say)
    if tokenizer.vocab_size != vocab_size:
        problem = f"--tokenizer={name}: has {tokenizer.vocab_size} tokens, the model {vocab_size}"
        raise UserError(f"{problem}; name the one it was trained with (char takes its characters from --dataset)")
    if {*ends} - {*tokenizer.ends}:
        say(f"in its files {ends} end a text, with --tokenizer={name} {list(tokenizer.ends)}: only the latter do here")
    return tokenizer
