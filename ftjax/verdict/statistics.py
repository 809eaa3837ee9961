"""Whether one contender is better than another on the same rows: difference, interval, test, power, verdict.

N rows, S seeds of a contender. Scores are (..., S, N): how each run scored on each row. Leading axes are pairs that are
compared at once.

Rows and seeds are both samples: the question is about other rows of the kind, and about training again. A score is
taken as mean + seed + row + rest, with seeds that are independent from contender to contender, so that the variance of
a difference of means has a part of rows and a part of seeds (`spread`). With one seed there is nothing to be said of
seeds: the verdict is about that very run, which is fair for a base model that is not trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError, nearest
from ftjax.evaluation.resample import BLOCK, mean_interval

LEVEL = 0.95  # of intervals; 1 - LEVEL is the rate of false alarms
POWER = 0.8  # chance to tell a difference that is there
DRAWS = 10_000
MOST = 1e12  # rows; more count as infinitely many
LEAST = 1e-100  # p / 2
Bounds = tuple[float, float] | None  # the lowest and the highest score that there can be; None: there are none
CLOSE = 1e-9  # sums that differ by less, of the sum of all magnitudes, are ties


class Spread(NamedTuple):
    """A difference of means and what it varies by; arrays of the leading axes."""

    difference: np.ndarray  # a - b
    rows: np.ndarray  # variance from row to row of what all seeds of a contender share
    seeds: np.ndarray  # variance of the seeds' means over these n rows, each contender's by its S, added
    rest: np.ndarray  # what a single row adds to `seeds`: falls as 1 / n
    df: np.ndarray  # degrees of freedom of `seeds`
    n: int  # rows

    def half(self, tail, n=None) -> np.ndarray:
        """Half the width of the interval of which a share `tail` lies on either side, were there `n` rows.

        The interval of a sum of independent parts from those of the parts: their halves, by Student's t each, are added
        as squares (Howe 1974; Zou & Donner 2008). With three seeds or more of what is trained, an interval at 95 % held
        the truth in 95 to 98 % of simulated sets, whatever the shares of rows and seeds; with two, in 94 % at worst.
        One t for the summed variance (Satterthwaite 1946) held it in 92 % where three seeds matter more than the rows.
        """
        from scipy import stats

        rows, seeds = self.rows / (self.n if n is None else n), self.seeds
        if n is not None:
            seeds = np.maximum(seeds - self.rest / self.n, 0) + self.rest / n
        return np.sqrt(stats.t.isf(tail, self.n - 1) ** 2 * rows + stats.t.isf(tail, self.df) ** 2 * seeds)


class Comparison(NamedTuple):
    """`compare` of a and b; arrays of the leading axes, plain numbers where there are none."""

    difference: np.ndarray  # of means, a - b
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray  # two-sided, of no difference
    spread: Spread
    seeds: tuple[int, int]
    informative: np.ndarray  # rows on which the two differ
    size: np.ndarray  # mean size of the difference on those; where there are none, the largest that a row can show
    reach: float  # the largest difference that there can be; inf without bounds

    def smallest(self, alpha: float = 1 - LEVEL, power: float = POWER) -> np.ndarray:
        """The smallest true difference that these rows and seeds would show with chance `power`, tested at `alpha`.

        So few informative rows as may be found show little of their variance. So it is at least the difference with
        which enough rows for the sign test differ with that chance; infinite where not even the largest would show.
        """
        from scipy import stats

        n, least = self.spread.n, _least(alpha)
        share = stats.beta.ppf(power, least, n - least + 1) if n >= least else math.inf
        found = np.maximum(self.spread.half(alpha / 2) + self.spread.half(1 - power), share * self.size)
        return np.where(found > self.reach, np.inf, found)[()]

    def needed(self, alpha: float = 1 - LEVEL, power: float = POWER) -> np.ndarray:
        """Rows with which a true difference as large as the one found would show; inf where no number would do.

        It takes the difference found for the true one, which is a guess: a figure to plan by.
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
    """Rows that must differ before any sign test can be below alpha: its p is at least 2 / 2^rows."""
    return math.floor(math.log2(2 / alpha)) + 1


