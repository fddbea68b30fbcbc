"""Formats that are not plain text, recognised by their first bytes, so that nobody trains on binary content."""

import re
from pathlib import Path

from runtime.errors import UserError

HEAD_BYTES = 512  # of a file; enough to recognise each format below
PARQUET = "a Parquet file"

_DECOMPRESS, _UNPACK = "decompress it first", "write its texts to text files, or to Parquet for `main.py prepare`"
_KINDS = [  # name, pattern of the first bytes, suffix that the file must have besides, and advice
    (PARQUET, rb"PAR1\x15", "", "`main.py prepare` reads it"),
    ("gzip", rb"\x1f\x8b\x08", "", _DECOMPRESS),
    ("Zstandard", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "", _DECOMPRESS),
    ("bzip2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "", _DECOMPRESS),
    ("xz", rb"\xfd7zXZ\0", "", _DECOMPRESS),
    ("LZ4", rb"\x04\x22\x4d\x18", "", _DECOMPRESS),
    ("a zip archive", rb"PK(\x03\x04|\x05\x06)", "", _UNPACK),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c", "", _UNPACK),
    ("a tar archive", rb".{257}ustar[\0 ]", "", _UNPACK),
    ("an Arrow file", rb"ARROW1\0\0|\xff{4}...\0\x10\0\0\0|FEA1", "", _UNPACK),
    ("an Avro file", rb"Obj\x01", "", _UNPACK),
    ("NumPy's array", rb"\x93NUMPY", "", "write its tokens to a train.bin, as nanoGPT does"),
    ("a PDF file", rb"%PDF-\d", "", _UNPACK),
    ("an MDS shard", rb"", ".mds", _UNPACK),
    ("JSON lines", rb"(\xef\xbb\xbf)?\s*[{\[]", ".jsonl", f"{_UNPACK}; under another name its braces are text"),
    ("JSON lines", rb"(\xef\xbb\xbf)?\s*[{\[]", ".ndjson", f"{_UNPACK}; under another name its braces are text"),
]
_TABLE = [(name, re.compile(magic, re.DOTALL), ending, advice) for name, magic, ending, advice in _KINDS]


def kind_of(path: Path, head: bytes) -> tuple[str, str] | None:
    """The file's format and what to do with it; None if it is plain text. `head`: its first HEAD_BYTES."""
    fits = lambda magic, ending: path.name.lower().endswith(ending) and magic.match(head)
    return next(((name, advice) for name, magic, ending, advice in _TABLE if fits(magic, ending)), None)


def require_plain(path: Path, head: bytes) -> None:
    """Raises UserError if `kind_of` recognises the file."""
    if kind := kind_of(path, head):
        raise UserError(f"config.dataset: {path} is {kind[0]}, not plain text; {kind[1]}")
