"""Reading: every format gives the rows that were written, from files, folders and the hub. Malformed files have a test
of their own."""

import csv
import datetime
import json
import os
import re
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from tables import mapped

from ftjax.data.read import read_table
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
    assert list(read_table(_write(tmp_path / f"rows{suffix}", ROWS))) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_streaming_gives_the_same_table_from_files_of_its_folder(tmp_path, suffix, monkeypatch):
    rows = [{"a": f"{n} é", "b": "x" * n} for n in range(30)]
    names = [_write(tmp_path / f"rows{n}{suffix}", rows[n:]) for n in range(3)]
    whole = read_table(",".join(names))
    monkeypatch.setattr("ftjax.data.read.CHUNK", 7)
    (tmp_path / "cache").mkdir()
    table = read_table(",".join(names), folder=tmp_path / "cache")
    assert list(table) == list(whole) == rows + rows[1:] + rows[2:]
    assert table.cells.schema == whole.cells.schema
    assert [table.place(i) for i in range(len(table))] == [whole.place(i) for i in range(len(table))]
    assert table.place(31) == f"{names[1]} row 2"
    assert {file.parent for file in mapped(table)} == {tmp_path / "cache"} and not mapped(whole)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_streaming_holds_a_few_chunks_and_not_the_file(tmp_path, suffix, monkeypatch):
    path, rows = tmp_path / f"rows{suffix}", [{"text": f"{n:06d}" * 2000} for n in range(1500)]
    if suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path), batch_size=100)
    else:
        _write(path, rows)
    monkeypatch.setattr("ftjax.data.read.CHUNK_BYTES", 1_000_000)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        table = read_table(str(path), folder=tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(table) == 1500 and table.row(1499) == rows[-1]
    assert peak < 8_000_000 and pyarrow.total_allocated_bytes() - before < 4_000_000, "of 18 MB"


def test_a_changed_file_is_noticed(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        for rows in (ROWS, ROWS[:1]):
            assert list(read_table(_write(tmp_path / f"rows{suffix}", rows))) == rows


def test_quoting_of_tsv_is_found_or_asked_for_but_never_guessed(tmp_path):
    rng, asked = np.random.default_rng(0), 0
    for n in range(400):
        quoting = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE)[n % 4]
        letters = list('ab "" \'') + ["\t", "\n"] * (quoting != csv.QUOTE_NONE)
        cell = lambda: "".join(rng.choice(letters, rng.integers(1, 5))) + "c"  # noqa: B023, E731
        rows = [{"a": cell(), "b": cell()} for _ in range(rng.integers(1, 6))]
        with open(tmp_path / f"{n}.tsv", "w", newline="") as file:
            writer = csv.writer(file, "excel-tab", quoting=quoting, quotechar='"' if quoting < 3 else None)
            writer.writerows([["a", "b"], *([*row.values()] for row in rows)])
        try:
            assert list(read_table(file.name)) == rows
        except FtjaxError as error:
            assert "which may be text or may quote" in str(error)
            asked += 1
    assert asked < 10, asked


def test_text_is_one_row_a_line_and_keeps_next_line_characters(tmp_path):
    (tmp_path / "t.txt").write_bytes("one\x85still one\u2028\r\n\n two\n".encode())
    assert list(read_table(str(tmp_path / "t.txt")).column("text")) == ["one\x85still one\u2028", " two"]


def test_json_lines_in_a_json_file_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "t.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n')
    assert list(read_table(str(tmp_path / "t.json")).column("a")) == [1, 2]


def test_columns_of_later_rows_are_kept_and_types_may_mix(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": "x", "b": {"k": 1}}\n{"b": {"l": "y"}}\n')
    rows = list(read_table(str(tmp_path / "t.jsonl")))
    assert rows == [{"a": 1, "b": None}, {"a": "x", "b": {"k": 1}}, {"a": None, "b": {"l": "y"}}]


def test_lists_globs_and_folders(tmp_path):
    names = [_write(tmp_path / f"{n}.jsonl", [{"n": n}]) for n in ("b", "a")]
    assert list(read_table(",".join(names)).column("n")) == ["b", "a"]
    assert list(read_table(str(tmp_path / "*.jsonl")).column("n")) == ["a", "b"]
    assert list(read_table(str(tmp_path)).column("n")) == ["a", "b"]
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("README.txt", "classes.json"):  # these need not be rows
        (parts / name).write_text("x")
    for name in ("train-1", "dev"):
        _write(parts / f"{name}.jsonl", [{"n": name}])
    assert list(read_table(str(parts), "data.train").column("n")) == ["train-1"]
    assert list(read_table(str(parts), "data.validation").column("n")) == ["dev"]
    with pytest.raises(FtjaxError, match=r"data.test: .* has train-1.jsonl, dev.jsonl but no file for test"):
        read_table(str(parts), "data.test")
    (tmp_path / "de").mkdir()
    for name in ("snli_1.0_train", "de-testset", "de.dev.1"):
        _write(tmp_path / "de" / f"{name}.jsonl", [{"n": name}])
    for split, name in (("train", "snli_1.0_train"), ("test", "de-testset"), ("validation", "de.dev.1")):
        assert list(read_table(str(tmp_path / "de"), f"data.{split}").column("n")) == [name]
    assert [read_table(",".join(names)).place(i) for i in (0, 1)] == [f"{name} row 1" for name in names]
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for twice in (f"{names[1]},{names[1]}", f"{names[1]},{tmp_path / '*.jsonl'}", f"{names[1]},{tmp_path}/link.jsonl"):
        with pytest.raises(FtjaxError, match=r"data.train: the file .*a.jsonl is named twice; name it once"):
            read_table(twice)


@pytest.mark.parametrize(
    "files",
    [
        {"train": ["data/train-0.jsonl", "data/train-1.jsonl"], "validation": ["data/validation-0.jsonl"]},
        {"train": ["train/b.jsonl", "train/a.jsonl"], "validation": ["dev/rows.jsonl"]},
    ],
)
def test_a_folder_laid_out_as_on_the_hub(files, tmp_path):
    import datasets

    for names in files.values():
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            _write(tmp_path / name, [{"n": name}])
    for split, names in files.items():
        theirs = datasets.load_dataset(str(tmp_path), split=split, cache_dir=str(tmp_path / ".cache"))["n"]
        assert list(read_table(str(tmp_path), f"data.{split}").column("n")) == list(theirs) == sorted(names)
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert list(read_table(str(tmp_path), "data.train").column("n")) == sorted(files["train"])
    (tmp_path / "main").mkdir()
    with pytest.raises(FtjaxError, match="no file for test"):
        read_table(str(tmp_path), "data.test")
    (tmp_path / "none" / "main").mkdir(parents=True)
    with pytest.raises(FtjaxError, match=r"no file that ftjax reads; .* name of one of its folders \(main\)"):
        read_table(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "used, left",
    [
        ("rows.jsonl", "rows-2.jsonl.gz"),
        ("test.jsonl", "train.csv.zip"),
        ("test.jsonl", "latest.jsonl"),
        ("test.jsonl", "constraint.jsonl"),
        ("test.jsonl", "extra.csv"),
        ("train.jsonl", "test/rows.jsonl"),
        ("train/a.jsonl", "train/more/b.jsonl"),
        ("data/train.jsonl", "data/de/train.jsonl"),
        ("data/train.jsonl", "data/train.json.xz"),
    ],
)
def test_rows_of_a_folder_that_would_be_left_out_are_named(used, left, tmp_path):
    for name in (used, left):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        _write(tmp_path / name, [{"n": 1}]) if name.endswith("jsonl") else (tmp_path / name).write_bytes(b"PK")
    at = str(Path(left).parent) if "/" in left and left.endswith("jsonl") else left
    with pytest.raises(FtjaxError, match=f"holds rows in {at} too, which would be left out beside {used}; unpack or"):
        read_table(str(tmp_path), "data.test")


def test_builtin_and_real_files(shared):
    assert read_table("builtin:commongen/test.jsonl").columns == ["src", "tgt"]
    assert len(read_table(str(shared / "data/gsm8k"))) == 7473
    assert len(read_table(str(shared / "data/gsm8k"), "data.test")) == 1319
    sst2 = read_table(str(shared / "data/sst2/train.tsv"))
    assert (len(sst2), sst2.columns) == (67349, ["label", "sentence"])
    assert len(read_table(str(shared / "data/preference/dpo_en_demo.json"))) == 300


@pytest.mark.parametrize("name, count", [("train", 3394), ("dev", 1009)])
def test_conll_gives_every_token_and_tag_of_a_real_file(shared, name, count):
    path = shared / f"data/wnut17/{name}.conll"
    table = read_table(str(path))
    sentences = list(table)
    assert len(table) == count and table.columns == ["tokens", "tags"]
    pairs = [pair for row in sentences for pair in zip(row["tokens"], row["tags"], strict=True)]
    assert pairs == re.findall(r"^(\S.*)\t(\S+)$", path.read_bytes().decode(), re.MULTILINE)
    assert {tag[:2] for _, tag in pairs} == {"O", "B-", "I-"}


def _hub(monkeypatch, rows: datasets.Dataset) -> list:
    """Let the hub give these rows; what it was asked for, in a list."""
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_names_give_configuration_and_split(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"a": "x", "b": [1]}, {"a": None, "b": []}])
    asked = _hub(monkeypatch, rows)
    for source in ("o/n", "o/n:test", "o/n:c", "o/n:c:s"):
        table = read_table(source, "data.validation", tmp_path)
        assert list(table) == rows.to_list()
    assert asked == [("o/n", "validation"), ("o/n", "test"), ("o/n", "c", "validation"), ("o/n", "c", "s")]
    assert table.place(1) == "o/n:c:s row 2"
    assert not list(tmp_path.iterdir()), "what is mapped from the hub's cache is not copied"


