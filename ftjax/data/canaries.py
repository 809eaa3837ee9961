"""Canaries: rows of random words that are planted in the training rows, so that an audit can measure what a model
keeps of single rows."""

from __future__ import annotations

import numpy as np

from ftjax.data.table import Table
from ftjax.errors import FtjaxError

FILE = "canaries.jsonl"  # in a run folder: {"planted", "row"} of each canary
TEXTS = ("content", "value", "text")  # keys of messages that hold text
WORDS_OF = 1000  # rows that give the words


def plant(
    table: Table, count: int, seed: int, kept: tuple[str, ...], folder: str | None = None
) -> tuple[Table, list[dict]]:
    """Append about half of `count` canaries to the rows: a coin decides about each of them.

    A canary is a copy of a drawn row in which random words of the rows stand in place of all words. The canaries that
    are not planted show what the model says of such rows that it has not seen.

    Args:
        table: The training rows.
        count: Number of canaries.
        seed: Seed of the draws.
        kept: Columns that are copied as they are, such as the label's.
        folder: See Table.edit.

    Returns:
        (the rows with the planted canaries at their end, {"planted": bool, "row": row} of each canary in order).

    Raises:
        FtjaxError: If the rows hold no words.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(count,)))
    some = table.select(rng.permutation(len(table))[:WORDS_OF])
    free = [name for name in table.columns if name not in kept]
    words = sorted({word for row in some for name in free for word in _words(row[name])})
    if not words:
        raise FtjaxError(f"data.canaries: the columns {', '.join(free)} of {table.files[0]} hold no words to draw from")
    at = rng.integers(len(table), size=count)
    drawn = [row | {name: _replaced(row[name], words, rng) for name in free} for row in table.select(at)]
    coins = (rng.random(count) < 0.5).tolist()
    planted = [(row, index) for row, index, coin in zip(drawn, at.tolist(), coins, strict=True) if coin]
    joined = table.extended([([row for row, _ in planted], [index for _, index in planted])], folder)
    return joined, [{"planted": coin, "row": row} for row, coin in zip(drawn, coins, strict=True)]


def _words(cell) -> list[str]:
    if isinstance(cell, str):
        return cell.split()
    cells = cell if isinstance(cell, list) else [cell[k] for k in TEXTS if k in cell] if isinstance(cell, dict) else []
    return [word for one in cells for word in _words(one)]


def _replaced(cell, words: list[str], rng: np.random.Generator):
    """The cell with as many random words in place of the words of each of its texts."""
    if isinstance(cell, str):
        return " ".join(words[i] for i in rng.integers(len(words), size=len(cell.split())))
    if isinstance(cell, list):
        return [_replaced(one, words, rng) for one in cell]
    if isinstance(cell, dict):
        return cell | {key: _replaced(cell[key], words, rng) for key in TEXTS if key in cell}
    return cell
