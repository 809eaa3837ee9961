"""Verdicts by how often they are right on simulated contenders, and their parts against scipy and worked cases."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ftjax.errors import FtjaxError
from ftjax.verdict.statistics import compare, holm, score_interval, sign_flips, spread, verdicts

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import simulate_verdict as simulate  # noqa: E402

SETS, N = 2000, 200


def contender(rng, hard, seeds, mean, seed_sd, binary):
    """Scores (SETS, seeds, N) whose expected mean is `mean`.

    Rows are hard for all contenders alike (`hard`, within 1), and for each in its own way; a seed moves a whole run.
    """
    own = 0.5 * hard + 0.5 * rng.uniform(-1, 1, size=hard.shape)
    seed = seed_sd * rng.normal(size=(SETS, seeds, 1)).clip(-2, 2)
    chance = mean + (0.24 if binary else 0.4) * own + seed  # within 0 and 1
    if binary:
        return (rng.random((SETS, seeds, N)) < chance).astype(float)
    return chance + 0.2 * rng.exponential(size=(SETS, seeds, N)) - 0.2


@pytest.mark.parametrize("binary", [True, False], ids=["accuracy", "continuous"])
@pytest.mark.parametrize(
    "seeds, sd", [((1, 1), 0.0), ((3, 1), 0.0), ((3, 1), 0.05), ((3, 3), 0.0), ((3, 3), 0.05), ((3, 3), 0.1)]
)
def test_false_alarms_and_coverage_are_as_said(seeds, sd, binary):
    rng = np.random.default_rng(0)
    hard = rng.uniform(-1, 1, size=(SETS, 1, N))

    def runs(s, mean):  # one seed: a model that is not trained
        return contender(rng, hard, s, mean, sd if s > 1 else 0.0, binary)

    null = compare(runs(seeds[0], 0.5), runs(seeds[1], 0.5), draws=4000)
    real = compare(runs(seeds[0], 0.55), runs(seeds[1], 0.5), draws=4000)
    alarms = (null.p < 0.05).mean()
    held = [((c.low <= truth) & (truth <= c.high)).mean() for c, truth in ((null, 0), (real, 0.05))]
    # Of 2,000 sets, a true 5 % has a standard deviation of 0.5 %. Few seeds are taken with care: more sets are held.
    lowest, most, fewest = (0.93, 0.97, 0.04) if seeds == (1, 1) else (0.94, 0.998, 0.01)
    assert fewest <= alarms <= 0.06
    assert all(lowest <= share <= most for share in held)


def test_percentiles_over_resampled_seeds_would_be_too_narrow():
    rng = np.random.default_rng(1)
    a = contender(rng, rng.uniform(-1, 1, size=(SETS, 1, N)), 3, 0.5, 0.1, False)
    seeds, rows = rng.integers(3, size=(100, 3)), rng.integers(N, size=(100, N))
    drawn = np.stack([a[:, s][:, :, r].mean((1, 2)) for s, r in zip(seeds, rows)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert ((low <= 0.5) & (0.5 <= high)).mean() < 0.85


def test_the_smallest_difference_and_the_rows_needed_show_in_four_of_five_sets():
    rng = np.random.default_rng(0)

    def pair(n, gap):
        d = rng.normal(gap, 0.3, size=(1000, 1, n))
        base = rng.random((1000, 1, n))
        return compare(base + d, base, draws=2000)

    gap = float(np.median(pair(100, 0).smallest()))
    assert (pair(100, gap).p < 0.05).mean() == pytest.approx(0.8, abs=0.04)
    needed = float(np.median(pair(400, 0.05).needed()))
    # By the normal approximation: (1.960 + 0.842)^2 0.3^2 / 0.05^2 = 282.6
    assert needed == pytest.approx(283, rel=0.1)
    assert (pair(283, 0.05).p < 0.05).mean() == pytest.approx(0.8, abs=0.04)


def test_interval_and_p_are_those_of_scipy():
    rng = np.random.default_rng(3)
    a, b = rng.exponential(size=60), rng.exponential(1.3, size=60)
    ours = compare(a, b, draws=50_000)

    def mean(x, axis):
        return x.mean(axis)

    flipped = stats.permutation_test((a - b,), mean, permutation_type="samples", n_resamples=50_000, rng=1)
    assert ours.p == pytest.approx(flipped.pvalue, abs=0.006)
    theirs = stats.bootstrap((a - b,), np.mean, n_resamples=20_000, method="BCa", rng=2).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.06)
    assert ours.difference == pytest.approx((a - b).mean())
    # Differences of hardly any skew, of many rows: Student's t.
    d = rng.normal(0.1, 1, size=2000)
    ours, theirs = compare(d, np.zeros(2000)), stats.ttest_1samp(d, 0).confidence_interval()
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.004)


def test_impossible_statistics_cannot_be():
    """Each within 0 and 1, each with a width, no p below what so few rows that differ can show."""
    exact = stats.binomtest(20, 20).proportion_ci(method="exact")
    assert score_interval(np.ones((1, 20)), (0, 1)) == pytest.approx((exact.low, exact.high))
    low, high = score_interval(np.zeros((3, 20)), (0, 1))
    assert (low, high) == pytest.approx((0, 1 - 0.025 ** (1 / 20)))  # rows are the sample: seeds of one row are alike
    scores = np.zeros((2, 20))
    scores[0, :], scores[1, :12] = 1, 1  # accuracy 0.8, and two seeds that are far apart
    low, high = score_interval(scores, (0, 1))
    assert 0 <= low < 0.2 and 0.95 < high <= 1
    assert score_interval(100 * np.ones((1, 20)), (0, 100)) == pytest.approx((100 * exact.low, 100))

    # 16 rows that differ, all one way, in each of three seeds: by Student's t, p would be about 1e-7.
    base = np.zeros((3, 400))
    tuned = base.copy()
    tuned[:, :16] = 1
    found = compare(tuned, base)
    assert 2 / 2**16 <= found.p < 0.001 and found.informative == 16
    same = compare(tuned, tuned)
    most = 1 - 0.025 ** (1 / 400)
    assert (same.p, same.low, same.high) == (1, pytest.approx(-most), pytest.approx(most))
    # Six rows that differ are the least that a sign test can tell: that many are there with a chance of 80 %.
    assert stats.binom.sf(5, 400, same.smallest()) == pytest.approx(0.8)
    assert compare(np.ones(5), np.zeros(5)).smallest() == np.inf
    # Two seeds that are far apart would not show even the largest difference that there can be.
    assert compare(scores, np.arange(20) % 2).smallest() == np.inf


@pytest.mark.parametrize("share", simulate.SHARES)
@pytest.mark.parametrize("seeds", simulate.SEEDS)
def test_intervals_hold_true_shares_and_alarms_are_rare(seeds, share):
    """The small brother of scripts/simulate_verdict.py. Of 400 sets a true 95 % has a standard deviation of 1.1 %."""
    how = {"draws": 500, "mixes": [(0.4, 0.1 * (seeds > 1))], "others": {share, 0.05}}
    for n in simulate.ROWS:
        score, difference, alarms = simulate.worst(np.random.default_rng(n), 400, n, seeds, share, **how)
        assert score >= 0.93 and difference >= 0.93 and alarms <= 0.06, n


def test_right_or_wrong_is_mcnemars_mid_p():
    a, b = np.zeros(100), np.zeros(100)
    a[:9], b[9:11] = 1, 1  # 9 rows that a alone gets right, 2 that b alone does
    # 2 P(X <= 2) - P(X = 2), X binomial(11, 1/2): (2 (1 + 11 + 55) - 55) / 2048
    assert sign_flips(a - b, draws=200_000) == pytest.approx(79 / 2048, abs=0.002)


def test_seeds_alone_are_welchs_test():
    """Where every row moves with its run, N rows say what one does."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 1)), rng.normal(1, size=(3, 1))
    ours = compare(a + np.zeros(50), b + np.zeros(50))
    theirs = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6)
    # Rows that all say the same add a little, as 50 rows may not show one in fourteen that does not.
    assert [ours.low, ours.high] == pytest.approx([interval.low, interval.high], rel=0.05)
    assert ours.low <= interval.low and interval.high <= ours.high and ours.needed() == np.inf


