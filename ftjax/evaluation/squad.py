"""Scores of answers that are spans of a text, by the official rules of SQuAD v1.1 (Rajpurkar et al. 2016) and v2.0
(2018).

Both rules lower-case the text, drop ASCII punctuation and the words a, an, the, and split at white space. An answer's
score is the best over its references. The official rules are for English. In addition, the punctuation of other scripts
is dropped here, and each character of a script without spaces is a word, as in MLQA and CMRC 2018.

The rules differ in two points. In v2.0 a question may have no answer, and the empty text is then correct. If no word is
left on either side (`The`), F1 is 0 by v1.1, and by v2.0 it is 1 if none is left on both. Figures are shares from 0 to
1, where the official scripts print percent.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.resample import Kind, Reduce, share
from ftjax.evaluation.words import composed, spaced, without_punctuation

ARTICLES = re.compile(r"\b(a|an|the)\b")
UNDEFINED = {  # why a figure is None
    **{f"{name}_has_answer": "no question has an answer" for name in ("exact_match", "f1")},
    "no_answer": "every question has an answer",
}


def words(text: str) -> list[str]:
    """The words of an answer that are compared. Punctuation is removed before articles, so `the-end` is one word,
    theend."""
    return spaced(ARTICLES.sub(" ", without_punctuation(composed(text).lower()))).split()


def f1(prediction: list[str], answer: list[str], no_answer: bool = False) -> float:
    """F1 of the shared words, each counted as often as both sides have it.

    Args:
        prediction: Words of the prediction.
        answer: Words of the reference.
        no_answer: Whether v2.0's rule applies.
    """
    if no_answer and not (prediction and answer):
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def answer_rows(answers, predictions, no_answer: bool = False) -> dict[str, np.ndarray]:
    """The contribution of each row.

    `loss` is 1 - F1, and a row is `wrong` without an exact match.

    Args:
        answers: N lists of reference texts.
        predictions: N texts, empty for no answer.
        no_answer: Whether v2.0's rule applies: a question without references has no answer, and references without a
            word are left out.

    Returns:
        {"exact_match", "f1", "loss", "wrong"}, each (N,), with `no_answer` also "has_answer".

    Raises:
        FtjaxError: If the numbers of answers and predictions differ, or if a question has no reference by v1.1's rule.
    """
    if len(answers) != len(predictions):
        raise FtjaxError(f"expected an answer for each question; found {len(predictions)} for {len(answers)}")
    N = len(answers)
    exact, best, has = np.zeros(N), np.zeros(N), np.ones(N, bool)
    for i, (references, prediction) in enumerate(zip(answers, predictions)):
        given, references = words(prediction), [words(text) for text in references]
        if no_answer:
            has[i] = bool(references)
            references = [r for r in references if r] or [[]]
        elif not references:
            raise FtjaxError(
                f"row {i + 1}: the question has no reference answer, which SQuAD v1.1's rule cannot score; "
                "pass no_answer=True for v2.0's"
            )
        exact[i] = given in references
        best[i] = max(f1(given, r, no_answer) for r in references)
    rows = {"exact_match": exact, "f1": best, "loss": 1 - best, "wrong": exact == 0}
    return rows | ({"has_answer": has} if no_answer else {})


def answer_metrics(rows) -> Reduce:
    """Exact match and F1. By v2.0 also those of questions with an answer, and the share of the others that are left
    empty."""
    exact, f1, every = rows["exact_match"], rows["f1"], np.ones(len(rows["f1"]), bool)
    means = {"exact_match": (exact, every), "f1": (f1, every)}  # the scores, and over which rows
    if "has_answer" in rows:
        has = rows["has_answer"]
        means |= {"exact_match_has_answer": (exact, has), "f1_has_answer": (f1, has), "no_answer": (exact, ~has)}
    return lambda counts: {name: share(counts @ (x * over), counts @ over) for name, (x, over) in means.items()}


KIND = Kind(answer_rows, answer_metrics, UNDEFINED, ("exact_match", "f1"))
