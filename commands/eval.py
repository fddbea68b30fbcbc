"""Exact loss of a trained model over a split of its text or another text, or its score in tasks."""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import run_lib
from commands.flags import define_checkpoint, parse_flags, spoken_in_flags
from corpus.dataset import UNKNOWN_CHARACTERS, Split
from corpus.tokenizer import Tokenizer, UnknownCharacters
from runtime import devices, programs
from runtime.checkpoints.manager import average_in
from runtime.errors import UserError, one_line
from runtime.files import new_file, parse_json, read_file
from runtime.screen.console import Console
from training import tasks
from training.evaluate import Evaluator, bits_per_byte, log_probs
from transformer.model import Transformer, params_of
from transformer.sharding import make_mesh


def _define(values: flags.FlagValues) -> None:
    define_checkpoint(values)
    split = "What to evaluate on; default val, and all of another text than the run's."
    flags.DEFINE_enum("split", None, ["train", "val", "test", "all"], split, values)
    flags.DEFINE_string("dataset", None, "Another text, or where the run's own lies now.", values)
    unknown = "What becomes of characters that the model lacks; default as the run's config says."
    flags.DEFINE_enum("unknown_characters", None, UNKNOWN_CHARACTERS, unknown, values)
    flags.DEFINE_string("text_column", None, "Of rows: the column to read; default as the config says.", values)
    flags.DEFINE_bool("skip_bad_rows", None, "Leave out rows without a text; default as the config says.", values)
    flags.DEFINE_multi_string("tasks", [], "A .jsonl of multiple choice instead; may be given again.", values)
    flags.DEFINE_string("tokens", None, "A new file of JSON lines: each token's log-probability, in nats.", values)


def main(argv: list[str]) -> None:
    values = parse_flags("eval", __doc__, argv, _define)
    console = Console()
    programs.set_up_compile_cache(console.warn)
    [device, *_] = devices.start_jax()
    model, tokenizer, config, meta = run_lib.load_model(Path(values.workdir), values.step, console.warn, values.weights)
    about = {"step": run_lib.real_step_of(meta)}
    if average_in(meta):
        about["weights"] = "trained" if values.weights == "trained" else "ema"
    own = meta.get("data_sha256")  # an imported model has none
    for name in ("dataset", "unknown_characters", "text_column", "skip_bad_rows"):
        if values[name].value is not None:
            config[name] = values[name].value
    if values.tasks:
        for name in ("split", "dataset", "tokens"):
            if values[name].value is not None:
                raise UserError(f"--{name}: is of a text; leave it out, or leave out --tasks")
        for path in map(Path, values.tasks):
            told = _score(path, model, tokenizer, config.unknown_characters, config.skip_bad_rows, console)
            console.line(json.dumps({**about, "task": path.name.removesuffix(".jsonl"), **told}))
        return
    with spoken_in_flags():
        name = values.split or "val"
        if values.dataset is not None or name == "all":
            data = run_lib.load_data(config, console.line, tokenizer, whole=True)
            name = values.split or ("val" if data.sha256 == own else "all")
        if name != "all":
            data = run_lib.load_data(config, console.line, tokenizer)
        if values.dataset is None:
            run_lib.require_same_text(own, data, "name it as --dataset to evaluate on it as it is now")
    split = data.train if name == "all" else getattr(data, name)
    if split is None:
        raise UserError(f"--split={name}: the run's config has test_fraction 0; use train or val")
    rows = min(config.batch_size, max(1, Evaluator.TOKENS // config.context_len))  # batch_size was for all devices
    if values.tokens is not None:
        _write_tokens(Path(values.tokens), model, tokenizer.pieces, split, rows)
    loss, tokens = Evaluator(model.config, make_mesh(devices=[device]), rows)(params_of(model), split)
    perplexity = math.exp(loss) if loss < 700 else None  # beyond, it overflows
    bits = bits_per_byte(loss, tokens, split, tokenizer)
    result = {"split": name, "loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens}
    console.line(json.dumps(about | result))


def _score(
    path: Path, model: Transformer, tokenizer: Tokenizer, unknown: str, skip: bool, console: Console
) -> dict[str, Any]:
    """What a model makes of the questions of a file, a JSON object on each line; those to `skip` are counted."""

    def encode(text: str) -> np.ndarray:
        try:
            return tokenizer.encode(text, replace_unknown=unknown == "replace")
        except UnknownCharacters as error:
            if unknown == "drop":
                return tokenizer.encode("".join(c for c in text if c not in error.characters))
            raise ValueError(f"{error}; give --unknown_characters=replace or drop") from error

    questions, requests, skipped = [], [], 0
    try:
        lines = read_file(path, 2**30).decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--tasks={path}: cannot be read ({one_line(error)}); name a file of JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                question = tasks.read_question(parse_json(line))
                requests += list(tasks.encode(question, tokenizer, encode))
                questions.append(question)
            except ValueError as error:
                skipped += 1
                if not skip:
                    raise UserError(f"--tasks={path}: line {number}: {one_line(error)}") from error
    if not questions:
        raise UserError(f"--tasks={path}: has no question; write a JSON object on each line")
    with console.progress(len(requests), 0) as update:
        told = tasks.scores(questions, tasks.log_likelihoods(model, requests, update))
    return told | ({"skipped": skipped} if skip else {})


def _write_tokens(path: Path, model: Transformer, pieces: list[bytes], split: Split, rows: int) -> None:
    """A line for each token of the split: its position, id, text and log-probability (null for the first token)."""
    with new_file(path, "--tokens") as file:
        place = 0
        for values in chain([[None]], (some.tolist() for some in log_probs(model, split, rows))):
            for token, value in zip(split.tokens[place : place + len(values)].tolist(), values, strict=True):
                text = pieces[token].decode("utf-8", errors="replace")
                file.write(json.dumps({"token": place, "id": token, "text": text, "log_prob": value}) + "\n")
                place += 1
