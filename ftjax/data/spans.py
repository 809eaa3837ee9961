"""Questions with a text that holds their answers -> windows of the text, each after the question.

T tokens of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ftjax.data.labelled import Labelled, need_offsets, second_text
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError


class Window(NamedTuple):
    """A stretch of a row's text, after its question.

    Attributes:
        ids: (T,) int32.
        second: Where the token types of the second text begin; 0: there are none.
        offsets: (T, 2) for tokens of the text, its first character and one past its last; for other tokens -1.
        row: Index of the row.
    """

    ids: np.ndarray
    second: int
    offsets: np.ndarray
    row: int


def windows(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Window]:
    """All windows of each row, in order. A window has as many tokens as fit, and shares how.stride with the one before.

    Args:
        how: The recipe.
        tokenizer: The tokenizer, from transformers.
        rows: The rows.
        places: Names of the rows for errors.

    Raises:
        FtjaxError: If a question leaves no more room than how.stride for the text, if the tokenizer cannot map tokens
            to characters, or if it makes no token of a text.
    """
    need_offsets(tokenizer, "characters")
    out = []
    texts = how.cells(rows, places)
    encoded = tokenizer(*texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    for i, place in enumerate(places):
        ids, offsets = np.array(encoded["input_ids"][i], np.int32), np.array(encoded["offset_mapping"][i])
        text = np.array([side == 1 for side in encoded.sequence_ids(i)])
        if not text.any():
            raise FtjaxError(f"{place}: the tokenizer makes no token of column {how.pair!r}")
        offsets = np.where(text[:, None], offsets, -1)
        a, b = np.flatnonzero(text)[[0, -1]] + (0, 1)
        room = how.max_length - (len(ids) - (b - a))
        if room <= how.stride and room < b - a:
            raise FtjaxError(
                f"{place}: the question leaves {max(room, 0)} of data.max_length={how.max_length} tokens for a "
                f"window of the text, which must be more than task.stride={how.stride}; raise data.max_length or "
                "lower task.stride"
            )
        for start in range(a, max(b - how.stride, a + 1), max(room - how.stride, 1)):
            kept = np.r_[0:a, start : min(start + room, b), b : len(ids)]
            out.append(Window(ids[kept], second_text(encoded, i), offsets[kept], i))
    return out


def encode(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
    """The windows of each row as examples.

    Args:
        how: The recipe.
        tokenizer: The tokenizer, from transformers.
        rows: The rows.
        places: Names of the rows for errors.

    Returns:
        One Example for each window. targets (1, 2): first and last token of the row's first answer; both are 0 if the
        window does not hold all of it.

    Raises:
        FtjaxError: If a row cannot be used, see `windows` and `span`.
    """
    spans = [span(how, row, place) for row, place in zip(rows, places, strict=True)]
    out = []
    for window in windows(how, tokenizer, rows, places):
        trained = np.zeros(len(window.ids), bool)
        trained[0] = True
        target = np.array([_tokens(window.offsets, *spans[window.row])], np.int32)
        out.append(Example(window.ids, trained, target, window.second, window.row))
    return out


def _tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters from start to end; (0, 0) if some of them are outside the window."""
    text = np.flatnonzero(offsets[:, 1] >= 0)
    begin, stop = offsets[text].T
    if start < 0 or start < begin[0] or end > stop[-1]:
        return 0, 0
    first = np.flatnonzero(begin <= start)[-1]
    last = np.flatnonzero(stop >= end)[0]
    return int(text[first]), int(text[max(first, last)])


def span(how: Labelled, row: dict, place: str) -> tuple[int, int]:
    """First character of a row's first answer, and one past its last.

    Args:
        how: The recipe.
        row: The row.
        place: Name of the row in errors.

    Returns:
        (start, end); (-1, -1) if the row has no answer, or if rows have no labels.

    Raises:
        FtjaxError: If an answer is missing and task.no_answer is not set, or if the text does not hold it at its place.
    """
    found = answers(how, row, place)
    if not found:
        if how.label and not how.no_answer:
            raise FtjaxError(f"{place}: column {how.label!r} holds no answer; set task.no_answer where some have none")
        return -1, -1
    start, text = found[0]
    held = row[how.pair][start : start + len(text)] if start >= 0 else ""
    if held != text:
        raise FtjaxError(
            f"{place}: column {how.label!r}: the text holds {held!r:.60} at answer_start {start}, not {text!r:.60}; "
            "answer_start is the index of the answer's first character, from 0"
        )
    return start, start + len(text)


def answers(how: Labelled, row: dict, place: str) -> list[tuple[int, str]]:
    """(first character, text) of each of a row's answers.

    Args:
        how: The recipe.
        row: The row, with answers in SQuAD's format: {"text": [...], "answer_start": [...]}.
        place: Name of the row in errors.

    Raises:
        FtjaxError: If the answers have another format.
    """
    if not how.label:
        return []
    cell = row.get(how.label)
    if isinstance(cell, list) and all(isinstance(x, dict) for x in cell):
        cell = {key: [x.get(key) for x in cell] for key in ("text", "answer_start")}
    texts, starts = (cell.get(key) for key in ("text", "answer_start")) if isinstance(cell, dict) else (None, None)
    if (
        not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts)
        or not all(isinstance(x, str) and x for x in texts) or not all(isinstance(x, int) for x in starts)
    ):  # fmt: skip
        raise FtjaxError(
            f"{place}: column {how.label!r} holds {cell!r:.80}; expected answers as "
            '{"text": ["..."], "answer_start": [0]}'
        )
    return list(zip(starts, texts))
