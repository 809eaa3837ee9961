"""By what rows are compared: what the model reads of a row, what it is to say, and the row's label. No other column
counts: an id would hide that two rows are the same to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ftjax.data import labelled, template
from ftjax.data.similar import digest, normalise, row_text
from ftjax.data.table import Table
from ftjax.errors import FtjaxError

OFTEN, SHARE = 10, 0.05  # rows, and share of all rows, above which the same prompt does not tell rows apart
FIELDS = {  # form: columns that are read, columns that are said
    "text": (("text",), ()),
    "prompt": (("prompt",), ("completion", "response")),
    "question": (("question",), ("answer",)),
    "instruction": (("instruction", "input"), ("output", "instances")),
}
SYSTEM = ("system", "developer")  # roles whose text is the same in many rows
SHOWN = ("content", "value", "name", "tool_calls", *template.THINKING)  # fields of a message that templates show


def nothing(row: dict) -> str:
    """What a row has to say that is only read, or has a label."""
    return ""


class Sides(NamedTuple):
    """read(row): text that the model reads; said(row): text that it is to say, empty where that is what it reads or a
    label; label: the column with the row's label, empty where there is none; known: whether the config or the columns'
    names say so, and not all columns are taken."""

    read: Callable[[dict], str]
    said: Callable[[dict], str] = nothing
    label: str = ""
    known: bool = True

    def whole(self, row: dict) -> str:
        """What the model reads and is to say."""
        return f"{self.read(row)}\n{self.said(row)}" if self.said is not nothing else self.read(row)

    def labels(self, table: Table) -> list[str]:
        """The label of each row as text; all empty where rows have none."""
        if self.label not in table.columns:
            return [""] * len(table)
        cells = table.cells(self.label)
        return ["" if labelled.is_missing(cell) else labelled.label_name(cell) or str(cell) for cell in cells]


class Texts(Sequence[str]):
    """A text of every row of a table: made chunk by chunk or by index, never all in memory."""

    def __init__(self, table: Table, text: Callable[[dict], str]):
        self.table, self.text = table, text

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> str:
        return self.text(self.table.row(index))

    def __iter__(self) -> Iterator[str]:
        for _, rows in self.table.chunks():
            yield from map(self.text, rows)


def sides(data, columns: Sequence[str], task=None) -> Sides:
    """What is compared of rows with these columns.

    Args:
        data: the config's group of their source. The columns of data.clean.columns, where it names some that are there,
            are all that counts.
        columns: of the rows.
        task: the config's group `task`; None: the rows are for task.kind="causal".

    Returns:
        All columns but the label's where nothing says what the model reads.
    """
    if named := [name for name in columns if name in data.clean.columns]:
        return Sides(columns_text(named))
    usual = labelled.COLUMNS.get(task.kind, labelled.Columns()) if task else labelled.Columns()
    label = _first(data.label, usual.label, columns)
    if task is not None and task.kind != "causal":
        texts = [_first(task.text, usual.text, columns), _first(task.pair, usual.pair, columns)]
        read, said = [name for name in texts if name], []
    else:
        try:
            form = template.guess(columns, data.prompt, data.completion) if data.form == "auto" else data.form
        except FtjaxError:
            form = ""
        if form in ("messages", "sharegpt", "preference"):
            return Sides(lambda row: _turns(row)[0], lambda row: _turns(row)[1], label)
        read, said = FIELDS.get(form, ((), ()))
        if form == "template":
            read, said = ([name for _, name in template.parse(text, "data.prompt") if name]
                          for text in (data.prompt, data.completion))  # fmt: skip
        if not read:
            read, said = said, ()
        label = "" if label in (*read, *said) else label
    known, read = bool(read), read or [name for name in columns if name != label]
    return Sides(columns_text(read), columns_text(said) if said else nothing, label, known)


def common(table: Table, by: Sides) -> set[bytes]:
    """Digests of prompts, such as `Write a story.`, that very many rows of a table have, with other answers."""
    if by.said is nothing:
        return set()
    prompts = (digest(normalise(by.read(row))) for _, rows in table.chunks() for row in rows if by.said(row))
    return {prompt for prompt, count in Counter(prompts).items() if count > max(OFTEN, SHARE * len(table))}


def telling(by: Sides, prompts: set[bytes]) -> Callable[[dict], str]:
    """row -> the text that tells it from others: what the model reads, and with one of `common` prompts, or with none,
    the answer too."""

    def text(row: dict) -> str:
        read = by.read(row)
        return by.whole(row) if not read.strip() or prompts and digest(normalise(read)) in prompts else read

    return text


def _first(asked: str, usual: Sequence[str], columns: Sequence[str]) -> str:
    return next((name for name in ([asked] if asked else usual) if name in columns), "")


def columns_text(names: Sequence[str]) -> Callable[[dict], str]:
    """row -> the text of these columns, numbers among it."""
    return lambda row: "\n".join(filter(None, (_text(row.get(name)) for name in names)))


def _text(cell) -> str:
    number = isinstance(cell, int | float) and not isinstance(cell, bool)
    return str(cell) if number else row_text({"": list(map(_shown, cell)) if isinstance(cell, list) else cell})


def _turns(row: dict) -> tuple[str, str]:
    """(what comes before a conversation's last answer, that answer); of a preference, the chosen one. System texts are
    left out: they are the same in many rows."""
    asked = next((row[name] for name in ("messages", "conversations", "prompt") if row.get(name)), None)
    chosen = row.get("chosen")
    if asked is None and isinstance(chosen, str):  # a whole conversation as Anthropic's HH-RLHF writes it
        asked, _, chosen = chosen.rpartition("\n\nAssistant:")
    turns = [turn for cell in (asked, chosen) for turn in (cell if isinstance(cell, list) else [cell])]
    roles = [(turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None for turn in turns]
    answers = [k for k, role in enumerate(roles) if template.ROLES.get(role, role) == "assistant"]
    last = answers[-1] if answers else 1
    before = [_shown(turn) for turn, role in zip(turns[:last], roles) if role not in SYSTEM]
    return row_text({"": before}), row_text({"": list(map(_shown, turns[last:]))})


def _shown(turn):
    """A message without the fields that no template shows, such as its number or the day, and without ids of calls."""
    if not isinstance(turn, dict) or not (turn.get("role") or turn.get("from")):
        return turn
    calls = turn.get("tool_calls") if isinstance(turn.get("tool_calls"), list) else []
    calls = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    return {name: turn[name] for name in SHOWN if name in turn} | ({"tool_calls": calls} if calls else {})
