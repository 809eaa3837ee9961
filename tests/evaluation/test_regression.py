"""Correlations and errors against scipy and scikit-learn, constants included."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from tiny_labelled import values

from ftjax.errors import FtjaxError
from ftjax.evaluation.regression import regression_metrics, regression_rows
from ftjax.evaluation.resample import intervals

NUMBERS = st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0]) | st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_figures_are_those_of_scipy_and_scikit_learn(pairs):
    y, x = np.array(pairs).T
    found = values(len(y), regression_metrics(regression_rows(y, x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = len(set(y)) > 1 and len(set(x)) > 1
        expected = {
            "pearson": stats.pearsonr(y, x).statistic if both else np.nan,
            "spearman": stats.spearmanr(y, x).statistic if both else np.nan,
            "mse": sk.mean_squared_error(y, x),
            "mae": sk.mean_absolute_error(y, x),
            "r2": sk.r2_score(y, x) if len(set(y)) > 1 else np.nan,
        }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


def test_equal_numbers_have_no_correlation_though_their_mean_is_rounded():
    y = np.full(3, 0.1)  # whose float mean is not 0.1
    found = values(3, regression_metrics(regression_rows(y, np.array([1.0, 2.0, 3.0]))))
    assert np.isnan([found["pearson"], found["spearman"], found["r2"]]).all() and found["mae"] > 1


def test_an_outlier_does_not_blur_resamples_without_it():
    rng = np.random.default_rng(0)
    y = np.append(rng.normal(size=30), 1e9)
    x = np.append(y[:30] + rng.normal(size=30), -1e9)
    reduce = regression_metrics(regression_rows(y, x))
    counts = np.append(np.ones(30), 0)[None]
    found = {name: value[0] for name, value in reduce(counts).items()}
    assert found["pearson"] == pytest.approx(stats.pearsonr(y[:30], x[:30]).statistic, rel=1e-9)
    assert found["r2"] == pytest.approx(sk.r2_score(y[:30], x[:30]), rel=1e-9)


def test_the_interval_of_a_correlation_is_near_fishers():
    rng = np.random.default_rng(0)
    y = rng.normal(size=800)
    x = 0.7 * y + np.sqrt(1 - 0.49) * rng.normal(size=800)
    found = intervals(800, regression_metrics(regression_rows(y, x)))
    fisher = stats.pearsonr(y, x).confidence_interval()
    assert [found["pearson"][end] for end in ("low", "high")] == pytest.approx([fisher.low, fisher.high], abs=0.01)
    assert found["spearman"]["low"] < stats.spearmanr(y, x).statistic < found["spearman"]["high"]


def test_a_column_is_taken_for_its_numbers():
    rows = regression_rows(np.array([1, 2]), np.array([[1.0], [4.0]], np.float32))
    assert rows["loss"].tolist() == [0, 4] and rows["wrong"].tolist() == [False, True]


@pytest.mark.parametrize(
    "y, x, message",
    [
        ([1.0, 2.0], [1.0], "expected one label and one prediction per row; found \\(2,\\) and \\(1,\\)"),
        ([1.0, np.nan], [1.0, 2.0], "row 2: expected finite numbers; found label nan, prediction 2.0"),
        ([1.0, 2.0], [np.inf, 2.0], "row 1: expected finite numbers"),
    ],
)
def test_bad_input_is_named(y, x, message):
    with pytest.raises(FtjaxError, match=message):
        regression_rows(y, x)
