"""Exact loss of a trained model over a whole split."""

import json
from pathlib import Path

from absl import flags

import run_lib
from commands.flags import DEFAULT_WORKDIR, parse_flags
from runtime import devices
from runtime.errors import UserError
from runtime.screen.console import Console
from training import cost
from training.evaluate import Evaluator
from transformer.model import params_of
from transformer.sharding import make_mesh


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", DEFAULT_WORKDIR, "The run's directory.", flag_values=values)
    flags.DEFINE_integer("step", None, "The checkpoint's number; default the best one.", flag_values=values)
    flags.DEFINE_enum("split", "val", ["train", "val", "test"], "What to evaluate on.", flag_values=values)


def main(argv: list[str]) -> None:
    values = parse_flags("eval", __doc__, argv, _define)
    console = Console()
    devices.set_up_compile_cache(console.warn)
    [device, *_] = devices.wake_up()
    model, tokenizer, config, step = run_lib.load_model(Path(values.workdir), values.step, console.warn)
    split = getattr(run_lib.load_data(config, console.line, tokenizer), values.split)
    if split is None:
        raise UserError(f"--split={values.split}: the run's config has test_fraction 0; use train or val")
    evaluate = Evaluator(model.config, make_mesh(devices=[device]), config.batch_size)
    loss, tokens = evaluate(params_of(model), split)
    result = {
        "step": step // config.accumulation_steps,
        "split": values.split,
        "loss": loss,
        "bits_per_byte": cost.bits_per_byte(loss, split.num_tokens, split.num_bytes),
        "tokens": tokens,
    }
    console.line(json.dumps(result))
