"""A self-contained HTML file: no network, no script, embedded pictures. Every text in it is escaped."""

import base64
from html import escape
from pathlib import Path
from typing import NamedTuple

from runtime.files import read_file
from runtime.screen.text import Table


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
    style = read_file(Path(__file__).with_name("page.css")).decode()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
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
        case Table(title, columns, lines, left, bold):
            rows = [_row("th", columns, left)] if any(columns) else []
            rows += [_row("td", line, left, i in bold) for i, line in enumerate(lines)]
            heading = f"<h2>{escape(title)}</h2>\n" if title else ""
            return f'{heading}<div class="scroll"><table>\n{"".join(rows)}</table></div>'
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


def _row(tag: str, texts: list[str], left: int, bold: bool = False) -> str:
    kind = lambda i: ' class="word"' if i < left else ""
    highlight = ' class="bold"' if bold else ""
    written = lambda text: escape(text).replace("_", "_<wbr>")  # a key may be broken between its words
    cells = "".join(f"<{tag}{kind(i)}>{written(text)}</{tag}>" for i, text in enumerate(texts))
    return f"<tr{highlight}>{cells}</tr>\n"
