"""Edit rows and leave rows out, each with a reason, as `data.clean` says. By default nothing is changed."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax.config import drop_patterns
from ftjax.data.compared import Sides, Texts
from ftjax.data.similar import ROLES, first_equal, firsts, near_pairs, row_text
from ftjax.data.table import Table, need_columns
from ftjax.data.textchecks import mask, mojibake, personal, without_control
from ftjax.errors import FtjaxError

Edit = Callable[[str, bool], str]  # (text, whether white space at its ends is kept) -> text
Answers = Callable[[dict, str], tuple[str, str]]  # (row, place) -> (prompt, answer) as text

PASSES = 8  # most repetitions of all edits of a text; for nearly every text two are enough
JOINED = ("prompt", "completion", "response", "chosen", "rejected")  # columns that are concatenated without change


class Removed(NamedTuple):
    """A row that was left out.

    Attributes:
        index: Its index in the table.
        place: Its place.
        rule: Name of the rule that removed it.
        why: The reason.
        twin: Place of the kept row that it duplicates, or of the evaluation row that it overlaps with; otherwise empty.
        conflict: Whether that row has another label.
    """

    index: int
    place: str
    rule: str
    why: str
    twin: str = ""
    conflict: bool = False


class Cleaned(NamedTuple):
    """The result of `clean`.

    Attributes:
        table: The rows that are kept, as edited.
        removed: The rows that were left out, in order.
        changed: {name of the edit: number of rows that it changed}.
        conflict: A note on rows that are kept although their text is that of another row, because their labels differ;
            empty if there are none.
    """

    table: Table
    removed: list[Removed]
    changed: dict[str, int]
    conflict: str = ""


class Row(NamedTuple):
    """What a filter looks at: the cells, all their text, and a function that gives (prompt, answer)."""

    cells: dict
    text: str
    answers: Callable[[], tuple[str, str]] | None


class Rule(NamedTuple):
    """One row of RULES.

    Attributes:
        name: Its field of data.clean, or the value of the field.
        kind: `edit`, `filter` or `duplicates`.
        on: settings -> whether the rule applies.
        apply: Its first argument is the settings. An edit: (text, whether white space at its ends is kept) -> text. A
            filter: Row -> the reason to leave it out, empty to keep it. Duplicates: (texts, labels) -> {index: (index
            of the first similar text with the same label, reason)}.
        answers: Whether a filter needs the prompt and the answer of a row.
    """

    name: str
    kind: str
    on: Callable[..., bool]
    apply: Callable
    answers: bool = False


def clean(
    table: Table, settings, answers: Answers | None = None, folder: str | None = None, by: Sides | None = None
) -> Cleaned:
    """Clean a table as `data.clean` says: edit, then filter, then remove duplicates, by RULES in their order.

    Rows keep their order. Every row is either kept or in `removed`. Cleaning a cleaned table changes nothing.

    Args:
        table: The rows.
        settings: The config's group `data.clean`.
        answers: Gives the prompt and the answer of a row, for the filters that need them. None: the rows have no known
            form.
        folder: See Table.edit.
        by: What duplicates are judged by. None: all text of a row, or that of settings.columns.

    Returns:
        The rows that are kept and those that are left out.

    Raises:
        FtjaxError: If a pattern does not compile, a column does not exist, a filter needs answers and `answers` is
            None, or no row is left.
    """
    need_columns(settings.columns, table.columns, "data.clean.columns")
    rules = [rule for rule in RULES if rule.on(settings)]
    edits, filters, duplicates = (
        {rule.name: functools.partial(rule.apply, settings) for rule in rules if rule.kind == kind}
        for kind in ("edit", "filter", "duplicates")
    )
    asked = [rule.name for rule in rules if rule.answers]
    if asked and answers is None:
        raise FtjaxError(
            f"data.clean.{asked[0]} needs the answer of each row, and no known form fits the columns "
            f"{', '.join(table.columns)}; set data.prompt and data.completion, or turn it off"
        )
    changed = Counter(dict.fromkeys(edits, 0))
    edited = table.edit(lambda rows: [_edit_row(row, edits, changed) for row in rows], folder) if edits else table
    removed = {r.index: r for r in _filtered(edited, filters, answers)} if filters else {}
    by, conflict = by or Sides(lambda row: row_text(row, settings.columns)), ""
    for name, find in duplicates.items():
        left = _left(len(table), removed)
        rest = edited.select(left)
        labels = by.labels(rest)
        conflict = conflict or conflicts(rest, by, labels)
        for i, (first, why) in find(Texts((rest, by.whole)), labels).items():
            at = int(left[i])
            removed[at] = Removed(at, table.place(at), name, why, table.place(int(left[first])))
    if removed and len(removed) == len(table):
        one = removed[min(removed)]
        raise FtjaxError(
            f"data.clean: the rules removed all {len(table)} rows, for example {one.place} by {one.rule!r}: {one.why}; "
            "relax the rules"
        )
    kept = edited.select(_left(len(table), removed)) if removed else edited
    return Cleaned(kept, [removed[i] for i in sorted(removed)], dict(changed), conflict)


def conflicts(table: Table, by: Sides, labels: list[str]) -> str:
    """A note on rows with the same input text and different labels: their number and the first three. Empty if none.

    Args:
        table: The rows.
        by: Gives the text that the model reads.
        labels: The label of each row as text.
    """
    if not any(labels):
        return ""
    first = firsts(Texts((table, by.read)))
    odd = [i for i in np.flatnonzero(first != np.arange(len(first))).tolist() if labels[i] != labels[first[i]]]
    shown = [
        f"{table.place(i)} ({labels[i][:40]!r}) and {table.place(int(first[i]))} ({labels[first[i]][:40]!r})"
        for i in odd[:3]
    ]
    return (
        f"{len(odd):,} rows have the text of another row and another label, and stay: {', '.join(shown)}" if odd else ""
    )


def records(table: Table, removed: Iterable[Removed]) -> Iterator[dict]:
    """The rows that were left out of `table` as plain data. Each is as in `table`, so that it can be restored."""
    for r in removed:
        yield {"place": r.place, "rule": r.rule, "why": r.why, "twin": r.twin, "row": table.row(r.index)}


def _left(rows: int, removed: dict[int, Removed]) -> np.ndarray:
    return np.setdiff1d(np.arange(rows), list(removed))


# ---------------------------------------------------------------------------------------------- edits


def _edit_row(row: dict, edits: dict[str, Edit], changed: Counter) -> dict:
    did: set[str] = set()
    out = {column: _edit_cell(cell, edits, column in JOINED, did) for column, cell in row.items()}
    changed.update(did)
    return out


def _edit_cell(cell, edits: dict[str, Edit], ends: bool, did: set[str]):
    """A cell with every text in it edited, in nested lists and objects too, except keys and roles of messages."""
    if isinstance(cell, str):
        return _edit_text(cell, edits, ends, did)
    if isinstance(cell, list):
        return [_edit_cell(c, edits, ends, did) for c in cell]
    if isinstance(cell, dict):
        return {key: c if key in ROLES else _edit_cell(c, edits, ends, did) for key, c in cell.items()}
    return cell


def _edit_text(text: str, edits: dict[str, Edit], ends: bool, did: set[str]) -> str:
    """Apply all edits in turn until none changes the text, because one edit may produce what another looks for."""
    for _ in range(PASSES):
        before = text
        for name, edit in edits.items():
            after = edit(text, ends)
            if after != text:
                did.add(name)
            text = after
        if text == before:
            break
    return text


def _mojibake(settings, text: str, ends: bool) -> str:
    from ftfy import fix_encoding

    return fix_encoding(text) if mojibake(text) else text


def whitespace(text: str, ends: bool = False) -> str:
    """Normalise the white space of a text.

    Several blanks become one, and blanks at the end of a line are removed. Every line end becomes a line feed, and at
    most one empty line remains in a row. White space at the ends of the text is stripped, or with `ends` kept. The
    indentation of lines is kept if there are several lines, because the text may be code.
    """
    if ends:
        body = text.strip()
        before, _, after = text.partition(body) if body else (text, "", "")
        return before + whitespace(body) + after
    lines = [LINE.fullmatch(line) for line in LINE_END.split(text)]
    text = EMPTY_LINES.sub("\n\n", "\n".join(m["indent"] + " ".join(m["rest"].split()) for m in lines)).strip("\n")
    return text if "\n" in text else text.strip()


LINE_END = re.compile(r"\r\n|\n|\r")
LINE = re.compile(r"(?P<indent>[ \t]*(?=\S)|)(?P<rest>.*)", re.DOTALL)
EMPTY_LINES = re.compile(r"\n{3,}")


# ---------------------------------------------------------------------------------------------- filters


def _filtered(table: Table, filters: dict[str, Callable[[Row], str]], answers: Answers | None) -> Iterator[Removed]:
    for start, rows in table.chunks():
        for i, cells in enumerate(rows, start):
            place = table.place(i)
            ask = answers and functools.cache(functools.partial(answers, cells, place))
            row = Row(cells, row_text(cells), ask)
            for name, filter in filters.items():
                why = filter(row)
                if why:
                    yield Removed(i, place, name, why)
                    break


def _empty(settings, row: Row) -> str:
    if row.answers is None:
        return "" if row_text(row.cells, settings.columns).strip() else "no text"
    try:
        row.answers()
    except FtjaxError as error:
        return str(error)
    return ""


def _min_chars(settings, row: Row) -> str:
    found = len(row.answers()[1])
    return f"an answer of {found} characters, fewer than {settings.min_chars}" if found < settings.min_chars else ""


def _max_chars(settings, row: Row) -> str:
    found = len(row.text)
    return f"{found} characters, more than {settings.max_chars}" if found > settings.max_chars else ""


def _max_ratio(settings, row: Row) -> str:
    prompt, answer = map(len, row.answers())
    long = answer > settings.max_ratio * prompt
    return f"an answer of {answer} characters, more than {settings.max_ratio:g} x {prompt}" if long else ""


def _personal(settings, row: Row) -> str:
    kinds = sorted({kind for kind, _, _ in personal(row.text)})
    return f"personal data: {', '.join(kinds)}" if kinds else ""


def _drop(settings, row: Row) -> str:
    match = next((m for p in drop_patterns(settings.drop) if (m := p.search(row.text))), None)
    return f"{match.re.pattern!r} matches {match[0][:80]!r}" if match else ""


# ---------------------------------------------------------------------------------------------- duplicates


def _exact(settings, texts: Texts, labels: list[str]) -> dict[int, tuple[int, str]]:
    twins = first_equal(zip(firsts(texts).tolist(), labels, strict=True))
    return {i: (twin, "the same text") for i, twin in enumerate(twins) if twin != i}


def _near(settings, texts: Texts, labels: list[str]) -> dict[int, tuple[int, str]]:
    """The rows to leave out. Each is similar to a row that is kept, so of three in a chain the third may be kept."""
    gone: dict[int, tuple[int, str]] = {}
    for i, j in near_pairs(texts, settings.near).tolist():  # sorted, so that it is already decided about row i
        if i not in gone and labels[i] == labels[j]:
            gone.setdefault(j, (i, f"at least {settings.near:g} alike"))
    return gone


# Edits come first, so that filters and duplicates see the text that is trained. Near duplicates include exact ones.
RULES = (
    Rule("mojibake", "edit", lambda s: s.mojibake, _mojibake),
    Rule("unicode", "edit", lambda s: s.unicode, lambda s, text, ends: unicodedata.normalize(s.unicode, text)),
    Rule("control", "edit", lambda s: s.control, lambda s, text, ends: without_control(text)),
    Rule("whitespace", "edit", lambda s: s.whitespace, lambda s, text, ends: whitespace(text, ends)),
    Rule("mask", "edit", lambda s: s.personal == "mask", lambda s, text, ends: mask(text)),
    Rule("empty", "filter", lambda s: s.empty, _empty),
    Rule("min_chars", "filter", lambda s: s.min_chars, _min_chars, answers=True),
    Rule("max_chars", "filter", lambda s: s.max_chars, _max_chars),
    Rule("max_ratio", "filter", lambda s: s.max_ratio, _max_ratio, answers=True),
    Rule("personal", "filter", lambda s: s.personal == "drop", _personal),
    Rule("drop", "filter", lambda s: s.drop, _drop),
    Rule("exact", "duplicates", lambda s: s.exact or s.near, _exact),
    Rule("near", "duplicates", lambda s: s.near, _near),
)
