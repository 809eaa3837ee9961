"""Synthetic rows for train: the answer is the same, and the prompt has other words, typing errors or another template.

Word dropout and swap: Wei and Zou, "EDA" (2019); typing errors: Belinkov and Bisk, "Synthetic and Natural Noise Both
Break Neural Machine Translation" (2018).
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ftjax import tasks, user_code
from ftjax.data import columns
from ftjax.data.table import Table, need_columns
from ftjax.data.template import FORMS, parse
from ftjax.data.template import PROMPT_COLUMN as PROMPT
from ftjax.errors import FtjaxError, check_known

Op = Callable[[str, float, np.random.Generator], str]  # (text, share of words or letters to change, rng) -> text
Make = Callable[[dict, np.random.Generator, str], dict | None]  # (row, rng, place) -> row, or None for no row

MARK = "augmented"  # column that says how a synthetic row was made; null for a row that was read
BY_FUNCTION, BY_PROMPT = "function", "prompt"  # values of MARK, besides the names of OPS
TRIES = 10  # most draws for a row that differs from its original and its earlier copies
# Columns that hold an answer if no template names them.
ANSWERS = {"chosen", "rejected", *(name for form in FORMS.values() for name in form.answer)}


class Augmented(NamedTuple):
    """The original rows, followed by the synthetic rows in the order of their originals, whose places they have.

    Attributes:
        table: All rows.
        made: {name of the op, "function" or "prompt": number of synthetic rows}.
        failed: The same for copies that were not made, because every draw equalled an existing row (as for a text of
            one word) or because the function returned None.
    """

    table: Table
    made: dict[str, int]
    failed: dict[str, int]


def augment(table: Table, data, seed: int, folder: str | None = None, task=None) -> Augmented:
    """Add the synthetic rows that data.augment asks for to the rows of train.

    Copy c of a row is made by one of the ops or by data.augment.function, in turn. Each copy has random numbers of its
    own, which depend on the seed, the row's place and c, so that no row influences another. Ops change only
    data.augment.columns, none of which may hold an answer or a label. Each of data.augment.prompts adds one copy of
    every row, which is rendered by that template. If any row is made, the column MARK is new, and with prompts the
    column PROMPT.

    Args:
        table: The rows of train.
        data: The config's group `data`.
        seed: config.seed.
        folder: See Table.edit.
        task: The config's group `task`; None: the rows are for task.kind="causal".

    Raises:
        FtjaxError: If a setting cannot be met, if a cell to be changed is not text, or if the function fails.
    """
    settings = data.augment
    if not settings.copies and not settings.prompts:
        return Augmented(table, {}, {})
    taken = [name for name in (MARK, PROMPT) if name in table.columns]
    if taken:
        raise FtjaxError(
            f"data.augment: the rows already have a column {taken[0]!r}, which augmentation adds; rename it, or, if "
            "these rows are already augmented, set data.augment.copies=0 and data.augment.prompts=()"
        )
    makers = _makers(table, data, task) if settings.copies else []
    _check_prompts(table, data)
    added = (MARK, PROMPT) if settings.prompts else (MARK,)
    made, failed = Counter(), Counter()

    def new_rows() -> Iterator[tuple[list[dict], list[int]]]:
        for start, chunk in table.chunks():
            new, at = [], []
            for index, row in enumerate(chunk, start):
                for name, synthetic in _synthetic(table, index, row, makers, settings, seed):
                    (failed if synthetic is None else made)[name] += 1
                    if synthetic is not None:
                        new.append(synthetic)
                        at.append(index)
            yield new, at

    return Augmented(table.extended(new_rows(), folder, added), dict(made), dict(failed))


def _synthetic(
    table: Table, index: int, row: dict, makers: list[tuple[str, Make]], settings, seed: int
) -> Iterator[tuple[str, dict | None]]:
    """(how it is made, row) for everything that is to be made of a row. The row is None if no copy would differ."""
    file, number = int(table.file[index]), int(table.number[index])
    unmarked = {PROMPT: None} if settings.prompts else {}
    seen = [row]
    for c in range(settings.copies):
        name, make = makers[(number + c) % len(makers)]
        rng = np.random.default_rng([seed, file, number, c])
        draws = (make(row, rng, table.place(index)) for _ in range(TRIES))
        new = next((draw for draw in draws if draw is None or draw not in seen), None)
        if new is not None:
            seen.append(new)
        yield name, new and {**new, **unmarked, MARK: name}
    for prompt in settings.prompts:
        yield BY_PROMPT, {**row, PROMPT: prompt, MARK: BY_PROMPT}


# ---------------------------------------------------------------------------------------------- who makes rows


def _makers(table: Table, data, task) -> list[tuple[str, Make]]:
    settings = data.augment
    for name in settings.ops:
        check_known(name, OPS, "data.augment.ops: unknown operation")
    need_columns(settings.columns, table.columns, "data.augment.columns")
    if settings.ops and not settings.columns:
        raise FtjaxError(
            f"data.augment.columns is empty: name the columns whose text may be changed, some of "
            f"{', '.join(table.columns)}, or "
            "set data.augment.ops=()"
        )
    fixed = [name for name in settings.columns if name in _fixed(data, task)]
    if fixed:
        raise FtjaxError(
            f"data.augment.columns: {fixed[0]!r} holds answers or labels, which must stay as they are: name columns of "
            "the prompt alone"
        )
    makers = [(name, _by_op(OPS[name], settings)) for name in settings.ops]
    if settings.function:
        makers.append((BY_FUNCTION, _by_function(settings.function, table)))
    if not makers:
        raise FtjaxError(
            "data.augment.copies needs a way to make the copies: set data.augment.ops or data.augment.function"
        )
    return makers


def _fixed(data, task) -> set[str]:
    """Columns that hold a label or an answer; for rows of plain text, the text."""
    this = tasks.find(task.kind if task else "causal")
    if this.encode:
        answers = set() if data.label else {*this.columns.label} - {task.text, task.pair}
    elif data.completion:
        answers = {name for _, name in parse(data.completion, "data.completion") if name}
    else:
        answers = ANSWERS if data.label else ANSWERS | {"text"}
    return answers | {data.label, data.stratify}


def _by_op(op: Op, settings) -> Make:
    def make(row: dict, rng: np.random.Generator, place: str) -> dict:
        new = dict(row)
        for name in settings.columns:
            cell = row[name]
            if cell is not None and not isinstance(cell, str):
                kind = type(cell).__name__
                raise FtjaxError(f"{place}: data.augment.columns: expected text in column {name!r}, found {kind}")
            new[name] = op(cell, settings.rate, rng) if cell else cell
        return new

    return make


def _by_function(named: str, table: Table) -> Make:
    function = user_code.load(named, "data.augment.function")
    kinds = {field.name: field.type for field in table.cells.schema}

    def make(row: dict, rng: np.random.Generator, place: str) -> dict | None:
        try:
            new = function(copy.deepcopy(row), rng)
        except user_code.ERRORS as error:  # the message names the row
            raise FtjaxError(f"{place}: {user_code.failed(named, 'data.augment.function', error)}") from error
        if new is None:
            return None
        where = f"{place}: data.augment.function {named!r}"
        if not isinstance(new, dict):
            raise FtjaxError(f"{where} returned {type(new).__name__}; expected a row (a dict), or None for no row")
        if new.keys() != kinds.keys():
            other = ", ".join(sorted(map(str, new.keys() ^ kinds.keys())))
            raise FtjaxError(
                f"{where}: the returned row must have the same columns as the row it received; different: {other}"
            )
        for name, cell in new.items():
            _check_storable(name, cell, kinds[name], where)
        return new

    return make


def _check_storable(name: str, cell, kind: pa.DataType, where: str) -> None:
    """Raise FtjaxError, which begins with `where`, if the column `name` of this type cannot store a cell."""
    try:
        own = columns.infer([cell])
        stored = columns.decode(columns.encode([cell], own))
    except columns.FAULTS as error:
        raise FtjaxError(f"{where}: column {name!r}: {error}") from error
    nested = isinstance(cell, list | dict)
    free = kind not in (pa.null(), *columns.SCALARS.values())  # a column that holds lists or objects
    if nested and stored != [cell] or not (nested and free) and columns.unify(kind, own) != kind:
        raise FtjaxError(f"{where}: column {name!r} has the type {kind}, which cannot store {cell!r:.80}")


def _check_prompts(table: Table, data) -> None:
    key, prompts = "data.augment.prompts", data.augment.prompts
    if prompts and not data.completion:
        raise FtjaxError(
            f"{key} adds templates to data.prompt, which is empty: set data.prompt and data.completion too"
        )
    for number, prompt in enumerate(prompts):
        need_columns([name for _, name in parse(prompt, key) if name], table.columns, key)
        if prompt == data.prompt or prompt in prompts[:number]:
            raise FtjaxError(f"{key}: the template {prompt!r} occurs twice and would repeat every row; remove one")


# ---------------------------------------------------------------------------------------------- ops

PIECE = re.compile(r"(\s*)(\S+)")  # white space before a word, and the word
WORD = re.compile(r"[^\W\d_]{4,}")  # letters; a shorter word easily becomes another word by a typing error
# Words on which the label may depend are never changed: numbers, and English words that negate a sentence.
KEPT = re.compile(
    r"\d|^\W*(?:no|not|never|nor|none|neither|nothing|nobody|nowhere|without|cannot|hardly|barely|scarcely|\w*n['’]t)\W*$",
    re.IGNORECASE,
)
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # rows of a keyboard, each half a key further right than the one above
KEYS = {
    a: "".join(
        b
        for other, keys in enumerate(ROWS)
        for k, b in enumerate(keys)
        if b != a and abs(other - line) <= 1 and abs(k + other / 2 - at - line / 2) <= 1
    )
    for line, letters in enumerate(ROWS)
    for at, a in enumerate(letters)
}


def word_dropout(text: str, rate: float, rng: np.random.Generator) -> str:
    """Leave out some words. Words that match KEPT, and at least one word, are kept.

    Args:
        text: The text.
        rate: Share of the words to leave out; at least one.
        rng: Random numbers.
    """
    pieces = [list(piece) for piece in PIECE.findall(text)]
    free = [i for i, (_, word) in enumerate(pieces) if not KEPT.search(word)]
    gone = set(_chosen(free, min(_count(rate, len(pieces)), len(pieces) - 1), rng))
    left = [piece for i, piece in enumerate(pieces) if i not in gone]
    if left:
        left[0][0] = pieces[0][0]
    return _text(left, text)


def word_swap(text: str, rate: float, rng: np.random.Generator) -> str:
    """Swap some neighbouring words. Words that match KEPT are not moved.

    Args:
        text: The text.
        rate: Number of swaps as a share of the words; at least one.
        rng: Random numbers.
    """
    pieces = [list(piece) for piece in PIECE.findall(text)]
    free = {i for i, (_, word) in enumerate(pieces) if not KEPT.search(word)}
    able = [i for i in sorted(free) if i + 1 in free and pieces[i][1] != pieces[i + 1][1]]
    moved: set[int] = set()
    for i in _chosen(able, len(able), rng):
        if len(moved) // 2 < _count(rate, len(pieces)) and not moved & {i, i + 1}:
            pieces[i][1], pieces[i + 1][1] = pieces[i + 1][1], pieces[i][1]
            moved |= {i, i + 1}
    return _text(pieces, text)


def char_noise(text: str, rate: float, rng: np.random.Generator) -> str:
    """Mistype some letters within words, each by one of TYPOS. Words that match KEPT are not changed.

    The first and the last letter of a word keep their places.

    Args:
        text: The text.
        rate: Share of the letters to mistype; at least one.
        rng: Random numbers.
    """
    kept = [m.span() for m in re.finditer(r"\S+", text) if KEPT.search(m[0])]
    words = [m for m in WORD.finditer(text) if not any(start <= m.start() < end for start, end in kept)]
    able = [i for m in words for i in range(m.start() + 1, m.end() - 2)]
    letters = list(text)
    for i in _chosen(able, _count(rate, sum(map(str.isalpha, text))), rng):
        TYPOS[rng.integers(len(TYPOS))](letters, i, rng)
    return "".join(letters)


def case(text: str, rate: float, rng: np.random.Generator) -> str:
    """Write some words in another case: lower, upper or capitalised.

    Args:
        text: The text.
        rate: Share of the words to change; at least one.
        rng: Random numbers.
    """
    pieces = [list(piece) for piece in PIECE.findall(text)]
    others = {i: {word.lower(), word.upper(), word.capitalize()} - {word} for i, (_, word) in enumerate(pieces)}
    for i in _chosen([i for i in others if others[i]], _count(rate, len(pieces)), rng):
        pieces[i][1] = str(rng.choice(sorted(others[i])))
    return _text(pieces, text)


OPS: dict[str, Op] = {"word_dropout": word_dropout, "word_swap": word_swap, "char_noise": char_noise, "case": case}


def _swap(letters: list[str], i: int, rng: np.random.Generator) -> None:
    letters[i], letters[i + 1] = letters[i + 1], letters[i]


def _leave_out(letters: list[str], i: int, rng: np.random.Generator) -> None:
    letters[i] = ""


def _double(letters: list[str], i: int, rng: np.random.Generator) -> None:
    letters[i] *= 2


def _next_key(letters: list[str], i: int, rng: np.random.Generator) -> None:
    keys = KEYS.get(letters[i].lower(), letters[i])
    key = keys[rng.integers(len(keys))]
    letters[i] = key.upper() if letters[i].isupper() else key


TYPOS = (_swap, _leave_out, _double, _next_key)


def _count(rate: float, n: int) -> int:
    return max(1, round(rate * n))


def _chosen(able: list[int], most: int, rng: np.random.Generator) -> list[int]:
    """At most `most` of these, in random order."""
    return rng.permutation(np.array(able, np.int64))[: max(0, most)].tolist()


def _text(pieces: list[list[str]], text: str) -> str:
    """The joined pieces, followed by the white space that ended the text."""
    return "".join(space + word for space, word in pieces) + text[len(text.rstrip()) :]