def test_the_parts_of_the_variance_are_unbiased():
    rng = np.random.default_rng(0)
    S, n = 4, 30
    a = 0.5 * rng.normal(size=(4000, S, 1)) + 2 * rng.normal(size=(4000, 1, n)) + rng.normal(size=(4000, S, n))
    found = spread(a, np.zeros((4000, 1, n)))
    assert found.rows.mean() == pytest.approx(4, rel=0.02)
    assert found.rest.mean() == pytest.approx(1 / S, rel=0.02)
    assert found.seeds.mean() == pytest.approx((0.25 + 1 / n) / S, rel=0.05)
    assert (found.rows / n + found.seeds).mean() == pytest.approx(found.difference.var(), rel=0.05)


def test_holm_by_hand():
    # Sorted 0.005 0.01 0.03 0.04, times 4 3 2 1, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([0.02]) == pytest.approx([0.02]) and len(holm([])) == 0


def test_verdicts_say_better_worse_or_how_many_rows():
    rng = np.random.default_rng(0)
    base = (rng.random(200) < 0.5).astype(float)
    scores = {
        "better": np.maximum(base, rng.random(200) < 0.4),
        "base": base,
        "worse": np.minimum(base, rng.random(200) < 0.6),
        "alike": np.abs(base - (np.arange(200) % 17 == 3)),
        "same": base,
    }
    found = verdicts(scores, "base")
    assert list(found) == ["better", "worse", "alike", "same"]
    assert [v.says for v in found.values()] == ["better", "worse", "cannot tell", "cannot tell"]
    assert [v.says for v in verdicts(scores, "base", higher=False).values()][:2] == ["worse", "better"]
    alike = found["alike"]
    assert alike.needed > 200 and abs(alike.difference) < alike.smallest
    assert alike.text.startswith("cannot tell with 200 rows; about ") and alike.text.endswith("00 rows would do")
    assert found["same"].p == 1 and found["same"].text == (
        "cannot tell with 200 rows: all rows score the same; only a difference above 0.018 is ruled out"
    )
    # Four questions make each harder to answer than one.
    alone = verdicts({name: scores[name] for name in ("base", "alike")}, "base")["alike"]
    assert alone.smallest < alike.smallest and alone.p < alike.p


