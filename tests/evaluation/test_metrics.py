"""Metrics against the libraries' own figures and against cases worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from ftjax.errors import FtjaxError
from ftjax.evaluation.metrics import score

SETTINGS = SimpleNamespace(words="src")


def test_rouge_l_is_the_best_f1_over_references():
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["The cats sat on mats.", "nothing alike", ""]
    references = [["A cat sits on a mat.", "the cat sat on the mat"], ["zebra"], ["x", "y z"]]
    figure, scores = score("rouge_l", predictions, references, [{}] * 3, SETTINGS)
    one = RougeScorer(["rougeL"], use_stemmer=True)
    best = [max(one.score(r, p)["rougeL"].fmeasure for r in rs) for p, rs in zip(predictions, references)]
    assert scores == pytest.approx(best) and figure == pytest.approx(np.mean(best))
    # the | cat sat on mat: 5 of 5 words in order, of 6
    assert scores[0] == pytest.approx(2 * 1 * (5 / 6) / (1 + 5 / 6))
    assert scores[1:] == [0.0, 0.0]


def test_coverage_counts_distinct_stems():
    predictions = ["He threw the ball; dogs were running.", "RUN", "no", "running-dogs"]
    rows = [{"src": "throw dog run"}, {"src": "run run"}, {"src": ["field", "look"]}, {"src": "dog run walk fly"}]
    figure, scores = score("coverage", predictions, [[""]] * 4, rows, SETTINGS)
    assert scores == pytest.approx([2 / 3, 1.0, 0.0, 0.5])  # Porter's stem of `threw` is not that of `throw`
    assert figure == pytest.approx(np.mean(scores))


def test_exact_match_disregards_white_space_only():
    _, scores = score("exact_match", [" a  b\n", "A b", "c"], [["x", "a b"], ["a b"], []], [{}] * 3, SETTINGS)
    assert scores == [1.0, 0.0, 0.0]


def test_bleu_is_that_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions = ["the cat sat on the mat today", "a dog ran through the green field"]
    references = [["the cat sat on the mat", "a cat is on the mat today"], ["the dog ran through the field"]]
    figure, scores = score("bleu", predictions, references, [{}] * 2, SETTINGS)
    streams = [["the cat sat on the mat", "the dog ran through the field"], ["a cat is on the mat today", None]]
    assert figure == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert scores == pytest.approx([sacrebleu.sentence_bleu(p, r).score for p, r in zip(predictions, references)])
    assert figure != pytest.approx(np.mean(scores))


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("rogue_l", {}, "unknown 'rogue_l' \\(did you mean \"rouge_l\"\\?\\)"),
        ("coverage", {"scr": "a"}, "found 'src' \\(did you mean \"scr\"\\?\\), the columns are scr"),
        ("coverage", {"src": " "}, "the column 'src' holds no word"),
    ],
)
def test_bad_input_is_named(name, row, message):
    with pytest.raises(FtjaxError, match=message):
        score(name, ["a"], [["a"]], [row], SETTINGS)


def test_no_predictions_is_refused():
    with pytest.raises(FtjaxError, match="no predictions"):
        score("rouge_l", [], [], [], SETTINGS)
