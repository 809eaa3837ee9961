"""Python rows <-> Arrow columns, exactly: what was read comes back with the same types and digits.

A column whose cells agree has an Arrow type: bool, int64, double, string, list and struct of these, and null where
there is nothing else. What does not fit one type (numbers beside text, whole numbers beside fractions, objects with
other keys, whole numbers beyond 64 bits) is stored as JSON text, cell by cell, and decoded to what it was. `datasets`
has a like way, but takes a text that is valid JSON for what it says ("007" for 7) and keeps ten digits of a fraction.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from ftjax.errors import FtjaxError

if TYPE_CHECKING:
    import datasets

Place = Callable[[int], str]  # index of a row -> what errors call it

JSON = pa.json_()
SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
DEPTH = 12  # lists and objects within one another that become Arrow types; Arrow files allow 64 types within another
FAULTS = (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError, OverflowError)


# ---------------------------------------------------------------------------------------------- types


def infer(cells: Iterable, depth: int = DEPTH) -> pa.DataType:
    """The narrowest type that gives all these cells back as they are."""
    cells = [cell for cell in cells if cell is not None]
    kinds = set(map(type, cells))
    if not kinds:
        return pa.null()
    kind = kinds.pop()
    if unknown := {kind, *kinds} - {*SCALARS, list, dict}:
        raise TypeError(f"a cell holds a {min(k.__name__ for k in unknown)}; expected text, a number, a list or a dict")
    if kinds or depth == 0 and kind in (list, dict):
        return JSON
    if kind is int:
        return pa.int64() if -(2**63) <= min(cells) and max(cells) < 2**63 else JSON
    if kind is list:
        return pa.list_(infer(itertools.chain.from_iterable(cells), depth - 1))
    if kind is dict:
        shape, *others = set(map(tuple, cells))
        # A field name of Arrow ends at a NUL.
        if others or not shape or any("\0" in key for key in shape):
            return JSON
        return pa.struct([(key, infer([cell[key] for cell in cells], depth - 1)) for key in shape])
    return SCALARS[kind]


def unify(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the cells of both."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(unify(a.value_type, b.value_type))
    if pa.types.is_struct(a) and pa.types.is_struct(b) and a.names == b.names:
        return pa.struct([(x.name, unify(x.type, y.type)) for x, y in zip(a, b)])
    return JSON


def merge(a: pa.Schema, b: pa.Schema) -> pa.Schema:
    """The columns of both in the order of their first appearance, with types that hold the cells of both."""
    types = {field.name: field.type for field in a}
    for field in b:
        types[field.name] = unify(types.get(field.name, pa.null()), field.type)
    return pa.schema(list(types.items()))


def _storage(kind: pa.DataType) -> pa.DataType:
    if kind == JSON:
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_storage(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _storage(field.type)) for field in kind])
    return kind


def _within(kind: pa.DataType, change: Callable) -> Callable | None:
    """(cell) -> the cell with `change` done where `kind` says JSON; None where it says so nowhere."""
    if kind == JSON:
        return lambda cell: None if cell is None else change(cell)
    if pa.types.is_list(kind) and (inner := _within(kind.value_type, change)):
        return lambda cell: None if cell is None else [inner(item) for item in cell]
    if pa.types.is_struct(kind):
        fields = {field.name: inner for field in kind if (inner := _within(field.type, change))}
        if fields:
            return lambda cell: None if cell is None else cell | {key: f(cell[key]) for key, f in fields.items()}
    return None


# ---------------------------------------------------------------------------------------------- cells


def encode(cells: list, kind: pa.DataType) -> pa.Array:
    """Cells as an array of a type that `infer` gave for them, or that holds them by `unify`."""
    if pa.types.is_null(kind):
        return pa.nulls(len(cells))
    mend = _within(kind, functools.partial(json.dumps, ensure_ascii=False))
    if not mend:
        return pa.array(cells, kind)
    return _as(pa.array([mend(cell) for cell in cells], _storage(kind)), kind)


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """An array of the type `_storage(kind)` as one of `kind`, on the same buffers.

    pyarrow's cast (26.0) gives lists of nulls within an object too few values.
    """
    if kind == array.type:
        return array
    if kind == JSON:
        return pa.ExtensionArray.from_storage(kind, array)
    if pa.types.is_list(kind):
        own, children = 2, [_as(array.values, kind.value_type)]
    else:
        own, children = 1, [_as(array.field(i), kind.field(i).type) for i in range(kind.num_fields)]
    return pa.Array.from_buffers(kind, len(array), array.buffers()[:own], children=children)


def decode(column: pa.Array | pa.ChunkedArray) -> list:
    """The cells that `encode` was given."""
    mend = _within(column.type, json.loads)
    cells = column.to_pylist()
    return [mend(cell) for cell in cells] if mend else cells


def rows(table: pa.Table | pa.RecordBatch) -> list[dict]:
    """Arrow columns -> one {column: cell} a row."""
    names = table.schema.names
    return [dict(zip(names, cells)) for cells in zip(*(decode(column) for column in table.columns))]


def batch(rows: list[dict], place: Place) -> pa.RecordBatch:
    """Rows with any keys -> columns; a key that a row lacks becomes None. Raises FtjaxError at the first bad row."""
    try:
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        columns = [[row.get(name) for row in rows] for name in names]
        return pa.RecordBatch.from_arrays([encode(cells, infer(cells)) for cells in columns], names)
    except FAULTS as error:
        for index, row in enumerate(rows if len(rows) > 1 else []):
            batch([row], lambda _, index=index: place(index))
        raise FtjaxError(f"{place(0)}: cannot be stored: {error}; mend or remove the row") from error


def recode(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The same rows under a schema that `merge` made of theirs and others."""
    if batch.schema == schema:
        return batch

    def column(field: pa.Field) -> pa.Array:
        if field.name not in batch.schema.names:
            return pa.nulls(batch.num_rows, field.type)
        array = batch.column(field.name)
        return array if array.type == field.type else encode(decode(array), field.type)

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)


