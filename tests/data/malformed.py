"""A corpus of files that are malformed or look so, each with what reading it must give: its rows, or one error.

`CASES`: name -> (file name, bytes, outcome). The outcome is a list of rows, or a regular expression that the error must
match behind the file's name. The bytes may be a function of no arguments, for what is large or made by a library.
"""

from __future__ import annotations

import codecs
import datetime
import decimal
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

BIG = "x" * 10_000_000


def _parquet(columns: dict, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def _twice() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), sink)
    return sink.getvalue()


def _flipped(place: float) -> bytes:
    """A file with checksums of its pages, which are not compressed, and one other bit at a share of its length."""
    data = bytearray(_parquet({"a": [f"{n:09d}" for n in range(500)]}, compression="none", write_page_checksum=True))
    data[int(place * len(data))] ^= 8
    return bytes(data)


def _damaged() -> bytes:
    data = bytearray(_parquet({"a": [f"{n:09d}" for n in range(5000)]}, compression="snappy"))
    data[20:4000] = bytes(3980)
    return bytes(data)


TIME = datetime.datetime(2020, 1, 2, 3, 4, 5)

JSON_CASES = {
    "truncated object": (
        "t.jsonl",
        b'{"a": 1}\n{"a": 2',
        r" line 2: invalid JSON: Expecting ',' delimiter \(character 8\)",
    ),
    "truncated string": (
        "t.jsonl",
        b'{"a": "x"}\n{"a": "y',
        r" line 2: invalid JSON: Unterminated string .*fetch the file again",
    ),
    "truncated between rows": ("t.jsonl", b'{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
    "trailing comma": (
        "t.jsonl",
        b'{"a": 1}\n\n{"a": 2,}\n',
        r" line 3: invalid JSON: .*no comma after the last|trailing comma",
    ),
    "single quotes": ("t.jsonl", b"{'a': 1}\n", r" line 1: invalid JSON: .*in double quotes"),
    "unquoted key": ("t.jsonl", b"{a: 1}\n", r" line 1: invalid JSON: .*in double quotes"),
    "NaN": ("t.jsonl", b'{"a": 1.5}\n{"a": NaN}\n', r" line 2: invalid JSON: JSON has no NaN; write null"),
    "minus infinity": ("t.jsonl", b'{"a": -Infinity}\n', r" line 1: invalid JSON: JSON has no -Infinity"),
    "fraction that overflows": ("t.jsonl", b'{"a": 1e999}\n', r" line 1: .*1e999 is too large for a 64-bit float"),
    "comment": ("t.jsonl", b'// rows\n{"a": 1}\n', r" line 1: invalid JSON: Expecting value"),
    "comment behind a row": ("t.jsonl", b'{"a": 1} // one\n', r" line 1: invalid JSON: Extra data"),
    "two objects on a line": (
        "t.jsonl",
        b'{"a": 1}\n{"a": 2} {"a": 3}\n',
        r" line 2: invalid JSON: Extra data .*a line of its own",
    ),
    "object over several lines": ("t.json", b'{\n "a": 1\n}\n', r" line 1: invalid JSON: .*each object on one line"),
    "objects a line in .json": ("t.json", b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    "array in .jsonl": ("t.jsonl", b'[{"a": 1}]\n', r" line 1: expected an object, .*name it \.json"),
    "array over lines in .jsonl": ("t.jsonl", b'[\n{"a": 1}\n]\n', r" line 1: invalid JSON: .*name it \.json"),
    "rows that are lists": (
        "t.jsonl",
        b'{"a": 1}\n[1, 2]\n',
        r" line 2: expected an object, found '\[1, 2\]'",
    ),
    "rows that are scalars": ("t.jsonl", b'"a"\n"b"\n', r" line 1: expected an object"),
    "row without a key": ("t.jsonl", b'{"a": 1}\n{}\n', r" line 2: an object without any key"),
    "array not closed": ("t.json", b'[{"a": 1},\n{"a": 2}\n', r" row 2 \(line 3\): the array is not closed"),
    "array cut off in an object": (
        "t.json",
        b'[{"a": 1},\n{"a": "2',
        r" row 2 \(line 2\): invalid JSON: Unterminated string",
    ),
    "array with a wrong bracket": (
        "t.json",
        b'[{"a": 1},\n{"a": 2]\n',
        r" row 2 \(line 2\): invalid JSON: .*\(character 8\)",
    ),
    "array with a trailing comma": ("t.json", b'[{"a": 1},\n]', r" row 2 \(line 2\): invalid JSON: Expecting value"),
    "array without a comma": (
        "t.json",
        b'[{"a": 1}\n{"a": 2}]',
        r" row 1 \(line 2\): expected a comma or \] after the object",
    ),
    "two arrays": ("t.json", b'[{"a": 1}]\n[{"a": 2}]', r" row 1 \(line 2\): expected nothing after the array"),
    "array with a scalar": (
        "t.json",
        b'[{"a": 1}, 5]',
        r" row 2 \(line 1\): expected an object, found '5'",
    ),
    "array of nothing": ("t.json", b" [ ]\n", r" is empty \(it has no rows\)"),
    "array in an array": ("t.json", b'[[{"a": 1}]]', r" row 1 \(line 1\): expected an object"),
    "array with white space": ("t.json", b'\r\n [\r\n{"a"\t: 1}\r\n ,\r\n{"a": 2} ]\r\n\r\n', [{"a": 1}, {"a": 2}]),
    "nested too deeply": (
        "t.jsonl",
        b'{"a": ' + b"[" * 120 + b"]" * 120 + b"}\n",
        r" line 1: more than 100 lists and objects within",
    ),
    "nested beyond the stack": (
        "t.jsonl",
        b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
        r" line 1: more than 100 lists",
    ),
    "nested deeply": (
        "t.jsonl",
        b'{"a": ' + b"[" * 60 + b"5" + b"]" * 60 + b"}\n",
        [{"a": json.loads("[" * 60 + "5" + "]" * 60)}],
    ),
    "key twice": (
        "t.jsonl",
        b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n',
        r" line 2: invalid JSON: the same key twice in one object: 'a'",
    ),
    "key twice within": (
        "t.json",
        b'[{"a": {"b": 1, "b": 1}}]',
        r" row 1 \(line 1\): invalid JSON: the same key twice .*'b'",
    ),
    "lone surrogate": ("t.jsonl", b'{"a": "x"}\n{"a": "\\ud83d!"}\n', r" line 2: half of a surrogate pair \(\\ud83d\)"),
    "lone surrogate in a key": (
        "t.json",
        b'[{"a": "x", "\\uDC00": 1}]',
        r" row 1 \(line 1\): half of a surrogate pair \(\\udc00\)",
    ),
    "surrogate pair": ("t.jsonl", b'{"a": "\\ud83d\\ude00"}\n', [{"a": "😀"}]),
    "escaped backslash before ud800": ("t.jsonl", b'{"a": "\\\\ud800"}\n', [{"a": "\\ud800"}]),
    "raw surrogate": (
        "t.jsonl",
        b'{"a": "\xed\xa0\x80"}\n',
        r" line 1: not UTF-8 \(byte 0xed\); half of a surrogate pair",
    ),
    "line end in text": ("t.jsonl", b'{"a": "x\ny"}\n', r" line 1: invalid JSON: Unterminated string|Invalid control"),
    "tab in text": ("t.jsonl", b'{"a": "x\ty"}\n', r" line 1: invalid JSON: Invalid control character"),
    "wrong escape": ("t.jsonl", b'{"a": "C:\\dir"}\n', r" line 1: invalid JSON: Invalid \\escape"),
    "NUL escape": ("t.jsonl", b'{"a": "x\\u0000y"}\n', [{"a": "x\0y"}]),
    "NUL in a key": ("t.jsonl", b'{"a\\u0000b": 1}\n', r" line 1: a key holds a NUL"),
    "keys that are no names": (
        "t.jsonl",
        b'{"": 1, "a.b": 2, "_type": "Value", "x\\ny": {"": 3, "_type": "Json", "n\\u0000": 4}, "{}": null}\n',
        [{"": 1, "a.b": 2, "_type": "Value", "x\ny": {"": 3, "_type": "Json", "n\0": 4}, "{}": None}],
    ),
    "numbers and text": ("t.jsonl", b'{"a": 1}\n{"a": "1"}\n{"a": "x"}\n', [{"a": 1}, {"a": "1"}, {"a": "x"}]),
    "whole numbers and fractions": (
        "t.jsonl",
        b'{"a": 1}\n{"a": 0.12345678901234567}\n',
        [{"a": 1}, {"a": 0.12345678901234567}],
    ),
    "truth and numbers": ("t.jsonl", b'{"a": true}\n{"a": 1}\n', [{"a": True}, {"a": 1}]),
    "lists and text": ("t.jsonl", b'{"a": ["x"]}\n{"a": "x"}\n{"a": []}\n', [{"a": ["x"]}, {"a": "x"}, {"a": []}]),
    "objects and text": (
        "t.jsonl",
        b'{"a": {"k": 1}}\n{"a": "{}"}\n{"a": null}\n',
        [{"a": {"k": 1}}, {"a": "{}"}, {"a": None}],
    ),
    "objects with other keys": (
        "t.jsonl",
        b'{"a": {"k": 1}}\n{"a": {"l": "07"}}\n{"a": {}}\n',
        [{"a": {"k": 1}}, {"a": {"l": "07"}}, {"a": {}}],
    ),
    "objects with keys in another order": (
        "t.jsonl",
        b'{"a": {"x": 1, "y": 2}}\n' * 2 + b'{"a": {"y": 3, "x": 4}}\n',
        [{"a": {"x": 1, "y": 2}}] * 2 + [{"a": {"y": 3, "x": 4}}],
    ),
    "text after nulls": ("t.jsonl", b'{"a": null}\n' * 5 + b'{"a": "x"}\n', [{"a": None}] * 5 + [{"a": "x"}]),
    "objects after nulls": (
        "t.jsonl",
        b'{"a": null}\n' * 5 + b'{"a": {"b": [1]}}\n',
        [{"a": None}] * 5 + [{"a": {"b": [1]}}],
    ),
    "nothing but nulls": ("t.jsonl", b'{"a": null}\n{"a": null}\n', [{"a": None}] * 2),
    "nested nulls": (
        "t.jsonl",
        b'{"a": {"b": null, "c": [null, {"d": null}]}}\n{"a": {"b": [1], "c": [{"d": "x"}, null]}}\n{"a": null}\n',
        [{"a": {"b": None, "c": [None, {"d": None}]}}, {"a": {"b": [1], "c": [{"d": "x"}, None]}}, {"a": None}],
    ),
    "keys that rows lack": ("t.jsonl", b'{"a": 1}\n{"b": 2}\n', [{"a": 1, "b": None}, {"a": None, "b": 2}]),
    "huge whole numbers": ("t.jsonl", b'{"a": 1}\n{"a": %d}\n' % 10**30, [{"a": 1}, {"a": 10**30}]),
    "whole number of 5,000 digits": ("t.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", r" line 1: .*more than 4,300 digits"),
    "text that looks like dates and numbers": (
        "t.jsonl",
        b'{"a": "2020-01-01T00:00:00Z", "b": "007"}\n{"a": "2020", "b": "1e5"}\n',
        [{"a": "2020-01-01T00:00:00Z", "b": "007"}, {"a": "2020", "b": "1e5"}],
    ),
    "lines of 10 MB": (
        "t.jsonl",
        lambda: b'{"a": "%s"}\n{"a": "y"}\n{"a": "%s"}\n' % (BIG.encode(), BIG.encode()),
        [{"a": BIG}, {"a": "y"}, {"a": BIG}],
    ),
    "array with an object of 10 MB": (
        "t.json",
        lambda: b'[{"a": "y"}, {"a": "%s"}, {"a": "y"}]' % BIG.encode(),
        [{"a": "y"}, {"a": BIG}, {"a": "y"}],
    ),
    "line of 10 MB, cut off": (
        "t.jsonl",
        lambda: b'{"a": 1}\n{"a": "%s' % BIG.encode(),
        r" line 2: invalid JSON: Unterminated",
    ),
    "characters over the edges of pieces": (
        "t.json",
        lambda: ("[" + ",\n".join('{"a": "%s"}' % ("é😀" * 997) for _ in range(400)) + "]").encode(),
        [{"a": "é😀" * 997}] * 400,
    ),
}

CODE_CASES = {
    "byte order mark": ("t.jsonl", codecs.BOM_UTF8 + b'{"a": 1}\n', [{"a": 1}]),
    "byte order mark in an array": ("t.json", codecs.BOM_UTF8 + b' [{"a": 1}]', [{"a": 1}]),
    "byte order mark in csv": ("t.csv", codecs.BOM_UTF8 + b"a,b\n1,2\n", [{"a": "1", "b": "2"}]),
    "byte order mark in the middle": (
        "t.jsonl",
        b'{"a": 1}\n' + codecs.BOM_UTF8 + b'{"a": 2}\n',
        r" line 2: invalid JSON: .*remove the byte order mark",
    ),
    "UTF-16 LE": ("t.jsonl", '\ufeff{"a": 1}\n'.encode("utf-16-le"), r" line 1: the file is UTF-16, .*iconv -f utf-16"),
    "UTF-16 BE": ("t.csv", "\ufeffa,b\n1,2\n".encode("utf-16-be"), r" line 1: the file is UTF-16, .*iconv -f utf-16"),
    "UTF-16 LE without a mark": (
        "t.jsonl",
        '{"a": 1}\n'.encode("utf-16-le"),
        r" line 1: found a NUL byte.*UTF-16 without a byte order mark",
    ),
    "UTF-16 BE without a mark": (
        "t.json",
        '[{"a": 1}]\n'.encode("utf-16-be"),
        r" line 1: found a NUL byte.*UTF-16 without a byte order mark",
    ),
    "UTF-32": ("t.txt", "\ufeffa\n".encode("utf-32-le"), r" line 1: the file is UTF-32"),
    "Latin-1": (
        "t.jsonl",
        '{"a": "x"}\n{"a": "café"}\n'.encode("latin1"),
        r" line 2: not UTF-8 \(byte 0xe9\); .*iconv -f latin1",
    ),
    "Latin-1 in one line of UTF-8": (
        "t.csv",
        "a\ncliché\nplain\n".encode() + "café\n".encode("latin1"),
        r" line 4: not UTF-8 \(byte 0xe9\); the text before it is UTF-8; write this line",
    ),
    "Latin-1 in an array": (
        "t.json",
        '[{"a": "x"},\n\n{"a": "café"}]'.encode("latin1"),
        r" line 3: not UTF-8 \(byte 0xe9\)",
    ),
    "CP1252": ("t.csv", "a\n“x”\n".encode("cp1252"), r" line 2: not UTF-8 \(byte 0x93\); .*iconv -f cp1252"),
    "cut off within a character": (
        "t.txt",
        "one\ntwo é".encode()[:-1],
        r" line 2: not UTF-8 \(byte 0xc3\); the file ends within",
    ),
    "array cut off within a character": ("t.json", '[{"a": "é'.encode()[:-1], r" line 1: not UTF-8 \(byte 0xc3\)"),
    "overlong code": ("t.txt", b"a\nb\xc0\x80\n", r" line 2: not UTF-8 \(byte 0xc0\)"),
    "NUL bytes": ("t.txt", b"one\ntw\0o\n", r" line 2: found a NUL byte"),
    "NUL bytes in csv": ("t.csv", b"a,b\n1,\0\n", r" line 2: found a NUL byte"),
    "NUL bytes in an array": ("t.json", b'[{"a": 1},\n{"a": "\0"}]', r" line 2: found a NUL byte"),
    "next-line and line-separator characters": (
        "t.txt",
        "one\x85still\u2028one\x0btoo\x1c\ntwo\n".encode(),
        [{"text": "one\x85still\u2028one\x0btoo\x1c"}, {"text": "two"}],
    ),
    "next-line characters in csv": ("t.csv", "a,b\n1\x852,\u2028\n".encode(), [{"a": "1\x852", "b": "\u2028"}]),
    "next-line characters in JSON": ("t.jsonl", '{"a": "1\x852\u2028"}\n'.encode(), [{"a": "1\x852\u2028"}]),
    "form feeds": ("t.txt", b"one\x0cstill one\n\x0c\ntwo\n", [{"text": "one\x0cstill one"}, {"text": "two"}]),
    "carriage returns alone, txt": ("t.txt", b"one\rtwo\r", r" line 1: found a carriage return within the line.*tr "),
    "carriage returns alone, csv": ("t.csv", b"a,b\r1,2\r", r" line 1: a carriage return outside quotes; .*tr "),
    "carriage returns alone, jsonl": (
        "t.jsonl",
        b'{"a": 1}\r{"a": 2}\r',
        r" line 1: found a carriage return within the line",
    ),
    "carriage returns alone, array": ("t.json", b'[{"a": 1},\r{"a": 2}]\r', [{"a": 1}, {"a": 2}]),
    "mixed line ends": ("t.txt", b"one\r\ntwo\nthree\r\n\r\n\n", [{"text": "one"}, {"text": "two"}, {"text": "three"}]),
    "no line end at the end": ("t.txt", b"one\ntwo", [{"text": "one"}, {"text": "two"}]),
    "blank lines": ("t.jsonl", b'\n \t\n{"a": 1}\n\r\n\n{"a": 2}\n\n', [{"a": 1}, {"a": 2}]),
    "empty file": ("t.jsonl", b"", r" is empty \(it has no rows\)"),
    "only a byte order mark": ("t.csv", codecs.BOM_UTF8, r" is empty \(it has no rows\)"),
    "only white space": ("t.json", b" \n\t\r\n", r" is empty \(it has no rows\)"),
    "only blank lines": ("t.txt", b"\n \n", r" is empty \(it has no rows\)"),
    "Parquet named .jsonl": (
        "t.jsonl",
        lambda: _parquet({"a": [1]}),
        r" line 1: the file is Parquet, .*name it \.parquet",
    ),
    "gzip named .jsonl": (
        "t.jsonl",
        lambda: gzip.compress(b'{"a": 1}\n'),
        r" line 1: the file is compressed by gzip.*gunzip",
    ),
    "spreadsheet named .csv": ("t.csv", b"PK\x03\x04\x14\0", r" line 1: the file is a zip archive or a spreadsheet"),
    "pointer of Git LFS": ("t.csv", b"version https://git-lfs.github.com/spec/v1\n", r" line 1: .*git lfs pull"),
    "JSON named .csv": ("t.csv", b'{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}\n', r" line 1: the header looks like JSON"),
    "array named .tsv": ("t.tsv", b'[\n{"a": 1}\n]\n', r" line 1: the header looks like JSON"),
    "csv named .jsonl": ("t.jsonl", b"a,b\n1,2\n", r" line 1: invalid JSON: .*name the file by its format"),
    "HTML named .json": (
        "t.json",
        b"<!DOCTYPE html>\n<html>",
        r" line 1: invalid JSON: .*name the file by its format",
    ),
    "unknown extension": ("t.xlsx", b"1", r": unknown extension; rename or convert the file .* \.jsonl"),
}

CSV_CASES = {
    "quote not closed": (
        "t.csv",
        b'a,b\n1,2\n"3,4\n5,6\n',
        r" line 3: a quote opens in this row that the file never closes; close it",
    ),
    "quote within a quoted cell": (
        "t.csv",
        b'a,b\n"say "x"",2\n',
        r" line 2: a quote within quotes, in line 2; double it",
    ),
    "doubled quote": ("t.csv", b'a,b\n"say ""x""",2\n', [{"a": 'say "x"', "b": "2"}]),
    "quote within a bare cell": ("t.csv", b'a,b\n5" disk,2\n', [{"a": '5" disk', "b": "2"}]),
    "quoted line ends": ("t.csv", b'a,b\n"1\n2\r\n3\r4",5\n', [{"a": "1\n2\r\n3\r4", "b": "5"}]),
    "row behind a row over lines": ("t.csv", b'a,b\n"1\n2",3\n4\n', r" line 4: expected 2 cells \(a, b\), found 1"),
    "ragged row over lines": ("t.csv", b'a,b\n"1\n2",3,4\n', r" line 2: expected 2 cells \(a, b\), found 3"),
    "quoted separators": ("t.csv", b'a,b\n"1,2",3\n', [{"a": "1,2", "b": "3"}]),
    "too few cells": ("t.csv", b"a,b\n1,2\n3\n", r" line 3: expected 2 cells \(a, b\), found 1"),
    "too many cells": (
        "t.csv",
        b"a,b\n1,2\n3,4,5\n",
        r" line 3: expected 2 cells \(a, b\), found 3; .*in double quotes",
    ),
    "empty cells": ("t.csv", b'a,b\n,\n"",x\n', [{"a": "", "b": ""}, {"a": "", "b": "x"}]),
    "empty column": ("t.tsv", b"a\tb\n1\t\n2\t\n", [{"a": "1", "b": ""}, {"a": "2", "b": ""}]),
    "empty header cell": ("t.csv", b",text,\n0,x,y\n", [{"column_1": "0", "text": "x", "column_3": "y"}]),
    "empty header cell named as another": (
        "t.csv",
        b"column_2,\n1,2\n",
        r" line 1: a column is named twice: column_2, column_2",
    ),
    "header twice": ("t.csv", b"\na,b,a\n1,2,3\n", r" line 2: a column is named twice: a, b, a; rename one"),
    "only a header": ("t.csv", b"a,b\n", r" is empty \(it has no rows\)"),
    "blank lines in csv": ("t.csv", b"\n  \na,b\n\n1,2\n \n3,4\n\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
    "one column with an empty cell": ("t.csv", b'a\n""\n\nx\n', [{"a": ""}, {"a": "x"}]),
    "cells of 10 MB": ("t.csv", lambda: b'a,b\n"%s",2\n' % BIG.encode(), [{"a": BIG, "b": "2"}]),
    "semicolons": ("t.csv", b"a;b\n1;2\n", r" line 1: the header has one column, 'a;b', and contains ';'"),
    "tabs in .csv": ("t.csv", b"a\tb\n1\t2\n", r" line 1: the header has one column, .*name a file with tabs \.tsv"),
    "commas in .tsv": ("t.tsv", b"a,b\n1,2\n", r" line 1: the header has one column, .*one with commas \.csv"),
    "quotes in tsv": ("t.tsv", b'a\tb\n"x\t5"\n"\t""\n', [{"a": '"x', "b": '5"'}, {"a": '"', "b": '""'}]),
    "unpaired quotes in tsv": (
        "t.tsv",
        b'a\tb\n"x" said\t5\ny\t"z"\n',
        [{"a": '"x" said', "b": "5"}, {"a": "y", "b": '"z"'}],
    ),
    "quotes within tsv": ("t.tsv", b'a\tb\nsay "x"\t5"\n', [{"a": 'say "x"', "b": '5"'}]),
    "quoted header of tsv": ("t.tsv", b'"a"\t"b"\n"x"\t"5"\n', [{"a": "x", "b": "5"}]),
    "doubled quotes in tsv": ("t.tsv", b'a\tb\n"x ""y"""\t5\n', [{"a": 'x "y"', "b": "5"}]),
    "tab in quotes of tsv": ("t.tsv", b'a\tb\n"x\ty"\t5\n1\t2\n', [{"a": "x\ty", "b": "5"}, {"a": "1", "b": "2"}]),
    "line end in quotes of tsv": ("t.tsv", b'a\tb\n"x\ny"\t5\n', [{"a": "x\ny", "b": "5"}]),
    "quotes of tsv in question": (
        "t.tsv",
        b'a\tb\n1\t2\n"x"\t5\n',
        r" line 3: a cell begins with a double quote, which may",
    ),
    "ragged tsv": ("t.tsv", b"a\tb\n1\t2\n3\t4\t5\n", r" line 3: expected 2 cells \(a, b\), found 3; mend the row"),
    "numbers stay text": ("t.csv", b"a,b,c\n007,1.0,NA\n", [{"a": "007", "b": "1.0", "c": "NA"}]),
    "space around cells": ("t.csv", b"a, b\n 1 ,2\n", [{"a": " 1 ", " b": "2"}]),
}

CONLL_CASES = {
    "sentences parted by a tab": (
        "t.conll",
        b"a\tO\nb\tB-x\n\t\nc\tO\n\n\n",
        [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}, {"tokens": ["c"], "tags": ["O"]}],
    ),
    "starts of documents": (
        "t.iob",
        b"-DOCSTART- -X- O\n\na DT O\n-DOCSTART- -X- O\nb NN B-x",
        [{"tokens": ["a"], "column_2": ["DT"], "tags": ["O"]}, {"tokens": ["b"], "column_2": ["NN"], "tags": ["B-x"]}],
    ),
    "tokens with blanks": ("t.bio", b"New York\tB-x\n#\tO\n", [{"tokens": ["New York", "#"], "tags": ["B-x", "O"]}]),
    "ragged columns": (
        "t.conll",
        b"a\tO\n\nb\tN\tO\n",
        r" line 3: expected 2 columns as in the lines before, found 3 in 'b.*O'",
    ),
    "token without a tag": ("t.conll", b"a O\nb\n", r" line 2: expected a token and its tag"),
    "numbers of words before them": (
        "t.conll",
        b"1\tA\tO\n2\tb\tO\n\n1\tc\tO\n",
        r" line 4: the first column of the sentence before this line counts its words, as in CoNLL-U",
    ),
    "a number is a token": (
        "t.conll",
        b"1 O\n2 O\n\n2 O\n",
        [{"tokens": ["1", "2"], "tags": ["O", "O"]}, {"tokens": ["2"], "tags": ["O"]}],
    ),
    "empty tag": ("t.conll", b"a\tO\nb\t\n", r" line 2: expected a token and its tag"),
    "only documents": ("t.conll", b"-DOCSTART- O\n\n", r" is empty \(it has no rows\)"),
}

PARQUET_CASES = {
    "truncated Parquet": (
        "t.parquet",
        lambda: _parquet({"a": [1, 2]})[:-20],
        r": not a readable Parquet file: .*copy it",
    ),
    "damaged Parquet": ("t.parquet", _damaged, r": not a readable Parquet file"),
    "Parquet with another bit in a page": (
        "t.parquet",
        lambda: _flipped(0.3),
        r": not a readable Parquet file: .*checksum.*; copy it or write it again$",
    ),
    "Parquet with another bit in its footer": (
        "t.parquet",
        lambda: _flipped(0.97),
        r": not a readable Parquet file: .*; copy it or write it again$",
    ),
    "text named .parquet": ("t.parquet", b'{"a": 1}\n', r": not a readable Parquet file"),
    "Parquet without rows": ("t.parquet", lambda: _parquet({"a": pa.array([], pa.string())}), r" is empty"),
    "Parquet with a column twice": ("t.parquet", _twice, r": a column is named twice: a, a"),
    "Parquet with times and decimals": (
        "t.parquet",
        lambda: _parquet(
            {
                "s": pa.array([TIME], pa.timestamp("s")),
                "z": pa.array([TIME], pa.timestamp("us", "UTC")),
                "d": [TIME.date()],
                "c": [TIME.time()],
                "n": [decimal.Decimal("1.50")],
                "l": pa.array([[TIME]], pa.list_(pa.timestamp("ms"))),
            }
        ),
        [
            {
                "s": "2020-01-02 03:04:05.000",
                "z": "2020-01-02 03:04:05.000000Z",
                "d": "2020-01-02",
                "c": "03:04:05.000000",
                "n": "1.50",
                "l": ["2020-01-02 03:04:05.000"],
            }
        ],
    ),
    "Parquet with other numbers": (
        "t.parquet",
        lambda: _parquet(
            {
                "i": pa.array([1, None], pa.int8()),
                "u": pa.array([2, 3], pa.uint32()),
                "f": pa.array([0.5, 1], pa.float32()),
            }
        ),
        [{"i": 1, "u": 2, "f": 0.5}, {"i": None, "u": 3, "f": 1.0}],
    ),
    "Parquet with categories and maps": (
        "t.parquet",
        lambda: _parquet(
            {
                "c": pa.array(["x", "y", "x"]).dictionary_encode(),
                "m": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
                "w": pa.array([[1, 2], [3, 4], None], pa.list_(pa.int16(), 2)),
                "t": pa.array(["x", None, "z"], pa.large_string()),
            }
        ),
        [
            {"c": "x", "m": [{"key": "k", "value": 1}], "w": [1, 2], "t": "x"},
            {"c": "y", "m": [], "w": [3, 4], "t": None},
            {"c": "x", "m": None, "w": None, "t": "z"},
        ],
    ),
    "Parquet with NaN": (
        "t.parquet",
        lambda: _parquet({"f": [0.5, float("nan")], "g": [[{"x": float("nan")}], [{"x": 1.5}]]}),
        [{"f": 0.5, "g": [{"x": None}]}, {"f": None, "g": [{"x": 1.5}]}],
    ),
    "Parquet with infinity": (
        "t.parquet",
        lambda: _parquet({"f": [0.5, float("inf")]}),
        r" row 2: column 'f': inf, which",
    ),
    "Parquet with a huge number": (
        "t.parquet",
        lambda: _parquet({"u": pa.array([1, 2, 2**63], pa.uint64())}),
        r" row 3: column 'u': Integer value 9223372036854775808 not in range",
    ),
    "Parquet with bytes": (
        "t.parquet",
        lambda: _parquet({"a": [1], "b": [b"\xff"]}),
        r": column 'b' holds binary; expected text",
    ),
    "Parquet with durations": (
        "t.parquet",
        lambda: _parquet({"b": [[datetime.timedelta(1)]]}),
        r": column 'b' holds duration\[us\]; .*convert it to text",
    ),
    "Parquet with text that is not UTF-8": (
        "t.parquet",
        lambda: _parquet({"a": pa.StringArray.from_buffers(2, *pa.array([b"x", b"\xe9"]).buffers()[1:])}),
        r" row 2: column 'a': Invalid UTF8",
    ),
    "Parquet with JSON": (
        "t.parquet",
        lambda: _parquet({"a": pa.array(['{"k": [1, "2"]}', None, '"x"'], pa.json_())}),
        [{"a": {"k": [1, "2"]}}, {"a": None}, {"a": "x"}],
    ),
    "Parquet with JSON that is none": (
        "t.parquet",
        lambda: _parquet({"a": pa.array(["1", "{"], pa.json_())}),
        r" row 2: column 'a': Expecting",
    ),
}

CASES = JSON_CASES | CODE_CASES | CSV_CASES | CONLL_CASES | PARQUET_CASES
