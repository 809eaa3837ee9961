"""What rows are compared by: the text that the model reads, the text that it should answer, and the label.

Other columns are ignored: an id, for example, would hide that two rows are the same for the model.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ftjax import tasks
from ftjax.data import labelled, template
from ftjax.data.similar import digest, normalise, row_text
from ftjax.data.table import Table
from ftjax.errors import FtjaxError

OFTEN, SHARE = 10, 0.05  # number and share of rows above which a common prompt does not identify a row
SYSTEM = ("system", "developer")  # roles whose text is the same in many rows
SHOWN = ("content", "value", "name", "tool_calls", *template.THINKING)  # fields of a message that templates show


def nothing(row: dict) -> str:
    """The answer text of a row that has none, or that has a label instead."""
    return ""


class Sides(NamedTuple):
    """What is compared of a row.

    Attributes:
        read: read(row) -> the text that the model reads.
        answer: answer(row) -> the text that it should answer. Empty if that is the text it reads, or a label.
        label: Column of the label; empty if there is none.
        known: Whether the columns are known from the config or from their names. Otherwise all columns are taken.
    """

    read: Callable[[dict], str]
    answer: Callable[[dict], str] = nothing
    label: str = ""
    known: bool = True

    def whole(self, row: dict) -> str:
        """The text that the model reads, followed by the text that it should answer."""
        return f"{self.read(row)}\n{self.answer(row)}" if self.answer is not nothing else self.read(row)

    def labels(self, table: Table) -> list[str]:
        """The label of each row as text; all are empty if rows have no labels."""
        if self.label not in table.columns:
            return [""] * len(table)
        cells = table.column(self.label)
        return ["" if labelled.is_missing(cell) else labelled.label_name(cell) or str(cell) for cell in cells]


class Texts(Sequence[str]):
    """A text for every row of some tables, computed chunk by chunk or by index, and never held in memory as a whole.

    Args:
        parts: (table, function row -> its text), one table after another.
    """

    def __init__(self, *parts: tuple[Table, Callable[[dict], str]]):
        self.parts = parts
        self.ends = list(itertools.accumulate(len(table) for table, _ in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> str:
        part = bisect.bisect_right(self.ends, index)
        table, text = self.parts[part]
        return text(table.row(index - self.ends[part] + len(table)))

    def __iter__(self) -> Iterator[str]:
        return (text(row) for table, text in self.parts for row in table)


def sides(data, columns: Sequence[str], task=None) -> Sides:
    """What is compared of rows with these columns.

    Args:
        data: The config's group `data` of their source. If data.clean.columns names some of the columns, only these are
            compared.
        columns: Columns of the rows.
        task: The config's group `task`; None: the rows are for task.kind="causal".

    Returns:
        The Sides. If nothing says what the model reads, it is all columns except the label's.
    """
    if named := [name for name in columns if name in data.clean.columns]:
        return Sides(columns_text(named))
    this = tasks.find(task.kind if task else "causal")
    usual = this.columns
    label = _first(data.label, usual.label, columns)
    if this.encode:
        texts = [_first(task.text, usual.text, columns), _first(task.pair, usual.pair, columns)]
        read, answers = [name for name in texts if name], []
    else:
        try:
            form = template.guess(columns, data.prompt, data.completion) if data.form == "auto" else data.form
        except FtjaxError:
            form = ""
        found = template.FORMS.get(form)
        if found and not found.read:
            return Sides(lambda row: _turns(row)[0], functools.partial(_answers, both=this.texts == 2), label)
        read, answers = (found.read, found.answer) if found else ((), ())
        if form == "template":
            read, answers = ([name for _, name in template.parse(text, "data.prompt") if name]
                          for text in (data.prompt, data.completion))  # fmt: skip
        if not read:
            read, answers = answers, ()
        label = "" if label in (*read, *answers) else label
    known, read = bool(read), read or [name for name in columns if name != label]
    return Sides(columns_text(read), columns_text(answers) if answers else nothing, label, known)


def common(table: Table, by: Sides) -> set[bytes]:
    """Digests of prompts that very many rows with an answer have, such as `Write a story.`."""
    if by.answer is nothing:
        return set()
    prompts = (digest(normalise(by.read(row))) for row in table if by.answer(row))
    return {prompt for prompt, count in Counter(prompts).items() if count > max(OFTEN, SHARE * len(table))}


def telling(by: Sides, prompts: set[bytes]) -> Callable[[dict], str]:
    """A function row -> the text that identifies it: what the model reads.

    If that is empty or one of the `common` prompts, the answer is included.
    """

    def text(row: dict) -> str:
        read = by.read(row)
        return by.whole(row) if not read.strip() or prompts and digest(normalise(read)) in prompts else read

    return text


def _first(asked: str, usual: Sequence[str], columns: Sequence[str]) -> str:
    return next((name for name in ([asked] if asked else usual) if name in columns), "")


def columns_text(names: Sequence[str]) -> Callable[[dict], str]:
    """A function row -> the text of these columns, including numbers."""
    return lambda row: "\n".join(filter(None, (_text(row.get(name)) for name in names)))


def _text(cell) -> str:
    number = isinstance(cell, int | float) and not isinstance(cell, bool)
    return str(cell) if number else row_text({"": list(map(_shown, cell)) if isinstance(cell, list) else cell})


def _turns(row: dict) -> tuple[str, str]:
    """(text before a conversation's last answer, text of that answer). Of a preference, the chosen one is taken.

    System texts are left out, because many rows have the same.
    """
    chosen = row.get("chosen") or next((row[name] for name in template.RANKED if row.get(name)), None)
    names = ("prompt", "messages", "conversations") if chosen else ("messages", "conversations", "prompt")
    asked = next((row[name] for name in names if row.get(name)), None)
    if asked is None and isinstance(chosen, str):  # a whole conversation in the format of Anthropic's HH-RLHF
        asked, _, chosen = chosen.rpartition("\n\nAssistant:")
    turns = [turn for cell in (asked, chosen) for turn in (cell if isinstance(cell, list) else [cell])]
    roles = [(turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None for turn in turns]
    answers = [k for k, role in enumerate(roles) if template.ROLES.get(role, role) == "assistant"]
    last = answers[-1] if answers else 1
    before = [_shown(turn) for turn, role in zip(turns[:last], roles) if role not in SYSTEM]
    return row_text({"": before}), row_text({"": list(map(_shown, turns[last:]))})


def _answers(row: dict, both: bool) -> str:
    """The text of a row's answer; with `both` that of the chosen and of the rejected one."""
    chosen = [None, row["rejected"]] if both and row.get("rejected") else [None]
    return "\n".join(_turns(row | {"chosen": text} if text else row)[1] for text in chosen)


def _shown(turn):
    """A message without ids of calls and without fields that no template shows, such as its number or the date."""
    if not isinstance(turn, dict) or not (turn.get("role") or turn.get("from")):
        return turn
    calls = turn.get("tool_calls") if isinstance(turn.get("tool_calls"), list) else []
    calls = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    return {name: turn[name] for name in SHOWN if name in turn} | ({"tool_calls": calls} if calls else {})