# ---------------------------------------------------------------------------------------------- columns of others


def plain(kind: pa.DataType) -> pa.DataType:
    """The type that stands here for another program's: wider numbers, dates, times and decimals as text, maps as lists
    of `key` and `value`. Raises TypeError where none does: bytes, durations, unions."""
    t = pa.types
    if isinstance(kind, pa.JsonType):
        return JSON
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if t.is_dictionary(kind):
        return plain(kind.value_type)
    if t.is_map(kind):
        return pa.list_(pa.struct([("key", plain(kind.key_type)), ("value", plain(kind.item_type))]))
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type))
    if t.is_struct(kind):
        return pa.struct([(field.name, plain(field.type)) for field in kind])
    for test, to in _PLAIN:
        if test(kind):
            return to
    raise TypeError(f"holds {kind}, which is no text, number, list or object")


_PLAIN = (
    (pa.types.is_null, pa.null()),
    (pa.types.is_boolean, pa.bool_()),
    (pa.types.is_integer, pa.int64()),
    (pa.types.is_floating, pa.float64()),
    (pa.types.is_decimal, pa.string()),
    (pa.types.is_date, pa.string()),
    (pa.types.is_time, pa.string()),
    (pa.types.is_timestamp, pa.string()),
    (pa.types.is_string, pa.string()),
    (pa.types.is_large_string, pa.string()),
    (pa.types.is_string_view, pa.string()),
)


def is_plain(schema: pa.Schema) -> bool:
    """Whether columns of this schema can stand as they are, with no look at their cells."""
    return all(_is_plain(field.type) for field in schema)


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_struct(kind):
        return not _has_objects_within(kind) and all(_is_plain(field.type) for field in kind)
    return kind in (pa.null(), pa.bool_(), pa.int64(), pa.string())


def adopt(batch: pa.RecordBatch, place: Place) -> pa.RecordBatch:
    """Another program's columns as ours: see `plain`; a NaN, which stands for a missing number, becomes null.

    An object within an object loses its nulls: all objects of such a column have the same keys, and null fills those
    that one lacks, such as the arguments of another tool.

    Raises FtjaxError naming the row for an infinity, for text that is not UTF-8, and for a number beyond 64 bits.
    """
    arrays = []
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            arrays.append(_adopt(column))
        except FAULTS as error:
            for index in range(batch.num_rows if batch.num_rows > 1 else 0):
                adopt(batch.slice(index, 1), lambda _, index=index: place(index))
            raise FtjaxError(f"{place(0)}: column {name!r}: {error}; mend it and write the file again") from error
    return pa.RecordBatch.from_arrays(arrays, batch.schema.names)


def class_names(column: pa.Array, names: list[str]) -> pa.Array:
    """Numbers of classes, or lists of them, as the names of the classes; null for -1, which stands for none."""

    def name(cell):
        if isinstance(cell, list):
            return list(map(name, cell))
        return None if cell in (None, -1) else names[cell] if 0 <= cell < len(names) else str(cell)

    cells = list(map(name, column.to_pylist()))
    return encode(cells, infer(cells))


def _adopt(column: pa.Array) -> pa.Array:
    kind = plain(column.type)
    if column.type != kind:
        column = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
        column = column.cast(_storage(kind))
    column.validate(full=True)
    mend = _within(kind, json.loads)  # raises ValueError where another program's JSON is none
    filled = _has_objects_within(kind)
    if not mend and not filled and all(pc.all(pc.is_finite(leaf)).as_py() is not False for leaf in _floats(column)):
        return column
    cells = [_without_nan(mend(cell) if mend else cell) for cell in column.to_pylist()]
    if filled:
        cells = [_without_filling(cell, kind) for cell in cells]
        kind = infer(cells)
    return encode(cells, kind)


