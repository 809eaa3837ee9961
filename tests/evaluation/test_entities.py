"""Entities and their figures against seqeval, malformed tags included."""

import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import metrics as sq
from seqeval.scheme import BILOU, IOB2, IOBES
from tiny_labelled import values

from ftjax.errors import FtjaxError
from ftjax.evaluation import entities as ours
from ftjax.evaluation.classification import shares

TYPES = ("PER", "creative-work")


def tags_of(prefixes):
    return st.sampled_from(["O"] * 2 + [f"{prefix}-{kind}" for prefix in prefixes for kind in TYPES])


@st.composite
def sentences(draw, prefixes):
    """Labels and predictions of a few short sentences, both free to break the scheme; often they agree."""
    labels, predictions = [], []
    for _ in range(draw(st.integers(1, 4))):
        label = draw(st.lists(tags_of(prefixes), max_size=7))
        changed = draw(st.lists(st.none() | tags_of(prefixes), min_size=len(label), max_size=len(label)))
        labels.append(label)
        predictions.append([new or old for new, old in zip(changed, label)])
    return labels, predictions


def same_as_seqeval(labels, predictions, strict=False, **how):
    rows, types = ours.tag_rows(labels, predictions, strict)
    N = len(labels)
    found = values(N, ours.tag_metrics(rows))
    tally = [x[0] for x in ours.tally(rows)(np.ones((1, N)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {name: getattr(sq, f"{name}_score")(labels, predictions, **how) for name in ("precision", "recall")}
        expected["f1"] = sq.f1_score(labels, predictions, **how)
        report = sq.classification_report(labels, predictions, output_dict=True, **how) if types else {}
    # Undefined where seqeval says 0 for want of entities.
    right, predicted, labelled = (int(x.sum()) for x in tally)
    undefined = {"precision": not predicted, "recall": not labelled, "f1": not predicted + labelled}
    for name, without in undefined.items():
        assert found[name] == pytest.approx(np.nan if without else expected[name], nan_ok=True)
        assert expected[name] == 0 or not without
    tokens = sum(map(len, labels))
    accuracy = sq.accuracy_score(labels, predictions) if tokens else np.nan
    assert found["token_accuracy"] == pytest.approx(accuracy, nan_ok=True)
    each = {name: share.value for name, share in shares(*tally).items()}
    assert types == sorted(name for name in report if not name.endswith(" avg"))
    for t, kind in enumerate(types):
        assert report[kind]["support"] == tally[2][t]
        for ourname, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert np.nan_to_num(each[ourname][t]) == pytest.approx(report[kind][theirs])
    return right


@settings(max_examples=150, deadline=None)
@given(sentences("BI"))
def test_bio_in_both_readings(case):
    same_as_seqeval(*case)
    same_as_seqeval(*case, strict=True, mode="strict", scheme=IOB2)


@settings(max_examples=150, deadline=None)
@given(sentences("BIES"))
def test_iobes_in_both_readings(case):
    same_as_seqeval(*case)
    if any(tag[0] in "ES" for side in case for tags in side for tag in tags):  # else it reads as BIO
        same_as_seqeval(*case, strict=True, mode="strict", scheme=IOBES)


@settings(max_examples=100, deadline=None)
@given(sentences("BILU"))
def test_bilou_is_iobes_by_other_letters(case):
    letters = str.maketrans("LU", "ES")
    translated = [[[tag[0].translate(letters) + tag[1:] for tag in tags] for tags in side] for side in case]
    for strict in (False, True):
        rows, same = (ours.tag_rows(*side, strict=strict)[0] for side in (case, translated))
        assert np.array_equal(rows["tally"], same["tally"])
    if any(tag[0] in "LU" for side in case for tags in side for tag in tags):
        same_as_seqeval(*case, strict=True, mode="strict", scheme=BILOU)


def test_the_readings_part_on_malformed_tags():
    # The second sentence's I- has no B-: conlleval.pl takes it for an entity, the strict reading does not.
    labels = [["B-PER", "I-PER", "O"], ["O", "B-PER"]]
    predictions = [["B-PER", "I-PER", "O"], ["O", "I-PER"]]
    f1 = [values(2, ours.tag_metrics(ours.tag_rows(labels, predictions, strict)[0]))["f1"] for strict in (False, True)]
    assert f1 == pytest.approx([1.0, 2 / 3])
    spelled = ours.entities([ours.parse(tag, "") for tag in ("I-PER", "I-LOC", "B-LOC", "I-LOC", "O")])
    assert spelled == [("PER", 0, 0), ("LOC", 1, 1), ("LOC", 2, 3)]


def test_the_worst_sentence_is_that_with_most_entities_wrong():
    labels = [["B-PER", "O", "B-LOC"], ["O", "O", "O"], ["B-PER", "I-PER", "O"]]
    predictions = [["B-LOC", "O", "B-LOC"], ["O", "O", "O"], ["B-PER", "O", "B-LOC"]]
    rows, types = ours.tag_rows(labels, predictions)
    assert types == ["LOC", "PER"]
    assert rows["loss"].tolist() == [2, 0, 3] and rows["wrong"].tolist() == [True, False, True]


def test_wnut17_with_every_tenth_tag_changed(shared):
    text = (shared / "data/wnut17/dev.conll").read_text(encoding="utf-8")
    labels = [[]]
    for line in text.split("\n"):
        if line.strip():
            labels[-1].append(line.split("\t")[1])
        elif labels[-1]:
            labels.append([])
    labels = [row for row in labels if row]
    known, rng = sorted({tag for row in labels for tag in row}), random.Random(0)
    predictions = [[rng.choice(known) if rng.random() < 0.1 else tag for tag in row] for row in labels]
    assert len(labels) == 1009
    assert same_as_seqeval(labels, predictions) > 100
    assert same_as_seqeval(labels, predictions, strict=True, mode="strict", scheme=IOB2) > 100


@pytest.mark.parametrize(
    "labels, predictions, message",
    [
        ([["O"]], [["O"], ["O"]], "expected labels and predictions of the same rows; found 1 and 2 rows"),
        ([["O"], ["O", "O"]], [["O"], ["O"]], "row 2: expected a predicted tag for each of 2 labels; found 1"),
        ([["O", "PER"]], [["O", "O"]], "row 1, label 2: expected the tag O or one such as B-PER.*found 'PER'"),
        ([["O"]], [["B-"]], "row 1, prediction 1: .*found 'B-'"),
        ([["O"]], [[3]], "row 1, prediction 1: .*found 3"),
    ],
)
def test_bad_input_is_named(labels, predictions, message):
    with pytest.raises(FtjaxError, match=message):
        ours.tag_rows(labels, predictions)
