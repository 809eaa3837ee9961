"""Rows with labels -> token ids, and the places at which labels are read off.

N rows, C labels.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ftjax.data import masks, pairs, spans, tags
from ftjax.data.table import Table
from ftjax.data.template import Rendered
from ftjax.data.tokenise import CHUNK, Example
from ftjax.errors import FtjaxError, nearest
from ftjax.hub.tokenizer import pad_token

TEXTS = ("sentence", "text", "content", "sentence1", "premise", "question", "review", "gloss")  # usual names, in order
LABELS = ("label", "labels", "category", "class", "target")


class Columns(NamedTuple):
    """Usual names of the columns of a kind of task, in order. pair empty: there is one text, unless task.pair names a
    second; label empty: rows have none."""

    text: tuple[str, ...] = TEXTS
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = LABELS


COLUMNS = {
    "tag": Columns(("tokens", "words"), (), ("tags", "ner_tags", "labels")),
    "span": Columns(("question",), ("context",), ("answers",)),
    "masked": Columns(label=()),
    "embed": Columns(("anchor", "query", *TEXTS), ("positive", "answer", "sentence2", "hypothesis", "context"), ()),
}
FIXED = {"span": ("start", "end"), "masked": (), "embed": ()}  # names of labels that do not depend on rows


@dataclasses.dataclass(frozen=True)
class Labelled:
    """How rows become tokens and targets: all that these depend on, but for the tokenizer. form: a row of ENCODERS.

    text, pair, label: columns, pair empty where there is one text; names: of the labels, in the order of their ids;
    pool: ModelConfig.head's, by which the last token of a text is read, or its first; max_length: tokens to which a
    text is cut, special tokens kept; 0: none is; subwords, stride, no_answer: those
    of config.task; ids: the cells of labels are ids and not names; vectors: they are multi-hot vectors.
    """

    form: str
    text: str
    pair: str
    label: str
    names: tuple[str, ...]
    pool: str
    max_length: int
    subwords: str = "first"
    stride: int = 0
    no_answer: bool = False
    ids: bool = False
    vectors: bool = False

    def render(self, rows: list[dict], places: list[str]) -> list[Rendered]:
        """Rows as text and the text of their label."""
        if self.form == "tag":
            texts = [[" ".join(tags.cell(row, self.text, place))] for row, place in zip(rows, places)]
        else:
            texts = [[self.cell(row, column, place) for column in self.texts] for row, place in zip(rows, places)]
        return [
            Rendered(prompt="\n".join(text), completion=str(row.get(self.label, "")))
            for text, row in zip(texts, rows, strict=True)
        ]

    def sides(self, row: dict, place: str) -> tuple[str, str]:
        """("", the text of a row); raises FtjaxError for a row without text, or without the label that it needs."""
        (rendered,) = self.render([row], [place])
        if self.label and self.form != "multilabel" and is_missing(row.get(self.label)):
            raise FtjaxError(f"{place}: column {self.label!r} holds no label")
        return "", rendered.prompt

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """Rows as tokens with targets; raises FtjaxError naming the place of a row that cannot be used."""
        return ENCODERS[self.form](self, tokenizer, rows, places)

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of text."""
        return (self.text, self.pair) if self.pair else (self.text,)

    def cell(self, row: dict, column: str, place: str) -> str:
        """A text that is not empty."""
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise FtjaxError(
                f"{place}: column {column!r} holds {value!r}; expected a text, see task.text and task.pair"
            )
        return value


def recipe(
    config, data, table: Table, names: tuple[str, ...], pool: str, max_length: int, truths: bool = True
) -> Labelled:
    """The recipe that a config means for the rows of a table; data: its group, or that of one source; truths:
    whether the rows have labels."""
    task, usual = config.task, COLUMNS.get(config.task.kind, Columns())
    alone = task.kind == "embed" and not truths  # any text is embedded, without a partner
    asked = "" if alone and task.text not in table.columns else task.text
    text = column(asked, usual.text, table, "task.text")
    pair = label = ""
    if (task.pair or usual.pair) and not alone:
        pair = column(task.pair, usual.pair, table, "task.pair")
    if usual.label and truths:
        label = column(data.label, usual.label, table, "data.label")
    # Long texts of these kinds are cut into several examples, none of which is too long.
    cut = max_length if config.data.long == "truncate" or task.kind in ("span", "masked") else 0
    cut = cut // 2 if task.kind == "embed" else cut  # a row holds two
    return Labelled(task.kind, text, pair, label, names, pool, cut, task.subwords, task.stride, task.no_answer)


