"""How often the intervals of a comparison hold the truth, and how often it finds a difference where there is none.

    python scripts/simulate_verdict.py [--sets 2000]

Contenders that are right or wrong on each of N rows, with S seeds. A contender is right on a row where a normal
deviate lies below the quantile of its true share; the deviate is a sum of a part of the row (which both contenders
share in part), one of the seed, and one of this very answer. So each true share is exact, rows are hard for all alike,
and whole runs are better or worse. Prints one line for each N, S and true share, the worst over all mixes of the parts
and, for differences, over all true shares of the other contender.
"""

import argparse
import itertools

import numpy as np
from scipy import stats

from ftjax.verdict.statistics import compare, score_interval

ROWS = (10, 20, 50, 300)
SEEDS = (1, 3)
SHARES = (0.0, 0.05, 0.5, 1.0)
MIXES = tuple(itertools.product((0.0, 0.4, 0.8), (0.0, 0.1)))  # variance of the row's part, and of the seed's


def contender(rng, hard, share, seeds, row, seed):
    """Right or wrong (sets, seeds, N) of a contender that is right on `share` of rows; hard (sets, 1, N): normal."""
    sets, _, n = hard.shape
    seed = seed if seeds > 1 else 0.0  # the truth of a single run is its own
    own = np.sqrt(0.7) * hard + np.sqrt(0.3) * rng.standard_normal(hard.shape)
    noise = np.sqrt(1 - row - seed) * rng.standard_normal((sets, seeds, n))
    deviate = np.sqrt(row) * own + np.sqrt(seed) * rng.standard_normal((sets, seeds, 1)) + noise
    return (deviate < stats.norm.ppf(share)).astype(float)


def worst(rng, sets, n, seeds, share, draws=2000, mixes=MIXES, others=SHARES):
    """(coverage of the score, coverage of differences, share of `better` of an equal contender) at worst."""
    score, difference, alarms = 1.0, 1.0, 0.0
    for row, seed in mixes if 0 < share < 1 else mixes[:1]:
        if seeds == 1 and seed:
            continue
        hard = rng.standard_normal((sets, 1, n))
        a = contender(rng, hard, share, seeds, row, seed)
        low, high = score_interval(a, (0.0, 1.0))
        score = min(score, np.mean((low <= share) & (share <= high)))
        for other, their in itertools.product(others, {1, seeds}):
            b = contender(rng, hard, other, their, row, seed)
            found = compare(a, b, draws=draws)
            held = np.mean((found.low <= share - other + 1e-12) & (share - other - 1e-12 <= found.high))
            difference = min(difference, held)
            if share == other:
                alarms = max(alarms, np.mean((found.p < 0.05) & (found.difference > 0)))
    return score, difference, alarms


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=2000, help="simulated comparisons of each kind")
    sets = parser.parse_args().sets
    print("| rows | seeds | true share | score held | difference held | false `better` |")
    print("|---|---|---|---|---|---|")
    for n, seeds, share in itertools.product(ROWS, SEEDS, SHARES):
        score, difference, alarms = worst(np.random.default_rng(0), sets, n, seeds, share)
        print(f"| {n} | {seeds} | {share} | {score:.1%} | {difference:.1%} | {alarms:.1%} |", flush=True)


if __name__ == "__main__":
    main()
