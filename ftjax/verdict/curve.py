"""Learning curves: what a figure comes to with more data, or with a larger model, and how far that can be said.

K amounts, S runs at each, M draws of the law.

The law is error(n) = a + b (n + n0)^-c with a >= 0, b >= 0: a power law that falls to what no amount mends (Hestness et
al. 2017), and may begin with a plateau, as figures do that stand at chance until there are n0 rows. What is known of
its parameters is told by draws from their posterior: a best fit with its standard errors is far too sure of itself
where the curve has not bent yet, which is where one asks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError

LEAST = 4  # different amounts that a law is fitted to
LEVEL = 0.95
DRAWS = 4000
EXPONENTS = np.geomspace(0.05, 2, 40)  # c; each as likely as any other before the figures are seen
STARTS = 8  # values of n0 above 0, from the smallest amount to the largest; together as likely as n0 = 0
MISFITS = np.geomspace(0.1, 30, 20)  # of the law at a point: standard deviations, by that of a point's mean
EACH = 16  # draws of (a, b) at every combination of the three
PRIOR = 2.0  # degrees of freedom that a point's spread over runs has from the others'


class Range(NamedTuple):
    """A figure, and between which two it lies with LEVEL."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is known of a figure's law, from `fit`. Arrays (M,) are draws of it, each as likely as any other."""

    amounts: np.ndarray  # (K,) ascending
    means: np.ndarray  # (K,) of the figures over runs
    runs: int  # of a point, the fewest
    spread: np.ndarray  # (K,) standard deviation from run to run
    noise: float  # of a figure, by the sampling of the rows it is measured on
    sign: int  # -1: error = best - figure
    best: float
    first: np.ndarray  # (M,) error at the smallest amount
    last: np.ndarray  # (M,) at the largest
    exponent: np.ndarray  # (M,) c
    start: np.ndarray  # (M,) n0
    misfit: np.ndarray  # (M,) standard deviation of what the law leaves out at a point
    normal: np.ndarray  # (3, M) of what is measured
    bounds: tuple[float, float]  # between which every figure lies

    def law(self, n: float) -> np.ndarray:
        """The figure (M,) at an amount, by every draw."""
        share = _share(n, self.amounts, self.exponent, self.start)
        return self.best + self.sign * (self.last + (self.first - self.last) * share)

    def measured(self, n: float) -> np.ndarray:
        """As `law`, were it measured: the mean of as many runs, on the same rows as the points."""
        at = np.interp(math.log(n), np.log(self.amounts), self.spread)
        found = self.law(n) + self.misfit * self.normal[0] + at / math.sqrt(self.runs) * self.normal[1]
        return np.clip(found, *self.bounds)

    def predict(self, n: float, same_rows: bool = False) -> Range:
        """What would be measured at an amount: the mean of as many runs, on as many other rows of the kind.

        same_rows: on the very rows that the points were measured on.
        """
        # Other rows differ from the mean of all, and so do those that the law is known from.
        other = 0.0 if same_rows else math.sqrt(2) * self.noise
        return _range(np.clip(self.measured(n) + other * self.normal[2], *self.bounds))

    def gain(self, times: float = 2) -> Range:
        """How much higher than by the law at the largest amount the figure would be measured with `times` as much."""
        n = self.amounts[-1]
        return _range(self.measured(times * n) - self.law(n))

    def sentence(self, what: str = "the data", times: float = 2) -> str:
        """What more would bring, in words."""
        found, name = self.gain(times), {2: "twice", 3: "three times"}.get(times, f"{times:g} times")
        return f"{name} {what} would bring about {found.value:+.2g} ({found.low:+.2g} to {found.high:+.2g})"


