"""Python rows <-> Arrow columns, without loss: cells that are read have the same types and digits as those written.

A column has the Arrow type bool, int64, double or string if all its cells are of that type, and null if all its cells
are None. Any other column (lists, objects, numbers beside text, integers beside fractions or beyond 64 bits) is stored
as JSON text, cell by cell, and decoded again. `datasets` does something similar, but it decodes text that happens to be
valid JSON ("007" becomes 7) and keeps ten digits of a fraction. Lists and objects in files of other programs keep their
Arrow types, so that a data set of the hub is mapped and not copied.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ftjax.errors import FtjaxError

Place = Callable[[int], str]  # index of a row -> its name in errors

JSON = pa.json_()
_text = json.JSONEncoder(ensure_ascii=False).encode
SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
FAULTS = (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError, OverflowError, RecursionError)


# ---------------------------------------------------------------------------------------------- cells


def infer(cells: Iterable) -> pa.DataType:
    """The narrowest type from which all these cells can be restored. Raises TypeError for any other kind of cell."""
    cells = [cell for cell in cells if cell is not None]
    kinds = set(map(type, cells))
    if not kinds:
        return pa.null()
    if unknown := kinds - {*SCALARS, list, dict}:
        raise TypeError(f"a cell holds a {min(k.__name__ for k in unknown)}; expected text, a number, a list or a dict")
    if len(kinds) > 1 or kinds == {int} and not (-(2**63) <= min(cells) and max(cells) < 2**63):
        return JSON
    return SCALARS.get(kinds.pop(), JSON)


def unify(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the cells of both types."""
    if a == b or pa.types.is_null(b):
        return a
    return b if pa.types.is_null(a) else JSON


def merge(a: pa.Schema, b: pa.Schema) -> pa.Schema:
    """The columns of both schemas in the order of first appearance, with types that hold the cells of both."""
    types = {field.name: field.type for field in a}
    for field in b:
        types[field.name] = unify(types.get(field.name, pa.null()), field.type)
    return pa.schema(list(types.items()))


def encode(cells: list, kind: pa.DataType) -> pa.Array:
    """Cells as an array of a type that `infer` gave for them, or of a type from `unify` that holds them."""
    if kind == JSON:
        return pa.ExtensionArray.from_storage(JSON, _texts(None if cell is None else _text(cell) for cell in cells))
    return _texts(cells) if kind == pa.string() else pa.array(cells, kind)


def _texts(cells: Iterable[str | None]) -> pa.Array:
    """pa.array(cells, pa.string()), which would import pandas first: half a second of the start of every run."""
    builder = pa.lib.StringBuilder()
    builder.append_values(cells)
    return builder.finish()


def decode(column: pa.Array | pa.ChunkedArray) -> list:
    """The cells from which `encode` made a column."""
    cells = column.to_pylist()
    return [cell and json.loads(cell) for cell in cells] if column.type == JSON else cells


def rows(table: pa.Table | pa.RecordBatch) -> list[dict]:
    """The rows of Arrow columns, each as {column: cell}."""
    names = table.schema.names
    return [dict(zip(names, cells)) for cells in zip(*(decode(column) for column in table.columns))]


def batch(rows: list[dict], place: Place) -> pa.RecordBatch:
    """The columns of rows with any keys. A key that a row lacks becomes None. Raises FtjaxError for a bad row."""
    try:
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        columns = [[row.get(name) for row in rows] for name in names]
        return pa.RecordBatch.from_arrays([encode(cells, infer(cells)) for cells in columns], names)
    except FAULTS as error:
        for index, row in enumerate(rows if len(rows) > 1 else []):
            batch([row], lambda _, index=index: place(index))
        raise FtjaxError(f"{place(0)}: cannot be stored: {error}; correct or remove the row") from error


