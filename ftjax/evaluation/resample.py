"""Bootstrap intervals of any figure of N rows, and of the paired difference of two systems on the same rows.

B resamples at a time, N rows, K categories, S statistics a row. A resample is told by how often it holds each row:
`counts` (B, N) float64, whose rows each sum to N. A figure is a function of counts, a `Reduce`; counts of one for every
row give the figure itself. So one rule computes both, for all resamples at once and without a copy of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def intervals(n: int, reduce: Reduce, draws: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, dict]:
    """name -> {"value", "low", "high"} of each figure of n rows, with a list of these where the figure is (K,).

    The percentile interval (Efron & Tibshirani 1993, section 13.3): of the resamples, (1 - level) / 2 lie on either
    side. It takes rows for independent, follows the bias of a figure that resampling shifts, such as a calibration
    error, and is too narrow for a few tens of rows. An undefined figure is None; `note` says of a figure in how many
    resamples it is undefined, these being left out, and when all resamples agree, so that nothing can be said of its
    spread.
    """
    if not 0 < level < 1:
        raise FtjaxError(f"the level of an interval lies between 0 and 1; found {level}")
    drawn, whole = bootstrap(n, reduce, draws, seed), values(n, reduce)
    return {
        name: _interval(float(value), drawn[name], level)
        if np.ndim(value) == 0
        else [_interval(float(v), drawn[name][:, k], level) for k, v in enumerate(value)]
        for name, value in whole.items()
    }


def _interval(value: float, drawn: np.ndarray, level: float) -> dict:
    there = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(there):
        return {"value": None if np.isnan(value) else value, "low": None, "high": None}
    low, high = (float(q) for q in np.quantile(there, [(1 - level) / 2, (1 + level) / 2]))
    entry = {"value": value, "low": low, "high": high}
    if len(there) < len(drawn):
        entry["note"] = f"undefined in {len(drawn) - len(there):,} of {len(drawn):,} resamples, left out"
    elif np.all(drawn == drawn[0]):
        entry["note"] = "all resamples give this figure: the interval does not show how sure it is"
    return entry


def of_sums(statistics: np.ndarray, reduce: Reduce) -> Reduce:
    """A figure of sums over rows. statistics: (N, S) of each row; reduce: their sums (B, S) -> name: (B,)."""
    statistics = np.asarray(statistics, float)
    return lambda counts: reduce(counts @ statistics)


def means(**statistics: np.ndarray) -> Reduce:
    """Figures that are means over rows. statistics: name -> (N,)."""
    names, columns = list(statistics), np.stack([np.asarray(s, float) for s in statistics.values()], axis=1)
    return lambda counts: dict(zip(names, (counts @ columns / counts.sum(1, keepdims=True)).T, strict=True))


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
