"""Rows with labels -> token ids, and the positions at which the head predicts labels.

N rows, C labels.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import unicodedata
from collections.abc import Callable

import numpy as np

from ftjax import tasks
from ftjax.data.table import Table, need_columns
from ftjax.data.template import Rendered
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError, nearest
from ftjax.hub.tokenizer import pad_token


@dataclasses.dataclass(frozen=True)
class Labelled:
    """How rows become tokens and targets. Together with the tokenizer, it determines both.

    Attributes:
        form: The value of task.kind.
        text: Column of the first text.
        pair: Column of the second text; empty if there is one text.
        label: Column of the label; empty if rows have none.
        names: Names of the labels, in the order of their ids.
        pool: ModelConfig.head's. With `last`, the label is read at the last token of a text, otherwise at the first.
        max_length: Most tokens of a text, special tokens included; a longer text is cut. 0: texts are not cut.
        subwords: config.task.subwords.
        stride: config.task.stride.
        no_answer: config.task.no_answer.
        ids: Whether the cells of labels are ids instead of names.
        vectors: Whether the cells of labels are multi-hot vectors.
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
        """The rows as text, each with its label as text."""
        text = tasks.find(self.form).text or _text
        return [
            Rendered(prompt=text(self, row, place), completion=str(row.get(self.label, "")))
            for row, place in zip(rows, places, strict=True)
        ]

    def sides(self, row: dict, place: str) -> tuple[str, str]:
        """("", the text of a row).

        Raises FtjaxError if the row has no text, or lacks a label that it needs.
        """
        (rendered,) = self.render([row], [place])
        if self.label and not tasks.find(self.form).unlabelled and is_missing(row.get(self.label)):
            raise FtjaxError(f"{place}: column {self.label!r} holds no label")
        return "", rendered.prompt

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """The rows as tokens with targets.

        Args:
            tokenizer: The tokenizer, from transformers.
            rows: The rows.
            places: Names of the rows for errors.

        Raises:
            FtjaxError: If a row cannot be used. It names the row's place.
        """
        return tasks.find(self.form).encode(self, tokenizer, rows, places)

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the columns of text."""
        return (self.text, self.pair) if self.pair else (self.text,)

    def cell(self, row: dict, column: str, place: str) -> str:
        """The text in a column of a row.

        Args:
            row: The row.
            column: Name of the column.
            place: Name of the row in errors.

        Raises:
            FtjaxError: If the cell is empty or not a text.
        """
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise FtjaxError(
                f"{place}: column {column!r} holds {value!r}; expected a text, see task.text and task.pair"
            )
        return value

    def cells(self, rows: list[dict], places: list[str]) -> list[list[str]]:
        """The texts of all rows, column by column. Raises FtjaxError as `cell` does."""
        return [[self.cell(row, column, place) for row, place in zip(rows, places)] for column in self.texts]


def _text(how: Labelled, row: dict, place: str) -> str:
    return "\n".join(how.cell(row, column, place) for column in how.texts)


def recipe(
    config, data, table: Table, names: tuple[str, ...], pool: str, max_length: int, truths: bool = True
) -> Labelled:
    """The recipe for the rows of a table.

    Args:
        config: The whole config.
        data: Its group `data`, or that of the rows' source.
        table: The rows.
        names: Names of the labels, in the order of their ids.
        pool: See Labelled.
        max_length: Most tokens of a row.
        truths: Whether the rows have labels.

    Raises:
        FtjaxError: If the table lacks a column that the recipe needs.
    """
    task, this = config.task, tasks.find(config.task.kind)
    usual = this.columns
    alone = this.texts > 1 and not truths  # a single text is embedded, without a second one
    asked, there = task.text, [name for name in usual.text if name in table.columns]
    if alone and asked not in table.columns and len(there) == 1:  # `prepare` says that it is another column
        asked = there[0]
    text = column(asked, usual.text, table, "task.text")
    pair = label = ""
    if (task.pair or usual.pair) and not alone:
        pair = column(task.pair, usual.pair, table, "task.pair")
    if usual.label and truths:
        label = column(data.label, usual.label, table, "data.label")
    cut = max_length // this.texts if config.data.long == "truncate" or this.splits else 0
    return Labelled(task.kind, text, pair, label, names, pool, cut, task.subwords, task.stride, task.no_answer)


def names_of(config, tables: list[tuple[object, Table]], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the labels in the order of their ids: those of the config, else of the model, else of the rows.

    Args:
        config: The whole config.
        tables: (data group, all rows of data.train) of each source.
        known: Names of the labels of the model's head. They are not used for task.kind="regress".

    Returns:
        The names; those of the task where they do not depend on the rows.

    Raises:
        FtjaxError: If the task cannot use the labels of the rows, if task.labels has a name twice, or if a cell holds
            no valid label.
    """
    task, this = config.task, tasks.find(config.task.kind)
    if this.labels is not None:
        return this.labels
    names = tuple(label_name(name) or "" for name in task.labels) or (() if this.numeric else known)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FtjaxError(f"task.labels: two labels are called {twice!r}; give each label a name of its own")
    if names:
        return names
    if this.numeric:
        return ("value",)
    found = set()
    for data, table in tables:
        named = column(data.label, this.columns.label, table, "data.label")
        found |= label_names(table, named, this.several)
    check_spelling(found)
    return (this.order or in_order)(found)