def fit(
    points: Mapping[float, Sequence[float]],
    *,
    higher: bool = True,
    best: float | None = None,
    worst: float | None = None,
    bounded: bool = True,
    noise: float = 0.0,
    seed: int = 0,
) -> Curve:
    """The law of a figure over amounts.

    Points are weighted by their spread over runs; where runs are few it is taken together with that of the others,
    along the amounts. How far the law itself misses a point is told by the points, so that it counts for more where
    they do not lie on any law.

    Args:
        points: Amount -> the figure of every run there.
        higher: Whether more is better.
        best: What no figure passes; None: 1, or 0 where less is better.
        worst: What no figure passes at the other end; None: there is no such bound.
        bounded: Whether there is a best.
        noise: Standard deviation of a figure by the sampling of the rows that it is measured on, which are the same at
            all points.
        seed: Of the draws.

    In simulated laws, with four or six amounts and two or three runs, the interval of `predict` at 4 and 8 times the
    largest amount held what was measured there in 93 to 100 % of draws, 98 % on average. Raises FtjaxError for fewer
    than LEAST amounts, amounts and figures that are no such.
    """
    amounts = np.array(sorted(points), float)
    if len(amounts) < LEAST:
        raise FtjaxError(f"a curve is fitted to {LEAST} different amounts or more; there are {len(amounts)}")
    values = [np.asarray(points[n], float) for n in sorted(points)]
    if amounts[0] <= 0 or not all(len(v) and np.isfinite(v).all() for v in values):
        raise FtjaxError("a curve is fitted to amounts above 0, with a number of one run or more at each")
    sign = -1 if higher else 1
    bound = float(higher if best is None else best)
    errors = np.array([sign * (v.mean() - bound) for v in values])
    runs = np.array([len(v) for v in values])
    spread = _spread(np.log(amounts), values)
    rng = np.random.default_rng(seed)

    scale = math.sqrt(np.mean(spread**2 / runs)) or noise or np.ptp(errors) / 10 or abs(errors[0]) / 100 or 1e-6
    starts = np.concatenate([[0.0], np.geomspace(amounts[0], amounts[-1], STARTS)])
    c, n0, tau = (
        a.ravel() for a in np.meshgrid(EXPONENTS, starts, MISFITS * max(scale, np.ptp(errors) / 100), indexing="ij")
    )
    # Before the figures: n0 = 0 half of the time; of the misfit a half-Cauchy of a point's own standard deviation.
    prior = np.where(n0 == 0, math.log(STARTS), 0.0) + np.log(tau) - np.log1p((tau / scale) ** 2)
    # Given these, errors are linear in those at both ends, (first, last): weighted least squares, in closed form.
    share = np.stack([_share(n, amounts, c, n0) for n in amounts], axis=1)  # (cells, K)
    weight = 1 / (spread**2 / runs + tau[:, None] ** 2)
    columns = np.stack([share, 1 - share], axis=2)  # (cells, K, 2)
    normal = np.einsum("gki,gk,gkj->gij", columns, weight, columns)
    ends = np.linalg.solve(normal, np.einsum("gki,gk,k->gi", columns, weight, errors)[..., None])[..., 0]
    left = errors - np.einsum("gki,gi->gk", columns, ends)
    evidence = 0.5 * np.log(weight).sum(1) - 0.5 * np.linalg.slogdet(normal)[1] - 0.5 * (weight * left**2).sum(1)
    evidence += prior
    root = np.linalg.cholesky(np.linalg.inv(normal))
    drawn = ends[:, None] + rng.standard_normal((len(c), EACH, 2)) @ np.swapaxes(root, -1, -2)
    # a >= 0, b >= 0: draws that break these are left out, which makes the rest those of the bounded posterior.
    first, last = drawn[..., 0], drawn[..., 1]
    limit = last + (first - last) * _limit(amounts, c, n0)[:, None]
    holds = (first >= last) & ((limit >= 0) | (not bounded))
    chance = np.where(holds, np.exp(evidence - evidence.max())[:, None], 0.0).ravel()
    if not chance.sum() > 0:
        raise FtjaxError("no law of a falling error comes near these figures; look at the points")
    chosen = rng.choice(len(chance), DRAWS, p=chance / chance.sum())
    cell = chosen // EACH
    ends = (bound if bounded else -sign * math.inf, sign * math.inf if worst is None else worst)
    return Curve(
        amounts, np.array([v.mean() for v in values]), int(runs.min()), spread, float(noise), sign, bound,
        first.ravel()[chosen], last.ravel()[chosen], c[cell], n0[cell], tau[cell], rng.standard_normal((3, DRAWS)),
        (min(ends), max(ends)),
    )  # fmt: skip