def names_of(config, tables: list[tuple[object, Table]], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a config's labels in the order of their ids: its own, those of the model, or those of the rows.

    Args:
        config: the whole config.
        tables: (data group, all rows of data.train) of each source.
        known: names of the labels of the model's head.

    Raises:
        FtjaxError: for fewer than two labels, a name that stands twice, and what is no label.
    """
    task, usual = config.task, COLUMNS.get(config.task.kind, Columns())
    if task.kind in FIXED:
        return FIXED[task.kind]
    names = tuple(label_name(name) or "" for name in task.labels) or (() if task.kind == "regress" else known)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FtjaxError(f"task.labels: two labels are called {twice!r}; give each label a name of its own")
    if names:
        return names
    if task.kind == "regress":
        return ("value",)
    found = set()
    for data, table in tables:
        named = column(data.label, usual.label, table, "data.label")
        found |= label_names(table, named, task.kind in SEVERAL)
    names = tags.in_order(found) if task.kind == "tag" else in_order(found)
    if len(names) < 2 and task.kind == "classify":
        raise FtjaxError(f"data.label: the rows of train have the label {', '.join(names)!r} only; expected two")
    return names


def reading(how: Labelled, table: Table, whole: Table, labels_as: str) -> tuple[Labelled, list[str]]:
    """How the labels of a table are written: `how` with `ids` and `vectors`, and notes for a person.

    A label is a value. A whole number is an id only where `labels_as` says so.

    Args:
        how: the recipe of the rows.
        table: the rows.
        whole: all rows of their source, which say whether cells are multi-hot vectors.
        labels_as: "names", "ids", or "auto": ids where no name is a number itself and all cells are whole numbers.

    Raises:
        FtjaxError: for rows without a label, with their count, and for tags that are none.
    """
    if not how.label or how.form in FIXED:
        return how, []
    cells, said = list(table.cells(how.label)), f"column {how.label!r} holds"
    if how.form != "multilabel":  # where an empty cell says that there is no label
        need_labels(table, cells, how.label)
    if how.form == "tag":
        tags.in_order(set(how.names))
    if how.form == "multilabel":
        source = list(whole.cells(how.label)) if how.label in whole.columns else cells
        if vector_length(source) == len(how.names):
            note = f"{said} vectors of 0 and 1, one number for each of {_some(how.names)}"
            return dataclasses.replace(how, vectors=True), [note]
    if how.form == "regress" or labels_as == "names":
        return how, []
    if labels_as == "auto":
        labels = (label for cell in cells for label in (split_labels(cell) if how.form in SEVERAL else [cell]))
        if any(map(WHOLE.fullmatch, how.names)) or not all(is_whole(label) for label in labels):
            return how, []
    meant = _some([f"{i} is {name!r}" for i, name in enumerate(how.names)])
    return dataclasses.replace(how, ids=True), [f"{said} numbers, which are read as ids: {meant}"]


def need_labels(table: Table, cells: list, column: str) -> None:
    """Raises FtjaxError where rows have no label, with their number and the places of the first."""
    lacking = [i for i, cell in enumerate(cells) if is_missing(cell)]
    if lacking:
        first = ", ".join(table.place(i) for i in lacking[:3])
        raise FtjaxError(
            f"{len(lacking):,} of {len(table):,} rows have no label in column {column!r}: {first}"
            f"{', ...' if len(lacking) > 3 else ''}; add the labels, or leave these rows out: of a run's own rows by "
            "data.clean.empty=True (in the parts that data.clean.parts names), of rows that are given in their file"
        )


def is_missing(cell) -> bool:
    """Whether a cell holds no label."""
    return cell is None or isinstance(cell, str) and not cell.strip()


def column(asked: str, usual: tuple[str, ...], table: Table, key: str) -> str:
    """The column that a config names, or else the first of the usual names that is there."""
    found = asked or next((name for name in usual if name in table.columns), "")
    if found not in table.columns:
        listed, file = ", ".join(table.columns), table.files[0]
        if found:
            near = nearest(found, table.columns)
            raise FtjaxError(f"{key}: {found!r} is no column of {file}{near}; the columns are {listed}")
        raise FtjaxError(f"{key}: none of the usual names is a column of {file}; name one of its columns: {listed}")
    return found


# ---------------------------------------------------------------------------------------------- labels


WHOLE = re.compile(r"-?\d+")
VECTOR = re.compile(r"[01](\s*[\s;|/]\s*[01])+")  # a multi-hot vector in a text without commas
SEVERAL = ("multilabel", "tag")  # task.kind of rows with several labels each


def label_name(cell) -> str | None:
    """A label as text, `1` for 1 and 1.0; None for what is no label."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, int) or isinstance(cell, str) and cell.strip():
        return str(cell).strip()
    return None


def is_whole(cell) -> bool:
    """Whether a label is a whole number, or the text of one."""
    return not isinstance(cell, bool) and WHOLE.fullmatch(label_name(cell) or "") is not None


def label_names(table: Table, column: str, several: bool = False) -> set[str]:
    """The distinct labels of rows, as text; of multi-hot vectors the places in them. Rows without any are left out."""
    cells = list(table.cells(column))
    if several and (length := vector_length(cells)) > 1:
        return set(map(str, range(length)))
    found = set()
    for i, cell in enumerate(cells):
        if several and isinstance(cell, str) and VECTOR.fullmatch(cell.strip()):
            raise FtjaxError(
                f"{table.place(i)}: column {column!r} holds {cell!r:.80}, which looks like a vector of 0 and 1; write "
                "vectors as [0, 1] or 0,1"
            )
        for label in split_labels(cell) if several else [] if is_missing(cell) else [cell]:
            name = label_name(label)
            if name is None:
                raise FtjaxError(
                    f"{table.place(i)}: column {column!r} holds {cell!r:.80}; expected a label: a text or a whole "
                    'number; for numbers to predict set task.kind="regress", for lists of labels "multilabel"'
                )
            found.add(name)
    return found


def in_order(names: set[str]) -> tuple[str, ...]:
    """Whole numbers as numbers go, others by the alphabet."""
    whole = all(map(WHOLE.fullmatch, names))
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def split_labels(cell) -> list:
    """The labels of a cell that may hold several: a list, its text as JSON or Python write it, or a text with commas
    between them; none: empty. Any other cell is its own only label."""
    if is_missing(cell):
        return []
    if isinstance(cell, str) and cell.strip().startswith("["):
        try:
            cell = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError):
            return [None]  # no label, which is refused
    if isinstance(cell, str):
        return [part.strip() for part in cell.split(",")]
    return cell if isinstance(cell, list) else [cell]


