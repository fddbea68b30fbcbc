"""Tokenise a corpus into memory-mapped shards; the same command again goes on where it was stopped."""

import os
import re

from absl import flags

from commands.flags import parse_flags, spoken_in_flags
from configs import default
from corpus.dataset import Wanted
from corpus.prepare import MAX_SHARD_TOKENS, prepare
from runtime.errors import UserError
from runtime.files import data_folder
from runtime.screen.console import Console


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("dataset", None, "Files of texts or rows (a glob), a directory, or a data set's name.", values)
    flags.DEFINE_string("out", None, "The directory to make; then --config.dataset=DIRECTORY trains on it.", values)
    flags.DEFINE_string("tokenizer", "gpt2", "byte, char, a tiktoken encoding, or the directory of your own.", values)
    flags.DEFINE_float("val_fraction", 0.01, "Of the bytes or rows, for validation: after training.", 0, None, values)
    flags.DEFINE_float("test_fraction", 0.0, "Of the bytes or rows, for testing: the end.", 0, None, values)
    flags.DEFINE_integer("shard_tokens", 100_000_000, "Tokens from which a shard is full.", 1, MAX_SHARD_TOKENS, values)
    flags.DEFINE_string("text_column", "text", "Of rows: the column, or key, to read.", values)
    flags.DEFINE_bool("skip_bad_rows", False, "Leave out rows without a text, and count them.", values)
    flags.DEFINE_integer("threads", 0, "Worker threads; 0: one for each CPU core.", 0, None, values)


def main(argv: list[str]) -> None:
    values = parse_flags("prepare", __doc__, argv, _define)
    for name in ("dataset", "out"):
        if not getattr(values, name):
            raise UserError(f"--{name}: must be given; see python main.py prepare --help")
    if not values.val_fraction + values.test_fraction < 1:  # it may be no number
        raise UserError("--val_fraction: with --test_fraction it leaves no text to train on; their sum must be below 1")
    threads = values.threads or len(os.sched_getaffinity(0))
    data_dir, console = data_folder(default.get_config().data_dir), Console()
    try:
        with spoken_in_flags():
            wanted = Wanted.of(values, data_dir=data_dir, unknown_characters="", say=console.line)
            prepare(wanted, values.out, threads, console)
    except UserError as error:  # the code below calls it the workdir
        raise UserError(re.sub("^workdir", "--out", str(error).replace("--workdir", "--out"))) from error
