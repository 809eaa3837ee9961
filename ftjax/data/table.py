"""Rows, and where each of them came from. Reading, cleaning, splitting and augmenting pass them on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from ftjax.data import columns
from ftjax.errors import FtjaxError, nearest

CHUNK = 1000  # rows held as Python objects at once
CHUNK_BYTES = 16_000_000  # bytes of these rows, approximately: chunks of large rows have fewer rows


@dataclasses.dataclass(frozen=True)
class Table:
    """N rows in order. If rows are left out or changed, the others keep their places in their files.

    Attributes:
        cells: Arrow columns as `ftjax.data.columns` makes them, in memory or mapped from files.
        at: (N,) int64, where in `cells` each row lies.
        files: Names of the files for errors.
        file: (N,) int32, index into `files`.
        number: (N,) int64, number of the row in its file, from 1. Blank lines and headers are not counted.
    """

    cells: pa.Table
    at: np.ndarray
    files: tuple[str, ...]
    file: np.ndarray
    number: np.ndarray

    @classmethod
    def of_files(cls, cells: pa.Table, files: Sequence[str], sizes: Sequence[int]) -> Table:
        """All rows of some files, of which each has so many."""
        file = np.repeat(np.arange(len(files), dtype=np.int32), sizes)
        number = np.concatenate([np.arange(1, size + 1) for size in sizes])
        return cls(cells, np.arange(len(cells)), tuple(files), file, number)

    def __len__(self) -> int:
        return len(self.at)

    def __iter__(self) -> Iterator[dict]:
        """Each row as {column: cell}, exactly as it was read. A chunk of them is in memory at a time."""
        return (row for _, rows in self.chunks() for row in rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of the file."""
        return self.cells.column_names

    def place(self, index: int) -> str:
        """The name of a row in errors and reports, such as `a.jsonl row 3`."""
        return f"{self.files[self.file[index]]} row {self.number[index]}"

    def row(self, index: int) -> dict:
        """One row as {column: cell}."""
        index = range(len(self))[int(index)]
        return columns.rows(self.arrow(index, index + 1))[0]

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, list[dict]]]:
        """(index of the first row, rows) of consecutive chunks of all rows.

        At most `size` rows, or fewer if they are large, are Python objects at the same time.
        """
        size = max(1, min(size, CHUNK_BYTES * len(self.cells) // max(1, self.cells.nbytes)))
        for start in range(0, len(self), size):
            yield start, columns.rows(self.arrow(start, start + size))

    def column(self, name: str) -> Iterator:
        """The cells of one column, in order."""
        one = dataclasses.replace(self, cells=self.cells.select([name]))
        return (row[name] for row in one)

    def arrow(self, start: int, stop: int) -> pa.Table:
        """The rows from `start` up to `stop` as Arrow columns. Nothing is copied."""
        at, (batches, first) = self.at[start:stop], self._batches
        batch = np.searchsorted(first, at, "right") - 1
        cuts = np.flatnonzero((np.diff(at) != 1) | (np.diff(batch) != 0)) + 1
        runs = zip([0, *cuts], [*cuts, len(at)]) if len(at) else ()
        pieces = [batches[batch[i]].slice(at[i] - first[batch[i]], j - i) for i, j in runs]
        return pa.Table.from_batches(pieces, self.cells.schema)

    @functools.cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """(the batches of `cells`, where in `cells` each of them begins)."""
        batches = self.cells.to_batches()
        return batches, np.cumsum([0, *map(len, batches)])[:-1]

    def select(self, indices: Sequence[int]) -> Table:
        """The rows at these indices, in this order. An index may occur more than once."""
        indices = np.asarray(indices, np.int64)
        mine = {name: getattr(self, name)[indices] for name in ("at", "file", "number")}
        return dataclasses.replace(self, **mine)

    def extended(
        self, made: Iterable[tuple[list[dict], list[int]]], folder: str | None = None, more: Sequence[str] = ()
    ) -> Table:
        """These rows, followed by rows that were made of them. If there are none of these, it is the table itself.

        Args:
            made: Chunks of (new rows, for each of them the index of the row whose place it has).
            folder: See `edit`.
            more: Names of columns of text that only the new rows have; null in the others.
        """
        origins: list[int] = []
        schema = pa.schema([*self.cells.schema, *((name, pa.string()) for name in more)])
        with columns.Writer(folder, schema) as writer:
            for start in range(0, len(self), CHUNK):
                for batch in self.arrow(start, start + CHUNK).combine_chunks().to_batches():
                    writer.add(batch)
            for rows, at in made:
                if rows:
                    writer.add(columns.batch(rows, lambda i, at=at: self.place(at[i])))
                origins += at
            cells = writer.finish()
        if not origins:
            return self
        whole = self.select([*range(len(self)), *origins])
        return dataclasses.replace(whole, cells=cells, at=np.arange(len(whole)))

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
        with columns.Writer(folder, self.cells.schema) as writer:
            for start, rows in self.chunks():
                changed = [{name: row[name] for name in self.columns} for row in change(rows)]
                if len(changed) != len(rows):
                    raise ValueError(f"an edit must keep the number of rows; {len(rows)} became {len(changed)}")
                writer.add(columns.batch(changed, lambda i, start=start: self.place(start + i)))
            return dataclasses.replace(self, cells=writer.finish(), at=np.arange(len(self)))


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
