"""Texts out of Parquet files; the only file that knows pyarrow, which is an optional extra."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError, one_line


class ParquetRows:
    """One text column of a Parquet file, read by row group.

    Raises:
      UserError: pyarrow is not installed, the file is no Parquet file or damaged, or has no such column of text.
    """

    def __init__(self, path: Path, column: str):
        try:
            import pyarrow as arrow  # here, because all else does without
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: Parquet needs pyarrow; pip install -r requirements-parquet.txt") from error
        self._arrow, self._path, self._column = arrow, path, column
        with self._reading():
            self._file = arrow.parquet.ParquetFile(path)
        schema = self._file.schema_arrow
        names = [field.name for field in schema if field.type in (arrow.string(), arrow.large_string())]
        if column not in names:
            has = f"its columns of text are {', '.join(names)}" if names else "it has none"
            raise UserError(f"{path}: has no column of text {column!r}; {has}: set --text_column")

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def texts(self, group: int) -> list[str]:
        """The texts of a row group; null is the empty text."""
        with self._reading():
            column = self._file.read_row_group(group, columns=[self._column]).column(0).to_pylist()
        return [text or "" for text in column]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._arrow.ArrowException) as error:
            raise UserError(f"{self._path}: cannot be read ({one_line(error)}); copy it again") from error
