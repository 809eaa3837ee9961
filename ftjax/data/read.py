"""Files and hub names -> rows. The standard library parses text, pyarrow reads Parquet, `datasets` loads from the hub.

JSON is parsed by `json` and not by the reader of `datasets`, which turns strings that look like dates into timestamps,
guesses types, and cannot name the line of an error.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import glob
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ftjax.assets import PREFIX, resolve
from ftjax.data import columns
from ftjax.data.table import CHUNK, CHUNK_BYTES, Table
from ftjax.errors import FtjaxError, nearest, reason
from ftjax.files import mode

if TYPE_CHECKING:
    import datasets
    import pyarrow

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_NAMES = "|".join(name for names in SPLITS.values() for name in names)
# A file is of a split if its name begins with that of the split, or has it as a word, such as `sst2_train`.
SPLIT = re.compile(rf"^(?:{_NAMES})|(?<=[\W\d_])(?:{_NAMES})(?=(?:ing|set)?(?:[\W\d_]|$))")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # of sets on the hub
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")  # ends of the names of compressed files
NESTING = 100  # greatest depth of lists and objects in a row
PIECE = 1 << 20  # bytes of a JSON array that are read at once


def read_table(
    source: str, key: str = "data.train", folder: str | Path | None = None, header: tuple[str, ...] = ()
) -> Table:
    """Read all rows of a source, with the place of each, in the order of its files.

    Text is UTF-8, with or without a byte order mark. A line ends with "\\n" or "\\r\\n". A blank line is not a row.
      .json             an array of objects, or one object a line; of SQuAD's own files one row a question: `id`,
                        `title`, `context`, `question`, `answers` {`text`, `answer_start`}, as in the hub's copies
      .jsonl .ndjson    one object a line; a key that a row lacks is None
      .csv              with a header and quoting; cells stay text as written; an empty name becomes `column_2`
      .tsv              the same with tabs between cells; quotes are text, unless only quoting gives all rows the same
                        number of cells, the header is quoted, or quotes are doubled; else they are refused
      .conll .iob .bio  one row a sentence: `tokens`, `tags` (first and last column), `column_2` and so on between them
      .txt              one row a line: `text`
      .parquet          dates, times, timestamps and decimals become text, categories their values, maps lists of
                        `key` and `value`, NaN null, numbers of a ClassLabel of `datasets` their names, -1 null; bytes
                        and durations are refused
    A hub data set is converted like Parquet.

    Args:
        source: A file, a glob, a comma-separated list of these, a directory, `builtin:NAME`, or a hub data set
            `owner/name[:config][:split]` (`owner/name:train` means the split). Of a directory, the files named after
            the split in `key` are read (train*, validation* or valid*, val*, dev*, test*), or all files if none is
            named after a split. If it holds folders alone, as data sets of the hub do, these are the files in `data`
            and in folders named after a split. A folder with further rows, compressed, beside these files or without
            a split in their name, is refused. Files of one source need the same columns; their types may differ.
        key: Key of the config, for errors and for the split.
        folder: Directory for data sets larger than memory. Rows are written chunk by chunk to new Arrow files there and
            mapped from them; the caller deletes the files. None: rows are held in memory. The table and the errors are
            the same.
        header: Names of the columns of .csv and .tsv files that have no header. Empty: their first line is the header.

    Raises:
        FtjaxError: If anything cannot be read in full. It names the file and the line or row, and says what to do.
    """
    source = str(source).strip()
    if not source:
        raise FtjaxError(f"{key} is empty: name a file, a directory or a hub data set.")
    if _is_hub_name(source):
        rows = _load_hub(source, key)
        schema = rows.features.arrow_schema
        if columns.is_plain(schema) and len(rows) and not _class_names(schema):  # `datasets` maps it from its own cache
            return Table.of_files(rows.with_format("arrow")[:], [source], [len(rows)])
        tables = rows.with_format("arrow").iter(CHUNK)
        names, parts = [source], [_adopted(source, schema, (b for table in tables for b in table.to_batches()))]
    else:
        try:
            names = _files(source, key)
        except OSError as e:
            raise FtjaxError(f"{key}: {source}: {e.strerror}; check the path and its permissions") from e
        real = [os.path.realpath(name) for name in names]
        if len(set(real)) < len(real):
            twice = next(name for name, path in zip(names, real) if real.count(path) > 1)
            raise FtjaxError(
                f"{key}: the file {twice} is named twice; name it once. To draw its rows more often, give it a weight "
                "in data.mixture"
            )
        parts = [_batches(name, key, header) for name in names]
    sizes, first = [], None
    with columns.Writer(folder) as writer:
        for name, batches in zip(names, parts):
            size, found = 0, {}
            for batch in batches:
                writer.add(batch)
                size += batch.num_rows
                found |= dict.fromkeys(batch.schema.names)
            if not size:
                raise FtjaxError(f"{name} is empty (it has no rows); fill it or leave it out")
            first = first or found
            if found.keys() != first.keys():
                raise FtjaxError(
                    f"{key}: {name} has the columns {_list(found)}, {names[0]} has {_list(first)}. "
                    "Files of one source need the same columns."
                )
            sizes.append(size)
        return Table.of_files(writer.finish(), names, sizes)


def _list(names) -> str:
    return ", ".join(map(str, names))


# ---------------------------------------------------------------------------------------------- finding the files


def _is_hub_name(source: str) -> bool:
    looks = HUB_NAME.fullmatch(source) and not source.startswith((".", "/", PREFIX))
    return bool(looks) and not mode(source) and Path(source.split(":")[0]).suffix.lower() not in READERS


def _open(folder: str) -> bool:
    """Whether the files of a folder can be listed and read."""
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _files(source: str, key: str) -> list[str]:
    path = Path(resolve(source))
    if stat.S_ISREG(found := mode(path)):
        return [str(path)]
    if stat.S_ISDIR(found):
        return _files_of_folder(path, key)
    if "," in source:
        return [name for piece in source.split(",") if piece.strip() for name in _files(piece.strip(), key)]
    if glob.has_magic(source):
        found = sorted(name for name in glob.glob(source, recursive=True) if Path(name).is_file())
        closed = [at for at in glob.glob(os.path.join(os.path.dirname(source), ""), recursive=True) if not _open(at)]
        if closed:
            raise FtjaxError(f"{key}: {source}: {closed[0]} cannot be read; check its permissions, or name the files")
        if not found:
            raise FtjaxError(f"{key}: no file matches {source}; check the pattern and the folder")
        return found
    if os.path.lexists(path):
        raise FtjaxError(f"{key}: {source} is a pipe, a device or a link that leads nowhere; write its rows to a file")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FtjaxError(f"{key}: {source}: no such file or directory{nearest(path.name, beside)}")


def _files_of_folder(folder: Path, key: str) -> list[str]:
    inside = sorted(p for p in folder.iterdir() if stat.S_ISDIR(mode(p)) and not p.name.startswith("."))
    of_sets = [p for p in inside if p.name.lower() in ("data", *(name for names in SPLITS.values() for name in names))]
    files = _readers(folder) or [p for one in of_sets for p in _readers(one)]
    beside = of_sets if _readers(folder) else [q for p in of_sets for q in sorted(p.iterdir()) if stat.S_ISDIR(mode(q))]
    packed = [p for one in {folder, *(p.parent for p in files)} for p in one.iterdir() if p.suffix.lower() in PACKED]
    name = lambda p: (p.stem if p.parent.name.lower() == "data" or p.parent == folder else p.parent.name).lower()  # noqa: E731
    words = {p: found[0] for p in files if (found := SPLIT.search(name(p)))}
    likely = {p.suffix for p in words} | READERS.keys() - {".txt", ".json"}  # others may be notes and settings
    left = [p for p in packed if Path(p.stem).suffix.lower() in READERS] + [p for p in beside if _readers(p)]
    left += [p for p in files if words and p not in words and p.suffix in likely]
    if files and left:
        raise FtjaxError(
            f"{key}: {folder} holds rows in {min(left).relative_to(folder)} too, which would be left out beside "
            f"{next(iter(words), files[0]).relative_to(folder)}; unpack or move them, or name the files that are meant"
        )
    if not files:
        others = f", or the name of one of its folders ({_list(p.name for p in inside)})" if inside else ""
        raise FtjaxError(f"{key}: {folder} has no file that ftjax reads; expected one of {_list(READERS)}{others}")
    split = key.rpartition(".")[2]
    named = {s: [p for p in files if words.get(p) in names] for s, names in SPLITS.items()}
    if any(named.values()):
        files = named.get(split) or []
        if not files:
            there = _list(p.name for group in named.values() for p in group)
            raise FtjaxError(f"{key}: {folder} has {there} but no file for {split}; name the file")
    return [str(p) for p in files]


def _readers(folder: Path) -> list[Path]:
    """The files of a folder that hold rows, in order."""
    able = (
        p
        for p in folder.iterdir()
        if stat.S_ISREG(mode(p)) and p.suffix.lower() in READERS and p.name not in DESCRIPTIONS
    )
    return sorted(able)


# ---------------------------------------------------------------------------------------------- reading one file


def _batches(name: str, key: str, header: tuple[str, ...] = ()) -> Iterator[pyarrow.RecordBatch]:
    suffix = Path(name).suffix.lower()
    if suffix not in READERS:
        raise FtjaxError(
            f"{key}: {name}: unknown extension; rename or convert the file to one that ftjax reads: {_list(READERS)}"
        )
    with _readable(name, f"{key}: "):
        if suffix == ".parquet":
            yield from _parquet(name)
        else:
            with open(name, "rb") as handle:
                text = _Text(name, handle, header)
                yield from _gather(READERS[suffix](text), text)


def numbered(name: str | Path) -> Iterator[tuple[int, dict]]:
    """(number of its first line, row) for each row of a text file. Raises FtjaxError as `read_table` does."""
    with _readable(name), open(name, "rb") as handle:
        text = _Text(str(name), handle)
        for row in READERS[Path(name).suffix.lower()](text):
            yield text.begins or text.line, row


@contextlib.contextmanager
def _readable(name: str | Path, key: str = "") -> Iterator[None]:
    """Raise FtjaxError where the system cannot read a file."""
    try:
        yield
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else e
        raise FtjaxError(f"{key}{name} cannot be read: {reason}; check the file and its permissions") from e


def _gather(rows: Iterable[dict], text: _Text) -> Iterator[pyarrow.RecordBatch]:
    """Rows in batches. A batch is limited in its number of rows and in bytes of the file."""
    done, chunk, begin = 0, [], text.size

    def place(index: int) -> str:
        return f"{text.name} row {done + index + 1}"

    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK or text.size - begin >= CHUNK_BYTES:
            yield columns.batch(chunk, place)
            done, chunk, begin = done + len(chunk), [], text.size
    if chunk:
        yield columns.batch(chunk, place)


SIGNATURES = (  # (first bytes of a file that is not UTF-8 text, its format, what to do)
    (b"\xff\xfe\0\0", "UTF-32", "convert it by `iconv -f utf-32 -t utf-8`"),
    (b"\0\0\xfe\xff", "UTF-32", "convert it by `iconv -f utf-32 -t utf-8`"),
    (b"\xff\xfe", "UTF-16", "convert it by `iconv -f utf-16 -t utf-8`"),
    (b"\xfe\xff", "UTF-16", "convert it by `iconv -f utf-16 -t utf-8`"),
    (b"PAR1\x15", "Parquet", "name it .parquet"),
    (b"ARROW1\0\0", "Arrow", "convert it to .parquet"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it by `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it by `unzstd`"),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it by `unxz`"),
    (b"BZh91AY&SY", "compressed by bzip2", "unpack it by `bunzip2`"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save the sheet as .csv"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file by `git lfs pull`"),
)


class _Text:
    """A text file that is read once, by lines or by size.

    Attributes:
        header: Names of the columns of a table whose file does not name them; else empty.
        line: Number of the last line that was read.
        size: Bytes read so far.
        begins: Line at which the last row begins; 0 if every row is one line.

    Raises:
        FtjaxError: If the file is not UTF-8 text.
    """

    def __init__(self, name: str, handle, header: tuple[str, ...] = ()):
        self.name, self.handle, self.header, self.line, self.size = name, handle, header, 0, 0
        self.begins = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.is_utf8 = False  # whether a character that is not ASCII was read
        self.head = handle.peek(4096)
        for signature, what, advice in SIGNATURES:
            if self.head.startswith(signature):
                raise FtjaxError(f"{name} line 1: the file is {what}, not UTF-8 text; {advice}")
        if self.head.startswith(codecs.BOM_UTF8):
            handle.read(len(codecs.BOM_UTF8))

    def error(self, message: str, line: int | None = None) -> FtjaxError:
        """The exception for a line, by default the last one that was read."""
        return FtjaxError(f"{self.name} line {line or self.line}: {message}")

    def lines(self) -> Iterator[str]:
        r"""Lines with their ends. Only "\n" ends a line; "\x85" and others at which str.splitlines splits are text."""
        for data in self.handle:
            self.line, self.size = self.line + 1, self.size + len(data)
            yield self._decoded(data)

    def bare(self) -> Iterator[str]:
        """Lines without their ends; blank lines are left out."""
        for line in self.lines():
            line = line.removesuffix("\n").removesuffix("\r")
            if "\r" in line:
                raise self.error(
                    "found a carriage return within the line; remove it, or make it a line end by `tr '\\r' '\\n'`"
                )
            if line.strip():
                yield line

    def read(self, size: int = -1) -> str:
        """The text of the next `size` bytes or a little more, by default of all; "" at the end. Advances `line`."""
        text, self.line = "", self.line or 1
        while not text and (data := self.handle.read(size)):
            self.size += len(data)
            text = self._decoded(data, self.decoder.decode)
        if not text:
            self._decoded(b"", functools.partial(self.decoder.decode, final=True))
        self.line += text.count("\n")
        return text

    def _decoded(self, data: bytes, decode: Callable[[bytes], str] = bytes.decode) -> str:
        if (at := data.find(b"\0")) >= 0:
            self.line += data.count(b"\n", 0, at)
            raise self.error(
                "found a NUL byte: the file is binary, damaged, or UTF-16 without a byte order mark; convert it by "
                "`iconv -f utf-16le -t utf-8`, or remove the byte by `tr -d '\\0'`"
            )
        try:
            text = decode(data)
            self.is_utf8 = self.is_utf8 or not text.isascii()
            return text
        except UnicodeDecodeError as e:
            self.line += e.object.count(b"\n", 0, e.start)
            bad = e.object[e.start : e.start + 2]
            if bad[0] == 0xED and bad[1:] >= b"\xa0":
                advice = "half of a surrogate pair, as CESU-8 has it; write the file again as UTF-8"
            elif e.reason == "unexpected end of data":
                advice = "the file ends within a character; fetch it again, or convert it to UTF-8"
            elif self.is_utf8 or not e.object[: e.start].isascii():
                advice = "the text before it is UTF-8; write this line as UTF-8, too, and leave the others as they are"
            else:
                advice = f"convert it, such as by `iconv -f {'cp1252' if bad[0] < 0xA0 else 'latin1'} -t utf-8`"
            raise self.error(f"not UTF-8 (byte 0x{bad[0]:02x}); {advice}") from e


# ---------------------------------------------------------------------------------------------- JSON


def _once(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the same key twice in one object: {twice!r}; rename or remove one")
    return row


def _no_constant(name: str):
    raise ValueError(f"JSON has no {name}; write null or a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is too large for a 64-bit float; write it as text")
    return value


WHITE = re.compile(r"[ \t\n\r]*")
CUT = "the array is not closed by ]; close it, or fetch the file again if it is cut off"
_JSON = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
ADVICE = {  # message of the JSON decoder -> what to do
    "Extra data": "put each object on a line of its own, with nothing behind it",
    "Expecting value": "add or mend the value, or name the file by its format if that is not JSON",
    "Expecting property name enclosed in double quotes": "put keys and text in double quotes, no comma after the last, "
    "no comments, and each object on one line",
    "Unterminated string starting at": "close the quote, or fetch the file again if it is cut off",
    "Invalid control character at": "write a line end or tab in text as \\n or \\t, and close each quote",
    "Invalid \\escape": "write a backslash in text as \\\\",
    "Expecting ',' delimiter": "add the comma or closing bracket, or a backslash before a quote in text",
}


def _complaint(error: ValueError | RecursionError, start: int = 0) -> str:
    """What is wrong with a row, and what to do. `start` is where the text of the row, or of its line, begins."""
    if isinstance(error, RecursionError):
        return f"more than {NESTING} lists and objects within one another; flatten the row"
    if isinstance(error, json.JSONDecodeError):
        message = error.msg.removesuffix(": ")
        advice = ADVICE.get(message, "mend or remove the row")
        if error.doc.startswith("\ufeff", error.pos):
            advice = "remove the byte order mark (U+FEFF) that stands here"
        return f"invalid JSON: {message} (character {error.pos - start + 1}); {advice}"
    if "integer string conversion" in str(error):
        return "invalid JSON: a whole number of more than 4,300 digits; write it as text"
    return f"invalid JSON: {error}"


def _fault(row, text: str, start: int, end: int) -> str | None:
    """Why a value decoded from text[start:end] cannot be a row; None if it can.

    The calls of count and find are cheap bounds, which spare nearly every row the exact checks.
    """
    if not isinstance(row, dict):
        return f'expected an object, found {text[start:end].strip()[:40]!r}; give it a key, such as {{"text": ...}}'
    if not row:
        return "an object without any key; fill or remove it"
    if text.count("[", start, end) + text.count("{", start, end) > NESTING and _depth(row) > NESTING:
        return _complaint(RecursionError())
    if text.find("\\u", start, end) < 0:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        return f"half of a surrogate pair (\\u{ord(e.object[e.start]):04x}), which is no character; mend or remove it"
    if any("\0" in key for key in row):
        return "a key holds a NUL (\\u0000); rename it"
    return None


def _depth(value) -> int:
    """Depth of nested lists and objects."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = list(itertools.chain.from_iterable(v.values() if isinstance(v, dict) else v for v in level))
    return depth


