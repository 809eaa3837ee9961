"""Rows, and where each of them came from: what reading, cleaning, splitting and augmenting hand on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ftjax.data import columns

if TYPE_CHECKING:
    import datasets
    import pyarrow

CHUNK = 1000  # rows held as Python objects at once
CHUNK_BYTES = 16_000_000  # and about so much text, where rows are large


@dataclasses.dataclass(frozen=True)
class Table:
    """N rows in order. A row that is left out or changed leaves the others' places as they were in their files.

    rows: the cells, in memory or mapped from files; `chunks` and `row` give them exactly as they were read, `datasets`
    itself all but long numbers in columns of mixed types (see `ftjax.data.columns`); files: names that errors give;
    file (N,) int32: index into `files`; number (N,) int64: the row's number in its file, from 1, blank lines and
    headers not counted.
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
        """What an error or a report calls a row, such as `a.jsonl row 3`."""
        return f"{self.files[self.file[index]]} row {self.number[index]}"

    def row(self, index: int) -> dict:
        """One row, {column: cell}."""
        index = range(len(self))[int(index)]
        return columns.rows(self._arrow(index, index + 1))[0]

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, list[dict]]]:
        """(index of the first, rows) for all rows in order, at most `size` of them as Python objects at once; fewer
        where they are large."""
        data = self.rows.data
        size = max(1, min(size, CHUNK_BYTES * len(data) // max(1, data.nbytes)))
        for start in range(0, len(self), size):
            yield start, columns.rows(self._arrow(start, min(start + size, len(self))))

    def cells(self, column: str) -> Iterator:
        """The cells of one column, in order."""
        rows = self.rows.select_columns(column).with_format("arrow")
        for start in range(0, len(self), CHUNK):
            yield from columns.decode(rows[start : start + CHUNK].column(0))

    def batches(self) -> Iterator[pyarrow.RecordBatch]:
        """All rows in order, as Arrow holds them."""
        for start in range(0, len(self), CHUNK):
            yield from self._arrow(start, min(start + CHUNK, len(self))).to_batches()

    def _arrow(self, start: int, stop: int) -> pyarrow.Table:
        return self.rows.with_format("arrow")[start:stop]

    def select(self, indices: Sequence[int]) -> Table:
        """The rows of these indices, in this order; an index may come twice."""
        indices = np.asarray(indices, np.int64)
        return Table(self.rows.select(indices), self.files, self.file[indices], self.number[indices])

    def edit(self, change: Callable[[list[dict]], list[dict]], folder: str | None = None) -> Table:
        """As many rows, each replaced by what `change` makes of it, chunk by chunk; the columns stay, and those of text
        or numbers keep their types where the new cells fit them.

        folder: where a file with the result is written and mapped from, for tables larger than memory; None: in memory.
        """
        with columns.Writer(folder, self.rows.data.schema) as writer:
            for start, rows in self.chunks():
                changed = [{name: row[name] for name in self.columns} for row in change(rows)]
                if len(changed) != len(rows):
                    raise ValueError(f"{len(rows)} rows became {len(changed)}: an edit keeps their number")
                writer.add(columns.batch(changed, lambda i, start=start: self.place(start + i)))
            return dataclasses.replace(self, rows=writer.finish())
