"""Write text with a trained model; without a prompt, on a terminal, one types prompts to it."""

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
from talk_lib import Talk, readable, talk, write_text
from transformer.sampling import Sampling, stream
from transformer.tokenizer import UnknownCharacters


def _define(values: flags.FlagValues) -> None:
    default = Sampling()
    flags.DEFINE_string("workdir", config_lib.DEFAULT_WORKDIR, "The run's directory.", flag_values=values)
    flags.DEFINE_integer("step", None, "The checkpoint's number; default the best one.", flag_values=values)
    flags.DEFINE_string(
        "prompt", None, "What the text goes on from; default: typed, or else standard input.", flag_values=values
    )
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale may lack what the model writes
    watched = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if values.prompt is None and watched:
        say = lambda line: print(line, flush=True)
        chat = Talk(model, tokenizer, sampling, values.num_tokens, say, write_text, values.replace_unknown)
        talk(chat.answer, say)
        return
    prompt = _read_prompt() if values.prompt is None else values.prompt
    name = "--prompt" if values.prompt is not None else "standard input"
    try:
        prompt, length = readable(tokenizer, prompt, values.replace_unknown)
    except UnknownCharacters as error:
        raise UserError(f"{name}: {error}; leave them out, or give --replace_unknown") from error
    if length > model.config.context_len:
        print(f"the prompt has {length} tokens; the model reads the last {model.config.context_len}", file=sys.stderr)
    try:
        write_text(prompt)
        for text in stream(model, tokenizer, prompt, values.num_tokens, sampling):
            write_text(text)
        write_text("\n")
    except BrokenPipeError:  # the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_prompt() -> str:
    """Standard input without its last line break, which a shell puts there; a line break where there is none.

    Raises:
      UserError: it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return "\n"
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}; give text") from error
    return text.removesuffix("\n").removesuffix("\r") or "\n"
