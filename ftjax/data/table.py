"""Rows, and where each of them came from. Reading, cleaning, splitting and augmenting pass them on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ftjax.data import columns
from ftjax.errors import FtjaxError, nearest

if TYPE_CHECKING:
    import datasets
    import pyarrow

CHUNK = 1000  # rows held as Python objects at once
CHUNK_BYTES = 16_000_000  # bytes of these rows, approximately: chunks of large rows have fewer rows


@dataclasses.dataclass(frozen=True)
class Table:
    """N rows in order. If rows are left out or changed, the others keep their places in their files.

    Attributes:
        rows: The cells, in memory or mapped from files. `chunks` and `row` give them exactly as they were read.
            `datasets` itself does so too, except for long numbers in columns of mixed types (see `ftjax.data.columns`).
        files: Names of the files for errors.
        file: (N,) int32, index into `files`.
        number: (N,) int64, number of the row in its file, from 1. Blank lines and headers are not counted.
    """

    rows: datasets.Dataset
    files: tuple[str, ...]
    file: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of the file."""
        return self.rows.column_names

    def place(self, index: int) -> str:
        """The name of a row in errors and reports, such as `a.jsonl row 3`."""
        return f"{self.files[self.file[index]]} row {self.number[index]}"

    def row(self, index: int) -> dict:
        """One row as {column: cell}."""
        index = range(len(self))[int(index)]
        return columns.rows(self._arrow(index, index + 1))[0]

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, list[dict]]]:
        """(index of the first row, rows) of consecutive chunks of all rows.

        At most `size` rows, or fewer if they are large, are Python objects at the same time.
        """
        data = self.rows.data
        size = max(1, min(size, CHUNK_BYTES * len(data) // max(1, data.nbytes)))
        for start in range(0, len(self), size):
            yield start, columns.rows(self._arrow(start, min(start + size, len(self))))

    def cells(self, column: str) -> Iterator:
        """The cells of one column, in order."""
        for rows in self.rows.select_columns(column).with_format("arrow").iter(CHUNK):
            yield from columns.decode(rows.column(0))

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """All rows in order, as Arrow batches."""
        for rows in self.rows.with_format("arrow").iter(CHUNK):
            yield from rows.to_batches()

    def _arrow(self, start: int, stop: int) -> pyarrow.Table:
        return self.rows.with_format("arrow")[start:stop]

    def select(self, indices: Sequence[int]) -> Table:
        """The rows at these indices, in this order. An index may occur more than once."""
        indices = np.asarray(indices, np.int64)
        return Table(self.rows.select(indices), self.files, self.file[indices], self.number[indices])

    def edit(self, change: Callable[[list[dict]], list[dict]], folder: str | None = None) -> Table:
        """Replace each row by the result of a function. The columns stay.

        Columns of text or numbers keep their types if the new cells fit them.

        Args:
            change: (chunk of rows) -> as many rows.
            folder: Directory of a file to which the result is written and from which it is mapped, for tables larger
                than memory. None: the result is held in memory.

        Raises:
            ValueError: If `change` returns another number of rows.
        """
        with columns.Writer(folder, self.rows.data.schema) as writer:
            for start, rows in self.chunks():
                changed = [{name: row[name] for name in self.columns} for row in change(rows)]
                if len(changed) != len(rows):
                    raise ValueError(f"an edit must keep the number of rows; {len(rows)} became {len(changed)}")
                writer.add(columns.batch(changed, lambda i, start=start: self.place(start + i)))
            return dataclasses.replace(self, rows=writer.finish())


def need_columns(names: Iterable[str], there: Sequence[str], key: str) -> None:
    """Raise FtjaxError for the first column that does not exist.

    Args:
        names: Columns that are needed.
        there: Columns that the rows have.
        key: Key of the config, for the error, and the file if there may be several.
    """
    for name in names:
        if name not in there:
            raise FtjaxError(f"{key}: no column {name!r}{nearest(name, there)}; the columns are {', '.join(there)}")
