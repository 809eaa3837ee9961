"""How much training text a model reproduces: copied runs in its outputs, and the exposure of planted texts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError

Units = Sequence[Hashable]  # tokens or words


class Copied(NamedTuple):
    """The part of an output that also occurs in training texts."""

    grams: int  # n-grams of an output
    seen: int  # those that also occur in a training text
    longest: int  # units of the longest run that also occurs in a training text; 0 if none has n units
    source: int | None  # index of a training text that has the longest run


def copied(outputs: Sequence[Units], training: Sequence[Units], n: int = 8) -> list[Copied]:
    """Find runs of n or more units in each output that occur word for word in training texts.

    The rate over outputs is the sum of `seen` divided by the sum of `grams`. Text that a prompt asks to repeat counts
    too. Leave it out, or compare with the base. Memory grows with the outputs, not with the training texts.

    Args:
        outputs: N outputs, as tokens or words.
        training: The training texts, in the same units.
        n: Units of an n-gram.

    Returns:
        N Copied.

    Raises:
        FtjaxError: If n is less than 1.
    """
    if n < 1:
        raise FtjaxError(f"copied: expected n of at least 1; found n={n}")
    asked = {tuple(units[i : i + n]) for units in outputs for i in range(len(units) - n + 1)}
    places: dict[tuple, list[tuple[int, int]]] = {}
    for number, text in enumerate(training):
        for i in range(len(text) - n + 1):
            gram = tuple(text[i : i + n])
            if gram in asked:
                places.setdefault(gram, []).append((number, i))
    return [_copied(units, training, places, n) for units in outputs]


def _copied(units: Units, training: Sequence[Units], places: dict, n: int) -> Copied:
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    longest, source, open_runs = 0, None, {}
    for i, gram in enumerate(grams):
        # A run continues if the next n-gram is also the next one in the same training text.
        found = places.get(gram, ())
        open_runs = {(text, at): open_runs.get((text, at - 1), i) for text, at in found}
        for (text, _), start in open_runs.items():
            if i - start + n > longest:
                longest, source = i - start + n, text
    return Copied(len(grams), sum(gram in places for gram in grams), longest, source)


def exposure(canary: float, others: Sequence[float]) -> float:
    """Exposure of a canary in bits, log2(number of canaries) - log2(rank): how easily a model reveals the canary.

    It comes after those that tie with it (Carlini et al. 2019, definition 5).

    Args:
        canary: Log-perplexity of the canary's text, in nats.
        others: Log-perplexities of texts of the same form that were not planted.

    Returns:
        0 to log2(1 + number of others). A canary that was not learnt has 1.44 on average.

    Raises:
        FtjaxError: If `others` is empty, or if a log-perplexity is not finite.
    """
    others = np.asarray(others, float)
    if not len(others) or not np.isfinite([canary, *others]).all():
        raise FtjaxError("exposure: expected finite log-perplexities, of the canary and of at least one other text")
    return math.log2(1 + len(others)) - math.log2(1 + int((others <= canary).sum()))