def recode(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The same rows with a schema that `merge` made of their schema and others."""
    if batch.schema == schema:
        return batch

    def column(field: pa.Field) -> pa.Array:
        array = batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows)
        return array if array.type == field.type else encode(decode(array), field.type)

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)


# ---------------------------------------------------------------------------------------------- columns of others


def plain(kind: pa.DataType, of_json: pa.DataType = JSON) -> pa.DataType:
    """The type by which a type of another program is replaced. Raises TypeError for bytes, durations and unions.

    Numbers become 64 bits wide; dates, times and decimals become text; maps become lists of `key` and `value`. of_json:
    the type in place of JSON.
    """
    t = pa.types
    if isinstance(kind, pa.JsonType):
        return of_json
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type, of_json)
    if t.is_dictionary(kind):
        return plain(kind.value_type, of_json)
    if t.is_map(kind):
        return pa.list_(pa.struct([("key", plain(kind.key_type, of_json)), ("value", plain(kind.item_type, of_json))]))
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type, of_json))
    if t.is_struct(kind):
        return pa.struct([(field.name, plain(field.type, of_json)) for field in kind])
    for tests, to in _PLAIN:
        if any(test(kind) for test in tests):
            return to
    raise TypeError(f"holds {kind}; expected text, numbers, lists or objects")


_PLAIN = (
    ((pa.types.is_null,), pa.null()),
    ((pa.types.is_boolean,), pa.bool_()),
    ((pa.types.is_integer,), pa.int64()),
    ((pa.types.is_floating,), pa.float64()),
    ((pa.types.is_decimal, pa.types.is_date, pa.types.is_time, pa.types.is_timestamp), pa.string()),
    ((pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view), pa.string()),
)


def is_plain(schema: pa.Schema) -> bool:
    """Whether columns of this schema can be taken as they are, without a look at their cells."""
    return all(_is_plain(field.type) for field in schema)


def _is_plain(kind: pa.DataType, within: bool = False) -> bool:
    """within: whether the type is part of an object. Objects within objects are not plain, see `adopt`."""
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type, within)
    if pa.types.is_struct(kind):
        return not within and all(_is_plain(field.type, True) for field in kind)
    return kind in (pa.null(), pa.bool_(), pa.int64(), pa.string())


def adopt(batch: pa.RecordBatch, place: Place) -> pa.RecordBatch:
    """Convert columns of another program to types of `plain`. A NaN, which means a missing number, becomes null.

    Nulls in an object within an object are removed. All objects of such a column have the same keys, and null stands
    for keys that one does not have, such as the arguments of another tool.

    Raises FtjaxError, which names the row, for an infinity, for text that is not UTF-8, and for a number beyond 64
    bits.
    """
    arrays = []
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            arrays.append(_adopt(column))
        except FAULTS as error:
            for index in range(batch.num_rows if batch.num_rows > 1 else 0):
                adopt(batch.slice(index, 1), lambda _, index=index: place(index))
            raise FtjaxError(
                f"{place(0)}: column {name!r}: {error}; correct the column and write the file again"
            ) from error
    return pa.RecordBatch.from_arrays(arrays, batch.schema.names)


def class_names(column: pa.Array, names: list[str]) -> pa.Array:
    """Numbers of classes, or lists of them, replaced by the classes' names. -1, which means no class, becomes null."""

    def name(cell):
        if isinstance(cell, list):
            return list(map(name, cell))
        return None if cell in (None, -1) else names[cell] if 0 <= cell < len(names) else str(cell)

    cells = list(map(name, decode(column)))
    return encode(cells, infer(cells))


def _adopt(column: pa.Array) -> pa.Array:
    kind = plain(column.type)
    if column.type != kind:
        column = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
        column = column.cast(plain(column.type, pa.string()))
    column.validate(full=True)
    numbers = pa.types.is_floating(kind) and pc.all(pc.is_finite(column)).as_py() is not False
    if numbers or _is_plain(kind):
        return column
    cells = [_own(cell, kind) for cell in column.to_pylist()]
    return encode(cells, infer(cells))


def _own(cell, kind: pa.DataType | None, within: bool = False):
    """A cell of the type `kind` as ours; JSON is still text. Raises ValueError for an infinity and for invalid JSON.

    kind: None if the cell has no Arrow type of its own, because it is part of JSON; within: whether it is part of an
    object.
    """
    if kind == JSON and cell is not None:
        cell, kind = json.loads(cell), None
    if isinstance(cell, list):
        return [_own(item, kind and kind.value_type, within) for item in cell]
    if isinstance(cell, dict):
        cells = {key: _own(item, kind and kind.field(key).type, True) for key, item in cell.items()}
        filled = within and kind is not None  # Arrow fills in missing keys; JSON has only the keys that were written
        return {key: item for key, item in cells.items() if item is not None or not filled}
    if isinstance(cell, float) and cell in (float("inf"), float("-inf")):
        raise ValueError(f"{cell}, which JSON cannot represent")
    return None if cell != cell else cell


# ---------------------------------------------------------------------------------------------- writing


class Writer:
    """Collects batches of rows into one data set, with the narrowest types that hold all of them.

    As a context manager, it removes its files on an exception.

    Args:
        folder: Directory of the Arrow files from which the data set is mapped; None: memory. Batches go to one file as
            long as their types fit. A wider type begins another file, and `finish` rewrites the earlier ones.
        schema: Columns and types that the data set has at least.
    """

    def __init__(self, folder: str | Path | None = None, schema: pa.Schema | None = None):
        self.folder = folder
        self.schema = schema or pa.schema([])
        self.held: list[pa.RecordBatch] = []  # without a folder, all batches as they were added
        self.files: list[_File] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Append the rows of a batch, and widen the types of the data set if they do not fit."""
        self.schema = merge(self.schema, batch.schema)
        if self.folder is None:
            self.held.append(batch)
            return
        if not self.files or self.files[-1].schema != self.schema:
            for file in self.files:
                file.close()
            self.files.append(_File(self.schema, self.folder))
        self.files[-1].write(recode(batch, self.schema))

    def finish(self) -> pa.Table:
        """All rows. The writer must not be used afterwards."""
        if not self.files:
            return pa.Table.from_batches([recode(batch, self.schema) for batch in self.held], self.schema)
        parts = []
        for file in list(self.files):
            file.close()
            if file.schema != self.schema:
                narrow, file = file, _File(self.schema, self.folder)
                self.files.append(file)
                for batch in narrow.batches():
                    file.write(recode(batch, self.schema))
                file.close()
                narrow.remove()
            parts.append(pa.ipc.open_stream(pa.memory_map(file.path)).read_all())
        return pa.concat_tables(parts)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        for file in self.files:
            file.close()
            if kind is not None:
                file.remove()


class _File:
    def __init__(self, schema: pa.Schema, folder: str | Path):
        handle, self.path = tempfile.mkstemp(suffix=".arrow", dir=folder)
        os.close(handle)
        self.schema = schema
        self.sink = pa.OSFile(self.path, "wb")
        self.stream = pa.ipc.new_stream(self.sink, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self.stream.write_batch(batch)

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(self.path) as source:  # not mapped, because its pages would count as memory of this process
            yield from pa.ipc.open_stream(source)

    def close(self) -> None:
        if not self.sink.closed:
            self.stream.close()
            self.sink.close()

    def remove(self) -> None:
        Path(self.path).unlink(missing_ok=True)