def _has_objects_within(kind: pa.DataType, within: bool = False) -> bool:
    """Whether a type holds objects within objects."""
    if pa.types.is_list(kind):
        return _has_objects_within(kind.value_type, within)
    return pa.types.is_struct(kind) and (within or any(_has_objects_within(field.type, True) for field in kind))


def _without_filling(cell, kind: pa.DataType, within: bool = False):
    if cell is None or kind == JSON:  # what stands in JSON has the keys that somebody wrote
        return cell
    if pa.types.is_list(kind):
        return [_without_filling(item, kind.value_type, within) for item in cell]
    if not pa.types.is_struct(kind):
        return cell
    types = {field.name: field.type for field in kind}
    there = {key: item for key, item in cell.items() if item is not None or not within}
    return {key: _without_filling(item, types[key], True) for key, item in there.items()}


def _floats(array: pa.Array) -> Iterator[pa.Array]:
    """The arrays of fractions within an array."""
    if pa.types.is_floating(array.type):
        yield array
    elif pa.types.is_list(array.type):
        yield from _floats(array.flatten())
    elif pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _floats(child)


def _without_nan(cell):
    if isinstance(cell, float) and cell != cell:
        return None
    if isinstance(cell, float) and cell in (float("inf"), float("-inf")):
        raise ValueError(f"{cell}, which JSON has no way to write")
    if isinstance(cell, list):
        return [_without_nan(item) for item in cell]
    return {key: _without_nan(item) for key, item in cell.items()} if isinstance(cell, dict) else cell


# ---------------------------------------------------------------------------------------------- writing


class Writer:
    """Batches of rows -> one data set with the narrowest types that hold all of them.

    folder: where the batches go, in Arrow files that the data set is mapped from; None: memory. As long as the types of
    new batches fit, they go on in one file; a wider type begins another, and `finish` writes the earlier ones again. As
    a context, it removes its files on an exception.
    """

    def __init__(self, folder: str | Path | None = None, schema: pa.Schema | None = None):
        self.folder = folder
        self.schema = schema or pa.schema([])
        self.segments: list[_Memory | _File] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Append the rows of a batch; its types widen those of the whole where they must."""
        schema = merge(self.schema, batch.schema)
        if not self.segments or schema != self.schema:
            if self.segments:
                self.segments[-1].close()
            self.schema = schema
            self._begin()
        self.segments[-1].write(recode(batch, schema))

    def _begin(self) -> None:
        self.segments.append(_Memory(self.schema) if self.folder is None else _File(self.schema, self.folder))

    def finish(self) -> datasets.Dataset:
        """All rows; the writer takes no more."""
        import datasets

        for number, segment in enumerate(list(self.segments)):
            segment.close()
            if segment.schema != self.schema:
                self._begin()
                for batch in segment.batches():
                    self.segments[-1].write(recode(batch, self.schema))
                self.segments[-1].close()
                self.segments[number] = self.segments.pop()
                segment.remove()
        if not self.segments:
            return _dataset(pa.Table.from_batches([], self.schema))
        return datasets.concatenate_datasets([segment.dataset() for segment in self.segments])

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        for segment in self.segments:
            segment.close()
            if kind is not None:
                segment.remove()


class _Memory:
    def __init__(self, schema: pa.Schema):
        self.schema, self.held = schema, []

    def write(self, batch: pa.RecordBatch) -> None:
        self.held.append(batch)

    def batches(self) -> Iterator[pa.RecordBatch]:
        return iter(self.held)

    def dataset(self) -> datasets.Dataset:
        return _dataset(pa.Table.from_batches(self.held, self.schema))

    def close(self) -> None:
        """Nothing is open."""

    def remove(self) -> None:
        self.held.clear()


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
        with pa.OSFile(self.path) as source:  # not mapped: all its pages would count as this process's memory
            yield from pa.ipc.open_stream(source)

    def dataset(self) -> datasets.Dataset:
        import datasets

        return datasets.Dataset.from_file(self.path)

    def close(self) -> None:
        if not self.sink.closed:
            self.stream.close()
            self.sink.close()

    def remove(self) -> None:
        Path(self.path).unlink(missing_ok=True)


def _dataset(table: pa.Table) -> datasets.Dataset:
    import datasets
    from datasets.fingerprint import generate_random_fingerprint

    # Left to itself, `datasets` would hash all cells for a fingerprint, which nothing here looks at.
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=generate_random_fingerprint())
