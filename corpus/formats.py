"""What a file of texts is, and what reads it: one table, by its first bytes or else by the ending of its name.

A file holds one text as it is, or rows, each of which has one; either may be compressed. Of Parquet and Arrow files, of
CSV and JSON lines one column is read. A row that has no text there is a `Bad` one, which whoever reads it counts.
"""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from runtime.errors import UserError, one_line
from runtime.files import open_regular, parse_json

HEAD_BYTES = 512  # of a file, in which all of these show
_FAILURES = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error)  # of what reads a damaged file
MAX_ROW_BYTES = 2**30  # of a line; more comes of a damaged file, or of one that is made to fill the memory
TEXT_ENDINGS = (".txt", ".md")  # what a directory is searched for, beside the endings of the table


class Bad(str):
    """Why a row has no text."""


Group = tuple[int, Callable[[], Iterable[Any]]]  # rows that are read together: how many, and what gives their values


class Format(NamedTuple):
    """A kind of file: how it begins, how its name ends where its first bytes are others, and what to do with it.

    `unpack` makes a stream of what is inside, `groups` gives the column of that name; `advice` is for what has neither.
    """

    name: str
    magic: bytes = b""
    endings: tuple[str, ...] = ()
    unpack: Callable[[Path], Any] | None = None
    groups: Callable[[IO[bytes], str], Iterator[Group]] | None = None
    advice: str = "write its texts to text files, JSON lines or Parquet"


# --- Rows -------------------------------------------------------------------------------------------------------------


def _arrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet  # here, because all else does without
    except ImportError as error:
        raise UserError("needs pyarrow; pip install -r requirements-data.txt") from error
    return pyarrow


_TEXT_TYPES = {*("string", "large_string", "string_view"), *("binary", "large_binary", "binary_view")}


def _require_column(schema: Any, column: str) -> None:
    """Whether it is one of text or of bytes, as they are or in a dictionary, or of lists, as of messages."""
    value_type = lambda kind: kind.value_type if _arrow().types.is_dictionary(kind) else kind
    names = [field.name for field in schema if str(value_type(field.type)) in _TEXT_TYPES]
    lists = [field.name for field in schema if _arrow().types.is_nested(field.type)]
    _require_name(column, [column] if column in lists else names, "columns of text")


def _require_name(column: str, names: list[str], what: str) -> None:
    if column not in names:
        has = f"its {what} are {', '.join(names)}" if names else "it has none"
        raise UserError(f"has no column of text {column!r}; {has}: set config.text_column")


def _parquet(file: IO[bytes], column: str) -> Iterator[Group]:
    rows = _arrow().parquet.ParquetFile(file)
    _require_column(rows.schema_arrow, column)
    for number in range(rows.metadata.num_row_groups):
        read = partial(rows.read_row_group, number, columns=[column])
        yield rows.metadata.row_group(number).num_rows, lambda read=read: _as_bytes(read().column(0))


def _arrow_batches(of_file: bool, file: IO[bytes], column: str) -> Iterator[Group]:
    rows = _arrow().ipc.open_file(file) if of_file else _arrow().ipc.open_stream(file)
    _require_column(rows.schema, column)
    for batch in map(rows.get_batch, range(rows.num_record_batches)) if of_file else rows:
        yield batch.num_rows, partial(_as_bytes, batch.column(column))


def _as_bytes(column: Any) -> list[Any]:
    if _arrow().types.is_nested(column.type):
        return column.to_pylist()
    return column.cast("large_binary").to_pylist()  # a careless writer's text may be no UTF-8


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"it has a line of more than {MAX_ROW_BYTES:,} bytes")
        yield line


def _json_lines(file: IO[bytes], column: str) -> Iterator[Group]:
    lines = _lines(file)
    while some := list(islice(lines, 256)):
        yield len(some), partial(map, partial(_of_object, column), some)


def _of_object(column: str, line: bytes) -> Any:
    if not line.strip():
        return ""  # the number of a row is that of its line
    try:
        row = parse_json(line)
    except ValueError as error:
        return Bad(one_line(error))
    if not isinstance(row, dict):
        return Bad(f"is no JSON object but {type(row).__name__}")
    return row[column] if column in row else Bad(f"has no {column!r} but {', '.join(list(row)[:8]) or 'nothing'}")


def _csv(file: IO[bytes], column: str) -> Iterator[Group]:
    csv.field_size_limit(MAX_ROW_BYTES)
    decoded = (line.decode("utf-8", "surrogateescape") for line in _lines(file))
    rows = filter(None, csv.reader(decoded))
    names = [name.removeprefix("\ufeff") for name in next(rows, [])]
    _require_name(column, names, "columns")
    place = names.index(column)
    while some := list(islice(rows, 256)):
        cells = [row[place] if place < len(row) else Bad(f"has no {column!r}") for row in some]
        yield len(cells), cells.copy


# --- The table --------------------------------------------------------------------------------------------------------


def _by_arrow(codec: str, path: Path) -> IO[bytes]:
    """Unpacked by pyarrow, which notices where the end is missing; zstandard's reader does not."""
    return io.BufferedReader(_arrow().input_stream(str(path), compression=codec))


