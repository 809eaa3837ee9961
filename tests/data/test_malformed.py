"""Malformed files: each gives one clear error with file and row or line, or is read rightly; the corpus says which."""

import json
import os
import re

import pytest
from malformed import CASES

from ftjax.data import read
from ftjax.data.read import read_table
from ftjax.errors import FtjaxError


@pytest.fixture(params=["in memory", "streaming", "streaming by two"])
def mode(request, tmp_path, monkeypatch):
    """Where rows go, and how many are in a chunk."""
    if request.param == "in memory":
        return None
    if request.param.endswith("two"):
        monkeypatch.setattr(read, "CHUNK", 2)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def rows_of(table) -> str:
    """All rows as text, in which 1, 1.0, "1" and True differ."""
    return json.dumps(list(table))


@pytest.mark.parametrize("case", CASES)
def test_each_file_is_read_rightly_or_gives_one_clear_error(tmp_path, mode, case):
    name, content, outcome = CASES[case]
    path = tmp_path / name
    path.write_bytes(content() if callable(content) else content)
    if isinstance(outcome, list):
        table = read_table(str(path), folder=mode)
        assert rows_of(table) == json.dumps(outcome)
        assert table.place(len(table) - 1) == f"{path} row {len(outcome)}"
        return
    with pytest.raises(FtjaxError) as caught:
        read_table(str(path), folder=mode)
    message = str(caught.value)
    assert re.search(re.escape(str(path)) + f"(?:{outcome})", message)
    assert "; " in message, "says what to do"
    assert len(message) < 500 and "\n" not in message
    assert mode is None or not os.listdir(mode), "a failed read leaves no file"


def test_the_corpus_has_at_least_sixty_files_and_many_of_each_outcome():
    errors = [case for case, (_, _, outcome) in CASES.items() if isinstance(outcome, str)]
    assert len(CASES) >= 60 and len(errors) >= 40 and len(CASES) - len(errors) >= 30


def test_a_folder_named_like_a_file(tmp_path):
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises(FtjaxError, match=r"t\.jsonl has no file that ftjax reads"):
        read_table(str(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl" / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "t.jsonl" / "b.jsonl").mkdir()
    assert len(read_table(str(tmp_path / "t.jsonl"))) == 1


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_a_file_that_may_not_be_read(tmp_path, name, bound_by_permissions):
    (tmp_path / name).write_text("")
    (tmp_path / name).chmod(0)
    with pytest.raises(FtjaxError, match=rf"data\.train: .*{name} cannot be read: Permission denied"):
        read_table(str(tmp_path / name))


def test_a_link_to_nothing_and_a_name_too_long(tmp_path):
    (tmp_path / "t.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(FtjaxError, match=r"t\.jsonl is a pipe, a device or a link that leads nowhere"):
        read_table(str(tmp_path / "t.jsonl"))
    with pytest.raises(FtjaxError, match="File name too long; check the path"):
        read_table(str(tmp_path / ("x" * 300 + ".jsonl")))


@pytest.mark.parametrize("pattern", ["rows/*/*.jsonl", "rows/**/*.jsonl"])
def test_a_folder_that_may_not_be_read_hides_no_rows(tmp_path, pattern, bound_by_permissions):
    for name in "ab":
        (tmp_path / "rows" / name).mkdir(parents=True)
        (tmp_path / "rows" / name / "t.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "rows/b").chmod(0)
    with pytest.raises(FtjaxError, match=r"data\.train: .*rows/b/ cannot be read; check its permissions"):
        read_table(str(tmp_path / pattern))
    (tmp_path / "rows/b").chmod(0o700)
    assert len(read_table(str(tmp_path / pattern))) == 2
