"""Texts to embed, alone or as pairs of texts that belong together -> tokens.

T tokens of a row.
"""

from __future__ import annotations

import numpy as np

from ftjax.data.labelled import Labelled, encode_cut
from ftjax.data.tokenise import Example
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