def _json_lines(text: _Text) -> Iterator[dict]:
    for line in text.bare():
        try:
            row = _JSON.decode(line)
            fault = _fault(row, line, 0, len(line))
        except (ValueError, RecursionError) as e:
            fault = _complaint(e)
        if fault:
            array = text.line == 1 and line.lstrip().startswith("[")
            raise text.error(fault + ("; or, if the file is one array of objects, name it .json" if array else ""))
        yield row


def _json(text: _Text) -> Iterator[dict]:
    start = text.head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return _json_array(text)
    return _squad(text) if SQUAD.match(start) and b'"paragraphs"' in start else _json_lines(text)


SQUAD = re.compile(rb'\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')


def _squad(text: _Text) -> Iterator[dict]:
    """The questions of a file in SQuAD's layout (https://rajpurkar.github.io/SQuAD-explorer), read as a whole."""
    try:
        whole = _JSON.decode(text.read())
    except (ValueError, RecursionError) as e:
        raise text.error(_complaint(e)) from e
    number = 0
    try:
        for article in whole["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    answers = question.get("answers", [])
                    yield {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                    }
    except (KeyError, TypeError, AttributeError) as e:
        raise FtjaxError(
            f"{text.name} row {number or 1}: expected SQuAD's layout, data > paragraphs > context and qas > id, "
            f"question and answers > text and answer_start; this key is missing or has another type: {e}"
        ) from e


def _json_array(text: _Text) -> Iterator[dict]:
    """The objects of a JSON array. Only a few pieces of the file, or one object, are in memory at a time."""
    buffer, at, number = "", 0, 0

    def more() -> bool:
        nonlocal buffer, at
        # Read as much again as the buffer holds, so that a large object is parsed a few times, not once for each PIECE.
        new = text.read(max(PIECE, len(buffer) - at))
        if new:  # at the end of the file, the buffer is kept for the position in an error
            buffer, at = buffer[at:] + new, 0
        return bool(new)

    def sign() -> str:
        """The next character that is not white space; "" at the end."""
        nonlocal at
        while True:
            at = WHITE.match(buffer, at).end()
            if at < len(buffer) or not more():
                return buffer[at : at + 1]

    def error(message: str, position: int) -> FtjaxError:
        return FtjaxError(f"{text.name} row {number} (line {text.line - buffer.count(chr(10), position)}): {message}")

    sign()
    at += 1  # the bracket that opens the array
    while True:
        number += 1
        after = sign()
        if number == 1 and after == "]":
            break
        if not after:
            raise error(CUT, at)
        while True:
            try:
                row, end = _JSON.raw_decode(buffer, at)
                break
            except (ValueError, RecursionError) as e:
                if _cut_off(e, buffer) and more():
                    continue
                raise error(_complaint(e, at), e.pos if isinstance(e, json.JSONDecodeError) else at) from e
        if fault := _fault(row, buffer, at, end):
            raise error(fault, at)
        yield row
        at = end
        after = sign()
        if after != ",":
            break
        at += 1
    if after != "]":
        raise error(
            f"expected a comma or ] after the object, found {buffer[at : at + 20]!r}; add it" if after else CUT, at
        )
    at += 1
    if sign():
        raise error(f"expected nothing after the array, found {buffer[at : at + 20]!r}; remove it", at)


def _cut_off(error: ValueError | RecursionError, buffer: str) -> bool:
    """Whether more text may resolve the error: the decoder stopped in a string, or a few characters before the end."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
    )


# ---------------------------------------------------------------------------------------------- tables of text


CSV_FAULTS = {  # part of the csv module's message -> our message; {line} is the last line that was read
    "unexpected end of data": "a quote opens in this row that the file never closes; close it",
    "expected after": "a quote within quotes, in line {line}; double it, or close the quote that opens before it",
    "new-line character": "a carriage return outside quotes; quote the cell, or let it end a line by `tr '\\r' '\\n'`",
}


def _csv(text: _Text, separator: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # a setting of the process; by default the module refuses cells above 128 kB
    reader = csv.reader(text.lines(), delimiter=separator, quoting=quoting, strict=True)
    advice = "mend the row" if quoting == csv.QUOTE_NONE else "mend it, or put a cell with a comma in double quotes"
    header = named = list(text.header)
    after = 1
    try:
        for cells in reader:
            line, after = after, reader.line_num + 1  # a row may span several lines; errors name the first
            if not cells or len(cells) == 1 and not cells[0].strip() and len(header) != 1:
                continue
            if not header:
                header = _header(cells, separator, text, line)
            elif cells == named:
                raise text.error(
                    "this line names the columns, and data.columns names them too; leave data.columns empty", line
                )
            elif len(cells) != len(header):
                raise text.error(f"expected {len(header)} cells ({_list(header)}), found {len(cells)}; {advice}", line)
            else:
                text.begins = line
                yield dict(zip(header, cells))
    except csv.Error as e:
        fault = next((ours for theirs, ours in CSV_FAULTS.items() if theirs in str(e)), f"{e}; mend the row")
        raise text.error(fault.format(line=text.line), after) from e


def _header(cells: list[str], separator: str, text: _Text, line: int) -> list[str]:
    if re.match(r"\s*(\[\s*)?\{|\s*\[\s*$", cells[0]):
        raise text.error("the header looks like JSON; name the file .jsonl or .json", line)
    others = [s for s in ",;\t|" if s != separator and s in cells[0]]
    if len(cells) == 1 and others:
        raise text.error(
            f"the header has one column, {cells[0]!r}, and contains {others[0]!r}, which may be the separator; name a "
            "file with tabs .tsv, one with commas .csv, and convert other separators",
            line,
        )
    names = [cell or f"column_{number}" for number, cell in enumerate(cells, 1)]
    if len(set(names)) < len(names):
        raise text.error(f"a column is named twice: {_list(names)}; rename one", line)
    return names


def _tsv(text: _Text) -> Iterator[dict]:
    return _csv(text, "\t", csv.QUOTE_MINIMAL if _quoted(text) else csv.QUOTE_NONE)


def _quoted(text: _Text) -> bool:
    """Whether quotes around a cell of a .tsv file are no part of its text, as in files that `csv` or pandas wrote.

    Only one of the two readings may give all rows the same number of cells. If both do, a quoted header or a doubled
    quote within quotes tells of such a writer.
    """
    begins = re.compile(r'(?:^|\t)"')

    def lines() -> Iterator[str]:
        with open(text.name, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            yield from file

    def reads(quoting: int) -> bool:
        with contextlib.suppress(csv.Error):
            rows = csv.reader(lines(), delimiter="\t", quoting=quoting, strict=True)
            return len({len(cells) for cells in rows if len(cells) > 1 or "".join(cells).strip()}) == 1
        return False

    found = ((n, line.rstrip("\r\n")) for n, line in enumerate(lines(), 1) if begins.search(line))
    first, line = next(found, (0, ""))
    csv.field_size_limit(2**31 - 1)
    if not first or not reads(csv.QUOTE_MINIMAL):
        return False
    doubled = any(
        cell[:1] == '"' and '""' in cell[1:-1] for _, line in [(first, line), *found] for cell in line.split("\t")
    )
    if doubled or (first == 1 and not text.header) or not reads(csv.QUOTE_NONE):
        return True
    raise text.error(
        "a cell begins with a double quote, which may be text or may quote the cell; convert the file to .jsonl, or "
        "double each quote that is text and put its cell in quotes",
        first,
    )


def _plain_text(text: _Text) -> Iterator[dict]:
    return ({"text": line} for line in text.bare())


def _conll(text: _Text) -> Iterator[dict]:
    """Sentences, separated by blank lines or by -DOCSTART-. Columns are separated by tabs, or else by blanks."""
    width, words, last = None, [], 0
    for line in text.bare():
        if line.startswith("-DOCSTART-") or text.line != last + 1:
            if words:
                yield _sentence(words, text)
            words = []
        last = text.line
        if line.startswith("-DOCSTART-"):
            continue
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        width = width or len(cells)
        if len(cells) < 2 or not all(cells):
            raise text.error(f"expected a token and its tag, separated by a tab or blanks, found {line[:40]!r}; add it")
        if len(cells) != width:
            raise text.error(
                f"expected {width} columns as in the lines before, found {len(cells)} in {line[:40]!r}; correct the "
                "line"
            )
        words.append(cells)
    if words:
        yield _sentence(words, text)


def _sentence(words: list[list[str]], text: _Text) -> dict[str, list[str]]:
    tokens, *between, tags = map(list, zip(*words))
    if between and len(tokens) > 1 and tokens == list(map(str, range(1, len(tokens) + 1))):
        raise text.error(
            "the first column of the sentence before this line counts its words, as in CoNLL-U, and tokens are read "
            "from the first column; keep the column of words and that of tags"
        )
    return {"tokens": tokens} | {f"column_{n}": cells for n, cells in enumerate(between, 2)} | {"tags": tags}


# ---------------------------------------------------------------------------------------------- Parquet and the hub


def _parquet(name: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name, pre_buffer=False, page_checksum_verification=True) as file:
            yield from _adopted(name, file.schema_arrow, _row_groups(file))
    except (OSError, pyarrow.ArrowException, ValueError, LookupError, AttributeError, TypeError) as e:
        if isinstance(e, FtjaxError) or isinstance(e, OSError) and e.errno:
            raise
        raise FtjaxError(f"{name}: not a readable Parquet file: {reason(e)}; copy it or write it again") from e


def _row_groups(file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    # One row group a call, because a call over several keeps the buffers of all of them until the last is read.
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows = CHUNK_BYTES * group.num_rows // max(1, group.total_byte_size)
        yield from file.iter_batches(max(1, min(CHUNK, rows)), row_groups=[number])


def _class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """{column: names of its classes} for columns of ClassLabels or lists of them, from the metadata of `datasets`."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = {name: f.get("feature", f) for name, f in info.get("info", {}).get("features", {}).items()
                if isinstance(f, dict)}  # fmt: skip
    return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}


