"""Tables: any rows come back as they went in, from memory and from files, with the place of each."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftjax.data import columns, read
from ftjax.data.read import read_table
from ftjax.data.table import Table
from ftjax.errors import FtjaxError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
numbers = st.integers() | st.integers(2**62, 2**65) | st.floats(allow_nan=False, allow_infinity=False)
cells = st.recursive(
    st.none() | st.booleans() | numbers | text | st.sampled_from(["1", "null", '"x"', "{}", "2020-01-01"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
# Few names, so that rows share them, and long stretches of one kind, so that types change late.
rows = st.lists(st.dictionaries(st.sampled_from(["a", "b", ""]), cells, min_size=1), min_size=1, max_size=8)


def exact(rows) -> str:
    """Rows as text, in which 1, 1.0, "1" and True differ, and the order of keys counts."""
    return json.dumps(list(rows))


def complete(rows: list[dict]) -> list[dict]:
    """Rows with every column, in the order of their first appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [dict.fromkeys(names) | row for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@settings(max_examples=150, deadline=None)
@example(rows=[{"a": {"b": {}, "c": [None, None]}}], size=1, suffix=".jsonl", streaming=False)
@given(rows=rows, size=st.integers(1, 4), suffix=st.sampled_from([".jsonl", ".json"]), streaming=st.booleans())
def test_rows_are_read_exactly_in_any_chunks_and_places(folder, rows, size, suffix, streaming):
    path = folder / f"t{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, "utf-8", newline="")
    whole = read_table(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "CHUNK", size)
        patch.setattr(read, "PIECE", size)
        table = read_table(str(path), folder=folder if streaming else None)
    assert exact(list(table)) == exact(complete(rows))
    assert exact(map(table.row, range(len(table)))) == exact(complete(rows))
    assert table.cells.schema == whole.cells.schema
    assert [table.place(i) for i in range(len(table))] == [f"{path} row {i + 1}" for i in range(len(rows))]
    for file in folder.glob("*.arrow"):
        file.unlink()


@settings(max_examples=100, deadline=None)
@given(st.lists(cells, max_size=6), st.lists(cells, max_size=6), st.lists(cells, max_size=6))
def test_types_unify_in_any_order_and_hold_all_cells(a, b, c):
    types = [columns.infer(part) for part in (a, b, c)]
    one = columns.unify(columns.unify(types[0], types[1]), types[2])
    assert one == columns.unify(types[0], columns.unify(types[1], types[2]))
    assert exact(columns.decode(columns.encode([*a, *b, *c], one))) == exact([*a, *b, *c])


def table_of(folder, rows, name="t", **options) -> Table:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(str(path), **options)


def test_selected_rows_keep_their_places(tmp_path):
    table = table_of(tmp_path, [{"a": n} for n in range(5)]).select([3, 0, 3])
    assert list(table) == [{"a": 3}, {"a": 0}, {"a": 3}] == [table.row(0), table.row(1), table.row(-1)]
    assert [table.place(i).split("/")[-1] for i in range(3)] == ["t.jsonl row 4", "t.jsonl row 1", "t.jsonl row 4"]
    assert [(start, len(rows)) for start, rows in table.chunks(2)] == [(0, 2), (2, 1)]


def test_chunks_of_large_rows_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr("ftjax.data.table.CHUNK_BYTES", 3000)
    table = table_of(tmp_path, [{"a": "x" * 1000}] * 10)
    assert max(len(rows) for _, rows in table.chunks()) == 2
    assert len(list(table)) == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_an_edit_keeps_places_and_columns_and_widens_types(tmp_path, streaming):
    rows = [{"a": n, "b": {"k": "1"} if n % 2 else "1", "c": None} for n in range(2500)]
    table = table_of(tmp_path, rows).select(np.arange(2499, -1, -1))
    (tmp_path / "cache").mkdir()
    folder = tmp_path / "cache" if streaming else None
    same = table.edit(lambda rows: rows, folder)
    assert exact(list(same)) == exact(rows[::-1])
    assert same.cells.schema == table.cells.schema
    edited = table.edit(lambda rows: [row | {"a": str(row["a"]), "c": [1.5]} for row in rows], folder)
    assert exact(list(edited)) == exact([row | {"a": str(row["a"]), "c": [1.5]} for row in rows[::-1]])
    assert edited.place(0) == table.place(0) and edited.place(0).endswith("row 2500")
    assert exact(list(table)) == exact(rows[::-1]), "the table itself is as before"
    assert len(table.select([]).edit(lambda rows: rows, folder)) == 0


def test_an_edit_that_gives_what_no_table_holds_names_the_row(tmp_path):
    table = table_of(tmp_path, [{"a": n} for n in range(5)])
    with pytest.raises(FtjaxError, match=r"t\.jsonl row 4: .* a cell holds a set; expected text"):
        table.edit(lambda rows: [row if row["a"] != 3 else {"a": {1}} for row in rows])
    with pytest.raises(FtjaxError, match=r"t\.jsonl row 4: cannot be stored: .*surrogates not allowed"):
        table.edit(lambda rows: [row if row["a"] != 3 else {"a": "\ud800"} for row in rows])
    with pytest.raises(ValueError, match="5 became 4"):
        table.edit(lambda rows: rows[1:])
