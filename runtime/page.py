"""One HTML file that needs nothing else: no network, no script, pictures inside. Every text in it is escaped."""

import base64
from dataclasses import dataclass
from html import escape

from runtime.text import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { color: #666; font-weight: normal; vertical-align: bottom; }
.word { text-align: left; white-space: normal; overflow-wrap: break-word; max-width: 22rem; }
tr.bold td { font-weight: bold; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.pictures img { flex: 1 1 20rem; min-width: 0; max-width: min(100%, 42rem); height: auto; align-self: flex-start; }
p { max-width: 45rem; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG image and what it shows, for those who cannot see it."""

    png: bytes
    alt: str


def html_page(title: str, blocks: list[Table | list[Picture] | str]) -> str:
    """A page of tables, rows of pictures and paragraphs, which reads at a phone's width too."""
    body = "\n".join(_block(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _block(block: Table | list[Picture] | str) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Table):
        return _table(block)
    images = (
        f'<img src="data:image/png;base64,{base64.b64encode(picture.png).decode()}" alt="{escape(picture.alt)}">'
        for picture in block
    )
    return f'<div class="pictures">{"".join(images)}</div>'


def _table(table: Table) -> str:
    rows = [_row("th", table.columns, table.left)] if any(table.columns) else []
    rows += [_row("td", row, table.left, i in table.bold) for i, row in enumerate(table.rows)]
    return f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n{"".join(rows)}</table></div>'


def _row(tag: str, texts: list[str], left: int, bold: bool = False) -> str:
    kind = lambda i: ' class="word"' if i < left else ""
    highlight = ' class="bold"' if bold else ""
    cells = "".join(f"<{tag}{kind(i)}>{escape(text)}</{tag}>" for i, text in enumerate(texts))
    return f"<tr{highlight}>{cells}</tr>\n"
