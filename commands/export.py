"""Write a trained model for other programs: as a class of transformers, or as one safetensors file with our names."""

from pathlib import Path

import numpy as np
from absl import flags

import config_lib
import run_lib
from commands.flags import define_checkpoint, parse_flags
from interop.models import exported_as, to_theirs
from interop.tokenizer_json import hf_tokenizer_config, to_tokenizers
from interop.weight_files import WEIGHTS, new_directory, write_safetensors
from runtime import devices
from runtime.errors import UserError
from runtime.files import write_json, write_text
from runtime.screen.console import Console
from transformer.model import params_of


def _define(values: flags.FlagValues) -> None:
    define_checkpoint(values)
    flags.DEFINE_string("out", None, "A new directory for the files.", values)
    what = "hf: a directory for transformers' AutoModelForCausalLM; safetensors: any model, with our names."
    flags.DEFINE_enum("format", "hf", ["hf", "safetensors"], what, values)


def main(argv: list[str]) -> None:
    values = parse_flags("export", __doc__, argv, _define)
    if not values.out:
        raise UserError("--out: missing; name a new directory for the files")
    console = Console()
    devices.start_jax()
    model, tokenizer, config, _ = run_lib.load_model(Path(values.workdir), values.step, console.warn, values.weights)
    params = {name: np.asarray(value) for name, value in params_of(model).items()}
    with new_directory(Path(values.out)) as out:
        if values.format == "safetensors":
            metadata = {"config": config_lib.to_dict(config), "tokenizer": tokenizer.to_dict()}
            write_safetensors(out / WEIGHTS, params, {"format": run_lib.EXPORT_FORMAT, **metadata})
        else:
            try:
                theirs, weights = to_theirs(model.config, params)
            except ValueError as error:
                raise UserError(f"config.{error}; change the setting, or export with --format=safetensors") from error
            start = tokenizer.eot if theirs["model_type"] == "gpt2" else None  # in GPT-2 one token is both
            several = list(tokenizer.ends) if len(tokenizer.ends) > 1 else tokenizer.eot
            ends = {"bos_token_id": start, "eos_token_id": several, "pad_token_id": None}
            write_json(out / "config.json", theirs | ends)
            write_safetensors(out / WEIGHTS, weights, {"format": "pt"})
            if caveats := exported_as(model.config).caveats:
                console.line(f"not read by all programs: {'; '.join(caveats)}")
            try:
                write_text(out / "tokenizer.json", to_tokenizers(tokenizer).to_str(pretty=True))
                write_json(out / "tokenizer_config.json", hf_tokenizer_config(tokenizer, config.chat))
            except ValueError as error:
                console.warn(f"no tokenizer files: {error}")
    console.line(f"wrote {values.out}")