def test_a_verdict_may_need_seeds_instead_of_rows():
    rng = np.random.default_rng(0)
    runs = np.array([[0.1], [0.3], [-0.2]]) + 0.5 + 0.01 * rng.normal(size=(3, 400))
    (verdict,) = verdicts({"tuned": runs, "base": 0.5 + 0.01 * rng.normal(size=400)}, "base").values()
    expected = "cannot tell with 400 rows and 3 seeds beside one run; more seeds are needed, no number of rows would do"
    assert verdict.text == expected


def test_few_rows_cannot_be_told_apart():
    assert sign_flips(np.array([1.0, 2, 3, 4, 5, 0])) == 2 / 32
    assert sign_flips(np.ones(6)) == pytest.approx(2 / 64)
    (verdict,) = verdicts({"tuned": np.ones(5), "base": np.zeros(5)}, "base").values()
    assert verdict.text == "cannot tell with 5 rows; about 6 rows would do"


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"tuned": [1.0, 0.0], "base": [1.0]}, r"'tuned' has scores \(2,\); expected \(seeds, rows\) with the 1 rows"),
        ({"tuned": [1.0], "base": [1.0]}, "the same rows, at least two"),
        ({"tuned": [1.0, np.nan], "base": [1.0, 0.0]}, "'tuned': expected a number for each row; row 2 holds nan"),
        ({"tuned": [1.0, 0.5], "bse": [1.0, 0.0]}, "verdicts: unknown contender 'base' .did you mean \"bse\""),
    ],
)
def test_bad_input_is_named(scores, message):
    with pytest.raises(FtjaxError, match=message):
        verdicts(scores, "base")
