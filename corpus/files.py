"""The files of a corpus, and where they may be cut.

A corpus is one sequence of bytes (of text files) or rows (of Parquet files); a position in it is one integer. It is cut
into tasks where that changes no token, so that many processes produce the same tokens as one.
"""

import contextlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

from corpus.containers import HEAD_BYTES, PARQUET, kind_of, require_plain
from corpus.dataset import SPLITS, ends_of_splits
from corpus.load_text import find_files
from runtime.errors import UserError, one_line
from runtime.files import open_regular

# Where a text may be cut without changing what any tiktoken pattern finds on either side: before a single space
# between letters, or after a newline between two visible characters of which the second is not punctuation.
_CUT = re.compile(
    rb"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[\xd0\xd1][\x80-\xbf])(?= [\xd0\xd1])|(?<=[!-~]\n)(?=[A-Za-z0-9])"
    rb"|(?:(?<=[\xe4-\xe9][\x80-\xbf]{2}\n)|(?<=\xe3\x80\x82\n))(?=[\xe4-\xe9A-Za-z0-9])"
)
_BEHIND = 4  # bytes before the cut that the pattern looks at
LOOK_FOR_CUT = 2**16  # bytes; if they hold no such place, the text is cut between any two characters


@dataclass(frozen=True)
class Settings:
    """What the shards depend on, besides the files themselves. Fractions are of the text's bytes, or of the rows."""

    tokenizer: str
    val_fraction: float
    test_fraction: float
    shard_tokens: int
    text_column: str


class Span(NamedTuple):
    """Bytes `start` to `stop` of a text file, or rows `start` to `stop` of a row group of a Parquet file."""

    path: str
    start: int
    stop: int
    row_group: int | None = None


class TextFiles:
    """Text files end to end, each of them a document; a position counts bytes.

    Attributes:
      size: the number of positions.
      empty: the number of empty documents.
      identity: names, sizes and times of change, to recognise the same, unchanged files.
    """

    unit, step = "bytes", 2**20

    def __init__(self, paths: list[Path], tokenizer: str):
        self._paths, self._tokenizer = paths, tokenizer
        try:
            stats = [path.stat() for path in paths]
        except OSError as error:
            raise _unreadable(error.filename, error) from error
        self._starts = list(accumulate((stat.st_size for stat in stats), initial=0))
        self.size, self.empty = self._starts[-1], sum(not stat.st_size for stat in stats)
        self.identity = [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]

    def boundary(self, place: int) -> int:
        """The first position at or after `place` where a cut changes no token."""
        number = bisect_right(self._starts, place) - 1
        if self._tokenizer == "byte" or place in (self._starts[number], self.size):
            return place
        begin, end = self._starts[number : number + 2]
        at = place - begin
        with open_file(self._paths[number]) as file:
            if self._tokenizer != "char":
                first = max(0, at - _BEHIND)
                file.seek(first)
                window = file.read(LOOK_FOR_CUT)
                if found := _CUT.search(window, at - first):
                    return begin + first + found.start()
                if first + len(window) >= end - begin:
                    return end
            file.seek(at)
            while at < end - begin and file.read(1)[0] & 0xC0 == 0x80:  # inside a character
                at += 1
        return begin + at

    def spans(self, start: int, stop: int) -> list[Span]:
        """The parts of the files that lie between two positions."""
        return [Span(str(self._paths[i]), *within) for i, *within in _between(self._starts, start, stop)]