def report(
    points: Mapping[float, Sequence[float]],
    *,
    whole: tuple[float, Sequence[float]] | None = None,
    at: Sequence[float] = (),
    what: str = "the data",
    **how,
) -> dict:
    """A figure over amounts as plain data for a report and a picture; how: of `fit`.

    whole: a further amount and its runs' figures, on which the law of the points is checked before it is fitted to all;
    at: amounts for which the figure is told. {"points": [{"amount", "values"}], "says": a sentence, or why there is
    none, "law": [{"amount", "value", "low", "high"}] up to 4 times the largest amount or the largest of `at`,
    "predicted": as `law` at `at`, "check": {"amount", "value", "low", "high", "measured", "inside"} or None}.
    """
    points = {n: list(map(float, values)) for n, values in points.items() if len(values)}
    every = points | ({whole[0]: list(map(float, whole[1]))} if whole and len(whole[1]) else {})
    out = drawn(every) | {"predicted": [], "says": ""}
    try:
        law = fit(every, **how)
        if len(every) > len(points) >= LEAST:
            n, measured = whole[0], float(np.mean(whole[1]))
            found = fit(points, **how).predict(n, same_rows=True)
            inside = found.low <= measured <= found.high
            out["check"] = {"amount": n, **found._asdict(), "measured": measured, "inside": inside}
    except FtjaxError as error:
        return out | {"says": f"{error}"}
    end = max(4 * law.amounts[-1], *at, 0)
    out["law"] = [{"amount": float(n)} | _law(law, n) for n in np.geomspace(law.amounts[0], end, 60)]
    out["predicted"] = [{"amount": n, **law.predict(n)._asdict()} for n in at]
    return out | {"says": law.sentence(what)}


def drawn(points: Mapping[float, Sequence[float]]) -> dict:
    """A figure over amounts without a law, as `report` gives it to a picture."""
    return {"points": [{"amount": n, "values": points[n]} for n in sorted(points)], "law": [], "check": None}


def _law(law: Curve, n: float) -> dict:
    return _range(law.measured(n))._asdict()


def _share(n, amounts: np.ndarray, c: np.ndarray, n0: np.ndarray) -> np.ndarray:
    """Of the fall from the smallest amount to the largest, what is still to come at n: 1, 0, and below 0 beyond."""
    first, at = (np.log((x + n0) / (amounts[-1] + n0)) for x in (amounts[0], n))
    return np.expm1(-c * at) / np.expm1(-c * first)


def _limit(amounts: np.ndarray, c: np.ndarray, n0: np.ndarray) -> np.ndarray:
    """`_share` without end."""
    return -1 / np.expm1(-c * np.log((amounts[0] + n0) / (amounts[-1] + n0)))


def _spread(at: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """Standard deviation from run to run at each point, (K,); 0 everywhere where no point has two runs.

    A point's own variance has as many degrees of freedom as it has runs but one; a line through the logarithms of all,
    along those of the amounts, is worth PRIOR more.
    """
    from scipy.special import digamma

    df = np.array([len(v) - 1 for v in values])
    own = np.array([v.var(ddof=1) if len(v) > 1 else 0.0 for v in values])
    told = (df > 0) & (own > 0)
    if not told.any():
        return np.zeros(len(values))
    # The logarithm of a variance of few runs is too low on average, by a known amount.
    logs = np.log(own[told]) - digamma(df[told] / 2) + np.log(df[told] / 2)
    slope = np.polyfit(at[told], logs, 1, w=np.sqrt(df[told]))[0] if told.sum() > 2 else 0.0
    slope = np.clip(slope, -1, 0)  # a mean's variance falls no faster than by 1 / n; runs on more data do not part more
    level = np.sum(df * own * np.exp(-slope * (at - at[-1]))) / df.sum()
    line = level * np.exp(slope * (at - at[-1]))
    return np.sqrt((PRIOR * line + df * own) / (PRIOR + df))


def _range(draws: np.ndarray) -> Range:
    low, value, high = np.quantile(draws, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return Range(float(value), float(low), float(high))
