"""Write text with a trained model."""

import contextlib
import io
import os
import sys
from pathlib import Path

from absl import flags

import config_lib
import run_lib
from runtime import devices
from runtime.console import Console
from runtime.errors import UserError
from transformer.sampling import Sampling, prompt_tokens, stream
from transformer.tokenizer import UnknownCharacters


def _define(values: flags.FlagValues) -> None:
    default = Sampling()
    flags.DEFINE_string("workdir", config_lib.DEFAULT_WORKDIR, "The run's directory.", flag_values=values)
    flags.DEFINE_integer("step", None, "The checkpoint's number; default the best one.", flag_values=values)
    flags.DEFINE_string("prompt", "\n", "What the text goes on from.", flag_values=values)
    flags.DEFINE_integer("num_tokens", 300, "How many tokens to write.", flag_values=values)
    flags.DEFINE_float("temperature", default.temperature, "0 is greedy.", flag_values=values)
    flags.DEFINE_integer("top_k", default.top_k, "Only the k most likely tokens; 0: all.", flag_values=values)
    flags.DEFINE_float("top_p", default.top_p, "Only the likeliest tokens up to this probability.", flag_values=values)
    flags.DEFINE_float("min_p", default.min_p, "Only tokens this likely, against the top one.", flag_values=values)
    flags.DEFINE_integer("seed", default.seed, "Another seed writes another text.", flag_values=values)
    flags.DEFINE_bool("replace_unknown", False, "Replace characters that the model lacks.", flag_values=values)


def main(argv: list[str]) -> None:
    values = config_lib.parse_flags("sample", __doc__, argv, _define)
    if values.num_tokens < 0:
        raise UserError(f"--num_tokens: must be at least 0, got {values.num_tokens}")
    try:
        sampling = Sampling(values.temperature, values.top_k, values.top_p, values.min_p, values.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    devices.set_up_compile_cache()
    devices.wake_up()
    model, tokenizer, _, _ = run_lib.load_model(Path(values.workdir), values.step, Console().warn)
    prompt = values.prompt
    try:
        if values.replace_unknown:
            prompt = tokenizer.decode(tokenizer.encode(prompt, replace_unknown=True))
        length = len(prompt_tokens(tokenizer, prompt))
    except UnknownCharacters as error:
        raise UserError(f"--prompt: {error}; leave them out, or give --replace_unknown") from error
    if length > model.config.context_len:
        print(f"the prompt has {length} tokens; the model reads the last {model.config.context_len}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale may lack what the model writes
    try:
        print(prompt, end="", flush=True)
        for text in stream(model, tokenizer, prompt, values.num_tokens, sampling):
            print(text, end="", flush=True)
        print()
    except BrokenPipeError:  # the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