def _between(starts: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """What lies between two positions, part by part, as (part, from, to); part i begins at starts[i]."""
    number = bisect_right(starts, start) - 1
    while start < stop:
        begin, end = starts[number : number + 2]
        if end > start:
            yield number, start - begin, min(stop, end) - begin
            start = min(stop, end)
        number += 1


class ParquetFiles:
    """Parquet files end to end, each row a document; a position counts rows. Attributes: see `TextFiles`."""

    unit, step = "rows", 256

    def __init__(self, paths: list[Path], text_column: str):
        groups = [(path, number, rows) for path in paths for number, rows in _groups(path, text_column)]
        self._groups = [(str(path), number) for path, number, _ in groups]
        self._starts = list(accumulate((rows for _, _, rows in groups), initial=0))
        self.size, self.empty = self._starts[-1], 0
        self.identity = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def boundary(self, place: int) -> int:
        """The position itself."""
        return place

    def spans(self, start: int, stop: int) -> list[Span]:
        """The rows between two positions, by row group."""
        pieces = _between(self._starts, start, stop)
        return [Span(path, *within, group) for i, *within in pieces for path, group in [self._groups[i]]]


def _groups(path: Path, text_column: str) -> Iterator[tuple[int, int]]:
    return enumerate(ParquetRows(path, text_column).group_sizes)


def open_file(path: str | Path) -> IO[bytes]:
    """A file to read bytes from. Raises UserError if it cannot be read."""
    try:
        return open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def open_corpus(
    dataset: str, settings: Settings, data_dir: Path, say: Callable[[str], None]
) -> TextFiles | ParquetFiles:
    """The files of a corpus: a named data set, a file, or a glob, in sorted order.

    Raises:
      UserError: there are no files, they cannot be read, are of two kinds, or are all empty.
    """
    paths = find_files(dataset, data_dir, say)
    parquet = [path for path in paths if _holds_rows(path) or path.suffix == ".parquet"]
    if parquet and len(parquet) < len(paths):
        raise UserError(f"config.dataset: {dataset} has text and Parquet files; prepare each kind by itself")
    files = ParquetFiles(parquet, settings.text_column) if parquet else TextFiles(paths, settings.tokenizer)
    if not files.size:
        raise UserError(f"config.dataset: {dataset} has 0 {files.unit}; give files with text in them")
    return files


def _holds_rows(path: Path) -> bool:
    """Whether it is a Parquet file. Raises UserError if it is of a format that is not read here."""
    with open_file(path) as file:
        head = file.read(HEAD_BYTES)
    if (kind := kind_of(path, head)) and kind[0] == PARQUET:
        return True
    require_plain(path, head)
    return False


class Task(NamedTuple):
    """Spans of one split, and the position where the last one ends."""

    split: str
    stop: int
    spans: list[Span]


def tasks_of(files: TextFiles | ParquetFiles, settings: Settings, place: int) -> Iterator[Task]:
    """The corpus from `place` on, training split first. Starting at the end of any task gives the same tasks again."""
    ends = ends_of_splits(files.size, settings.val_fraction, settings.test_fraction)
    for split, end in zip(SPLITS, map(files.boundary, ends), strict=True):
        while place < end:
            stop = min(end, files.boundary(min(place + files.step, files.size)))
            yield Task(split, stop, files.spans(place, stop))
            place = stop


_TEXT_TYPES = {*("string", "large_string", "string_view"), *("binary", "large_binary", "binary_view")}


class ParquetRows:
    """One column of a Parquet file, read by row group: of text or bytes, plain or dictionary-encoded.

    Raises:
      UserError: pyarrow is not installed, the file is damaged or not Parquet, or it has no such column of text.
    """

    def __init__(self, path: Path, column: str):
        try:
            import pyarrow as arrow  # here, because nothing else needs it
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: Parquet needs pyarrow; pip install -r requirements-parquet.txt") from error
        self._arrow, self._path, self._column = arrow, path, column
        with self._reading():
            self._file = arrow.parquet.ParquetFile(path)
        value_type = lambda kind: kind.value_type if arrow.types.is_dictionary(kind) else kind
        names = [field.name for field in self._file.schema_arrow if str(value_type(field.type)) in _TEXT_TYPES]
        if column not in names:
            has = f"its columns of text are {', '.join(names)}" if names else "it has none"
            raise UserError(f"{path}: has no column of text {column!r}; {has}: set --text_column")

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def texts(self, group: int) -> list[bytes]:
        """The texts of a row group; null becomes an empty text. A column of bytes may hold invalid UTF-8."""
        with self._reading():
            column = self._file.read_row_group(group, columns=[self._column]).column(0).to_pylist()
        return [text.encode() if isinstance(text, str) else text or b"" for text in column]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeDecodeError, self._arrow.ArrowException) as error:
            raise UserError(f"{self._path}: cannot be read ({one_line(error)}); copy it again") from error