def vector_length(cells: list) -> int:
    """The length of multi-hot vectors such as [1, 0, 1]; 0 where cells are lists of labels.

    Lists of labels of one length that hold nothing but 0 and 1 are no other: two labels, each row with both of them,
    would teach nothing.
    """
    length = 0
    for cell in cells:
        labels = split_labels(cell)
        if (
            isinstance(cell, int | float)
            or length not in (0, len(labels))
            or not labels
            or any(x not in BITS for x in labels)
        ):
            return 0
        length = len(labels)
    return length


BITS = (0, 1, "0", "1")  # equal to 0.0 and False, 1.0 and True


def label_id(how: Labelled, cell, place: str) -> int:
    """The id of a label: its place among how.names, or the label itself where how.ids says so.

    Raises FtjaxError for a label that is not known.
    """
    name = label_name(cell)
    if how.ids and name is not None and name.isdecimal() and int(name) < len(how.names):
        return int(name)
    if name in how.names and not how.ids:
        return how.names.index(name)
    if how.ids:
        raise FtjaxError(
            f"{place}: column {how.label!r} holds {cell!r:.80}; expected one of {_some(how.names)}, which are written "
            f"by their ids, 0 to {len(how.names) - 1}"
        )
    raise FtjaxError(
        f"{place}: column {how.label!r} holds {cell!r:.80}{nearest(str(cell), how.names)}; expected one of "
        f"{_some(how.names)}; to have others, name them all in task.labels"
        + ("; where numbers are ids of these names, set task.labels_as=ids" if is_whole(cell) else "")
    )


def _some(names) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def one_class(how: Labelled, row: dict, place: str):
    """() int32: the class of a row; 0 of rows without labels."""
    return np.int32(label_id(how, row.get(how.label), place) if how.label else 0)