_TABLE = [
    Format("gzip", rb"\x1f\x8b\x08", (".gz",), unpack=gzip.open),
    Format("Zstandard", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", (".zst",), unpack=partial(_by_arrow, "zstd")),
    Format("bzip2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", unpack=bz2.open),
    Format("xz", rb"\xfd7zXZ\0", unpack=lzma.open),
    Format("LZ4", rb"\x04\x22\x4d\x18", unpack=partial(_by_arrow, "lz4")),
    Format("a Parquet file", rb"PAR1\x15", (".parquet",), groups=_parquet),
    Format("an Arrow stream", rb"\xff{4}...\0\x10\0\0\0", (".arrow",), groups=partial(_arrow_batches, False)),
    Format("an Arrow file", rb"ARROW1\0\0", groups=partial(_arrow_batches, True)),
    Format("JSON lines", endings=(".jsonl", ".ndjson"), groups=_json_lines),
    Format("CSV", endings=(".csv",), groups=_csv),
    Format("a zip archive", rb"PK(\x03\x04|\x05\x06)"),
    Format("a 7z archive", rb"7z\xbc\xaf\x27\x1c"),
    Format("a tar archive", rb".{257}ustar[\0 ]"),
    Format("a Feather file", rb"FEA1"),
    Format("an Avro file", rb"Obj\x01"),
    Format("NumPy's array", rb"\x93NUMPY", advice="write its tokens to a train.bin, as nanoGPT does"),
    Format("a PDF file", rb"%PDF-\d"),
    Format("an MDS shard", endings=(".mds",)),
]
_PLAIN = Format("a text")
_PACKED = re.compile(r"\.(gz|zst|bz2|xz|lz4)$", re.IGNORECASE)


def _format_of(name: str, head: bytes) -> Format:
    of_magic = (kind for kind in _TABLE if kind.magic and re.match(kind.magic, head, re.DOTALL))
    of_name = (kind for kind in _TABLE if name.lower().endswith(kind.endings))
    return next(of_magic, None) or next(of_name, _PLAIN)


def is_named_so(path: Path) -> bool:
    """Whether the ending of a file's name says that texts are in it which can be read."""
    name = _PACKED.sub("", path.name.lower())
    return name.endswith(TEXT_ENDINGS) or any(kind.groups and name.endswith(kind.endings) for kind in _TABLE)


def require_plain(path: Path, head: bytes) -> None:
    """Raises UserError if the file, whose first HEAD_BYTES are `head`, begins as one of these formats."""
    if (kind := _format_of("", head)) is not _PLAIN:
        raise _refused(path, kind)


def _refused(path: Path, kind: Format) -> UserError:
    advice = "decompress it first" if kind.unpack else kind.advice
    return UserError(f"config.dataset: {path} is {kind.name}, not plain text; {advice}")


class Source:
    """A file of texts: whether it is `packed` (compressed), whether it `has_rows` or is one text, and its content.

    Raises UserError if it cannot be read, or its texts are inside something that is not read here.
    """

    def __init__(self, path: Path):
        self.path, self._unpack = path, None
        kind = _format_of(path.name, self._head())
        if kind.unpack:
            self._unpack = kind.unpack
            kind = _format_of(_PACKED.sub("", path.name), self._head())
        if kind is not _PLAIN and not kind.groups:
            raise _refused(path, kind)
        self.packed, self.has_rows, self._groups = self._unpack is not None, kind.groups is not None, kind.groups

    def _head(self) -> bytes:
        with self.reading(), self.stream() as file:
            return file.read(HEAD_BYTES)

    def stream(self) -> IO[bytes]:
        """What is in the file, decompressed. Raises OSError, or as `reading` knows."""
        return self._unpack(self.path) if self._unpack else open_regular(self.path)

    def chunks(self) -> Iterator[bytes]:
        """All of that, in order."""
        with self.reading(), self.stream() as file:
            while chunk := file.read(2**20):
                yield chunk

    def num_rows(self, column: str) -> int:
        with self.reading(), self.stream() as file:
            return sum(count for count, _ in self._groups(file, column))

    def values(self, column: str, start: int = 0) -> Iterator[Any]:
        """What the rows from number `start` on have in a column, or a `Bad`."""
        with self.reading(), self.stream() as file:
            for count, values in self._groups(file, column):
                if start < count:
                    yield from islice(values(), start, None)
                start = max(0, start - count)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, what reading the file raises becomes a UserError."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        except PermissionError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); check its permissions") from error
        except (*_FAILURES, getattr(sys.modules.get("pyarrow"), "ArrowException", OSError)) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"{self.path}: cannot be read ({reason}); copy it again") from error


def text_of(value: Any, any_bytes: bool) -> bytes | Bad:
    """The text that a row holds, in UTF-8; with `any_bytes` bytes as they are."""
    if isinstance(value, Bad):
        return value
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes):
            return value if any_bytes else value.decode().encode()
    except UnicodeError as error:
        return Bad(f"is not UTF-8 at {'byte' if isinstance(value, bytes) else 'character'} {error.start}")
    return Bad("is null" if value is None else f"is no text but {type(value).__name__}")
