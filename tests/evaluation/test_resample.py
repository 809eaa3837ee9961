"""Bootstrap intervals against resampling row by row, against scipy, and by how often they hold the truth."""

import numpy as np
import pytest

from ftjax.errors import FtjaxError
from ftjax.evaluation import classification, resample
from ftjax.evaluation.classification import shares


def means(**statistics):
    """Figures that are means over rows."""
    return lambda counts: {name: counts @ np.asarray(x, float) / counts.sum(1) for name, x in statistics.items()}


def test_a_resample_is_n_rows_drawn_from_n():
    blocks = list(resample.resamples(700, 1000, seed=3))
    counts = np.concatenate(blocks)
    assert len(blocks) > 1 and counts.shape == (1000, 700)
    assert (counts.sum(1) == 700).all() and (counts == counts.astype(int)).all()
    # Each count is binomial(700, 1/700): mean 1, variance 1 - 1/700.
    assert counts.mean() == 1 and counts.var() == pytest.approx(1 - 1 / 700, abs=0.01)
    assert np.array_equal(counts, np.concatenate(list(resample.resamples(700, 1000, seed=3))))
    assert not np.array_equal(counts, np.concatenate(list(resample.resamples(700, 1000, seed=4))))


def test_blocks_do_not_change_the_draws(monkeypatch):
    whole = np.concatenate(list(resample.resamples(50, 20, seed=0)))
    monkeypatch.setattr(resample, "BLOCK", 150)
    assert np.array_equal(whole, np.concatenate(list(resample.resamples(50, 20, seed=0))))


def test_intervals_are_those_of_scipy():
    from scipy import stats

    x = np.random.default_rng(0).exponential(size=300)
    ours = resample.intervals(300, means(mean=x), draws=20_000, seed=1)["mean"]
    level = 1 - 2 * resample.expanded(300, 0.95)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", confidence_level=level, rng=2
    ).confidence_interval
    assert 0.95 < level < 0.953
    assert ours["value"] == pytest.approx(x.mean())
    assert [ours["low"], ours["high"]] == pytest.approx([theirs.low, theirs.high], abs=0.004)


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (20, 20), (297, 300)])
def test_shares_have_the_exact_interval_of_scipy(hits, n):
    from scipy import stats

    theirs = stats.binomtest(hits, n).proportion_ci(method="exact")
    right = np.arange(n) < hits
    assert resample.share_interval(hits / n, n) == pytest.approx((theirs.low, theirs.high))
    assert resample.mean_interval(right) == pytest.approx((theirs.low, theirs.high))
    ours = resample.intervals(
        n, lambda counts: {"share": resample.share(counts @ right, n * np.ones(len(counts)))}, seed=1
    )["share"]
    # Resamples tell the variance of the share to a few percent.
    assert ours["low"] == pytest.approx(theirs.low, abs=0.02) and ours["high"] == pytest.approx(theirs.high, abs=0.02)
    assert 0 <= ours["low"] < ours["high"] <= 1 and "note" not in ours


def test_scores_that_vary_little_have_students_interval():
    from scipy import stats

    x = np.random.default_rng(0).beta(20, 20, size=40)
    theirs = stats.ttest_1samp(x, 0).confidence_interval()
    assert resample.mean_interval(x) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), {"accuracy": 0, "f1": 0}
    # A classifier that is right on 80 % of positives and 90 % of negatives, 30 % of the rows being positive.
    truth = {"accuracy": 0.3 * 0.8 + 0.7 * 0.9, "f1": 2 * 0.24 / (0.3 + 0.24 + 0.07)}
    for trial in range(400):
        label = rng.random(250) < 0.3
        predicted = label == (rng.random(250) < np.where(label, 0.8, 0.9))
        rows = np.stack([label & predicted, predicted, label, label == predicted], axis=1)

        def reduce(counts, rows=rows):
            sums = counts @ rows
            return {"accuracy": sums[:, 3] / 250, "f1": shares(*sums[:, :3].T)["f1"].value}

        for name, entry in resample.intervals(250, reduce, draws=300, seed=trial).items():
            held[name] += entry["low"] <= truth[name] <= entry["high"]
    # Of 400, a true 95 % gives 380, standard deviation 4.4; the percentile interval holds a little less.
    assert all(366 <= n <= 392 for n in held.values()), held