def compare(a, b, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0, bounds: Bounds = None) -> Comparison:
    """How much higher a scores than b, on the same rows in the same order.

    The interval is that of the rows (`difference_interval` of the means over seeds), widened for seeds by the squares
    of both parts (Zou & Donner 2008). p is that of `sign_flips` of the means over seeds; with several seeds it is the
    larger of that and of the p by Student's t of rows and seeds (`Spread.half`), so that neither few seeds nor few
    rows that differ can show what they cannot know.

    Args:
        a, b: Scores (..., S, N) or (N,).
        level: Of the interval.
        draws: Of the sign flips.
        seed: Of these draws.
        bounds: (lowest, highest) score that there can be; None: 0 and 1 where all scores lie between these, else none.

    Raises:
        FtjaxError: Where rows differ in number, are fewer than two, or hold what is no number.
    """
    from scipy import stats

    a, b = _scores(a, "a"), _scores(b, "b")
    if a.shape[-1] != b.shape[-1] or a.shape[-1] < 2:
        raise FtjaxError(f"compare: expected two rows or more, the same of both; found {a.shape[-1]} and {b.shape[-1]}")
    bounds = bounds or bounds_of(a, b)
    lowest, highest = _range(bounds, a, b)
    found, seeds = spread(a, b), (a.shape[-2], b.shape[-2])
    paired = a.mean(-2) - b.mean(-2)
    # Of single runs: means over seeds differ by less than a row may.
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
    """0 and 1 where all scores lie between these."""
    return (0.0, 1.0) if all(np.min(x) >= 0 and np.max(x) <= 1 for x in scores) else None


def _range(bounds: Bounds, *scores) -> tuple[float, float]:
    """The bounds, or else the lowest and the highest score found."""
    return bounds or (min(float(np.min(x)) for x in scores), max(float(np.max(x)) for x in scores))


