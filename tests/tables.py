"""Tables of rows that tests name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ftjax.data import columns
from ftjax.data.table import Table


def table(rows: list[dict], name: str = "t.jsonl") -> Table:
    """These rows, as if they had been read from a file."""
    return Table.of_files(pa.Table.from_batches([columns.batch(rows, str)]), [name], [len(rows)])


def mapped(table: Table) -> set[Path]:
    """The files from which the cells of a table are mapped; those of a table in memory are none."""
    chunks = [chunk for column in table.cells.columns for chunk in column.chunks]
    held = [buffer.address for chunk in chunks for buffer in chunk.buffers() if buffer and buffer.size]
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    areas = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines if line[-1].endswith(".arrow")]
    return {Path(name) for at in held for start, stop, name in areas if start <= at < stop}
