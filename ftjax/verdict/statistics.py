"""Whether one contender is better than another on the same rows: difference, interval, test, power, verdict.

N rows, S seeds of a contender. Scores are arrays (..., S, N): the score of each run on each row. The leading axes are
pairs of contenders that are compared at once.

Rows and seeds are both samples, because the question is about other rows of the same kind and about training again. A
score is modelled as mean + seed effect + row effect + residual. Seed effects are independent between contenders, so
that the variance of a difference of means has a part from rows and a part from seeds (`spread`). With one seed, nothing
is known about the variance between seeds. The verdict is then about that very run, which is fair for a base model that
is not trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError, check_known
from ftjax.evaluation.resample import BLOCK, mean_interval
from ftjax.pages import macros

LEVEL = 0.95  # level of the intervals; 1 - LEVEL is the rate of false positives
POWER = 0.8  # probability of detecting a true difference
DRAWS = 10_000
MOST = 1e12  # rows; a larger number counts as infinite
LEAST = 1e-100  # lower end of the search for p / 2
Bounds = tuple[float, float] | None  # lowest and highest possible score; None: no bounds
CLOSE = 1e-9  # sums are ties if they differ by less than this share of the sum of all magnitudes


class Spread(NamedTuple):
    """A difference of means and the parts of its variance. Arrays have the shape of the leading axes."""

    difference: np.ndarray  # a - b
    rows: np.ndarray  # variance between rows of the part that all seeds of a contender share
    seeds: np.ndarray  # variance of the runs' means over these n rows, divided by S, summed over both
    rest: np.ndarray  # residual variance of one row; `seeds` contains rest / n
    df: np.ndarray  # degrees of freedom of `seeds`
    n: int  # rows

    def half(self, tail, n=None) -> np.ndarray:
        """Half the width of the confidence interval that leaves a share `tail` on either side, with `n` rows.

        The half widths of rows and of seeds, each by Student's t, are added as squares, as for a sum of independent
        parts (Howe 1974; Zou & Donner 2008). In simulations with at least three trained seeds, an interval at 95 %
        covered the truth in 95 to 98 % of the cases, for all ratios of the two variances. With two seeds the worst
        coverage was 94 %. With one t for the summed variance (Satterthwaite 1946) the coverage was 92 % if three seeds
        matter more than the rows.

        Args:
            tail: Probability on either side of the interval.
            n: Number of rows; None: as many as were measured.

        Returns:
            Array of the leading axes.
        """
        from scipy import stats

        rows, seeds = self.rows / (self.n if n is None else n), self.seeds
        if n is not None:
            seeds = np.maximum(seeds - self.rest / self.n, 0) + self.rest / n
        return np.sqrt(stats.t.isf(tail, self.n - 1) ** 2 * rows + stats.t.isf(tail, self.df) ** 2 * seeds)


class Comparison(NamedTuple):
    """The result of `compare(a, b)`. Fields are arrays of the leading axes, and plain numbers if there are none."""

    difference: np.ndarray  # difference of means, a - b
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray  # two-sided, for no difference
    spread: Spread
    seeds: tuple[int, int]
    informative: np.ndarray  # number of rows on which the two differ
    size: np.ndarray  # mean absolute difference on those; if there are none, the largest possible one of a row
    reach: float  # the largest possible difference of means; inf without bounds

    def smallest(self, alpha: float = 1 - LEVEL, power: float = POWER) -> np.ndarray:
        """The smallest true difference that these rows and seeds detect with probability `power` at level `alpha`.

        A few informative rows show little of their variance. Therefore the result is at least the difference at which,
        with probability `power`, enough rows differ for the sign test. It is infinite if even the largest possible
        difference would not be detected.
        """
        from scipy import stats

        n, least = self.spread.n, _least(alpha)
        share = stats.beta.ppf(power, least, n - least + 1) if n >= least else math.inf
        found = np.maximum(self.spread.half(alpha / 2) + self.spread.half(1 - power), share * self.size)
        return np.where(found > self.reach, np.inf, found)[()]

    def needed(self, alpha: float = 1 - LEVEL, power: float = POWER) -> np.ndarray:
        """Number of rows that detect a true difference as large as the one found; inf if no number of rows does.

        Detection has probability `power` at level `alpha`. The difference found is taken for the true one, which is a
        guess, so use the result for planning only.
        """

        def unseen(log_n):
            n = np.exp(log_n)
            return self.spread.half(alpha / 2, n) + self.spread.half(1 - power, n) > np.abs(self.difference)

        most = math.log(MOST)
        n = np.ceil(np.exp(_turn(unseen, 0.0, most, self.difference.shape)))
        share = np.maximum(self.informative, 1) / self.spread.n  # the sign test needs `_least` rows that differ
        n = np.maximum(n, np.ceil(_least(alpha) / share))
        return np.where(unseen(most) | (self.difference == 0), np.inf, n)[()]


def _least(alpha: float) -> int:
    """Number of rows that must differ before the p of a sign test can be below alpha: it is at least 2 / 2^rows."""
    return math.floor(math.log2(2 / alpha)) + 1


def compare(a, b, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0, bounds: Bounds = None) -> Comparison:
    """How much higher a scores than b, on the same rows in the same order.

    The interval is that of the rows (`difference_interval` of the means over seeds), widened for seeds by adding the
    squares of both parts (Zou & Donner 2008). p comes from `sign_flips` of the means over seeds. With several
    seeds it is at least the p value of Student's t over rows and seeds (`Spread.half`), so that few seeds, or few rows
    that differ, cannot give a p that is too small.

    Args:
        a, b: Scores (..., S, N) or (N,).
        level: Level of the interval.
        draws: Number of draws of the sign flips.
        seed: Seed of these draws.
        bounds: (lowest, highest) possible score; None: 0 and 1 if all scores lie between these, else no bounds.

    Returns:
        The Comparison of a and b.

    Raises:
        FtjaxError: If a and b have different numbers of rows or fewer than two, or if a score is NaN or infinite.
    """
    from scipy import stats

    a, b = _scores(a, "a"), _scores(b, "b")
    if a.shape[-1] != b.shape[-1] or a.shape[-1] < 2:
        raise FtjaxError(
            f"compare: expected scores of the same rows, at least two; found {a.shape[-1]} and {b.shape[-1]} rows"
        )
    bounds, lowest, highest = _ends(bounds, a, b)
    found, seeds = spread(a, b), (a.shape[-2], b.shape[-2])
    paired = a.mean(-2) - b.mean(-2)
    # Over single runs, because means over seeds differ by less than a row of one run may.
    largest = np.maximum(a.max(-2) - b.min(-2), b.max(-2) - a.min(-2)).max(-1)
    low, high = difference_interval(paired, np.where(largest > 0, largest, highest - lowest), level)
    p = sign_flips(paired, draws=draws, seed=seed)
    if seeds != (1, 1):
        t = stats.t.isf((1 - level) / 2, found.df)
        ends = [by_seeds(x, t, bounds) for x in (a, b)]
        low, high = (np.sqrt(end**2 + ends[0][k] ** 2 + ends[1][1 - k] ** 2) for k, end in enumerate((low, high)))

        def within(log_tail):  # whether 0 lies in the interval
            return found.half(np.exp(log_tail)) >= np.abs(found.difference)

        p = np.maximum(p, 2 * np.exp(_turn(within, math.log(LEAST), math.log(0.5), found.difference.shape)))
    low, high = found.difference - low, found.difference + high
    if bounds:
        low, high = np.maximum(low, lowest - highest), np.minimum(high, highest - lowest)
    differ = (paired != 0).sum(-1)
    size = np.where(differ > 0, np.abs(paired).sum(-1) / np.maximum(differ, 1), highest - lowest)
    reach = highest - lowest if bounds else math.inf
    return Comparison(found.difference, low[()], high[()], p[()], found, seeds, differ, size, reach)


def bounds_of(*scores) -> Bounds:
    """(0, 1) if all scores lie between these, else None."""
    return (0.0, 1.0) if all(np.min(x) >= 0 and np.max(x) <= 1 for x in scores) else None


def _ends(bounds: Bounds, *scores) -> tuple[Bounds, float, float]:
    """The given bounds or those of `bounds_of`, with their ends; without bounds, the lowest and highest score found."""
    bounds = bounds or bounds_of(*scores)
    return bounds, *(bounds or (min(float(np.min(x)) for x in scores), max(float(np.max(x)) for x in scores)))


def difference_interval(paired: np.ndarray, largest, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above their mean the true mean of differences by row may lie.

    What a wins and what it loses over the rows are two means of bounded scores, each with its `mean_interval`. Their
    difference has the interval of Zou & Donner (2008) for correlated parts, as Newcombe (1998) has it for paired
    proportions. If all rows tie, the interval is therefore as wide as that of a share of 0.

    Args:
        paired: Differences by row (..., N).
        largest: The largest difference that a row can show (...).
        level: Level of the interval.

    Returns:
        (distance below the mean, distance above the mean), each (...).
    """
    scale = np.where(np.asarray(largest) > 0, largest, 1.0)[..., None]
    won, lost = np.maximum(paired, 0) / scale, np.maximum(-paired, 0) / scale
    (won_low, won_high), (lost_low, lost_high) = (mean_interval(np.minimum(x, 1), level) for x in (won, lost))
    up, down, sd = won.mean(-1), lost.mean(-1), won.std(-1) * lost.std(-1)
    together = np.divide(-up * down, sd, out=np.zeros_like(up), where=sd > 0)  # correlation: no row is both

    def apart(x, y):
        return np.sqrt(x**2 + y**2 - 2 * together * x * y) * scale[..., 0]

    return apart(up - won_low, lost_high - down), apart(won_high - up, down - lost_low)


