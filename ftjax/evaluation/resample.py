"""Intervals of any figure of N rows, and of the paired difference of two systems on the same rows.

B resamples at a time, N rows, K categories, S statistics a row. A resample is told by how often it holds each row:
`counts` (B, N) float64, whose rows each sum to N. A figure is a function of counts, a `Reduce`; counts of one for every
row give the figure itself. So one rule computes both, for all resamples at once and without a copy of the data.

Shares and means of bounded scores have intervals by the binomial distribution (`share_interval`), because resamples of
rows that all agree are all alike: they would give 1.0 the interval 1 to 1. All other figures have a bootstrap interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ftjax.errors import FtjaxError

Reduce = Callable[[np.ndarray], dict[str, np.ndarray]]  # counts (B, N) -> name: (B,) or (B, K), NaN where undefined

BLOCK = 1 << 18  # counts held at once: 2 MiB, which caches hold


def resamples(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (B, n) of counts, `draws` resamples in all: n rows drawn with replacement from n, by numpy's PCG64."""
    rng, block = np.random.default_rng(seed), max(1, BLOCK // n)
    for start in range(0, draws, block):
        drawn = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(min(block, draws - start))]
        yield np.stack(drawn, axis=1).astype(float).T  # the counts of a row lie together, as `totals` reads them


def values(n: int, reduce: Reduce) -> dict[str, np.ndarray]:
    """The figures of all n rows, each once: name -> scalar or (K,)."""
    return {name: value[0] for name, value in reduce(np.ones((1, n))).items()}


