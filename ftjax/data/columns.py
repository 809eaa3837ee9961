"""Python rows <-> Arrow columns, exactly: what was read comes back with the same types and digits.

A column has the Arrow type bool, int64, double or string where all its cells are of that type, and null where there are
none. Any other column (lists, objects, numbers beside text, whole numbers beside fractions or beyond 64 bits) is stored
as JSON text, cell by cell, and decoded to what it was. `datasets` has a like way, but takes a text that is valid JSON
for what it says ("007" for 7) and keeps ten digits of a fraction. Lists and objects of other programs' files keep their
Arrow types, so that a data set of the hub is mapped and not copied.
"""

from __future__ import annotations

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
_text = json.JSONEncoder(ensure_ascii=False).encode
SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
FAULTS = (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError, OverflowError, RecursionError)


# ---------------------------------------------------------------------------------------------- cells


def infer(cells: Iterable) -> pa.DataType:
    """The narrowest type that gives all these cells back as they are."""
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
    """The narrowest type that holds the cells of both."""
    if a == b or pa.types.is_null(b):
        return a
    return b if pa.types.is_null(a) else JSON


def merge(a: pa.Schema, b: pa.Schema) -> pa.Schema:
    """The columns of both in the order of their first appearance, with types that hold the cells of both."""
    types = {field.name: field.type for field in a}
    for field in b:
        types[field.name] = unify(types.get(field.name, pa.null()), field.type)
    return pa.schema(list(types.items()))


def encode(cells: list, kind: pa.DataType) -> pa.Array:
    """Cells as an array of a type that `infer` gave for them, or that holds them by `unify`."""
    if kind != JSON:
        return pa.array(cells, kind)
    texts = [None if cell is None else _text(cell) for cell in cells]
    return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string()))


def decode(column: pa.Array | pa.ChunkedArray) -> list:
    """The cells that `encode` was given."""
    cells = column.to_pylist()
    return [cell and json.loads(cell) for cell in cells] if column.type == JSON else cells


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
    for tests, to in _PLAIN:
        if any(test(kind) for test in tests):
            return to
    raise TypeError(f"holds {kind}, which is no text, number, list or object")


_PLAIN = (
    ((pa.types.is_null,), pa.null()),
    ((pa.types.is_boolean,), pa.bool_()),
    ((pa.types.is_integer,), pa.int64()),
    ((pa.types.is_floating,), pa.float64()),
    ((pa.types.is_decimal, pa.types.is_date, pa.types.is_time, pa.types.is_timestamp), pa.string()),
    ((pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view), pa.string()),
)


def is_plain(schema: pa.Schema) -> bool:
    """Whether columns of this schema can stand as they are, with no look at their cells."""
    return all(_is_plain(field.type) for field in schema)


def _is_plain(kind: pa.DataType, within: bool = False) -> bool:
    """within: an object holds it. Objects within objects are not plain, see `adopt`."""
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type, within)
    if pa.types.is_struct(kind):
        return not within and all(_is_plain(field.type, True) for field in kind)
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

    cells = list(map(name, decode(column)))
    return encode(cells, infer(cells))


def _adopt(column: pa.Array) -> pa.Array:
    kind = plain(column.type)
    if column.type != kind:
        column = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
        column = column.cast(_storage(kind))
    column.validate(full=True)
    numbers = pa.types.is_floating(kind) and pc.all(pc.is_finite(column)).as_py() is not False
    if numbers or _is_plain(kind):
        return column
    cells = [_own(cell, kind) for cell in column.to_pylist()]
    return encode(cells, infer(cells))


def _storage(kind: pa.DataType) -> pa.DataType:
    """A type with text where it says JSON."""
    if pa.types.is_list(kind):
        return pa.list_(_storage(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _storage(field.type)) for field in kind])
    return pa.string() if kind == JSON else kind


def _own(cell, kind: pa.DataType | None, within: bool = False):
    """A cell of the type `_storage(kind)` as ours. Raises ValueError for an infinity and for what is no JSON.

    kind: None where a cell has no type but its own, as what stands in JSON; within: whether an object holds it.
    """
    if kind == JSON and cell is not None:
        cell, kind = json.loads(cell), None
    if isinstance(cell, list):
        return [_own(item, kind and kind.value_type, within) for item in cell]
    if isinstance(cell, dict):
        cells = {key: _own(item, kind and kind.field(key).type, True) for key, item in cell.items()}
        filled = within and kind is not None  # what stands in JSON has the keys that somebody wrote
        return {key: item for key, item in cells.items() if item is not None or not filled}
    if isinstance(cell, float) and cell in (float("inf"), float("-inf")):
        raise ValueError(f"{cell}, which JSON has no way to write")
    return None if cell != cell else cell


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
