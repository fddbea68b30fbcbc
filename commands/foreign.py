"""Models that other programs wrote: what a command needs of them, from the files in a directory."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import config_lib
import run_lib
from configs import default
from corpus.load_text import new_tokenizer
from corpus.tokenizer import Tokenizer, tokenizer_from_dict
from interop.families import Arrays
from interop.models import as_float32, config_from, from_original, from_theirs, require_blocks
from interop.tokenizer_json import from_tokenizers
from interop.weight_files import WEIGHTS, read_metadata, read_safetensors, read_torch, read_weights
from runtime.errors import UserError, one_line
from runtime.files import data_folder, parse_json, read_file, read_json
from transformer.model import model_of

Model = tuple[ConfigDict, Arrays, Tokenizer]


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


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """The innermost keys of nested objects."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item) if isinstance(item, dict) else {key: item}
    return found


def _ends_of_text(source: Path, theirs: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The ids at which transformers stops: those in generation_config.json, or without that file in config.json."""
    file = source / "generation_config.json"
    told = read_json(file) if file.exists() else theirs
    ends = told.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(end for end in ends if type(end) is int and 0 <= end < vocab_size))


def _tokenizer(
    source: Path, name: str | None, config: ConfigDict, vocab_size: int, ends: list[int], say: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer in the files, or the one called `name`."""
    file = source / "tokenizer.json"
    if name in (None, "imported"):
        if not file.exists():
            raise UserError(f"--tokenizer: {source} holds no tokenizer.json; name one, as --tokenizer=gpt2")
        try:
            return from_tokenizers(read_file(file).decode(), vocab_size, ends[0] if ends else None, ends[1:], say)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {one_line(error)}; give --tokenizer=NAME instead") from error
    if name == "char":  # its vocabulary is the characters of the text
        config = config.copy_and_resolve_references()
        config.update({"tokenizer": name, "context_len": 1})
        tokenizer = run_lib.load_data(config, say).tokenizer
    else:
        tokenizer = new_tokenizer(name, data_folder(config.data_dir), say)
    if tokenizer.vocab_size != vocab_size:
        problem = f"--tokenizer={name}: has {tokenizer.vocab_size} tokens, the model {vocab_size}"
        raise UserError(f"{problem}; name the one it was trained with (char takes its characters from --dataset)")
    if {*ends} - {*tokenizer.ends}:
        say(f"in its files {ends} end a text, with --tokenizer={name} {list(tokenizer.ends)}: only the latter do here")
    return tokenizer
