"""Words with a tag each -> tokens. Tokens that carry a tag are trained.

T tokens of a row, C tags.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from ftjax.data.labelled import Labelled, label_id, need_offsets
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError

TAG = re.compile(r"O|[BIESLU]-.+")


class Words(NamedTuple):
    """The words of a row as tokens.

    Attributes:
        ids: (T,) int32, special tokens included.
        word: (T,) index of each token's word; -1: none.
        before: As `word`, of the row before it was cut.
    """

    ids: np.ndarray
    word: np.ndarray
    before: np.ndarray


def in_words(tokenizer, rows: list[list[str]], max_length: int, place=str) -> list[Words]:
    """Encode rows of words, joined by blanks as in running text.

    A token belongs to the word in which it begins. If a row is too long, as many whole words are kept as fit between
    the special tokens. Of a single word that is too long, the beginning is kept.

    Args:
        tokenizer: The tokenizer, from transformers.
        rows: The words of each row.
        max_length: Most tokens of a row, special tokens included; 0: rows are not cut.
        place: Index of a row -> its name in errors.

    Raises:
        FtjaxError: If the tokenizer cannot map tokens to characters, or if it makes no token of a row.
    """
    need_offsets(tokenizer, "characters")
    out = []
    texts = [" ".join(words) for words in rows]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    for i, (words, ids, offsets) in enumerate(zip(rows, encoded["input_ids"], encoded["offset_mapping"])):
        if not ids:
            raise FtjaxError(f"{place(i)}: the tokenizer makes no token of these words")
        ids, word = np.array(ids, np.int32), _word_of(words, np.array(offsets).reshape(-1, 2))
        out.append(_cut(ids, word, max_length))
    return out


def _word_of(words: list[str], offsets: np.ndarray) -> np.ndarray:
    """(T,) the word in which each token begins.

    offsets (T, 2): the first character of each token in the joined text, and one past its last.
    """
    lengths = np.array([len(word) + 1 for word in words])
    at = np.repeat(np.arange(len(words)), lengths)
    at[np.cumsum(lengths) - 1] = -1  # the blank after each word
    # For each character, the next one that belongs to a word, because a token may begin with the blank before its word.
    own = np.where(at >= 0, np.arange(len(at)), len(at))
    following = np.minimum.accumulate(own[::-1])[::-1]
    start, end = offsets.T
    begins = following[np.minimum(start, len(at) - 1)]
    return np.where(begins < end, at[np.minimum(begins, len(at) - 1)], -1)


def _cut(ids: np.ndarray, word: np.ndarray, max_length: int) -> Words:
    whole, in_words = len(ids), np.flatnonzero(word >= 0)
    if not max_length or whole <= max_length or not len(in_words):
        return Words(ids, word, word)
    a, b = in_words[0], in_words[-1] + 1  # special tokens are before a and from b on
    room = max(max_length - (whole - (b - a)), 1)
    keep = room
    while keep and word[a + keep] == word[a + keep - 1]:
        keep -= 1
    kept = np.r_[0 : a + (keep or room), b:whole]
    return Words(ids[kept], word[kept], word)


def carriers(word: np.ndarray, subwords: str) -> np.ndarray:
    """(T,) bool: the tokens that carry their word's tag. subwords: `first` (the first token of a word) or `all`."""
    if subwords == "all":
        return word >= 0
    first = np.zeros(len(word), bool)
    first[np.unique(word, return_index=True)[1]] = True
    return first & (word >= 0)


def encode(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
    """Encode rows that have a list of words and a list of tags.

    If all tokens of a word carry its tag, the tokens after the first one of B-X carry I-X, provided that this tag
    exists.

    Args:
        how: The recipe.
        tokenizer: The tokenizer, from transformers.
        rows: The rows.
        places: Names of the rows for errors.

    Returns:
        One Example for each row. targets: the id of the tag at each token that carries one.

    Raises:
        FtjaxError: If a row has no words, another number of tags than words, or an unknown tag, or if the
            name of a label is no tag.
    """
    if how.label:
        in_order(set(how.names))
    words = [cell(row, how.text, place) for row, place in zip(rows, places, strict=True)]
    inside = np.array([how.names.index(n) if (n := f"I-{name[2:]}") in how.names else i
                       for i, name in enumerate(how.names)])  # fmt: skip
    inside = np.where([name.startswith("B-") for name in how.names], inside, np.arange(len(how.names)))
    out = []
    for row, place, own, found in zip(
        rows, places, words, in_words(tokenizer, words, how.max_length, places.__getitem__), strict=True
    ):
        tags = np.zeros(len(own), np.int32)
        if how.label:
            cells = row.get(how.label)
            if not isinstance(cells, list) or len(cells) != len(own):
                holds = f"{len(cells)} tags" if isinstance(cells, list) else repr(cells)
                raise FtjaxError(f"{place}: column {how.label!r} holds {holds}; expected {len(own)} tags, one a word")
            tags[:] = [label_id(how, tag, place) for tag in cells]
        trained = carriers(found.word, how.subwords)
        if not trained.any():
            raise FtjaxError(f"{place}: the tokenizer makes no token of these words")
        begun = carriers(found.word, "first")[trained]
        tag = tags[found.word[trained]]
        targets = np.where(begun, tag, inside[tag]).astype(np.int32)
        lost = np.count_nonzero(carriers(found.before, how.subwords)) - len(targets)
        out.append(Example(found.ids, trained, targets, whole=len(found.before), lost=lost))
    return out


def cell(row: dict, column: str, place: str) -> list[str]:
    """The words of a row.

    Args:
        row: The row.
        column: Name of the column of words.
        place: Name of the row in errors.

    Raises:
        FtjaxError: If the cell is not a list of texts, or if it is empty.
    """
    words = row.get(column)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise FtjaxError(f"{place}: column {column!r} holds {words!r:.80}; expected a list of words, see task.text")
    return words


def in_order(names: set[str]) -> tuple[str, ...]:
    """The tags in order: O first, then by type, and for each type by prefix. Raises FtjaxError for an invalid tag."""
    for name in sorted(names):
        if not TAG.fullmatch(name):
            ids = "; numbers are ids of tags that task.labels names" if name.isdecimal() else ""
            raise FtjaxError(
                "data.label: expected tags of entities, such as O, B-PER and I-PER, from which scores are computed; "
                f"found {name!r}{ids}"
            )
    return ("O", *sorted(names - {"O"}, key=lambda name: (name[2:], name[:2])))
