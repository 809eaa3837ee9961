"""Reading: every format gives the rows that were written, every fault its file and line."""

import csv
import json

import datasets
import pytest

from ftjax.data.read import read, read_parts
from ftjax.errors import FtjaxError

ROWS = [{"a": 'x, "y"\x85z', "b": "2020-01-01"}, {"a": "naïve", "b": "007"}]


def _write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as f:
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
            writer = csv.writer(f, **options)
            writer.writerows([list(rows[0]), *([*row.values()] for row in rows)])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_each_format_gives_the_rows_as_written(tmp_path, suffix):
    assert read(_write(tmp_path / f"rows{suffix}", ROWS)).to_list() == ROWS


def test_a_changed_file_is_noticed(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        for rows in (ROWS, ROWS[:1]):
            assert read(_write(tmp_path / f"rows{suffix}", rows)).to_list() == rows


def test_text_is_one_row_a_line_and_keeps_next_line_characters(tmp_path):
    (tmp_path / "t.txt").write_bytes("one\x85still one\u2028\r\n\n two\n".encode())
    assert read(str(tmp_path / "t.txt"))["text"] == ["one\x85still one\u2028", " two"]


def test_json_lines_in_a_json_file_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "t.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n')
    assert read(str(tmp_path / "t.json"))["a"] == [1, 2]


def test_columns_of_later_rows_are_kept_and_types_may_mix(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": "x", "b": {"k": 1}}\n{"b": {"l": "y"}}\n')
    rows = read(str(tmp_path / "t.jsonl")).to_list()
    assert rows == [{"a": 1, "b": None}, {"a": "x", "b": {"k": 1}}, {"a": None, "b": {"l": "y"}}]


def test_quoted_cell_over_two_lines(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n"1\n2",3\n')
    assert read(str(tmp_path / "t.csv")).to_list() == [{"a": "1\n2", "b": "3"}]


def test_lists_globs_and_folders(tmp_path):
    names = [_write(tmp_path / f"{n}.jsonl", [{"n": n}]) for n in ("b", "a")]
    assert read(",".join(names))["n"] == ["b", "a"]
    assert read(str(tmp_path / "*.jsonl"))["n"] == ["a", "b"]
    assert read(str(tmp_path))["n"] == ["a", "b"]
    _write(tmp_path / "train-1.jsonl", [{"n": "t"}])
    _write(tmp_path / "dev.jsonl", [{"n": "d"}])
    assert read(str(tmp_path), "data.train")["n"] == ["t"]
    assert read(str(tmp_path), "data.validation")["n"] == ["d"]
    with pytest.raises(FtjaxError, match=r"data.test: .* holds train-1.jsonl, dev.jsonl and no file for test"):
        read(str(tmp_path), "data.test")
    assert [len(rows) for _, rows in read_parts(",".join(names))] == [1, 1]


def test_builtin_and_real_files(shared):
    assert read("builtin:commongen/test.jsonl").column_names == ["src", "tgt"]
    assert len(read(str(shared / "data/gsm8k"))) == 7473
    assert len(read(str(shared / "data/gsm8k"), "data.test")) == 1319
    sst2 = read(str(shared / "data/sst2/train.tsv"))
    assert (len(sst2), sst2.column_names) == (67349, ["label", "sentence"])
    assert len(read(str(shared / "data/preference/dpo_en_demo.json"))) == 300


BAD = [
    ("t.jsonl", b'{"a": 1}\n\n{"a": 2\n{"a": 3}\n', r"t.jsonl line 3: invalid JSON: Expecting ',' delimiter"),
    ("t.jsonl", b'{"a": 1}\n[2]\n', r"t.jsonl line 2: expected an object"),
    ("t.jsonl", b'{"a": 1, "a": 2}\n', r"t.jsonl line 1: invalid JSON: the same key twice"),
    ("t.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', r"t.jsonl line 2: not UTF-8 \(byte 0xe9\)"),
    ("t.jsonl", b'{"a": "x"}\n{"a": "\\ud800"}\n', r"t.jsonl row 2: cannot be stored"),
    ("t.json", b'[{"a": 1},\n{"a": 2]\n', r"t.json line 2: invalid JSON"),
    ("t.json", b'[{"a": 1}, 5]', r"t.json row 2: expected an object"),
    ("t.csv", b"a,b\n1,2\n1,2,3\n", r"t.csv line 3: expected 2 cells \(a, b\), found 3"),
    ("t.csv", b"a,b\n1\n", r"t.csv line 2: expected 2 cells \(a, b\), found 1"),
    ("t.csv", b'a,b\n"1,2\n3,4\n', r"t.csv line \d: unexpected end of data"),
    ("t.csv", b"a,a\n1,2\n", r"t.csv line 1: a column is named twice"),
    ("t.csv", b"a,b\n", r"t.csv is empty"),
    ("t.jsonl", b"", r"t.jsonl is empty"),
    ("t.txt", b"\n \n", r"t.txt is empty"),
    ("t.json", b"[]", r"t.json is empty"),
    ("t.parquet", b"PAR1", r"t.parquet: not a readable Parquet file"),
    ("t.xlsx", b"1", r"data.train: .*t.xlsx: unknown extension; ftjax reads .jsonl"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_file_gives_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FtjaxError, match=message):
        read(str(tmp_path / name))


def test_missing_sources(tmp_path):
    _write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(FtjaxError, match=r'no such file or directory \(did you mean "train.jsonl"\?\)'):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FtjaxError, match="data.test: no file matches"):
        read(str(tmp_path / "*.csv"), "data.test")
    with pytest.raises(FtjaxError, match="carries no such file"):
        read("builtin:nothing.jsonl")
    with pytest.raises(FtjaxError, match="data.validation is empty"):
        read("", "data.validation")
    with pytest.raises(FtjaxError, match="holds no file that ftjax reads"):
        (tmp_path / "empty").mkdir()
        read(str(tmp_path / "empty"))
    with pytest.raises(FtjaxError, match=r"nobody/nothing is no file or directory here, and reading it from the hub"):
        read("nobody/nothing")


def test_files_of_one_source_need_the_same_columns(tmp_path):
    first, second = _write(tmp_path / "a.jsonl", [{"a": "1"}]), _write(tmp_path / "b.jsonl", [{"c": "1"}])
    with pytest.raises(FtjaxError, match=r"b.jsonl has the columns c, .*a.jsonl has a"):
        read(f"{first},{second}")