def check_spelling(names: set[str]) -> None:
    """Raise FtjaxError for two names of labels that differ only in how one label can be written: in upper and lower
    case, blanks, Unicode form, digits (1 and 1.0) or as a truth value (True and 1)."""
    known: dict[str, str] = {}
    for name in sorted(names):
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        key = {"true": "1", "false": "0"}.get(key, key)
        key = repr(float(key)) if re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", key) and float(key) < 1e5 else key
        if (other := known.setdefault(key, name)) != name:
            raise FtjaxError(
                f"data.label: the rows of train have the labels {other!r} and {name!r}, which look like one label "
                "written in two ways; correct the rows, or, if both are meant, name all labels in task.labels"
            )


def reading(how: Labelled, table: Table, whole: Table, labels_as: str) -> tuple[Labelled, list[str]]:
    """Decide how the labels of a table are written.

    A whole number is the name of a label, and an id only if `labels_as` says so.

    Args:
        how: The recipe of the rows.
        table: The rows.
        whole: All rows of their source, which decide whether cells are multi-hot vectors.
        labels_as: "names", "ids" or "auto". With "auto", cells are ids if no name is itself a whole number and all
            cells are whole numbers.

    Returns:
        (`how` with `ids` and `vectors` set, notes for the user).

    Raises:
        FtjaxError: If rows have no label. The message counts them.
    """
    task = tasks.find(how.form)
    if not how.label or task.labels is not None:
        return how, []
    cells, holds = list(table.column(how.label)), f"column {how.label!r} holds"
    if not task.unlabelled:
        need_labels(table, cells, how.label)
    if task.unlabelled and task.several:
        source = list(whole.column(how.label)) if how.label in whole.columns else cells
        if vector_length(source) == len(how.names):
            note = f"{holds} vectors of 0 and 1, one number for each of {_some(how.names)}"
            return dataclasses.replace(how, vectors=True), [note]
    if task.numeric or labels_as == "names":
        return how, []
    if labels_as == "auto":
        labels = (label for cell in cells for label in (split_labels(cell) if task.several else [cell]))
        if any(map(WHOLE.fullmatch, how.names)) or not all(is_whole(label) for label in labels):
            return how, []
    meant = _some([f"{i} is {name!r}" for i, name in enumerate(how.names)])
    return dataclasses.replace(how, ids=True), [f"{holds} numbers, which are read as ids: {meant}"]


def need_labels(table: Table, cells: list, column: str) -> None:
    """Check that all rows have a label.

    Args:
        table: The rows.
        cells: The label of each row.
        column: Name of the column of labels, for the error.

    Raises:
        FtjaxError: If rows have no label. The message has their number and the places of the first three.
    """
    lacking = [i for i, cell in enumerate(cells) if is_missing(cell)]
    if lacking:
        first = ", ".join(table.place(i) for i in lacking[:3])
        raise FtjaxError(
            f"{len(lacking):,} of {len(table):,} rows have no label in column {column!r}: {first}"
            f"{', ...' if len(lacking) > 3 else ''}; add the labels, or leave these rows out: of a run's own rows by "
            "data.clean.empty=True (in the parts that data.clean.parts names), of rows that are given in their file"
        )


def is_missing(cell) -> bool:
    """Whether a cell holds no label: None or blank text."""
    return cell is None or isinstance(cell, str) and not cell.strip()


