"""How much training text a model reproduces: copied n-grams in its outputs, and the exposure of planted texts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.words import grams


def copied(outputs: Sequence[Sequence[Hashable]], training: Sequence[Sequence[Hashable]], n: int = 8) -> float | None:
    """Share of the n-grams of outputs that occur word for word in training texts.

    Text that a prompt asks to repeat counts too. Leave it out, or compare with the base. Memory grows with the outputs,
    not with the training texts.

    Args:
        outputs: The outputs, as tokens or words.
        training: The training texts, in the same units.
        n: Units of an n-gram.

    Returns:
        The share; None if no output has n units.
    """
    own = [gram for units in outputs for gram in grams(units, n)]
    asked = set(own)
    seen = {gram for text in training for gram in grams(text, n) if gram in asked}
    return sum(gram in seen for gram in own) / len(own) if own else None


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
