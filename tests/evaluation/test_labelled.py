"""Reports of every kind of task: resamples, groups, worst mistakes, the table, and plain data for JSON."""

import json

import numpy as np
import pytest
from tiny_labelled import values

from ftjax.errors import FtjaxError
from ftjax.evaluation import labelled
from ftjax.evaluation.resample import resamples, share_interval, value_of

TAGS = ["O", "O", "O", "B-PER", "I-PER", "B-LOC"]
TEXTS = ["Paris", "the Paris", "in Paris", "", "London", "a"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def example(kind: str, N: int, seed: int = 0):
    """(labels, predictions, settings) of N rows, as arrays or lists."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=N)
    if kind == "single_label":
        return y, softmax(np.round(2 * np.eye(3)[y] + rng.normal(size=(N, 3)), 1)).astype(np.float32), {}
    if kind == "binary":
        return y // 2, softmax(np.round(2 * np.eye(2)[y // 2] + rng.normal(size=(N, 2)), 1)), {"threshold": 0.4}
    if kind == "multi_label":
        labels = rng.integers(2, size=(N, 4))
        return labels, np.round(0.3 * labels + 0.7 * rng.random((N, 4)), 1), {"thresholds": [0.3, 0.4, 0.5, 0.6]}
    if kind == "regression":
        return np.round(rng.normal(size=N), 1), np.round(y + rng.normal(size=N), 1), {}
    if kind == "tags":
        length = rng.integers(1, 9, size=N)
        sides = [[[TAGS[i] for i in rng.integers(6, size=n)] for n in length] for _ in range(2)]
        return *sides, {"strict": bool(seed % 2)}
    answers = [[TEXTS[i] for i in rng.integers(6, size=n)] for n in rng.integers(0, 3, size=N)]
    return answers, [TEXTS[i] for i in rng.integers(6, size=N)], {"no_answer": True}


KINDS = ["single_label", "binary", "multi_label", "regression", "tags", "answers"]


def name(kind):
    return "single_label" if kind == "binary" else kind


def taken(rows, places):
    return rows[places] if isinstance(rows, np.ndarray) else [rows[i] for i in places]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_a_resample_are_those_of_its_rows_repeated(kind):
    for seed in range(3):
        labels, predictions, settings = example(kind, 23, seed)
        this, rows, _ = labelled._rows(name(kind), labels, predictions, None, settings)
        (counts,) = resamples(23, 20, seed)
        by_counts = this.metrics(rows)(counts)
        for b, count in enumerate(counts.astype(int)):
            again = np.repeat(np.arange(23), count)
            repeated = labelled._rows(name(kind), taken(labels, again), taken(predictions, again), None, settings)[1]
            expected = values(23, this.metrics(repeated))
            found = {metric: value_of(x)[b] for metric, x in by_counts.items()}
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_plain_data_and_its_groups_are_reports_of_their_rows(kind):
    labels, predictions, settings = example(kind, 60)
    groups = [("b", "a", None)[i % 3] for i in range(60)]
    how = dict(draws=60, seed=2, **settings)
    report = labelled.report(name(kind), labels, predictions, groups=groups, **how)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["rows"] == 60 and list(report["groups"]) == ["None", "a", "b"]
    for metric, entry in report["metrics"].items():
        assert entry["low"] <= entry["high"] and set(entry) <= {"value", "low", "high", "note"}, metric
    for value in (None, "a", "b"):
        places = np.array([i for i, g in enumerate(groups) if g == value])
        alone = labelled.report(name(kind), taken(labels, places), taken(predictions, places), **how)
        assert report["groups"][str(value)] == {"rows": 20, "metrics": alone["metrics"]}
    assert report == labelled.report(name(kind), labels, predictions, groups=groups, **how)
    assert report["metrics"] != labelled.report(name(kind), labels, predictions, **how | {"seed": 3})["metrics"]


def test_classes_of_a_report():
    labels, p, _ = example("single_label", 300)
    report = labelled.report("single_label", labels, p, names=["x", "y", "z"], draws=50)
    counts = np.array(report["confusion"]["counts"])
    assert report["confusion"]["names"] == list(report["per_class"]) == ["x", "y", "z"]
    assert counts.sum() == 300 and counts.trace() / 300 == pytest.approx(report["metrics"]["accuracy"]["value"])
    for c, entry in enumerate(report["per_class"].values()):
        assert (entry["labelled"], entry["predicted"]) == (counts[c].sum(), counts[:, c].sum())
        assert entry["recall"]["value"] == pytest.approx(counts[c, c] / counts[c].sum())
        assert entry["recall"]["low"] < entry["recall"]["value"] < entry["recall"]["high"]
    bins = report["calibration"]
    assert sum(b["rows"] for b in bins) == 300
    error = sum(b["rows"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 300
    assert error == pytest.approx(report["metrics"]["calibration_error"]["value"])


def test_what_cannot_be_told_is_none_with_a_reason():
    # class 1 neither occurs nor is predicted
    report = labelled.report("single_label", np.zeros(5, int), np.tile([0.9, 0.1], (5, 1)), draws=20)
    figures, reasons = report["metrics"], labelled.classification.UNDEFINED
    for metric in ("precision", "recall", "f1", "mcc", "roc_auc"):
        assert figures[metric] == {"value": None, "low": None, "high": None, "note": reasons[metric]}
    assert figures["f1_macro"]["value"] == 1 and "without 1 class that labels" in figures["f1_macro"]["note"]
    low, high = share_interval(1, 5)  # of the one class that is there
    assert (figures["f1_macro"]["low"], figures["f1_macro"]["high"]) == pytest.approx((float(low), float(high)))
    assert figures["accuracy"]["low"] == pytest.approx(0.025 ** (1 / 5)) and figures["accuracy"]["high"] == 1
    assert report["per_class"]["0"]["recall"]["low"] == figures["accuracy"]["low"]
    assert report["per_class"]["1"]["recall"]["note"] == "no row is labelled with it"
    flat = labelled.report("regression", [1.0, 1.0], [1.0, 2.0], draws=20)["metrics"]
    assert flat["pearson"]["value"] is None and flat["r2"]["note"] == "labels are all the same"
    outside = labelled.report("tags", [["O", "O"]], [["O", "O"]], draws=20)
    assert outside["metrics"]["f1"]["note"] == "no entity is labelled or predicted" and outside["per_type"] == {}
    assert "undefined" in labelled.table(report)
    answered = labelled.report("answers", [["x"]], ["x"], draws=5, no_answer=True)["metrics"]
    assert answered["no_answer"]["note"] == "every question has an answer"


def test_the_worst_mistakes():
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.45, 0.55], [0.2, 0.8], [0.1, 0.9]])
    labels = np.array([0, 0, 0, 1, 0, 0])
    # Rows 1, 2, 4, 5 are wrong; 2 and 4 are equally bad.
    assert labelled.worst("single_label", labels, p) == [5, 2, 4, 1]
    assert labelled.worst("single_label", labels, p, 2) == [5, 2]
    assert labelled.worst("answers", [["a b"], ["c"], ["d"]], ["a b c", "x", "d"]) == [1, 0]
    assert labelled.worst("regression", [1.0, 2.0, 3.0], [1.0, 5.0, 3.5]) == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_tells_every_figure(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    labels, predictions, settings = example(kind, 80)
    groups = ["[red]", "blue"] * 40
    report = labelled.report(name(kind), labels, predictions, groups=groups, draws=30, **settings)
    text = labelled.table(report)
    lines = text.split("\n")
    for metric, entry in report["metrics"].items():
        arrow = "↓" if metric in ("log_loss", "calibration_error", "mse", "mae") else "↑"
        (line,) = [line for line in lines if f" {metric} {arrow} " in line and f"{entry['low']:.4g} to" in line]
        assert f"{entry['value']:.4g}" in line and f"{entry['high']:.4g}" in line
    assert any("[red]" in line and " 40 " in line for line in lines)
    assert "95 % interval" in text and lines[-1].endswith("80 rows; intervals from 30 resamples of them, seed 0")


def test_a_table_of_many_classes_says_what_it_leaves_out():
    y = np.arange(40)
    text = labelled.table(labelled.report("single_label", y, np.eye(40), draws=5))
    assert "the first 30 of 40" in text and "never predicted" not in text


def test_narrow_labels_do_not_overflow():
    y = np.arange(40)
    reports = [labelled.report("single_label", y.astype(kind), np.eye(40), draws=5) for kind in (np.uint8, np.int64)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: labelled.report("single", [0], [[1.0, 0.0]]), "unknown kind of task 'single' \\(did you mean"),
        (lambda: labelled.report("regression", [], []), "nothing to judge: there are no rows"),
        (lambda: labelled.report("single_label", [0], [[1.0, 0.0]], names=["a"]), "names: expected 2 different names"),
        (lambda: labelled.report("regression", [1.0], [1.0], groups=["a", "b"]), "groups: expected one value for each"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(FtjaxError, match=message):
        call()


def test_sst2_by_a_word_list(shared):
    """On real rows: a rule of a few words is better than chance, and its interval is as wide as 872 rows allow."""
    lines = (shared / "data/sst2/dev.tsv").read_text(encoding="utf-8").split("\n")[1:]
    rows = [line.split("\t", 1) for line in lines if line]
    labels = np.array([int(label) for label, _ in rows])
    good, bad = {"good", "best", "funny", "moving", "love", "great", "fun"}, {"bad", "not", "no", "dull", "too", "n't"}
    score = np.array([len(good & set(text.split())) - len(bad & set(text.split())) for _, text in rows], float)
    p = 1 / (1 + np.exp(-score))
    report = labelled.report("single_label", labels, np.stack([1 - p, p], axis=1), names=["negative", "positive"])
    accuracy = report["metrics"]["accuracy"]
    assert report["rows"] == 872 and accuracy["low"] > 0.5
    wald = 1.96 * np.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 872)
    assert accuracy["high"] - accuracy["low"] == pytest.approx(2 * wald, rel=0.1)


def test_ranks_among_few_rows_and_vectors_that_are_no_numbers_say_nothing():
    vectors = np.eye(12)
    for n, undefined in ((1, {"mrr", "recall_at_1", "recall_at_10", "mean_rank"}), (10, {"recall_at_10"}), (12, set())):
        found = labelled.report("retrieval", vectors[:n], vectors[:n], draws=5)["metrics"]
        assert {name for name, entry in found.items() if entry["value"] is None} == undefined
        assert all("there" in found[name]["note"] for name in undefined)
    vectors[3] = np.nan  # its rank would be 0, the best
    with pytest.raises(FtjaxError, match="expected finite numbers"):
        labelled.report("retrieval", vectors, vectors, draws=5)


def test_without_draws_there_are_values_and_no_intervals():
    whole = labelled.report("single_label", [0, 1, 1], np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), draws=20)
    plain = labelled.report("single_label", [0, 1, 1], np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), draws=0)
    assert {n: e["value"] for n, e in plain["metrics"].items()} == {n: e["value"] for n, e in whole["metrics"].items()}
    assert all(entry["low"] is None for entry in plain["metrics"].values())