def bootstrap(n: int, reduce: Reduce, draws: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """The figures of `draws` resamples: name -> (draws,) or (draws, K). Raises FtjaxError without rows or draws."""
    if n < 1 or draws < 1:
        raise FtjaxError(f"a bootstrap needs at least one row and one draw; found {n} rows and {draws} draws")
    blocks = [reduce(counts) for counts in resamples(n, draws, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def intervals(
    n: int,
    reduce: Reduce,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    trials: Mapping[str, np.ndarray | float] | None = None,
) -> dict[str, dict]:
    """name -> {"value", "low", "high"} of each figure of n rows, with a list of these where the figure is (K,).

    Args:
        n: Rows.
        reduce: The figures.
        draws: Resamples; 0: the figures alone, without intervals.
        seed: Of the resamples.
        level: Of the intervals, between 0 and 1.
        trials: Name -> of how many trials, () or (K,), a figure from 0 to 1 is the share of successes, or the mean.
            Its interval is `share_interval` with as many trials, or fewer where the resamples vary by more than
            independent trials would (Korn & Graubard 1998).

    Returns:
        The figures. The interval of one without trials is by the percentiles of its resamples, at a level that is
        `expanded`; it follows the bias of a figure that resampling shifts, such as a calibration error. An undefined
        figure is None; `note` says in how many resamples a figure is undefined, these being left out. Where the
        resamples agree, they say nothing of the figure's spread: its interval is None, and `note` says so.

    Raises:
        FtjaxError: For a level that is none.
    """
    if not 0 < level < 1:
        raise FtjaxError(f"the level of an interval lies between 0 and 1; found {level}")
    whole, trials = values(n, reduce), trials or {}
    nothing = {name: np.zeros((0, *np.shape(value))) for name, value in whole.items()}
    drawn = bootstrap(n, reduce, draws, seed) if draws else nothing
    tail = expanded(n, level)

    def entry(name, value, draws, k=()):
        size = np.asarray(trials[name], float)[k] if name in trials else None
        return _interval(float(value), draws, tail, level, size)

    return {
        name: entry(name, value, drawn[name])
        if np.ndim(value) == 0
        else [entry(name, v, drawn[name][:, k], k if np.ndim(trials.get(name)) else ()) for k, v in enumerate(value)]
        for name, value in whole.items()
    }


def _interval(value: float, drawn: np.ndarray, tail: float, level: float, trials: float | None) -> dict:
    there = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(there):
        return {"value": None if np.isnan(value) else value, "low": None, "high": None}
    if trials:
        variance = there.var()
        if variance > 0 and 0 < value < 1:
            trials = min(trials, value * (1 - value) / variance)
        low, high = map(float, share_interval(value, trials, level))
    else:
        low, high = map(float, np.quantile(there, [tail, 1 - tail]))
    notes = []
    if len(there) < len(drawn):
        notes.append(f"undefined in {len(drawn) - len(there):,} of {len(drawn):,} resamples, left out")
    if high - low <= 1e-9 * max(1.0, abs(value)):  # sums of floats in another order differ a little
        low = high = None
        notes.append("the resamples agree on this figure, so that its interval is not known")
    entry = {"value": value, "low": low, "high": high}
    return entry | ({"note": "; ".join(notes)} if notes else {})


def expanded(n: int, level: float) -> float:
    """The share of resamples to leave out on either side, so that the rest is an interval at `level`.

    Percentiles of n resampled rows are too narrow by sqrt((n - 1) / n) and know no Student's t; a higher level mends
    both (Hesterberg 2015, "expanded percentile interval", section 5.2).
    """
    from scipy import stats

    return stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)) if n > 1 else (1 - level) / 2


def share_interval(share, trials, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a share of successes (...) in so many trials (...): Clopper & Pearson (1934).

    It holds the truth at least as often as `level` says, for every number of trials and every true share. Wilson's
    interval holds a true 0.05 in 91 % of samples of ten. Trials need not be whole.
    """
    from scipy.special import betaincinv

    share, trials = np.broadcast_arrays(np.clip(share, 0.0, 1.0), np.asarray(trials, float))
    hits, tail = share * trials, (1 - level) / 2
    low = np.where(share > 0, betaincinv(np.where(share > 0, hits, 1), trials - hits + 1, tail), 0.0)
    high = np.where(share < 1, betaincinv(hits + 1, np.where(share < 1, trials - hits, 1), 1 - tail), 1.0)
    return low, high


def mean_interval(x, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the mean of scores x (..., N) from 0 to 1, whose N rows are a sample: `share_interval`.

    Scores that are 0 or 1 are N trials. Other scores vary by less than 0 and 1 with the same mean would, and count as
    more trials by that factor (Korn & Graubard 1998), less what Student's t takes off for a variance that is estimated.
    Where all scores are the same nothing is known of their spread, and they count as N.
    """
    from scipy import stats

    x = np.asarray(x, float)
    n, mean, variance = x.shape[-1], x.mean(-1), x.var(-1)
    more = np.divide(mean * (1 - mean), variance, out=np.ones_like(mean), where=variance > 1e-15)
    tail = (1 - level) / 2
    estimated = (stats.norm.isf(tail) / stats.t.isf(tail, n - 1)) ** 2 * (n - 1) / n if n > 1 else 0.0
    return share_interval(mean, n * (1 + np.maximum(more - 1, 0) * estimated), level)


def of_sums(statistics: np.ndarray, reduce: Reduce) -> Reduce:
    """A figure of sums over rows. statistics: (N, S) of each row; reduce: their sums (B, S) -> name: (B,)."""
    statistics = np.asarray(statistics, float)
    return lambda counts: reduce(counts @ statistics)


def difference(a: Reduce, b: Reduce) -> Reduce:
    """What system a has more than b, both on the same N rows: each resample holds the same rows of both (paired)."""

    def reduce(counts):
        left, right = a(counts), b(counts)
        return {name: left[name] - right[name] for name in left}

    return reduce


def totals(K: int, codes: np.ndarray, rows: np.ndarray, n: int, weights: np.ndarray | float = 1.0):
    """counts (B, n) -> (B, K), the sum of weight x count over the entries of each category.

    An entry is a category (int below K), a row and a weight: arrays of one length, a single weight being that of all.
    """
    from scipy.sparse import csr_array

    weights = np.broadcast_to(np.asarray(weights, float), codes.shape)
    matrix = csr_array((weights, (codes, rows)), shape=(K, n))
    return lambda counts: (matrix @ counts.T).T


def divide(numerator, denominator) -> np.ndarray:
    """numerator / denominator, NaN where the latter is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)
