"""What of its training text a model gives back: runs of it in what it writes, and how far planted texts stand out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError

Units = Sequence[Hashable]  # tokens or words


class Copied(NamedTuple):
    """What of an output training text has."""

    grams: int  # n-grams of an output
    seen: int  # those of them that training text has
    longest: int  # units of the longest run that training text has too; 0 where none has n
    source: int | None  # a training text that has it


def copied(outputs: Sequence[Units], training: Sequence[Units], n: int = 8) -> list[Copied]:
    """Of each output, what stands in training texts word for word, in runs of n units or more.

    The rate over outputs is the sum of `seen` by the sum of `grams`. What a prompt asks to repeat counts too: leave it
    out, or compare with the base. Memory grows with the outputs, and not with the training text.
    """
    if n < 1:
        raise FtjaxError(f"copied: n-grams have one unit or more; found n={n}")
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
        # A run goes on where the n-gram one further on stands one further on in the same text.
        found = places.get(gram, ())
        open_runs = {(text, at): open_runs.get((text, at - 1), i) for text, at in found}
        for (text, _), start in open_runs.items():
            if i - start + n > longest:
                longest, source = i - start + n, text
    return Copied(len(grams), sum(gram in places for gram in grams), longest, source)


# ---------------------------------------------------------------------------------------------- canaries


def canaries(form: str, alphabet: Sequence[str], length: int, count: int, seed: int = 0) -> list[str]:
    """`count` texts of a form, in which `{}` stands for `length` symbols drawn from an alphabet; no two are alike.

    Carlini et al. (2019): plant the first few in the training rows, some of them several times, and take the others as
    those that might have been.
    """
    space = len(alphabet) ** length
    if form.count("{}") != 1 or len(set(alphabet)) != len(alphabet) or not 0 < count <= space:
        raise FtjaxError(
            f"canaries: expected one {{}} in the form, an alphabet of distinct symbols, and no more canaries than "
            f"secrets; found {form!r}, {len(alphabet)} symbols, {count} of {space:,}"
        )
    rng, drawn = np.random.default_rng(seed), {}
    while len(drawn) < count:
        drawn["".join(alphabet[k] for k in rng.integers(len(alphabet), size=length))] = None
    return [form.replace("{}", secret) for secret in drawn]


def exposure(canary: float, others: Sequence[float], space: int | None = None) -> float:
    """log2(secrets) - log2(rank): bits by which a model gives away a canary, from log-perplexities (nats, of the text).

    others: log-perplexities of texts of the same form that were not planted. Where they are all (`space` is one more
    than their number, or None with as many), the rank is counted, ties before the canary (Carlini et al. 2019,
    definition 5). Where they are a sample of `space` secrets, the share that is as likely is that of a skew-normal
    distribution fitted to them (section 4.3 there), so that a canary beyond all of them can be told from one that is
    just so; at most log2(space). 0 to log2(secrets); a canary that was not learnt has 1.44 on average.
    """
    others = np.asarray(others, float)
    if not len(others) or not np.isfinite([canary, *others]).all():
        raise FtjaxError("exposure: expected finite log-perplexities of the canary and of one other text at least")
    secrets = len(others) + 1 if space is None else space
    if secrets <= len(others):
        raise FtjaxError(f"exposure: {len(others):,} other texts, and only {secrets:,} secrets in all")
    if secrets == len(others) + 1:
        return math.log2(secrets) - math.log2(1 + int((others <= canary).sum()))
    from scipy import stats

    share = stats.skewnorm.cdf(canary, *stats.skewnorm.fit(others))
    return min(max(-math.log2(share), 0.0) if share > 0 else math.inf, math.log2(secrets))