def by_seeds(scores: np.ndarray, t, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above the mean of some seeds' scores the mean of all seeds may lie.

    It is `t` standard errors of the seeds' means. With bounds these are taken on the logit scale between the bounds,
    because a few seeds near a bound need that.

    Args:
        scores: (..., S, N).
        t: Quantile of Student's t, in standard errors.
        bounds: (lowest, highest) possible score, or None.

    Returns:
        (distance below, distance above), each (...). Both are 0 with one seed.
    """
    means = scores.mean(-1)
    mean, seeds = means.mean(-1), means.shape[-1]
    error = t * means.std(-1, ddof=1) / math.sqrt(seeds) if seeds > 1 else np.zeros(mean.shape)
    if not bounds:
        return error, error
    scale = bounds[1] - bounds[0]
    mean, error = (mean - bounds[0]) / scale, error / scale
    room = mean * (1 - mean)
    factor = np.exp(np.divide(error, room, out=np.zeros(mean.shape), where=room > 1e-15).clip(max=700))
    down, up = mean - mean / (mean + (1 - mean) * factor), mean / (mean + (1 - mean) / factor) - mean
    return down * scale, up * scale


def score_interval(scores, bounds: Bounds = None, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of the mean of scores over rows and over seeds.

    Args:
        scores: (..., S, N) or (N,).
        bounds: (lowest, highest) possible score; None: as in `compare`. The interval stays within them.
        level: Level of the interval.

    Returns:
        (low, high), each (...).
    """
    from scipy import stats

    scores = _scores(scores, "scores")
    bounds, lowest, highest = _ends(bounds, scores)
    reach, mean, seeds = (highest - lowest) or 1.0, scores.mean((-2, -1)), scores.shape[-2]
    low, high = (lowest + reach * end for end in mean_interval((scores.mean(-2) - lowest) / reach, level))
    down, up = by_seeds(scores, stats.t.isf((1 - level) / 2, seeds - 1) if seeds > 1 else 0.0, bounds)
    low, high = mean - np.hypot(mean - low, down), mean + np.hypot(high - mean, up)
    return (np.maximum(low, lowest), np.minimum(high, highest)) if bounds else (low, high)


def spread(a: np.ndarray, b: np.ndarray) -> Spread:
    """The parts of the variance of mean(a) - mean(b), by mean squares; a is (..., S_a, N), b is (..., S_b, N).

    What the residual leaves in the seeds' means after N rows is counted with the seeds and subtracted from the rows,
    where a negative part counts as 0. Each part is thus estimated from its own samples. The degrees of freedom of the
    seeds are Welch's (1947).
    """
    n = a.shape[-1]
    paired = a.mean(-2) - b.mean(-2)
    seeds, rest, squares = (np.zeros(paired.shape[:-1]) for _ in range(3))
    for x in (a, b):
        S = x.shape[-2]
        if S == 1:
            continue
        variance = x.mean(-1).var(-1, ddof=1) / S
        left = x - x.mean(-1, keepdims=True) - x.mean(-2, keepdims=True) + x.mean((-2, -1), keepdims=True)
        seeds = seeds + variance
        rest = rest + (left**2).sum((-2, -1)) / ((S - 1) * (n - 1) * S)
        squares = squares + variance**2 / (S - 1)
    df = np.where(squares > 0, seeds**2 / np.where(squares > 0, squares, 1), np.inf)
    return Spread(paired.mean(-1), np.maximum(paired.var(-1, ddof=1) - rest, 0), seeds, rest, df, n)


def _turn(falls: Callable, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
    """Where `falls` goes from True to False between low and high (shape), by bisection; one of the ends if it never
    does."""
    low, high = np.full(shape, low), np.full(shape, high)
    for _ in range(60):
        middle = (low + high) / 2
        true = falls(middle)
        low, high = np.where(true, middle, low), np.where(true, high, middle)
    return high


def sign_flips(paired: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Two-sided p for no difference, from differences by row (..., N). Without a difference, each row's sign is a coin
    toss.

    This is the paired permutation test: draws from all 2^N sign patterns, with the observed pattern among them. Ties
    count half (mid-p). For scores of 0 and 1 this is McNemar's mid-p test, which keeps its level where the exact test
    falls short of it (Fagerland, Lydersen & Laake 2013). No p is below 2 / 2^(rows that differ), so five such rows are
    never significant.

    Args:
        paired: Differences by row (..., N).
        draws: Number of drawn patterns.
        seed: Seed of the draws.

    Returns:
        p (...).
    """
    n = paired.shape[-1]
    flat = paired.reshape(-1, n).T
    flat = flat[(flat != 0).any(1)]  # leave out rows that tie in every pair
    observed, close = np.abs(flat.sum(0)), CLOSE * np.abs(flat).sum(0)
    above, equal = np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
    for signs in _coins(len(flat), draws, seed):
        beyond = np.abs(signs @ flat) - observed
        above += (beyond > close).sum(0)
        equal += (np.abs(beyond) <= close).sum(0)
    p = np.clip((above + equal / 2 + 1) / (draws + 1), 2 * 0.5 ** (flat != 0).sum(0), 1)
    return np.where(observed <= close, 1.0, p).reshape(paired.shape[:-1])[()]


def _coins(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (B, n) of -1 and 1, with `draws` rows in all."""
    rng, block = np.random.default_rng(seed), max(1, BLOCK // max(n, 1))
    for start in range(0, draws, block):
        yield rng.integers(2, size=(min(block, draws - start), n), dtype=np.int8) * 2.0 - 1


def holm(p) -> np.ndarray:
    """Holm's (1979) adjustment of p values (M,) of M questions that are asked at once.

    If an adjusted p counts as significant below alpha, the probability that any of the M is a false positive is at most
    alpha, whatever the dependence between them.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


class Verdict(NamedTuple):
    """The verdict on a contender compared with the base. Figures are for scores as given; `says` is about which is
    better."""

    says: str  # better | worse | cannot tell
    text: str  # cell of a report's row
    difference: float  # contender - base
    low: float
    high: float
    p: float  # adjusted by Holm over all contenders
    smallest: float  # difference that would have been detected with probability POWER
    needed: float  # rows that would detect the difference found; inf: no number of rows would


def verdicts(
    scores: dict[str, np.ndarray],
    base: str,
    *,
    higher: bool = True,
    level: float = LEVEL,
    seed: int = 0,
    draws: int = DRAWS,
    bounds: Bounds = None,
) -> dict[str, Verdict]:
    """Compare every contender with the base.

    A contender is better or worse if its p, adjusted by Holm over all contenders, is below 1 - level. The intervals are
    each at `level` and are not adjusted. `smallest` and `needed` are for Holm's first and strictest step.

    Args:
        scores: {name: (S, N) or (N,)}, all of the same rows.
        base: The contender that the others are compared with.
        higher: Whether more is better.
        level: Level of the intervals.
        seed, draws, bounds: See `compare`.

    Returns:
        {name: Verdict} of every contender but the base, in order.

    Raises:
        FtjaxError: If the base is unknown or the scores cannot be compared.
    """
    check_known(base, scores, "verdicts: unknown contender")
    arrays = {name: _scores(x, name) for name, x in scores.items()}
    odd = [name for name, x in arrays.items() if x.ndim != 2 or x.shape[1] != arrays[base].shape[1]]
    if odd:
        raise FtjaxError(
            f"verdicts: {odd[0]!r} has scores {np.shape(scores[odd[0]])}; expected (seeds, rows) with the "
            f"{arrays[base].shape[1]} rows of {base!r}"
        )
    others = [name for name in scores if name != base]
    how = {"level": level, "draws": draws, "seed": seed, "bounds": bounds or bounds_of(*arrays.values())}
    found = [compare(arrays[name], arrays[base], **how) for name in others]
    adjusted = holm([c.p for c in found])
    strict = (1 - level) / max(1, len(others))
    return {
        name: _verdict(c, p, bool((c.difference > 0) == higher), 1 - level, strict)
        for name, c, p in zip(others, found, adjusted)
    }


def _verdict(c: Comparison, p: float, up: bool, alpha: float, strict: float) -> Verdict:
    smallest, needed = float(c.smallest(strict)), float(c.needed(strict))
    if p < alpha:
        says = text = "better" if up else "worse"
    else:
        needed = max(needed, c.spread.n + 1.0)  # the test and Student's t may disagree slightly
        says, text = "cannot tell", macros("undecided.jinja", rounded=rounded).text(c, needed, math.isfinite(needed))
    return Verdict(says, text, *map(float, (c.difference, c.low, c.high, p)), smallest, needed)


def rounded(rows: float) -> int:
    """A number of rows rounded up to two significant digits."""
    unit = 10 ** max(0, len(str(int(rows))) - 2)
    return math.ceil(rows / unit) * unit


def _scores(x, name: str) -> np.ndarray:
    """The scores as (..., S, N) float64. Raises FtjaxError for another shape and for NaN or infinite scores."""
    x = np.asarray(x, float)
    x = x[None] if x.ndim == 1 else x
    bad = np.argwhere(~np.isfinite(x))
    if x.ndim < 2 or len(bad):
        where = f"row {bad[0][-1] + 1} holds {x[tuple(bad[0])]}" if len(bad) else f"found shape {x.shape}"
        raise FtjaxError(f"scores of {name!r}: expected a number for each row; {where}")
    return x
