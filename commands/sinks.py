"""What the heads of a model attend to, with sinks or without: a run's, or one of transformers' GPT-2, Llama, Qwen3 or
gpt-oss class. Also where its residual stream is large."""

import json
from pathlib import Path

import jax.numpy as jnp
from absl import flags

import run_lib
from commands.flags import define_checkpoint, parse_flags, spoken_in_flags
from commands.foreign import read_model
from reports.sinks import as_json, described, measure, scalars_of, separators_of, stretch
from runtime import devices, programs
from runtime.errors import UserError
from runtime.files import new_file, plain
from runtime.screen.console import Console
from transformer.model import model_of


def _define(values: flags.FlagValues) -> None:
    define_checkpoint(values)
    flags.DEFINE_string("from", None, "Instead of a run: a directory with another program's model.", values)
    flags.DEFINE_string("tokenizer", None, "Its tokenizer, where the files hold none: char, byte, gpt2 ...", values)
    text = "A text, measured from its start on; default the run's validation split, tiny_shakespeare with --from."
    flags.DEFINE_string("dataset", None, text, values)
    flags.DEFINE_string("out", None, "A new file: all numbers by layer and head, as JSON.", values)


def main(argv: list[str]) -> None:
    values = parse_flags("sinks", __doc__, argv, _define)
    console = Console()
    programs.set_up_compile_cache(console.warn)
    devices.start_jax()
    source, dataset, of_run = values["from"].value, values.dataset, ("workdir", "step", "weights")
    if wrong := [name for name in of_run if values[name].present] if source else ["tokenizer"] * bool(values.tokenizer):
        raise UserError(f"--{wrong[0]}: {'a run has it' if source else 'a run has its own'}; leave it out")
    if source:
        config, params, tokenizer = read_model(Path(source), values.tokenizer, dataset, console.line)
        model_config = run_lib.model_config_for(config, tokenizer, run_lib.dtype_of(config, None).dtype)
        model = model_of(model_config, {name: jnp.asarray(value) for name, value in params.items()})
        about = {"from": source}
    else:
        workdir = Path(values.workdir)
        model, tokenizer, config, meta = run_lib.load_model(workdir, values.step, console.warn, values.weights)
        about = {"workdir": str(workdir), "step": run_lib.real_step_of(meta)}
    with spoken_in_flags():
        config.dataset = dataset or config.dataset
        data = run_lib.load_data(config, console.line, tokenizer, whole=bool(source or dataset))
    tokens_BT = stretch(data.train if source or dataset else data.val, config.context_len)
    measured = measure(model, tokens_BT, separators_of(tokenizer))
    table, sentences = described(measured, tokenizer)
    if values.out is not None:
        about |= {"dataset": config.dataset, "tokens": tokens_BT.size, "context_len": tokens_BT.shape[1]}
        with new_file(Path(values.out), "--out") as file:
            numbers = plain(scalars_of(measured)) | as_json(measured)
            json.dump(about | numbers | {"seen": sentences}, file, indent=1, allow_nan=False)
    console.table(table)
    console.line(" ".join(sentences))