@pytest.mark.parametrize("recalls", [(1.0, 0.0), (1.0, 1.0), (0.9, 0.5), (0.9, 0.5, 0.2)])
def test_averages_over_classes_have_intervals_of_shares(recalls):
    rng, C, held = np.random.default_rng(0), len(recalls), 0
    for n in (6, 20) * 20:
        label = np.r_[np.arange(C), rng.choice(C, n - C, p=[0.7, 0.3, 0][:C] if C == 2 else [0.5, 0.3, 0.2])]
        right = rng.random(n) < np.array(recalls)[label]
        chances = np.full((n, C), 0.1 / (C - 1))
        chances[np.arange(n), np.where(right, label, (label + 1) % C)] = 0.9
        rows = classification.single_rows(label, chances)
        found = resample.intervals(n, classification.single_metrics(rows), draws=200)
        for entry in (found["balanced_accuracy"], found["recall_macro"]):
            assert 0 <= entry["low"] < entry["high"] <= 1
        held += found["balanced_accuracy"]["low"] <= np.mean(recalls) <= found["balanced_accuracy"]["high"]
    assert held >= 37  # of 40


def test_what_is_undefined_is_none_and_said():
    def reduce(counts):  # the mean of row 0 and the rest, undefined without row 0; and never defined
        return {"some": np.where(counts[:, 0] > 0, counts[:, 1], np.nan), "none": np.full(len(counts), np.nan)}

    found = resample.intervals(10, reduce, draws=400)
    undefined = int(sum(c[0] == 0 for c in np.concatenate(list(resample.resamples(10, 400, 0)))))
    assert 0 < undefined < 400
    assert found["some"]["note"] == f"undefined in {undefined} of 400 resamples, left out"
    assert found["none"] == {"value": None, "low": None, "high": None}
    constant = resample.intervals(10, means(loss=np.ones(10)))["loss"]
    assert constant["low"] is constant["high"] is None and "its interval is not known" in constant["note"]


@pytest.mark.parametrize("odd", ["noise", "undefined", "rare"])
def test_resamples_that_agree_but_for_noise_give_no_interval(odd):
    def reduce(counts):
        figure = np.ones(len(counts))
        if odd == "noise":
            figure += 2e-16 * (counts[:, 0] > 0)
        elif odd == "undefined":
            figure[counts[:, 0] == 0] = np.nan
        else:  # less than the share of resamples that an interval leaves out
            figure[counts[:, 0] > 4] = 0.5
        return {"figure": figure}

    found = resample.intervals(10, reduce)["figure"]
    assert found["low"] is found["high"] is None and "its interval is not known" in found["note"]
    assert ("undefined in" in found["note"]) == (odd == "undefined")


def test_figures_of_several_classes_come_as_lists():
    x = np.random.default_rng(0).random((40, 3))
    found = resample.intervals(40, lambda counts: {"mean": counts @ x / 40}, draws=50)["mean"]
    assert [entry["value"] for entry in found] == pytest.approx(x.mean(0))
    one = resample.intervals(40, means(mean=x[:, 1]), draws=50)["mean"]
    assert found[1] == pytest.approx(one)


@pytest.mark.parametrize("n, how", [(0, {}), (5, {"draws": -1}), (5, {"level": 1.0})])
def test_bad_input_is_named(n, how):
    with pytest.raises(FtjaxError, match="at least one row and one resample|level between 0 and 1"):
        resample.intervals(n, lambda counts: {"sum": counts.sum(1)}, **how)