def many_classes(how: Labelled, row: dict, place: str):
    """(C,) float32: 1 for each label that a row has."""
    out, cell = np.zeros(len(how.names), np.float32), row.get(how.label)
    labels = split_labels(cell) if how.label else []
    if how.vectors:
        if len(labels) != len(out) or any(x not in BITS for x in labels):
            raise FtjaxError(
                f"{place}: column {how.label!r} holds {cell!r:.80}; expected {len(out)} numbers, each 0 or 1"
            )
        return np.array([x in (1, "1") for x in labels], np.float32)
    if isinstance(cell, int | float) and how.label:
        raise FtjaxError(
            f"{place}: column {how.label!r} holds {cell!r}; expected a list of labels, or a text with commas between "
            "them; where every label has a column of its own, write the names of those that a row has into one"
        )
    for label in labels:
        at = label_id(how, label, place)
        if out[at]:
            raise FtjaxError(
                f"{place}: column {how.label!r} holds {cell!r:.80}, in which {label!r} stands twice; expected each "
                f"label once, or in all rows vectors of {len(out)} numbers, each 0 or 1"
            )
        out[at] = 1
    return out


def numbers(how: Labelled, row: dict, place: str):
    """(C,) float32: the numbers of a row."""
    cell = row.get(how.label) if how.label else [0.0] * len(how.names)
    try:
        found = np.array([float(x) for x in (cell if isinstance(cell, list) else [cell])], np.float32)
    except (TypeError, ValueError):
        found = np.array([np.nan])
    # The loss squares numbers.
    if found.shape != (len(how.names),) or not (np.abs(found) < 1e18).all():
        expected = "a number" if len(how.names) == 1 else f"{len(how.names)} numbers"
        raise FtjaxError(f"{place}: column {how.label!r} holds {cell!r}; expected {expected} between -1e18 and 1e18")
    return found


# ---------------------------------------------------------------------------------------------- tokens


def sequence(how: Labelled, tokenizer, rows: list[dict], places: list[str], target: Callable) -> list[Example]:
    """Texts with one label each, as the tokenizer itself puts special tokens around one text or two.

    Of pool `last`, the label is read where transformers reads it from exported files: at the last token that does not
    fill rows up, which is not the end-of-text where that fills them too.
    """
    out, pad = [], pad_token(tokenizer)
    for first in range(0, len(rows), CHUNK):
        chunk, at = rows[first : first + CHUNK], places[first : first + CHUNK]
        texts = [[how.cell(row, column, place) for row, place in zip(chunk, at)] for column in how.texts]
        encoded = tokenizer(*texts, return_attention_mask=False, verbose=False)
        short = encoded
        if how.max_length and max(map(len, encoded["input_ids"])) > how.max_length:
            short = tokenizer(*texts, return_attention_mask=False, truncation=True, max_length=how.max_length)
        types_of = short.get("token_type_ids") or [[]] * len(chunk)  # of tokenizers whose models have them
        for i, (row, place) in enumerate(zip(chunk, at)):
            ids, types = np.array(short["input_ids"][i], np.int32), types_of[i]
            if not len(ids):
                raise FtjaxError(f"{place}: the tokenizer makes no token of this text")
            trained = np.zeros(len(ids), bool)
            trained[np.flatnonzero(ids != pad)[-1:] if how.pool == "last" else 0] = True
            trained[0] |= not trained.any()
            second = types.index(1) if 1 in types else 0
            value = target(how, row, place)
            out.append(Example(ids, trained, value[None], second, None, len(encoded["input_ids"][i])))
    return out


def _labelled(target: Callable) -> Callable:
    return lambda how, tokenizer, rows, places: sequence(how, tokenizer, rows, places, target)


# form -> (Labelled, tokenizer, rows, places) -> examples, one a row unless they say which is theirs
ENCODERS: dict[str, Callable[..., list[Example]]] = {
    "classify": _labelled(one_class),
    "multilabel": _labelled(many_classes),
    "regress": _labelled(numbers),
    "tag": tags.encode,
    "span": spans.encode,
    "masked": masks.encode,
    "embed": pairs.encode,
}


def layout(config, tokenizer) -> dict:
    """What Batches has to know of a kind of task to lay its examples out."""
    if config.task.kind == "masked":
        return {"masking": masks.masking(config.task, tokenizer)}
    return {"apart": True} if config.task.kind == "embed" else {}
