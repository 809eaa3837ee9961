"""Rows, and where each of them came from: what reading, cleaning, splitting and augmenting hand on."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets

CHUNK = 1000  # rows held as Python objects at once


@dataclasses.dataclass(frozen=True)
class Table:
    """N rows in order. A row that is left out or changed leaves the others' places as they were in their files.

    rows: the cells, in memory or mapped from a file; files: names that errors give; file (N,) int32: index into
    `files`; number (N,) int64: the row's number in its file, from 1, blank lines and headers not counted.
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
        return self.rows[int(index)]

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, list[dict]]]:
        """(index of the first, rows) for all rows in order, at most `size` of them as Python objects at once."""
        for start in range(0, len(self), size):
            yield start, self.rows.select(range(start, min(start + size, len(self)))).to_list()

    def select(self, indices: Sequence[int]) -> Table:
        """The rows of these indices, in this order; an index may come twice."""
        indices = np.asarray(indices, np.int64)
        return Table(self.rows.select(indices), self.files, self.file[indices], self.number[indices])

    def edit(self, change: Callable[[list[dict]], list[dict]], folder: str | None = None) -> Table:
        """As many rows, each replaced by what `change` makes of it, chunk by chunk; the columns keep their types.

        folder: where a file with the result is written and mapped from, for tables larger than memory; None: in memory.
        """

        def batch(columns: dict[str, list]) -> dict[str, list]:
            names = list(columns)
            changed = change([dict(zip(names, cells)) for cells in zip(*columns.values())])
            return {name: [row[name] for row in changed] for name in names}

        where = {"keep_in_memory": True}
        if folder is not None:
            handle, path = tempfile.mkstemp(suffix=".arrow", dir=folder)
            os.close(handle)
            where = {"cache_file_name": path}
        from ftjax.data.read import quiet

        with quiet():
            rows = self.rows.map(
                batch, batched=True, batch_size=CHUNK, features=self.rows.features, load_from_cache_file=False, **where
            )
        return dataclasses.replace(self, rows=rows)


def concatenate(tables: Sequence[Table]) -> Table:
    """The rows of several tables with the same columns, one after the other."""
    import datasets

    if len(tables) == 1:
        return tables[0]
    starts = np.cumsum([0, *(len(t.files) for t in tables)])[:-1]
    return Table(
        datasets.concatenate_datasets([t.rows for t in tables]),
        tuple(name for t in tables for name in t.files),
        np.concatenate([t.file + start for t, start in zip(tables, starts)]).astype(np.int32),
        np.concatenate([t.number for t in tables]),
    )
