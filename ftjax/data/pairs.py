"""Texts to embed, alone or in pairs that belong together -> tokens.

T tokens of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ftjax.data.tokenise import CHUNK, Example
from ftjax.errors import FtjaxError

if TYPE_CHECKING:
    from ftjax.data.labelled import Labelled


def encode(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
    """Texts one after the other, each between special tokens of its own and cut to how.max_length; trained: the first
    token of each, where its vector is read; second: where the second begins; targets: all 0."""
    out = []
    for first in range(0, len(rows), CHUNK):
        chunk, at = rows[first : first + CHUNK], places[first : first + CHUNK]
        sides, wholes = [], []
        for column in how.texts:
            texts = [how.cell(row, column, place) for row, place in zip(chunk, at)]
            found, whole = encode_texts(tokenizer, texts, how.max_length)
            sides.append(found)
            wholes.append(whole)
        for i, place in enumerate(at):
            mine = [side[i] for side in sides]
            if not all(map(len, mine)):
                raise FtjaxError(f"{place}: the tokenizer makes no token of this text")
            ids = np.concatenate(mine)
            trained = np.zeros(len(ids), bool)
            trained[np.cumsum([0, *map(len, mine[:-1])])] = True
            second = len(mine[0]) if len(mine) > 1 else 0
            out.append(Example(ids, trained, np.zeros(len(mine), np.int32), second, whole=sum(w[i] for w in wholes)))
    return out


def encode_texts(tokenizer, texts: list[str], max_length: int) -> tuple[list[np.ndarray], list[int]]:
    """ids (T,) int32 of each text, cut to max_length tokens (0: not at all), special ones included; and how many there
    were before."""
    plain = {"return_attention_mask": False, "verbose": False}
    encoded = short = tokenizer(texts, **plain)["input_ids"]
    if max_length and max(map(len, encoded), default=0) > max_length:
        short = tokenizer(texts, **plain, truncation=True, max_length=max_length)["input_ids"]
    return [np.array(ids, np.int32) for ids in short], [len(ids) for ids in encoded]
