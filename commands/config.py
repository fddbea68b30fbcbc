"""Every key of a config, its value and its meaning, a * where it is not the default; and how its model exports."""

from itertools import groupby

import config_lib
from commands.flags import parse_flags
from interop.models import exported_as
from runtime.screen.console import Console
from runtime.screen.text import Table


def main(argv: list[str]) -> None:
    config = parse_flags("config", __doc__, argv, lambda values: None, config=True).config
    config_lib.check(config)
    console = Console()
    for section, docs in groupby(config_lib.key_docs().values(), key=lambda doc: doc.section):
        rows = []
        for doc in docs:
            value, usual = config_lib.written(config[doc.key]), config_lib.written(doc.default)
            note = f" (default {usual})" if value != usual else ""
            rows.append(["*" if note else "", doc.key, value, doc.comment + note])
        bold = frozenset(number for number, row in enumerate(rows) if row[0])
        console.table(Table(section, [""] * 4, rows, left=4, bold=bold))
    try:
        exported = exported_as(config_lib.transformer_config(config, vocab_size=2, dtype="float32"))
        console.line("; ".join([f"exports as {exported.family.architecture}", *exported.caveats]))
    except ValueError as error:
        console.line(f"exports with our names only (--format=safetensors): {error}")
