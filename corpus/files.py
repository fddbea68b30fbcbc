"""The files of a corpus, and where they may be cut.

A corpus is one sequence of bytes (of text files) or rows (of files that hold rows); a position in it is one integer. It
is cut into tasks where that changes no token, so that many threads produce the same tokens as one.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from corpus.dataset import SPLITS, Wanted, ends_of_splits, names_of_splits, tell_names
from corpus.formats import Bad, Source, text_of
from corpus.load_text import find_files
from runtime.errors import UserError

# Where a text may be cut without changing what any tiktoken pattern finds on either side: before a single space
# between letters, or after a newline between two visible characters of which the second is not punctuation.
_CUT = re.compile(
    rb"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[\xd0\xd1][\x80-\xbf])(?= [\xd0\xd1])|(?<=[!-~]\n)(?=[A-Za-z0-9])"
    rb"|(?:(?<=[\xe4-\xe9][\x80-\xbf]{2}\n)|(?<=\xe3\x80\x82\n))(?=[\xe4-\xe9A-Za-z0-9])"
)
_BEHIND = 4  # bytes before the cut that the pattern looks at
LOOK_FOR_CUT = 2**16  # bytes; a longer text without such a place is cut between any two characters
KEPT = 2**22  # bytes of an unpacked stream, more than lie between what is asked for next and the farthest byte read


class Piece(NamedTuple):
    """UTF-8, or to the byte tokenizer any bytes: a document, or the part of one that begins at byte `start` of it."""

    path: Path
    data: bytes
    start: int = 0

    @property
    def begins(self) -> bool:
        """Whether a document begins with it."""
        return not self.start


class TextFiles:
    """Text files end to end, each of them a document; a position counts bytes.

    There are `size` positions and `empty` empty documents; by `identity` the same, unchanged files are recognised.
    """

    unit, step = "bytes", 2**20

    def __init__(self, sources: list[Source], tokenizer: str):
        self._files, self._tokenizer = [_TextFile(source) for source in sources], tokenizer
        self._starts = list(accumulate((file.size for file in self._files), initial=0))
        self.size, self.empty = self._starts[-1], sum(not file.size for file in self._files)
        self.identity = [_identity(source.path) for source in sources]
        if tokenizer == "imported":  # which may read a cut text otherwise: only splits are cut
            self.step = self.size

    def ends(self, val_fraction: float, test_fraction: float) -> list[int]:
        """Where each of `SPLITS` ends."""
        return [self.boundary(end) for end in ends_of_splits(self.size, val_fraction, test_fraction)]

    def boundary(self, place: int) -> int:
        """The first position at or after `place` where a cut changes no token."""
        number = bisect_right(self._starts, place) - 1
        if self._tokenizer == "byte" or place in (self._starts[number], self.size):
            return place
        begin, end = self._starts[number : number + 2]
        at, file = place - begin, self._files[number]
        if self._tokenizer != "char":
            first = max(0, at - _BEHIND)
            window = file.read(first, LOOK_FOR_CUT)
            if found := _CUT.search(window, at - first):
                return begin + first + found.start()
            if first + len(window) >= end - begin:
                return end
        window = file.read(at, 4)  # which may begin inside a character
        return place + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), len(window))

    def pieces(self, start: int, stop: int) -> tuple[list[Piece], list[str]]:
        """What lies between two positions, and no bad rows."""
        number, pieces = bisect_right(self._starts, start) - 1, []
        while start < stop:
            begin, end = self._starts[number : number + 2]
            if end > start:
                data = self._files[number].read(start - begin, min(stop, end) - start)
                pieces.append(Piece(self._files[number].source.path, data, start - begin))
                start = min(stop, end)
            number += 1
        return pieces, []


class _TextFile:
    """Bytes of a text file from any place; of a compressed one, each is unpacked once as long as the places go up."""

    def __init__(self, source: Source):
        self.source = source
        self.size = sum(map(len, source.chunks())) if source.packed else source.path.stat().st_size
        self._file: IO[bytes] | None = None
        self._begin, self._data = 0, b""

    def read(self, start: int, size: int) -> bytes:
        with self.source.reading():
            if not self.source.packed:
                with self.source.stream() as file:
                    file.seek(start)
                    return file.read(size)
            if self._file is None or start < self._begin:
                self._file, self._begin, self._data = self.source.stream(), 0, b""
            end = start + size
            while self._begin + len(self._data) < end and (more := self._file.read(2**20)):
                behind = max(0, min(len(self._data), start - KEPT - self._begin))
                self._begin, self._data = self._begin + behind, self._data[behind:] + more
            return self._data[start - self._begin : end - self._begin]


class RowFiles:
    """Files of rows end to end, each row a document; a position is that of a row. Attributes as `TextFiles`.

    `read` gives what a piece holds of a row's value, or a `Bad`. The files come in the order of the splits that their
    names, or their folders' names, say.
    """

    unit, step = "rows", 256

    def __init__(self, sources: list[Source], wanted: Wanted, read: Callable[[Any], Any]):
        names = names_of_splits(paths := [source.path for source in sources])
        self._sources = [source for name in SPLITS for source, own in zip(sources, names, strict=True) if own == name]
        self._wanted, self._read, self._sizes = wanted, read, dict.fromkeys(SPLITS, 0)
        counts = [source.num_rows(wanted.text_column) for source in self._sources]
        for count, name in zip(counts, sorted(names, key=list(SPLITS).index), strict=True):
            self._sizes[name] += count
        self._starts = list(accumulate(counts, initial=0))
        self.size, self.empty = self._starts[-1], 0
        self.identity = [_identity(source.path) for source in self._sources]
        self._rows: Iterator[Piece | str] = iter(())
        self._at = -1  # where they go on
        tell_names(paths, wanted.say)

    def ends(self, val_fraction: float, test_fraction: float) -> list[int]:
        """Where each of `SPLITS` ends: cut off the rows to train on where no file's name says so."""
        train, val, test = self._sizes.values()
        if val:
            return [train, train + val, self.size]
        return [*ends_of_splits(train, val_fraction, 0 if test else test_fraction)[:2], self.size]

    def boundary(self, place: int) -> int:
        """The position itself."""
        return place

    def pieces(self, start: int, stop: int) -> tuple[list[Piece], list[str]]:
        """The rows between two positions, and what is wrong with bad ones; UserError if these may not be left out."""
        if start != self._at:
            self._rows = self._rows_from(start)
        rows, self._at = list(islice(self._rows, stop - start)), stop
        bad = [row for row in rows if isinstance(row, str)]
        if bad and not self._wanted.skip_bad_rows:
            raise UserError(f"config.dataset: {bad[0]}; mend it, or set config.skip_bad_rows")
        return [row for row in rows if isinstance(row, Piece)], bad

    def _rows_from(self, start: int) -> Iterator[Piece | str]:
        for source, begin, end in zip(self._sources, self._starts, self._starts[1:], strict=False):
            if end <= start:
                continue
            skip = max(0, start - begin)
            values = source.values(self._wanted.text_column, skip)
            for number, text in enumerate(map(self._read, values), skip + 1):
                bad = isinstance(text, Bad)
                yield f"{source.path}, row {number:,}: {text}" if bad else Piece(source.path, text)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def open_corpus(wanted: Wanted) -> TextFiles | RowFiles:
    """The files of a corpus: a named data set, a file, a directory, or a glob, in sorted order.

    Raises UserError if there are no files, they cannot be read, are of two kinds, or are all empty.
    """
    sources = [Source(path) for path in find_files(wanted.dataset, wanted.data_dir, wanted.say)]
    of_rows = [source for source in sources if source.has_rows]
    if of_rows and len(of_rows) < len(sources):
        text = next(source for source in sources if not source.has_rows)
        both = f"files of rows, as {of_rows[0].path}, and of text, as {text.path}"
        raise UserError(f"config.dataset: {wanted.dataset} has {both}; name one kind by a glob")
    read = partial(text_of, any_bytes=wanted.tokenizer == "byte")
    files = RowFiles(sources, wanted, read) if of_rows else TextFiles(sources, wanted.tokenizer)
    if not files.size:
        raise UserError(f"config.dataset: {wanted.dataset} has 0 {files.unit}; give files with text in them")
    return files


class Task(NamedTuple):
    """Documents or parts of them, of one split, the position where they end, and a line for each bad row."""

    split: str
    stop: int
    pieces: list[Piece]
    bad: list[str]


def tasks_of(files: TextFiles | RowFiles, wanted: Wanted, place: int) -> Iterator[Task]:
    """The corpus from a position on, training part first. Begun at a task's end, the tasks that follow are the same."""
    for split, end in zip(SPLITS, files.ends(wanted.val_fraction, wanted.test_fraction), strict=True):
        while place < end:
            stop = min(end, files.boundary(min(place + files.step, files.size)))
            yield Task(split, stop, *files.pieces(place, stop))
            place = stop