def column(asked: str, usual: tuple[str, ...], table: Table, key: str) -> str:
    """The column that a config names, or else the first of the usual names that the table has.

    Args:
        asked: The name in the config; empty: none is set.
        usual: The usual names, in order.
        table: The rows.
        key: Key of the config, for the error.

    Raises:
        FtjaxError: If the table does not have the named column, or none of the usual ones.
    """
    found = asked or next((name for name in usual if name in table.columns), "")
    if not found:
        listed, file = ", ".join(table.columns), table.files[0]
        raise FtjaxError(f"{key}: none of the usual names is a column of {file}; name one of its columns: {listed}")
    need_columns([found], table.columns, f"{key}: {table.files[0]}")
    return found


# ---------------------------------------------------------------------------------------------- labels


WHOLE = re.compile(r"-?\d+")
VECTOR = re.compile(r"[01](\s*[\s;|/]\s*[01])+")  # a multi-hot vector in a text without commas


def label_name(cell) -> str | None:
    """A label as text: `1` for both 1 and 1.0. None if the cell is not a valid label."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, int) or isinstance(cell, str) and cell.strip():
        return str(cell).strip()
    return None


def is_whole(cell) -> bool:
    """Whether a label is a whole number, or the text of one."""
    return not isinstance(cell, bool) and WHOLE.fullmatch(label_name(cell) or "") is not None


def label_names(table: Table, column: str, several: bool = False) -> set[str]:
    """The distinct labels of a column as text. Rows without a label are ignored.

    Args:
        table: The rows.
        column: The column of labels.
        several: Whether a cell may hold several labels.

    Returns:
        The names. If the cells are multi-hot vectors, these are the positions in the vector, "0" to "C-1".

    Raises:
        FtjaxError: If a cell holds no valid label, or a vector written in another way than [0, 1] or 0,1.
    """
    cells = list(table.column(column))
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
    joined = [name for name in found if several and found.intersection(re.split(r"\s*[;|]\s*", name)) - {name}]
    if joined and all(isinstance(cell, str | None) and "," not in (cell or "") for cell in cells):
        raise FtjaxError(
            f"data.label: the rows of train have the label {min(joined)!r}, which holds another label; write several "
            "labels as a list or with commas between them, or, if it is one label, name all labels in task.labels"
        )
    return found


def in_order(names: set[str]) -> tuple[str, ...]:
    """Names in ascending order: by value if all are whole numbers, otherwise alphabetically."""
    whole = all(map(WHOLE.fullmatch, names))
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def split_labels(cell) -> list:
    """The labels of a cell that may hold several.

    The cell may be a list, a list written as JSON or Python text, or text with commas between the labels. Any other
    cell is itself the only label. An empty cell has no labels.
    """
    if is_missing(cell):
        return []
    if isinstance(cell, str) and cell.strip().startswith("["):
        try:
            cell = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError):
            return [None]  # not a valid label: the caller raises an error
    if isinstance(cell, str):
        return [part.strip() for part in cell.split(",")]
    return cell if isinstance(cell, list) else [cell]


def vector_length(cells: list) -> int:
    """The length of multi-hot vectors such as [1, 0, 1]; 0 if the cells are lists of labels.

    Lists of equal length that hold only 0 and 1 are always taken for vectors. Read as lists of labels, they would give
    two labels that every row has, from which nothing can be learned.
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


BITS = (0, 1, "0", "1")  # 0.0 and False are equal to 0, 1.0 and True to 1


