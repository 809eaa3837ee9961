"""Rows with labels -> token ids, and the places at which labels are read off.

N rows, C labels.
"""

from __future__ import annotations

import dataclasses
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
    of config.task.
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
    config, data, columns: list[str], names: tuple[str, ...], pool: str, max_length: int, truths: bool = True
) -> Labelled:
    """The recipe that a config means for rows with these columns; data: its group, or that of one source; truths:
    whether the rows have labels."""
    task, usual = config.task, COLUMNS.get(config.task.kind, Columns())
    text = column(task.text, usual.text, columns, "task.text")
    pair = label = ""
    if task.pair or usual.pair and (truths or task.kind == "span"):
        pair = column(task.pair, usual.pair, columns, "task.pair")
    if usual.label and truths:
        label = column(data.label, usual.label, columns, "data.label")
    # Long texts of these kinds are cut into several examples, none of which is too long.
    cut = max_length if config.data.long == "truncate" or task.kind in ("span", "masked") else 0
    cut = cut // 2 if task.kind == "embed" else cut  # a row holds two
    return Labelled(task.kind, text, pair, label, names, pool, cut, task.subwords, task.stride, task.no_answer)


def names_of(config, tables: list[tuple[object, Table]], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a config's labels: its own, those that the model knows, or those of the rows.

    tables: (data group, rows of train) of each source. Raises FtjaxError for fewer than two labels.
    """
    task, usual = config.task, COLUMNS.get(config.task.kind, Columns())
    if task.kind in FIXED:
        return FIXED[task.kind]
    if task.labels:
        return tuple(map(str, task.labels))
    if task.kind == "regress":
        return ("value",)
    if known:
        return known
    found = set()
    for data, table in tables:
        named = column(data.label, usual.label, table.columns, "data.label")
        found |= label_names(table, named, task.kind in ("multilabel", "tag"))
    names = tags.in_order(found) if task.kind == "tag" else in_order(found)
    if len(names) < 2 and task.kind == "classify":
        raise FtjaxError(f"data.label: the rows of train have the label {', '.join(names)!r} only; expected two")
    return names


def column(asked: str, usual: tuple[str, ...], columns: list[str], key: str) -> str:
    """The column that a config names, or else the first of the usual names that is there."""
    found = asked or next((name for name in usual if name in columns), "")
    if found not in columns:
        said = f"{found!r} is no column{nearest(found, columns)}" if found else "none of the usual names is a column"
        raise FtjaxError(f"{key}: {said}; the columns are {', '.join(columns)}")
    return found


# ---------------------------------------------------------------------------------------------- labels


def label_names(table: Table, column: str, several: bool = False) -> set[str]:
    """The distinct labels of rows, as text."""
    found = set()
    for start, rows in table.chunks():
        for i, row in enumerate(rows):
            for cell in split_labels(row.get(column)) if several else [row.get(column)]:
                if not isinstance(cell, str | int) or isinstance(cell, str) and not cell.strip():
                    raise FtjaxError(
                        f"{table.place(start + i)}: column {column!r} holds {cell!r}; expected a label: a text or a "
                        "whole number"
                    )
                found.add(str(cell).strip())
    return found


def in_order(names: set[str]) -> tuple[str, ...]:
    """Whole numbers as numbers go, others by the alphabet."""
    whole = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def split_labels(cell) -> list:
    """The labels of a cell that may hold several: a list, or a text with commas between them; none: empty."""
    if cell is None or cell == "":
        return []
    return [part.strip() for part in cell.split(",")] if isinstance(cell, str) else list(cell)


def label_id(cell, names: tuple[str, ...], place: str, column: str) -> int:
    """The id of a label: its place among `names`; a whole number that is no name is the id itself."""
    name = str(cell).strip()
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(names):
        return int(name)
    raise FtjaxError(
        f"{place}: column {column!r} holds {cell!r}{nearest(name, names)}; expected one of {_some(names)}; to have "
        "others, name them all in task.labels"
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def one_class(how: Labelled, row: dict, place: str):
    """() int32: the class of a row; 0 of rows without labels."""
    if not how.label:
        return np.int32(0)
    return np.int32(label_id(row.get(how.label), how.names, place, how.label))


def many_classes(how: Labelled, row: dict, place: str):
    """(C,) float32: 1 for each label that a row has."""
    out = np.zeros(len(how.names), np.float32)
    for cell in split_labels(row.get(how.label)) if how.label else ():
        out[label_id(cell, how.names, place, how.label)] = 1
    return out


def numbers(how: Labelled, row: dict, place: str):
    """(C,) float32: the numbers of a row."""
    cell = row.get(how.label) if how.label else [0.0] * len(how.names)
    try:
        found = np.array([float(x) for x in (cell if isinstance(cell, list) else [cell])], np.float32)
    except (TypeError, ValueError):
        found = np.array([np.nan])
    if found.shape != (len(how.names),) or not np.isfinite(found).all():
        expected = "a number" if len(how.names) == 1 else f"{len(how.names)} numbers"
        raise FtjaxError(f"{place}: column {how.label!r} holds {cell!r}; expected {expected}")
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
