"""Every key of a config, its value and its meaning, a * where it is not the default; and how its model exports."""

from itertools import groupby

import config_lib
from commands.flags import parse_flags
from config_lib import key_docs, written
from interop.models import exported_as
from runtime.screen.console import Console
from runtime.screen.text import Table


def main(argv: list[str]) -> None:
    config = parse_flags("config", __doc__, argv, lambda values: None, config=True).config
    config_lib.check(config)
    console = Console()
    for section, docs in groupby(key_docs().values(), key=lambda doc: doc.section):
        rows, differ = [], set()
        for doc in docs:
            value, usual = written(config[doc.key]), written(doc.default)
            if value != usual:
                differ.add(len(rows))
            note = f" (default {usual})" if value != usual else ""
            rows.append(["*" if note else "", doc.key, value, doc.comment + note])
        console.table(Table(section, [""] * 4, rows, left=4, bold=frozenset(differ)))
    try:
        exported = exported_as(config_lib.transformer_config(config, vocab_size=2, dtype="float32"))
        console.line("; ".join([f"exports as {exported.family.architecture}", *exported.caveats]))
    except ValueError as error:
        console.line(f"exports with our names only (--format=safetensors): {error}")