def test_hub_cells_become_text_and_numbers_and_bytes_are_refused(tmp_path, monkeypatch):
    time = datetime.datetime(2020, 1, 2)
    rows = [{"t": time, "f": 0.5, "m": 1}, {"t": None, "f": float("nan"), "m": "1"}]
    _hub(monkeypatch, datasets.Dataset.from_list(rows, on_mixed_types="use_json"))
    for folder in (None, tmp_path):
        table = read_table("o/n", folder=folder)
        assert table.row(0) == {"t": "2020-01-02 00:00:00.000000", "f": 0.5, "m": 1}
        assert table.row(1)["t"] is table.row(1)["f"] is None
    _hub(monkeypatch, datasets.Dataset.from_list([{"b": b"x"}]))
    with pytest.raises(FtjaxError, match="o/n: column 'b' holds binary"):
        read_table("o/n")
    _hub(monkeypatch, datasets.Dataset.from_list([{"f": 1.0}, {"f": float("inf")}]))
    with pytest.raises(FtjaxError, match="o/n row 2: column 'f': inf"):
        read_table("o/n")
    _hub(monkeypatch, datasets.Dataset.from_dict({"a": []}))
    with pytest.raises(FtjaxError, match="o/n is empty"):
        read_table("o/n")


def test_missing_sources(tmp_path):
    _write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(FtjaxError, match=r'no such file or directory \(did you mean "train.jsonl"\?\)'):
        read_table(str(tmp_path / "trian.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("pipe.jsonl", "loop.jsonl"):
        with pytest.raises(FtjaxError, match=f"{name} is a pipe, a device or a link that leads nowhere"):
            read_table(str(tmp_path / name))
    with pytest.raises(FtjaxError, match="data.test: no file matches"):
        read_table(str(tmp_path / "*.csv"), "data.test")
    with pytest.raises(FtjaxError, match="carries no such file"):
        read_table("builtin:nothing.jsonl")
    with pytest.raises(FtjaxError, match="data.validation is empty"):
        read_table("", "data.validation")
    with pytest.raises(FtjaxError, match="has no file that ftjax reads"):
        (tmp_path / "empty").mkdir()
        read_table(str(tmp_path / "empty"))
    with pytest.raises(
        FtjaxError, match=r"nobody/nothing is not a file or directory here, and reading it from the hub"
    ):
        read_table("nobody/nothing")


def test_files_of_one_source_need_the_same_columns(tmp_path):
    first, second = _write(tmp_path / "a.jsonl", [{"a": "1"}]), _write(tmp_path / "b.jsonl", [{"c": "1"}])
    with pytest.raises(FtjaxError, match=r"b.jsonl has the columns c, .*a.jsonl has a"):
        read_table(f"{first},{second}")


def test_types_of_a_column_may_differ_between_files(tmp_path):
    first, second = _write(tmp_path / "a.jsonl", [{"a": 1}]), _write(tmp_path / "b.jsonl", [{"a": "1"}])
    table = read_table(f"{first},{second}")
    assert [table.row(0), table.row(1)] == [{"a": 1}, {"a": "1"}]


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t")])
def test_columns_are_named_where_a_file_does_not(name, between, tmp_path):
    path = tmp_path / name
    path.write_text(f"yes{between}good{between}1\nno{between}bad{between}2\n")
    table = read_table(str(path), header=("label", "text", "n"))
    assert [table.row(i) for i in range(2)] == [
        {"label": "yes", "text": "good", "n": "1"}, {"label": "no", "text": "bad", "n": "2"},
    ]  # fmt: skip
    assert table.place(0) == f"{path} row 1"
    with pytest.raises(FtjaxError, match=r"expected 2 cells \(label, text\), found 3"):
        read_table(str(path), header=("label", "text"))