def difference_interval(paired: np.ndarray, largest, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above their mean the true mean of differences by row (..., N) may lie, each (...).

    What a wins and what it loses are two means of bounded scores, each with its `mean_interval`; their difference has
    the interval of Zou & Donner (2008) for correlated parts, as Newcombe (1998) has it for paired proportions. So ties
    on all rows leave an interval as wide as that of a share of 0.

    Args:
        paired: Differences by row.
        largest: The largest difference that a row can show, (...).
        level: Of the interval.
    """
    scale = np.where(np.asarray(largest) > 0, largest, 1.0)[..., None]
    won, lost = np.maximum(paired, 0) / scale, np.maximum(-paired, 0) / scale
    (won_low, won_high), (lost_low, lost_high) = (mean_interval(np.minimum(x, 1), level) for x in (won, lost))
    up, down, sd = won.mean(-1), lost.mean(-1), won.std(-1) * lost.std(-1)
    together = np.divide(-up * down, sd, out=np.zeros_like(up), where=sd > 0)  # never on the same row

    def apart(x, y):
        return np.sqrt(x**2 + y**2 - 2 * together * x * y) * scale[..., 0]

    return apart(up - won_low, lost_high - down), apart(won_high - up, down - lost_low)


def by_seeds(scores: np.ndarray, t, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above the mean of scores (..., S, N) that of all seeds may lie, each (...): `t` standard
    errors, with bounds on the scale of logits between them, which few seeds near a bound need; 0 with one seed."""
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
    """(low, high), each (...), of the mean of scores (..., S, N) over rows and over seeds; within the bounds."""
    from scipy import stats

    scores = _scores(scores, "scores")
    bounds = bounds or bounds_of(scores)
    lowest, highest = _range(bounds, scores)
    reach, mean, seeds = (highest - lowest) or 1.0, scores.mean((-2, -1)), scores.shape[-2]
    low, high = (lowest + reach * end for end in mean_interval((scores.mean(-2) - lowest) / reach, level))
    down, up = by_seeds(scores, stats.t.isf((1 - level) / 2, seeds - 1) if seeds > 1 else 0.0, bounds)
    low, high = mean - np.hypot(mean - low, down), mean + np.hypot(high - mean, up)
    return (np.maximum(low, lowest), np.minimum(high, highest)) if bounds else (low, high)


def spread(a: np.ndarray, b: np.ndarray) -> Spread:
    """The parts of the variance of mean(a) - mean(b), by mean squares; a (..., S_a, N), b (..., S_b, N).

    What `rest` leaves in the seeds' means after N rows is counted with the seeds and taken off the rows, where a
    negative part counts as 0; so each part is told by its own samples. Degrees of freedom of seeds are Welch's (1947).
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
    """Where `falls` goes from True to False between low and high, (shape), by bisection; an end where it never does."""
    low, high = np.full(shape, low), np.full(shape, high)
    for _ in range(60):
        middle = (low + high) / 2
        true = falls(middle)
        low, high = np.where(true, middle, low), np.where(true, high, middle)
    return high


def sign_flips(paired: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Two-sided p of no difference, from differences by row (..., N): which contender scored which way is a coin.

    Draws from all 2^N ways (the paired permutation test), with the observed way among them. Ties count half (mid-p):
    with right-or-wrong scores this is McNemar's mid-p test, which keeps its level where the exact test falls short of
    it (Fagerland, Lydersen & Laake 2013). No p is below 2 / 2^(rows that differ): five such rows never tell.
    """
    n = paired.shape[-1]
    flat = paired.reshape(-1, n).T
    flat = flat[(flat != 0).any(1)]  # rows that say nothing, in no pair
    observed, close = np.abs(flat.sum(0)), CLOSE * np.abs(flat).sum(0)
    above, equal = np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
    for signs in _coins(len(flat), draws, seed):
        beyond = np.abs(signs @ flat) - observed
        above += (beyond > close).sum(0)
        equal += (np.abs(beyond) <= close).sum(0)
    p = np.clip((above + equal / 2 + 1) / (draws + 1), 2 * 0.5 ** (flat != 0).sum(0), 1)
    return np.where(observed <= close, 1.0, p).reshape(paired.shape[:-1])[()]


def _coins(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (B, n) of -1 and 1, `draws` rows in all."""
    rng, block = np.random.default_rng(seed), max(1, BLOCK // max(n, 1))
    for start in range(0, draws, block):
        yield rng.integers(2, size=(min(block, draws - start), n), dtype=np.int8) * 2.0 - 1


def holm(p) -> np.ndarray:
    """p values (M,) of M questions asked at once, made larger so that `< alpha` is wrong of any with chance alpha at
    most, however they hang together (Holm 1979)."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


class Verdict(NamedTuple):
    """What is said of a contender beside the base. Figures are for scores as given, `says` for what is better."""

    says: str  # better | worse | cannot tell
    text: str  # a row of a report
    comparison: Comparison  # contender - base
    p: float  # adjusted for all contenders
    smallest: float  # difference that would have shown with chance POWER
    needed: float  # rows for the difference found; inf: no number of rows


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
    """Every contender but the base, in order -> its Verdict.

    A contender is better or worse where its p, by Holm over all contenders, is below 1 - level; the intervals are each
    at `level` and not adjusted. What could have shown is told at Holm's first and strictest step.

    Args:
        scores: Name -> (S, N) or (N,), of the same rows.
        base: The contender that the others are compared with.
        higher: Whether more is better.
        level: Of the intervals.
        seed, draws, bounds: See `compare`.

    Raises:
        FtjaxError: For an unknown base and for scores that cannot be compared.
    """
    if base not in scores:
        raise FtjaxError(f"verdicts: no contender {base!r}{nearest(base, scores)}; there are {', '.join(scores)}")
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
        name: _verdict(c, float(p), bool((c.difference > 0) == higher), 1 - level, strict)
        for name, c, p in zip(others, found, adjusted)
    }


def _verdict(c: Comparison, p: float, up: bool, alpha: float, strict: float) -> Verdict:
    smallest, needed, n = float(c.smallest(strict)), float(c.needed(strict)), c.spread.n
    if p < alpha:
        says = "better" if up else "worse"
        return Verdict(says, says, c, p, smallest, needed)
    if needed <= n:  # the test and Student's t disagree by a hair
        needed = float(n + 1)
    seeds = f" and {_seeds(*c.seeds)}" if max(c.seeds) > 1 else ""
    if not c.informative:
        most = max(float(c.high), -float(c.low))
        text = f"cannot tell with {n:,} rows{seeds}: all rows score the same; only a difference above {most:.2g} is"
        return Verdict("cannot tell", f"{text} ruled out", c, p, smallest, needed)
    text = f"cannot tell with {n:,} rows{seeds}"
    if math.isfinite(needed):
        text += f"; about {rounded(needed):,} rows would do"
    elif c.difference == 0:
        text += "; there is no difference to be seen"
    else:
        text += "; more seeds are needed, no number of rows would do"
    return Verdict("cannot tell", text, c, p, smallest, needed)


def _seeds(own: int, base: int) -> str:
    """Of a contender and of what it stands beside."""
    if own == base:
        return f"{own} seeds"
    counts = [f"{n} seeds" if n > 1 else "one run" for n in (own, base)]
    return " beside ".join(counts)


def rounded(rows: float) -> int:
    """Up to two digits that count."""
    unit = 10 ** max(0, len(str(int(rows))) - 2)
    return math.ceil(rows / unit) * unit


def _scores(x, name: str) -> np.ndarray:
    """(..., S, N) float64."""
    x = np.asarray(x, float)
    x = x[None] if x.ndim == 1 else x
    bad = np.argwhere(~np.isfinite(x))
    if x.ndim < 2 or len(bad):
        where = f"row {bad[0][-1] + 1} holds {x[tuple(bad[0])]}" if len(bad) else f"found shape {x.shape}"
        raise FtjaxError(f"scores of {name!r}: expected a number for each row; {where}")
    return x
