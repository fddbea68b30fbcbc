"""Learn a tokenizer from a corpus: byte-level byte-pair encoding, with special tokens for documents and chats."""

from collections.abc import Iterator
from pathlib import Path

from absl import flags

from commands.flags import parse_flags, spoken_in_flags
from configs import default
from corpus.dataset import Wanted
from corpus.fetch import has_vocabulary
from corpus.files import open_corpus, tasks_of
from corpus.load_text import decode_text, new_tokenizer
from corpus.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from corpus.train_tokenizer import FEWEST, PATTERNS, train_tokenizer
from runtime.errors import UserError
from runtime.files import data_folder, write_json
from runtime.screen.console import Console
from runtime.screen.text import Table
from runtime.workdir import prepare_workdir, removed_if_unused

COMPARED = ("gpt2", "o200k_base")
SAMPLE_BYTES = 10_000_000  # of the corpus, by which tokenizers are compared


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("dataset", None, "What to learn from: as prepare's.", values)
    flags.DEFINE_string("out", None, "The directory to make; then --config.tokenizer=DIRECTORY uses it.", values)
    size = "Tokens, with the 256 bytes and 5 special ones."
    flags.DEFINE_integer("vocab_size", 4096, size, FEWEST, MAX_VOCAB_SIZE, values)
    flags.DEFINE_enum("split", "gpt4", sorted(PATTERNS), "Whose pattern cuts a text before merging.", values)
    flags.DEFINE_string("text_column", "text", "Of rows: the column, or key, to read.", values)
    flags.DEFINE_bool("skip_bad_rows", False, "Leave out rows without a text, and count them.", values)


def main(argv: list[str]) -> None:
    values = parse_flags("tokenizer", __doc__, argv, _define)
    for name in ("dataset", "out"):
        if not getattr(values, name):
            raise UserError(f"--{name}: must be given; see python main.py tokenizer --help")
    path = Path(values.out).expanduser() / "tokenizer.json"
    if path.exists():
        raise UserError(f"--out={values.out}: holds a tokenizer; name another directory")
    data_dir = data_folder(default.get_config().data_dir)
    all_of_it = {"tokenizer": "gpt2", "val_fraction": 0.0, "test_fraction": 0.0, "data_dir": data_dir}
    sample: list[str] = []
    with spoken_in_flags(), removed_if_unused(path.parent), Console() as console:
        prepare_workdir(path.parent, flag="--out")  # before the work whose result goes there
        with console.busy("reading the files"):
            wanted = Wanted.of(values, **all_of_it, say=console.line)
            files = open_corpus(wanted)

        def texts() -> Iterator[str]:
            left, bad = SAMPLE_BYTES, []
            with console.progress(files.size, 0) as update:
                for task in tasks_of(files, wanted, 0):
                    for piece in task.pieces:
                        text = decode_text(*piece)
                        if left > 0:
                            sample.append(text)
                            left -= len(piece.data)
                        yield text
                    bad += task.bad
                    update(task.stop)
            if bad:
                console.warn(f"{len(bad):,} bad rows are left out; the first is {bad[0]}")
            console.doing("merging")

        tokenizer = train_tokenizer(texts(), values.vocab_size, values.split)
        if tokenizer.vocab_size < values.vocab_size:
            console.warn(f"no more pairs occur twice: {tokenizer.vocab_size:,} tokens, not {values.vocab_size:,}")
        write_json(path, tokenizer.to_dict())
        size = sum(len(text.encode()) for text in sample)
        rows = [_row(values.out, tokenizer, sample, size)]
        for name in COMPARED:  # if nothing needs to be downloaded for it
            other = new_tokenizer(name, data_dir, console.line) if has_vocabulary(name, data_dir) else None
            rows.append(_row(name, other, sample, size))
        console.table(Table(f"on {size:,} bytes of {values.dataset}", ["tokenizer", "tokens", "bytes per token"], rows))
        console.line(f"{values.out}: {tokenizer.vocab_size:,} tokens; --config.tokenizer={values.out}")


def _row(name: str, tokenizer: Tokenizer | None, texts: list[str], size: int) -> list[str]:
    if tokenizer is None:
        return [name, "", "not here"]
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return [name, f"{tokenizer.vocab_size:,}", f"{size / max(1, num_tokens):.3f}"]
