"""Texts to embed, alone or as pairs of texts that belong together -> tokens.

T tokens of a row.
"""

from __future__ import annotations

import numpy as np

from ftjax.data.labelled import Labelled
from ftjax.data.tokenise import CHUNK, Example
from ftjax.errors import FtjaxError


def encode(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
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
    """Encode texts, each cut to `max_length` tokens.

    Args:
        tokenizer: The tokenizer, from transformers.
        texts: The texts.
        max_length: Most tokens of a text, special tokens included; 0: texts are not cut.

    Returns:
        (ids (T,) int32 of each text, its number of tokens before it was cut).
    """
    plain = {"return_attention_mask": False, "verbose": False}
    encoded = short = tokenizer(texts, **plain)["input_ids"]
    if max_length and max(map(len, encoded), default=0) > max_length:
        short = tokenizer(texts, **plain, truncation=True, max_length=max_length)["input_ids"]
    return [np.array(ids, np.int32) for ids in short], [len(ids) for ids in encoded]