def label_id(how: Labelled, cell, place: str) -> int:
    """The id of a label: its index in how.names, or with how.ids the label itself.

    Args:
        how: The recipe.
        cell: The label.
        place: Name of the row in errors.

    Raises:
        FtjaxError: If the label is unknown.
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


# ---------------------------------------------------------------------------------------------- tokens


def sequence(how: Labelled, tokenizer, rows: list[dict], places: list[str], target: Callable) -> list[Example]:
    """Encode texts, or pairs of texts, that have one label each. The tokenizer adds its special tokens.

    With pool `last`, the label is read where transformers reads it from exported files: at the last token that is not
    the padding token. If a tokenizer pads with its end-of-text token, this is not the end-of-text.

    Args:
        how: The recipe.
        tokenizer: The tokenizer, from transformers.
        rows: The rows.
        places: Names of the rows for errors.
        target: target(how, row, place) -> the target of a row.

    Returns:
        One Example for each row.

    Raises:
        FtjaxError: If a row cannot be used, or if the tokenizer makes no token of it.
    """
    out = []
    encoded, lengths = encode_cut(tokenizer, how.cells(rows, places), how.max_length)
    for i, (row, place) in enumerate(zip(rows, places)):
        ids = np.array(encoded["input_ids"][i], np.int32)
        if not len(ids):
            raise FtjaxError(f"{place}: the tokenizer makes no token of this text")
        trained = last_token(ids, tokenizer) if how.pool == "last" else np.arange(len(ids)) == 0
        value = target(how, row, place)
        out.append(Example(ids, trained, value[None], second_text(encoded, i), whole=lengths[i]))
    return out


def encode_cut(tokenizer, texts: list[list[str]], max_length: int) -> tuple:
    """Encode texts, or pairs of texts, each cut to `max_length` tokens.

    Args:
        tokenizer: The tokenizer, from transformers.
        texts: The first text of each row, and the second ones if rows have pairs.
        max_length: Most tokens of a row, special tokens included; 0: rows are not cut.

    Returns:
        (the encoding, the number of tokens of each row before it was cut).
    """
    plain = {"return_attention_mask": False, "verbose": False}
    encoded = tokenizer(*texts, **plain)
    lengths = list(map(len, encoded["input_ids"]))
    if max_length and max(lengths, default=0) > max_length:
        encoded = tokenizer(*texts, **plain, truncation=True, max_length=max_length)
    return encoded, lengths


def apart(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
    """Encode the texts of each row one after another, each with its own special tokens and cut to how.max_length.

    Args:
        how: The recipe.
        tokenizer: The tokenizer, from transformers.
        rows: The rows.
        places: Names of the rows for errors.

    Returns:
        One Example for each row. trained: the first token of each text, at which its vector is read; second: where the
        second text begins; targets: all 0.

    Raises:
        FtjaxError: If a text is missing, or if the tokenizer makes no token of it.
    """
    out = []
    sides, wholes = zip(*(encode_texts(tokenizer, texts, how.max_length) for texts in how.cells(rows, places)))
    for *texts, whole, place in zip(*sides, map(sum, zip(*wholes)), places, strict=True):
        if not all(map(len, texts)):
            raise FtjaxError(f"{place}: the tokenizer makes no token of this text")
        ids = np.concatenate(texts)
        trained = np.zeros(len(ids), bool)
        trained[np.cumsum([0, *map(len, texts[:-1])])] = True
        second = len(texts[0]) if len(texts) > 1 else 0
        out.append(Example(ids, trained, np.zeros(len(texts), np.int32), second, whole=whole))
    return out


def encode_texts(tokenizer, texts: list[str], max_length: int) -> tuple[list[np.ndarray], list[int]]:
    """Encode texts, each cut to `max_length` tokens.

    Args:
        tokenizer: The tokenizer, from transformers.
        texts: The texts.
        max_length: Most tokens of a text, special tokens included; 0: texts are not cut.

    Returns:
        (ids (T,) int32 of each text, its number of tokens before it was cut).
    """
    encoded, lengths = encode_cut(tokenizer, [texts], max_length)
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]], lengths


def second_text(encoded, i: int) -> int:
    """The first token of the second text of row i of an encoding; 0: none, or the tokenizer gives no token types."""
    types = encoded["token_type_ids"][i] if encoded.get("token_type_ids") else []
    return types.index(1) if 1 in types else 0


def need_offsets(tokenizer, what: str) -> None:
    """Raise FtjaxError if a tokenizer cannot map tokens to `what`: `words` or `characters`."""
    if not tokenizer.is_fast:
        raise FtjaxError(f"task.kind: this tokenizer does not map tokens to {what}; a tokenizer.json is needed")


def last_token(ids: np.ndarray, tokenizer) -> np.ndarray:
    """(T,) bool, true at the token of a text (T,) at which transformers reads it: the last one that is no padding."""
    return np.arange(len(ids)) == max(np.flatnonzero(ids != pad_token(tokenizer)), default=0)


def encoder(target: Callable) -> Callable:
    """The `encode` of a task whose texts have one target each. target: see `sequence`."""
    return lambda how, tokenizer, rows, places: sequence(how, tokenizer, rows, places, target)
