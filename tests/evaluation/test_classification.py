"""Figures of classes against scikit-learn on random and degenerate cases; thresholds against trying every one."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk
from tiny_labelled import values

from ftjax.errors import FtjaxError
from ftjax.evaluation import classification as ours

NEAR = dict(rel=1e-9, abs=1e-12, nan_ok=True)


@st.composite
def one_class_a_row(draw):
    """Few rows, few classes, few levels of score: ties, absent classes, rows all right or all wrong are common."""
    N, C = draw(st.integers(1, 25)), draw(st.integers(2, 5))
    labels = draw(hnp.arrays(int, N, elements=st.integers(0, draw(st.integers(0, C - 1)))))
    levels = draw(hnp.arrays(int, (N, C), elements=st.integers(0, 3))) + draw(st.sampled_from([0, 1]))
    levels[levels.sum(1) == 0] = 1
    return labels, levels / levels.sum(1, keepdims=True)


@settings(max_examples=150, deadline=None)
@given(one_class_a_row())
def test_one_class_a_row_is_as_scikit_learn_says(case):
    y, p = case
    N, C = p.shape
    rows = ours.single_rows(y, p)
    found, predicted = values(N, ours.single_metrics(rows)), p.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": sk.accuracy_score(y, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
            "mcc": sk.matthews_corrcoef(y, predicted),
            "log_loss": sk.log_loss(y, p, labels=range(C)),
        }
        for average in ("macro", "micro") + (("binary",) if C == 2 else ()):
            triple = sk.precision_recall_fscore_support(y, predicted, average=average, zero_division=0)
            suffix = "" if average == "binary" else f"_{average}"
            expected |= {f"{name}{suffix}": x for name, x in zip(("precision", "recall", "f1"), triple)}
        there = np.unique(y)
        if C == 2:
            expected["roc_auc"] = sk.roc_auc_score(y, p[:, 1]) if len(there) == 2 else np.nan
        else:  # scikit-learn refuses where a class has no labels; ours leaves it out and says so
            curves = [sk.roc_auc_score(y == c, p[:, c]) for c in there]
            expected["roc_auc_macro"] = np.mean(curves) if len(there) > 1 else np.nan
            if len(there) == C:
                multi = sk.roc_auc_score(y, p, multi_class="ovr", labels=range(C))
                assert multi == pytest.approx(expected["roc_auc_macro"])
    # Undefined here where scikit-learn says 0, and exactly where it has no denominator.
    if C == 2:
        undefined = {"precision": not (predicted == 1).any(), "recall": not (y == 1).any()}
        undefined["f1"] = undefined["precision"] and undefined["recall"]
        expected |= {name: np.nan for name, without in undefined.items() if without and expected[name] == 0}
    if len(there) == 1 or len(np.unique(predicted)) == 1:
        assert expected["mcc"] == 0
        expected["mcc"] = np.nan
    error = found.pop("calibration_error")
    assert found == pytest.approx(expected, **NEAR)

    each = [x[0] for x in ours.tally(rows)(np.ones((1, N)))]
    triple = sk.precision_recall_fscore_support(y, predicted, labels=range(C), zero_division=np.nan)
    for name, x in zip(("precision", "recall", "f1"), triple):
        assert ours.shares(*each)[name].value == pytest.approx(x, nan_ok=True)
    assert ours.confusion(rows) == sk.confusion_matrix(y, predicted, labels=range(C)).tolist()
    assert error == pytest.approx(calibration_error(y, p), **NEAR)


def calibration_error(y, p):
    """By its definition, row by row (Guo et al. 2017, equations 2 and 3)."""
    edges, total = np.linspace(0, 1, 16), 0.0
    confidence = p.max(1)
    for low, high in zip(edges[:-1], edges[1:]):
        held = [i for i in range(len(y)) if low < confidence[i] <= high]
        if held:
            right = np.mean([p[i].argmax() == y[i] for i in held])
            total += len(held) / len(y) * abs(right - np.mean(confidence[held]))
    return total


@st.composite
def many_classes_a_row(draw):
    N, C = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    labels = draw(hnp.arrays(int, (N, C), elements=st.integers(0, 1)))
    p = draw(hnp.arrays(np.float32, (N, C), elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1]).map(np.float32)))
    labels[:, draw(st.integers(0, C - 1))] *= draw(st.integers(0, 1))  # a class without labels is common
    return labels, p, draw(hnp.arrays(float, C, elements=st.sampled_from([0.1, 0.5, 0.8])))


@settings(max_examples=150, deadline=None)
@given(many_classes_a_row())
def test_many_classes_a_row_are_as_scikit_learn_says(case):
    y, p, thresholds = case
    N, C = p.shape
    rows = ours.multi_rows(y, p, thresholds)
    found, predicted = values(N, ours.multi_metrics(rows)), (p >= thresholds).astype(int)
    expected = {"subset_accuracy": (predicted == y).all(1).mean()}
    if C > 1:
        assert expected["subset_accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    for average in ("micro", "macro"):
        # Of one column, scikit-learn takes 0 and 1 for two classes: flatten it by hand.
        how = dict(average=average) if C > 1 else dict(average="binary")
        triple = sk.precision_recall_fscore_support(y, predicted, zero_division=0, **how)
        expected |= {f"{name}_{average}": x for name, x in zip(("precision", "recall", "f1"), triple)}
    mixed = [c for c in range(C) if 0 < y[:, c].sum() < N]
    expected["roc_auc_macro"] = np.mean([sk.roc_auc_score(y[:, c], p[:, c]) for c in mixed]) if mixed else np.nan
    if not predicted.any():
        expected["precision_micro"] = np.nan
    if not y.any():
        expected["recall_micro"] = np.nan
    if not (y.any() or predicted.any()):
        expected |= {f"{name}_{a}": np.nan for name in ("precision", "recall", "f1") for a in ("micro", "macro")}
    assert found == pytest.approx(expected, **NEAR)
    clipped = np.clip(p.astype(float), np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
    cross_entropy = -(y * np.log(clipped) + (1 - y) * np.log(1 - clipped)).sum(1)
    assert rows["loss"] == pytest.approx(cross_entropy, rel=1e-6)


def test_probabilities_of_zero_are_clipped_by_their_type():
    y, p = np.array([0, 1, 1]), np.array([[0, 1], [0, 1], [0.5, 0.5]])
    for kind in (np.float32, np.float64):
        found = ours.single_rows(y, p.astype(kind))["loss"].mean()
        assert found == pytest.approx(sk.log_loss(y, p.astype(kind)), rel=1e-6)


def test_what_averages_leave_out_is_said():
    # classes 0..4: 1 is never predicted, 2 has no labels, 3 and 4 occur nowhere
    rows = ours.single_rows(np.array([0, 1, 0]), np.eye(5)[[0, 0, 2]])
    tally = [x[0] for x in ours.tally(rows)(np.ones((1, 3)))]
    lacking = "without 2 classes that labels and predictions lack"
    assert ours.notes(tally, 3) == {
        "precision_macro": f"1 class never predicted counted as 0; {lacking}",
        "recall_macro": f"1 class without labels counted as 0; {lacking}",
        "f1_macro": lacking,
        "balanced_accuracy": "without 3 classes that labels lack",
        "roc_auc_macro": "without 3 classes that no row is labelled with, or all",
    }
    assert ours.notes(tally, 3, absent=True)["f1_macro"] == "2 classes without labels and predictions counted as 0"
    assert ours.notes([np.ones(2)] * 3, 2) == {}


SCORERS = {
    "f1": lambda y, p: sk.f1_score(y, p, zero_division=0),
    "mcc": sk.matthews_corrcoef,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "accuracy": sk.accuracy_score,
}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=15),
    st.sampled_from(sorted(SCORERS)),
    st.sampled_from([np.float32, np.float64]),
    st.booleans(),
)
def test_no_threshold_is_better_than_the_best(pairs, metric, kind, neighbours):
    y = np.array([a for a, _ in pairs]).astype(int)
    steps = np.array([b for _, b in pairs])
    scores = (0.5 + steps / 8).astype(kind)
    if neighbours:  # scores with no number of their type between them
        scores = np.full(len(y), 0.3, kind)
        for _ in range(6):
            scores = np.where(steps > -3, np.nextafter(scores, kind(1)), scores).astype(kind)
            steps = steps - 1
    found = ours.best_threshold(y, scores, metric)
    if y.min() == y.max() or (metric == "mcc" and scores.min() == scores.max()):
        assert found["threshold"] == 0.5 and found["value"] is None and "nothing to choose by" in found["note"]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cuts = [*np.unique(scores), np.inf][1 if metric == "mcc" else 0 : -1 if metric == "mcc" else None]
        best = max(SCORERS[metric](y, (scores >= t).astype(int)) for t in cuts)
        # in the scores' type and as 64-bit numbers
        for s in (scores, scores.astype(float)):
            assert SCORERS[metric](y, (s >= found["threshold"]).astype(int)) == pytest.approx(best, abs=1e-12)
    assert found["value"] == pytest.approx(best, abs=1e-12)


def test_a_threshold_lies_midway_and_near_a_half():
    y, scores = [0, 0, 1, 1], np.array([0.1, 0.2, 0.6, 0.9])
    assert ours.best_threshold(y, scores) == {"threshold": pytest.approx(0.4), "value": 1.0}
    assert ours.best_threshold([0, 1], [0.5, 0.5], "accuracy")["value"] == 0.5
    assert ours.best_threshold([0, 0], [0.3, 0.1])["value"] is None


def test_a_chosen_threshold_is_what_the_report_applies():
    rng = np.random.default_rng(0)
    y = (rng.random(500) < 0.2).astype(int)
    p = np.clip(0.2 + 0.3 * y + 0.15 * rng.normal(size=500), 0.01, 0.99).astype(np.float32)
    both = np.stack([1 - p, p], axis=1)
    best = ours.best_threshold(y, p)
    at = {t: values(500, ours.single_metrics(ours.single_rows(y, both, t)))["f1"] for t in (None, best["threshold"])}
    assert at[best["threshold"]] == pytest.approx(best["value"]) and best["value"] > at[None]
    several = ours.multi_rows(y[:, None], p[:, None], [best["threshold"]])
    assert values(500, ours.multi_metrics(several))["f1_micro"] == pytest.approx(best["value"])


HALVES = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    "rows, message",
    [
        (lambda: ours.single_rows([0, 2], HALVES), "row 2: expected a label from 0 to 1; found 2"),
        (lambda: ours.single_rows([0, -100], HALVES), "row 2: expected a label from 0 to 1; found -100"),
        (lambda: ours.single_rows([0.0, 1.0], HALVES), "expected one integer label per row, shape \\(2,\\)"),
        (lambda: ours.single_rows([0], HALVES), "expected one integer label per row, shape \\(2,\\); found \\(1,\\)"),
        (lambda: ours.single_rows([0, 1], HALVES * 3), "row 1: expected probabilities from 0 to 1"),
        (lambda: ours.single_rows([0, 1], HALVES * [[1], [np.nan]]), "row 2: expected probabilities from 0 to 1"),
        (lambda: ours.single_rows([0, 1], HALVES * [[1], [0.9]]), "row 2: expected probabilities that sum to 1"),
        (lambda: ours.single_rows([0, 0], np.ones((2, 1))), "expected at least two classes; found 1"),
        (
            lambda: ours.single_rows([0, 0], np.eye(3)[:2], threshold=0.5),
            "two classes, because a threshold is set; found 3",
        ),
        (lambda: ours.multi_rows([[0, 1]], HALVES), "labels of the shape of the probabilities, \\(2, 2\\)"),
        (lambda: ours.multi_rows([[0, 1], [2, 0]], HALVES), "row 2: expected labels of 0 and 1"),
        (lambda: ours.multi_rows([[0, 1], [1, 0]], HALVES, [0.5] * 3), "one for each of 2 classes"),
        (lambda: ours.best_threshold([0, 1], [0.1, 0.2], "f2"), "unknown metric 'f2' \\(did you mean \"f1\"\\?\\)"),
        (lambda: ours.best_threshold([0, 1], [0.1, np.nan]), "row 2: expected a finite score"),
        (lambda: ours.best_threshold([0, 3], [0.1, 0.2]), "row 2: expected a label of 0 or 1"),
    ],
)
def test_bad_input_is_named(rows, message):
    with pytest.raises(FtjaxError, match=message):
        rows()
