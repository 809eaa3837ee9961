"""Confidence intervals of any figure of N rows.

B resamples at a time, N rows, K categories. A resample is described by how often it holds each
row: `counts` (B, N) float64, whose rows each sum to N. A figure is a function of counts, a `Reduce`. If all counts are
one, it is the figure of the rows themselves. One function thus computes both, for all resamples at once and without
copying the data.

Shares and means of bounded scores have intervals by the binomial distribution (`share_interval`). If all rows agree,
all their resamples are alike, so that a bootstrap would give 1.0 the interval 1 to 1. All other figures have a
bootstrap interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError


class Share(NamedTuple):
    """A figure from 0 to 1 that is a share of successes, or a mean, of a number of trials. Both are (B,) or (B, K)."""

    value: np.ndarray
    trials: np.ndarray


# counts (B, N) -> name: (B,) or (B, K), NaN where undefined
Reduce = Callable[[np.ndarray], dict[str, np.ndarray | Share]]


class Kind(NamedTuple):
    """How rows of one kind of task are evaluated.

    Attributes:
        rows: rows(labels, predictions, **settings) -> {name: (N, ...)}, the contribution of each row, with `loss` and
            `wrong` (N,), and with `tally` where there are classes (see ftjax.evaluation.classification). For tags it is
            a pair of that and the entity types.
        metrics: metrics(rows) -> the figures, a Reduce, in the order of the report.
        undefined: {name of a figure: why it is None}.
        main: The figures that a table by group shows.
        absent: Whether macro averages include classes that occur nowhere.
    """

    rows: Callable[..., dict[str, np.ndarray]]
    metrics: Callable[[dict], Reduce]
    undefined: dict[str, str]
    main: tuple[str, ...]
    absent: bool = False


BLOCK = 1 << 18  # counts in memory at once: 2 MiB, which fit in a cache


def resamples(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (B, n) of counts, `draws` resamples in all, each of n rows drawn from n with replacement, by numpy's
    PCG64."""
    rng, block = np.random.default_rng(seed), max(1, BLOCK // n)
    for start in range(0, draws, block):
        drawn = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(min(block, draws - start))]
        yield np.stack(drawn, axis=1).astype(float).T  # the counts of a row are contiguous, as `totals` reads them


def value_of(figure: np.ndarray | Share) -> np.ndarray:
    """The figure without its number of trials."""
    return figure.value if isinstance(figure, Share) else figure


