"""Learning curves: how a figure grows with more data or with a larger model, and how certain that is.

K amounts, S runs at each, M draws of the law.

The law is error(n) = a + b (n + n0)^-c with a >= 0, b >= 0. It is a power law that falls to an error which no amount
removes (Hestness et al. 2017). It may begin with a plateau, because some figures stay at chance until there are n0
rows. Its parameters are described by draws from their posterior. A best fit with standard errors would be far too
certain while the curve has not bent yet, and that is when users ask for a prediction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import FtjaxError

LEAST = 4  # smallest number of different amounts that a law is fitted to
LEVEL = 0.95
DRAWS = 4000
EXPONENTS = np.geomspace(0.05, 2, 40)  # values of c; their prior is uniform
STARTS = 8  # values of n0 above 0, from the smallest amount to the largest; together as likely as n0 = 0
MISFITS = np.geomspace(0.1, 30, 20)  # standard deviations of a point's misfit, in units of that of a point's mean
EACH = 16  # draws of (a, b) for each combination of c, n0 and misfit
PRIOR = 2.0  # degrees of freedom that the other points add to a point's spread over runs


class Range(NamedTuple):
    """A figure, and the two values between which it lies with probability LEVEL."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """The posterior of a learning curve, from `fit`. Arrays (M,) are draws of it, each as likely as any other."""

    amounts: np.ndarray  # (K,) ascending
    runs: int  # of the point with the fewest runs
    spread: np.ndarray  # (K,) standard deviation from run to run
    noise: float  # standard deviation of a figure from the sampling of rows
    sign: int  # -1: error = best - figure; 1: error = figure - best
    best: float
    first: np.ndarray  # (M,) error at the smallest amount
    last: np.ndarray  # (M,) at the largest
    exponent: np.ndarray  # (M,) c
    start: np.ndarray  # (M,) n0
    misfit: np.ndarray  # (M,) standard deviation of a point's misfit
    normal: np.ndarray  # (3, M) standard normal draws for misfit, runs and rows
    bounds: tuple[float, float]  # lowest and highest possible figure

    def law(self, n: float) -> np.ndarray:
        """The law's figure (M,) at amount n, for every draw."""
        share = _share(n, self.amounts, self.exponent, self.start)
        return self.best + self.sign * (self.last + (self.first - self.last) * share)

    def measured(self, n: float) -> np.ndarray:
        """Draws (M,) of the figure that would be measured at amount n: the mean of as many runs as the points have, on
        the same rows."""
        at = np.interp(math.log(n), np.log(self.amounts), self.spread)
        found = self.law(n) + self.misfit * self.normal[0] + at / math.sqrt(self.runs) * self.normal[1]
        return np.clip(found, *self.bounds)

    def predict(self, n: float, same_rows: bool = False) -> Range:
        """The figure that would be measured at amount n on other rows of the same kind.

        The prediction is for a mean of the same number of runs and rows as the points. same_rows: whether it would be
        measured on the same rows as the points.
        """
        # Twice the variance, because both the other rows and the rows of the fit are samples.
        other = 0.0 if same_rows else math.sqrt(2) * self.noise
        return _range(np.clip(self.measured(n) + other * self.normal[2], *self.bounds))

    def gain(self) -> Range:
        """The figure that would be measured at twice the largest amount, less the law's figure at the largest
        amount."""
        n = self.amounts[-1]
        return _range(self.measured(2 * n) - self.law(n))

    def sentence(self, what: str = "the data") -> str:
        """A sentence on what twice as much would bring. what: name of the amounts."""
        found = self.gain()
        return f"twice {what} would bring about {found.value:+.2g} ({found.low:+.2g} to {found.high:+.2g})"


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
    """Fit the law of a figure over amounts.

    Points are weighted by their spread over runs. With few runs, a point's spread is estimated together with that of
    the other points, along the amounts. The misfit between the points and the law is estimated too, so that it counts
    for more if the points do not lie on any law.

    In simulations of such laws, with four or six amounts and two or three runs, the interval of `predict` at 4 and 8
    times the largest amount contained the measured figure in 93 to 100 % of draws, 98 % on average.

    Args:
        points: {amount: the figure of every run at it}.
        higher: Whether more is better.
        best: The bound that no figure passes; None: 1, or 0 if less is better.
        worst: The bound at the other end; None: no such bound.
        bounded: Whether there is a best.
        noise: Standard deviation of a figure from the sampling of the rows that it is measured on, which are the same
            at all points.
        seed: Seed of the draws.

    Returns:
        The Curve.

    Raises:
        FtjaxError: If there are fewer than LEAST amounts, if an amount is not above 0 or a figure is not finite, or if
            no law comes near the points.
    """
    amounts = np.array(sorted(points), float)
    if len(amounts) < LEAST:
        raise FtjaxError(f"a learning curve needs at least {LEAST} different amounts; found {len(amounts)}")
    values = [np.asarray(points[n], float) for n in sorted(points)]
    if amounts[0] <= 0 or not all(len(v) and np.isfinite(v).all() for v in values):
        raise FtjaxError("a learning curve needs amounts above 0, each with the finite score of at least one run")
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
    # Prior: n0 = 0 with probability 1/2; the misfit is half-Cauchy, scaled by the standard deviation of a point's mean.
    prior = np.where(n0 == 0, math.log(STARTS), 0.0) + np.log(tau) - np.log1p((tau / scale) ** 2)
    # Given these, the errors are linear in (first, last): weighted least squares in closed form.
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
    # Draws that violate a >= 0 or b >= 0 are left out. The rest are draws of the posterior with these bounds.
    first, last = drawn[..., 0], drawn[..., 1]
    limit = last + (first - last) * _share(math.inf, amounts, c, n0)[:, None]
    holds = (first >= last) & ((limit >= 0) | (not bounded))
    chance = np.where(holds, np.exp(evidence - evidence.max())[:, None], 0.0).ravel()
    if not chance.sum() > 0:
        raise FtjaxError("no curve of an error that falls with the amount fits these scores; look at the single points")
    chosen = rng.choice(len(chance), DRAWS, p=chance / chance.sum())
    cell = chosen // EACH
    ends = (bound if bounded else -sign * math.inf, sign * math.inf if worst is None else worst)
    return Curve(
        amounts, int(runs.min()), spread, float(noise), sign, bound,
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
    """A figure over amounts as plain data, for a report and a picture.

    Args:
        points: {amount: the figure of every run at it}.
        whole: (amount, figures of its runs) of a further amount. The law of `points` is checked on it before the law is
            fitted to all. None: no check.
        at: Amounts for which the figure is predicted.
        what: Name of the amounts in the sentence.
        how: Arguments of `fit`.

    Returns:
        A dict with these keys. If no law can be fitted, "law" and "predicted" are empty and "says" gives the reason.

        - "points": [{"amount", "values"}].
        - "says": the sentence of Curve.sentence.
        - "law": [{"amount", "value", "low", "high"}] up to 4 times the largest amount or the largest of `at`.
        - "predicted": the same at each of `at`.
        - "check": {"amount", "value", "low", "high", "measured", "inside"}, or None.
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
    out["law"] = [
        {"amount": float(n), **_range(law.measured(n))._asdict()} for n in np.geomspace(law.amounts[0], end, 60)
    ]
    out["predicted"] = [{"amount": n, **law.predict(n)._asdict()} for n in at]
    return out | {"says": law.sentence(what)}


def drawn(points: Mapping[float, Sequence[float]]) -> dict:
    """A figure over amounts without a law, in the form that `report` returns to a picture."""
    return {"points": [{"amount": n, "values": points[n]} for n in sorted(points)], "law": [], "check": None}


def _share(n, amounts: np.ndarray, c: np.ndarray, n0: np.ndarray) -> np.ndarray:
    """Fraction of the error drop from the smallest amount to the largest that remains at n: 1, 0, and negative
    beyond. n may be infinite."""
    first, at = (np.log((x + n0) / (amounts[-1] + n0)) for x in (amounts[0], n))
    return np.expm1(-c * at) / np.expm1(-c * first)


def _spread(at: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """Standard deviation from run to run at each point (K,); 0 everywhere if no point has two runs.

    A point's own variance has one degree of freedom less than it has runs. A line through the logarithms of all
    variances, along those of the amounts, adds PRIOR degrees of freedom.
    """
    from scipy.special import digamma

    df = np.array([len(v) - 1 for v in values])
    own = np.array([v.var(ddof=1) if len(v) > 1 else 0.0 for v in values])
    usable = (df > 0) & (own > 0)
    if not usable.any():
        return np.zeros(len(values))
    # The logarithm of a variance from a few runs is too low on average, by a known amount.
    logs = np.log(own[usable]) - digamma(df[usable] / 2) + np.log(df[usable] / 2)
    slope = np.polyfit(at[usable], logs, 1, w=np.sqrt(df[usable]))[0] if usable.sum() > 2 else 0.0
    slope = np.clip(slope, -1, 0)  # variance falls no faster than 1 / n and does not grow with data
    level = np.sum(df * own * np.exp(-slope * (at - at[-1]))) / df.sum()
    line = level * np.exp(slope * (at - at[-1]))
    return np.sqrt((PRIOR * line + df * own) / (PRIOR + df))


def _range(draws: np.ndarray) -> Range:
    low, value, high = np.quantile(draws, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return Range(float(value), float(low), float(high))
