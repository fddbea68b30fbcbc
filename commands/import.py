"""Make a run of a model that was saved elsewhere: a directory of transformers' GPT-2, Llama, Qwen3 or gpt-oss class, a
checkpoint of the PyTorch original (model.pt, metadata.json), or what `export --format=safetensors` wrote."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

import config_lib
import run_lib
from commands.flags import parse_flags
from commands.foreign import read_model
from runtime import devices
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import UserError
from runtime.files import write_json
from runtime.screen.console import Console
from runtime.workdir import WorkdirLock, prepare_workdir
from training.cost import parameter_counts

UNFINISHED = ".import"  # a run is made in this folder of its directory until it is complete
MADE_HERE = "checkpoints", run_lib.TOKENIZER_FILE, run_lib.CONFIG_FILE


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("from", None, "The directory with the model's files.", values)
    flags.DEFINE_string("workdir", None, "The new run's directory.", values)
    flags.DEFINE_string("tokenizer", None, "char, byte or a tiktoken encoding, where the files hold none.", values)
    flags.DEFINE_string("dataset", None, "The text to evaluate on; char takes its alphabet.", values)
    flags.DEFINE_integer("context_len", None, "A shorter context than the model has.", flag_values=values)


def main(argv: list[str]) -> None:
    values = parse_flags("import", __doc__, argv, _define)
    source = values["from"].value
    if not source or not values.workdir:
        raise UserError("--from and --workdir: both are needed: where the model lies, and where the run shall be")
    console = Console()
    devices.start_jax()
    config, params, tokenizer = read_model(Path(source), values.tokenizer, values.dataset, console.line)
    if (length := values.context_len) is not None:
        if not 1 <= length <= config.context_len:
            raise UserError(f"--context_len: must be from 1 to the model's {config.context_len}, got {length}")
        config.context_len, table = length, "positions.embedding"
        params |= {table: params[table][:length]} if table in params else {}
    model_config = run_lib.model_config_for(config, tokenizer)
    workdir = prepare_workdir(values.workdir, run_lib.FILES)
    with WorkdirLock(workdir, console.warn):
        unfinished = _room_for_it(workdir, console.line)
        with Checkpoints(unfinished) as checkpoints:
            meta = {**run_lib.identity(config, tokenizer), run_lib.IMPORTED_FROM: str(source)}
            checkpoints.save(0, params, {"micro_step": np.zeros((), np.int32)}, meta, None)  # no optimizer's state
        write_json(unfinished / run_lib.TOKENIZER_FILE, tokenizer.to_dict())
        write_json(unfinished / run_lib.CONFIG_FILE, {"config": config_lib.to_dict(config), **devices.environment()})
        for name in MADE_HERE:
            (unfinished / name).rename(workdir / name)
        unfinished.rmdir()
    count = sum(parameter_counts(model_config).values())
    console.line(f"imported {count:,} parameters from {source} into {workdir}")
    if (long := config.context_len) > 8192:  # a key/value cache that is large enough to mention
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
