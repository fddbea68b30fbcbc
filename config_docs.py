"""What configs/default.py says of each key: its section and its comment, read from there."""

import re
import tokenize
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from configs import default

_SECTION = re.compile(r"# --- (.+?) -+$")
_ASSIGNMENT = re.compile(r"\s*config\.(\w+) = ")


class KeyDoc(NamedTuple):
    """One key as configs/default.py has it."""

    section: str
    key: str
    default: Any
    comment: str


@cache
def key_docs() -> dict[str, KeyDoc]:
    """Every key's documentation, in the order of configs/default.py. A comment may go on in the lines below its key."""
    defaults = default.get_config()
    found: dict[str, KeyDoc] = {}
    section = key = ""
    with Path(default.__file__).open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type != tokenize.COMMENT:
                continue
            text = token.string.removeprefix("#").strip()
            if heading := _SECTION.match(token.string):
                section, key = heading[1], ""
            elif assigned := _ASSIGNMENT.match(token.line):
                key = assigned[1]
                found[key] = KeyDoc(section, key, defaults[key], text)
            elif key:
                found[key] = found[key]._replace(comment=f"{found[key].comment}; {text}")
    return found


def written(value: Any) -> str:
    """A value as one writes it after `--config.KEY=`; text that would not be seen so is quoted."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    if isinstance(value, str) and (not value or not value.isprintable() or value != value.strip()):
        return repr(value)
    return str(value)
