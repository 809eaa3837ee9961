"""Files and hub names -> rows. The standard library parses text formats, `datasets` holds rows and reads the rest.

JSON goes through `json` and not through `datasets`' reader, which turns strings that look like dates into timestamps,
drops nothing but guesses much, and cannot name the line at which a file breaks.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftjax.assets import PREFIX, resolve
from ftjax.errors import FtjaxError, nearest

if TYPE_CHECKING:
    import datasets

    from ftjax.data.table import Table

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def read(source: str, key: str = "data.train") -> datasets.Dataset:
    """All rows of a source, in the order of its files; held in memory, so that a changed file is always noticed.

    source: a file, a glob, a comma-separated list of these, a directory, `builtin:NAME`, or a hub data set
    `owner/name[:config][:split]` (`owner/name:train` means the split). Files: .json (an array of objects, or one object
    a line), .jsonl, .ndjson, .csv, .tsv (no quoting), .parquet, .txt (one row a line, column `text`). Cells of csv and
    tsv stay text exactly as written. A blank line is no row in any text format. A directory stands for those of its
    files that are named after the split in `key` (train*, validation* or valid*, val*, dev*, test*), or for all when
    none is named after a split.
    Raises FtjaxError, which names `key`, file and line, for whatever cannot be read in full.
    """
    return join(read_parts(source, key), key)


def read_table(source: str, key: str = "data.train") -> Table:
    """As `read`, with the place of every row."""
    import numpy as np

    from ftjax.data.table import Table

    parts = read_parts(source, key)
    sizes = [len(rows) for _, rows in parts]
    return Table(
        rows=join(parts, key),
        files=tuple(name for name, _ in parts),
        file=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        number=np.concatenate([np.arange(1, size + 1) for size in sizes]),
    )


def read_parts(source: str, key: str = "data.train") -> list[tuple[str, datasets.Dataset]]:
    """As `read`, one (name, rows) for each file, so that errors further on can name the file."""
    source = str(source).strip()
    if not source:
        raise FtjaxError(f"{key} is empty: name a file, a directory or a hub data set.")
    if _is_hub_name(source):
        return [(source, _read_hub(source, key))]
    return [(name, _read_file(name, key)) for name in _files(source, key)]


def join(parts: list[tuple[str, datasets.Dataset]], key: str = "data.train") -> datasets.Dataset:
    """One data set from several with the same columns; raises FtjaxError naming the first that differs."""
    import datasets
    import pyarrow

    (first, head), *others = parts
    for name, rows in others:
        if set(rows.column_names) != set(head.column_names):
            raise FtjaxError(
                f"{key}: {name} has the columns {_list(rows.column_names)}, {first} has {_list(head.column_names)}. "
                "Files of one source need the same columns."
            )
    try:
        return datasets.concatenate_datasets([rows for _, rows in parts])
    except (ValueError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as e:
        names = ", ".join(name for name, _ in parts)
        raise FtjaxError(f"{key}: {names}: a column holds different types in different files: {e}") from e


def _list(names) -> str:
    return ", ".join(map(str, names))


# ---------------------------------------------------------------------------------------------- finding the files


def _is_hub_name(source: str) -> bool:
    looks = HUB_NAME.fullmatch(source) and not source.startswith((".", "/", PREFIX))
    return bool(looks) and not Path(source).exists() and Path(source.split(":")[0]).suffix.lower() not in READERS


def _files(source: str, key: str) -> list[str]:
    path = Path(resolve(source))
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return _files_of_folder(path, key)
    if "," in source:
        return [name for piece in source.split(",") if piece.strip() for name in _files(piece.strip(), key)]
    if glob.has_magic(source):
        found = sorted(name for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not found:
            raise FtjaxError(f"{key}: no file matches {source}")
        return found
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FtjaxError(f"{key}: {source}: no such file or directory{nearest(path.name, beside)}")


def _files_of_folder(folder: Path, key: str) -> list[str]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    if not files:
        raise FtjaxError(f"{key}: {folder} holds no file that ftjax reads ({_list(READERS)})")
    split = key.rpartition(".")[2]
    named = {s: [p for p in files if p.stem.lower().startswith(names)] for s, names in SPLITS.items()}
    if any(named.values()):
        files = named.get(split) or []
        if not files:
            there = _list(p.name for group in named.values() for p in group)
            raise FtjaxError(f"{key}: {folder} holds {there} and no file for {split}: name the file.")
    return [str(p) for p in files]


# ---------------------------------------------------------------------------------------------- reading one file


def _read_file(name: str, key: str) -> datasets.Dataset:
    reader = READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise FtjaxError(f"{key}: {name}: unknown extension; ftjax reads {_list(READERS)}")
    rows = reader(name)
    if len(rows) == 0:
        raise FtjaxError(f"{key}: {name} is empty: it holds no row.")
    return rows if reader is _read_parquet else _dataset(name, rows)


def _lines(name: str) -> list[str]:
    r"""Lines of a UTF-8 file, ended by "\n" or "\r\n" alone: "\x85" and its kin are text, unlike in str.splitlines."""
    data = Path(name).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise FtjaxError(
            f"{name} line {line}: not UTF-8 (byte 0x{data[e.start]:02x}); convert it, such as by "
            f"`iconv -f latin1 -t utf-8`"
        ) from e
    return [line.removesuffix("\r") for line in text.split("\n")]


def _once(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("the same key twice in one object")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _read_jsonl(name: str) -> list[dict]:
    rows = []
    for number, line in enumerate(_lines(name), 1):
        if not line.strip():
            continue
        try:
            row = _JSON.decode(line.strip())
        except (ValueError, RecursionError) as e:
            raise FtjaxError(f"{name} line {number}: invalid JSON: {e}") from e
        if not isinstance(row, dict):
            raise FtjaxError(f"{name} line {number}: expected an object, such as {{...}}, found {line.strip()[:40]!r}")
        rows.append(row)
    return rows


def _read_json(name: str) -> list[dict]:
    text = "\n".join(_lines(name)).strip()
    if not text.startswith("["):
        return _read_jsonl(name)
    try:
        rows = _JSON.decode(text)
    except (ValueError, RecursionError) as e:
        line = f" line {e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise FtjaxError(f"{name}{line}: invalid JSON: {e}") from e
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise FtjaxError(f"{name} row {number}: expected an object, such as {{...}}, found {str(row)[:40]!r}")
    return rows


def _read_csv(name: str, **dialect) -> list[dict]:
    # Line ends go back on: a quoted cell may span lines, and the reader wants them to join it again.
    reader = csv.reader((line + "\n" for line in _lines(name)), strict=True, **dialect)
    rows, header = [], None
    try:
        for cells in reader:
            if not cells or cells == [""]:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise FtjaxError(f"{name} line {reader.line_num}: a column is named twice: {_list(header)}")
            elif len(cells) != len(header):
                raise FtjaxError(
                    f"{name} line {reader.line_num}: expected {len(header)} cells ({_list(header)}), found {len(cells)}"
                )
            else:
                rows.append(dict(zip(header, cells)))
    except csv.Error as e:
        raise FtjaxError(f"{name} line {reader.line_num}: {e}") from e
    return rows


def _read_tsv(name: str) -> list[dict]:
    return _read_csv(name, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_text(name: str) -> list[dict]:
    return [{"text": line} for line in _lines(name) if line.strip()]


def _read_parquet(name: str) -> datasets.Dataset:
    import datasets
    import pyarrow

    try:
        with tempfile.TemporaryDirectory() as cache, quiet():
            return datasets.Dataset.from_parquet(name, cache_dir=cache, keep_in_memory=True)
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as e:
        raise FtjaxError(f"{name}: not a readable Parquet file: {e.__cause__ or e}") from e


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _dataset(name: str, rows: list[dict]) -> datasets.Dataset:
    """Rows with any keys -> a data set with all columns; a key that a row lacks becomes None."""
    import datasets
    import pyarrow

    columns = dict.fromkeys(key for row in rows for key in row)
    # `from_list` takes its columns from the first row alone.
    complete = [{**dict.fromkeys(columns), **rows[0]}, *rows[1:]]
    try:
        return datasets.Dataset.from_list(complete, on_mixed_types="use_json")
    except (pyarrow.ArrowException, UnicodeEncodeError, ValueError, TypeError, OverflowError) as e:
        for number, row in enumerate(rows, 1):
            try:
                datasets.Dataset.from_list([row], on_mixed_types="use_json")
            except (pyarrow.ArrowException, UnicodeEncodeError, ValueError, TypeError, OverflowError) as e_row:
                raise FtjaxError(f"{name} row {number}: cannot be stored: {e_row}") from e_row
        raise FtjaxError(f"{name}: rows disagree on the type of a column: {e}") from e


# ---------------------------------------------------------------------------------------------- the hub


def _read_hub(source: str, key: str) -> datasets.Dataset:
    import datasets

    name, *rest = source.split(":")
    split = rest.pop() if len(rest) == 2 or rest[:1] and rest[0] in SPLITS else key.rpartition(".")[2]
    try:
        with quiet():
            return datasets.load_dataset(name, *rest, split=split)
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        raise FtjaxError(
            f"{key}: {source} is no file or directory here, and reading it from the hub failed: {e} "
            f"(a hub data set is written owner/name[:config][:split])"
        ) from e


class quiet:
    """No progress bars of `datasets` inside, whatever they were outside."""

    def __enter__(self):
        import datasets

        self.on = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()

    def __exit__(self, *_):
        import datasets

        if self.on:
            datasets.enable_progress_bars()