def _adopted(
    name: str, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]
) -> Iterator[pyarrow.RecordBatch]:
    """The batches of another program with types of `columns.plain`, and names in place of the numbers of classes."""
    if len(set(schema.names)) < len(schema.names):
        raise FtjaxError(f"{name}: a column is named twice: {_list(schema.names)}; rename one")
    for field in schema:
        try:
            columns.plain(field.type)
        except TypeError as e:
            raise FtjaxError(f"{name}: column {field.name!r} {e}; convert it to text or leave it out") from e
    done, classes = 0, _class_names(schema)

    def place(index: int) -> str:
        return f"{name} row {done + index + 1}"

    for batch in batches:
        batch = columns.adopt(batch, place)
        for column, names in classes.items():
            at = batch.schema.get_field_index(column)
            batch = batch.set_column(at, column, columns.class_names(batch.column(at), names))
        yield batch
        done += batch.num_rows


def _load_hub(source: str, key: str) -> datasets.Dataset:
    import datasets

    name, *rest = source.split(":")
    split = rest.pop() if len(rest) == 2 or rest[:1] and rest[0] in SPLITS else key.rpartition(".")[2]
    shows_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, *rest, split=split)
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        raise FtjaxError(
            f"{key}: {source} is not a file or directory here, and reading it from the hub failed: {e} "
            f"(a hub data set is written owner/name[:config][:split])"
        ) from e
    finally:
        if shows_progress:
            datasets.enable_progress_bars()


READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".conll": _conll,
    ".iob": _conll,
    ".bio": _conll,
    ".txt": _plain_text,
    ".parquet": _parquet,
}