def bootstrap(n: int, reduce: Reduce, draws: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """The figures of resamples.

    Args:
        n: Number of rows.
        reduce: The figures.
        draws: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        {name: (draws,) or (draws, K)}.

    Raises:
        FtjaxError: If n or draws is less than 1.
    """
    if n < 1 or draws < 1:
        raise FtjaxError(f"the bootstrap needs at least one row and one resample; found {n} rows and {draws} resamples")
    blocks = [reduce(counts) for counts in resamples(n, draws, seed)]
    return {name: np.concatenate([value_of(block[name]) for block in blocks]) for name in blocks[0]}


def intervals(n: int, reduce: Reduce, draws: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, dict]:
    """Every figure of n rows with its confidence interval.

    The interval of a Share is `share_interval` with its number of trials, or with fewer if the resamples vary more than
    independent trials would (Korn & Graubard 1998). That of another figure has the percentiles of the resamples at a
    level that is `expanded`. It follows the bias of a figure that resampling shifts, such as a calibration error.
    Resamples in which a figure is undefined are left out, and "note" says how many. If all resamples agree, they say
    nothing about the spread: "low" and "high" are None and "note" says so.

    Args:
        n: Number of rows.
        reduce: The figures.
        draws: Number of resamples; 0: only the figures, without intervals.
        seed: Seed of the resamples.
        level: Level of the intervals, between 0 and 1.

    Returns:
        {name: {"value", "low", "high"}}, with a list of these for a figure (K,). "value" is None if a figure is
        undefined.

    Raises:
        FtjaxError: If the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise FtjaxError(f"expected a confidence level between 0 and 1; found {level}")
    whole, tail = reduce(np.ones((1, n))), expanded(n, level)
    drawn = bootstrap(n, reduce, draws, seed) if draws else {name: value_of(x)[:0] for name, x in whole.items()}

    def entry(figure, draws, k=()):
        trials = float(figure.trials[0][k]) if isinstance(figure, Share) else math.nan
        return _interval(float(value_of(figure)[0][k]), draws, tail, level, trials)

    return {
        name: entry(x, drawn[name])
        if value_of(x).ndim == 1
        else [entry(x, drawn[name][:, k], k) for k in range(value_of(x).shape[1])]
        for name, x in whole.items()
    }


def _interval(value: float, drawn: np.ndarray, tail: float, level: float, trials: float) -> dict:
    there = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(there):
        return {"value": None if np.isnan(value) else value, "low": None, "high": None}
    if trials > 0:
        variance = there.var()
        if variance > 0 and 0 < value < 1:
            trials = min(trials, value * (1 - value) / variance)
        low, high = map(float, share_interval(value, trials, level))
    else:
        low, high = map(float, np.quantile(there, [tail, 1 - tail]))
    notes = []
    if len(there) < len(drawn):
        notes.append(f"undefined in {len(drawn) - len(there):,} of {len(drawn):,} resamples, left out")
    if high - low <= 1e-9 * max(1.0, abs(value)):  # sums of floats in another order differ slightly
        low = high = None
        notes.append("the resamples agree on this figure, so that its interval is not known")
    entry = {"value": value, "low": low, "high": high}
    return entry | ({"note": "; ".join(notes)} if notes else {})


def expanded(n: int, level: float) -> float:
    """Share of resamples to leave out on each side, so that the rest is an interval at `level`.

    Percentiles of n resampled rows are too narrow by sqrt((n - 1) / n) and do not account for Student's t. A higher
    level corrects both (Hesterberg 2015, "expanded percentile interval", section 5.2).
    """
    from scipy import stats

    return stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)) if n > 1 else (1 - level) / 2


def share_interval(share, trials, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of a share of successes, by Clopper & Pearson (1934).

    It covers the truth at least as often as `level` says, for every number of trials and every true share. Wilson's
    interval covers a true 0.05 in 91 % of samples of ten.

    Args:
        share: Share of successes (...).
        trials: Number of trials (...); it need not be whole.
        level: Level of the interval.

    Returns:
        (low, high), each (...).
    """
    from scipy.special import betaincinv

    share, trials = np.broadcast_arrays(np.clip(share, 0.0, 1.0), np.asarray(trials, float))
    hits, tail = share * trials, (1 - level) / 2
    low = np.where(share > 0, betaincinv(np.where(share > 0, hits, 1), trials - hits + 1, tail), 0.0)
    high = np.where(share < 1, betaincinv(hits + 1, np.where(share < 1, trials - hits, 1), 1 - tail), 1.0)
    return low, high


def mean_interval(x, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the mean of scores x (..., N) from 0 to 1 whose N rows are a sample, by `share_interval`.

    Scores of 0 and 1 count as N trials. Other scores vary less than 0 and 1 with the same mean, and count as more
    trials by that factor (Korn & Graubard 1998), less a correction by Student's t because the variance is estimated. If
    all scores are equal, nothing is known about their spread, and they count as N trials.
    """
    from scipy import stats

    x = np.asarray(x, float)
    n, mean, variance = x.shape[-1], x.mean(-1), x.var(-1)
    more = np.divide(mean * (1 - mean), variance, out=np.ones_like(mean), where=variance > 1e-15)
    tail = (1 - level) / 2
    estimated = (stats.norm.isf(tail) / stats.t.isf(tail, n - 1)) ** 2 * (n - 1) / n if n > 1 else 0.0
    return share_interval(mean, n * (1 + np.maximum(more - 1, 0) * estimated), level)


def totals(K: int, codes: np.ndarray, rows: np.ndarray, n: int, weights: np.ndarray | float = 1.0):
    """A function counts (B, n) -> (B, K): the sum of weight x count over the entries of each category.

    Args:
        K: Number of categories.
        codes: Category of each entry, int below K.
        rows: Row of each entry.
        n: Number of rows.
        weights: Weight of each entry, or one weight for all.
    """
    from scipy.sparse import csr_array

    weights = np.broadcast_to(np.asarray(weights, float), codes.shape)
    matrix = csr_array((weights, (codes, rows)), shape=(K, n))
    return lambda counts: (matrix @ counts.T).T


def divide(numerator, denominator) -> np.ndarray:
    """numerator / denominator; NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def share(numerator, trials) -> Share:
    """The Share numerator / trials."""
    return Share(divide(numerator, trials), trials)
