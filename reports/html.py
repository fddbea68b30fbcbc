"""A self-contained HTML file: no network, no script, embedded pictures. Every text in it is escaped."""

import base64
from html import escape
from typing import NamedTuple

from runtime.screen.text import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd; --sunk: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #16181c; --faint: #999; --line: #383b40; --sunk: #1e2126; }
  img.paper { background: #fff; border-radius: 4px; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: normal; vertical-align: bottom; }
.word { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5.5rem; max-width: 22rem; }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; } }
tr.bold td { font-weight: bold; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.pictures img { flex: 1 1 24rem; min-width: 0; max-width: min(100%, 34rem); height: auto; align-self: flex-start; }
p { max-width: 45rem; }
pre { font: 13px/1.5 ui-monospace, monospace; background: var(--sunk); border-radius: 4px; padding: .6rem .8rem;
      margin: .4rem 0; max-width: 45rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { border-radius: 2px; }
figure { margin: 0; } figcaption { color: var(--faint); font-size: .85rem; margin-top: .6rem; }
summary { cursor: pointer; margin: 1rem 0 .4rem; color: var(--faint); }
"""


class Picture(NamedTuple):
    """A PNG image and what it shows, for those who cannot see it."""

    png: bytes
    alt: str
    clear: bool = False  # transparent, readable on a light and on a dark page


class Heading(NamedTuple):
    text: str


class Verbatim(NamedTuple):
    """Preformatted text under a caption; long lines wrap. `shades`: how strongly each part is marked, 0 to 1."""

    caption: str
    parts: list[str]
    shades: list[float] | None = None


class Fold(NamedTuple):
    """Blocks that are shown when their summary is clicked."""

    summary: str
    blocks: "list[Block]"


Block = Table | Heading | Verbatim | Fold | list[Picture] | str


def html_page(title: str, blocks: list[Block]) -> str:
    """A page of the blocks, readable also on a phone, in light and in dark mode."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{_body(blocks)}\n</body>\n</html>\n"
    )


def _body(blocks: list[Block]) -> str:
    return "\n".join(map(_block, blocks))


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Table():
            return _table(block)
        case Fold(summary, blocks):
            return f"<details><summary>{escape(summary)}</summary>\n{_body(blocks)}\n</details>"
        case Verbatim(caption, parts, shades):
            texts = map(escape, parts) if shades is None else map(_shaded, parts, shades)
            # HTML drops a line break right after <pre>, so one is always added
            return f"<figure><figcaption>{escape(caption)}</figcaption><pre>\n{''.join(texts)}</pre></figure>"
        case _:
            return f'<div class="pictures">{"".join(map(_image, block))}</div>'


def _shaded(text: str, shade: float) -> str:
    # at .6 the text is still readable, in light and in dark mode
    return f'<span style="background:rgba(209,96,61,{0.6 * shade:.3f})">{escape(text)}</span>'


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    kind = "" if picture.clear else ' class="paper"'
    return f'<img{kind} src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'


def _table(table: Table) -> str:
    rows = [_row("th", table.columns, table.left)] if any(table.columns) else []
    rows += [_row("td", row, table.left, i in table.bold) for i, row in enumerate(table.rows)]
    heading = f"<h2>{escape(table.title)}</h2>\n" if table.title else ""
    return f'{heading}<div class="scroll"><table>\n{"".join(rows)}</table></div>'


def _row(tag: str, texts: list[str], left: int, bold: bool = False) -> str:
    kind = lambda i: ' class="word"' if i < left else ""
    highlight = ' class="bold"' if bold else ""
    written = lambda text: escape(text).replace("_", "_<wbr>")  # a key may be broken between its words
    cells = "".join(f"<{tag}{kind(i)}>{written(text)}</{tag}>" for i, text in enumerate(texts))
    return f"<tr{highlight}>{cells}</tr>\n"
