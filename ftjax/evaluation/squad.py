"""Answers that are spans of a text, by the official rules of SQuAD: v1.1 (Rajpurkar et al. 2016) and v2.0 (2018).

Both rules lower-case, drop ASCII punctuation and the words a, an, the, and split at white space; an answer's score is
its best over the reference answers. The official rules are made for English. Beyond them, the punctuation of other
scripts is dropped, and each character of a script without spaces is a word, as MLQA and CMRC 2018 have it.

The two rules differ in two points. v2.0 knows questions without an answer, for which the
empty text is right; and where either side has no word left (`The`), F1 is 0 by v1.1, and by v2.0 it is 1 if both have
none. Figures are shares from 0 to 1; the official scripts print percent.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.resample import Reduce, divide
from ftjax.evaluation.words import composed, spaced, without_punctuation

ARTICLES = re.compile(r"\b(a|an|the)\b")
UNDEFINED = {  # why a figure is None
    **{f"{name}_has_answer": "no question has an answer" for name in ("exact_match", "f1")},
    "no_answer": "every question has an answer",
}


def words(text: str) -> list[str]:
    """The words of an answer that count. Articles go after punctuation, so `the-end` is one word: theend."""
    return spaced(ARTICLES.sub(" ", without_punctuation(composed(text).lower()))).split()


def f1(prediction: list[str], answer: list[str], no_answer: bool = False) -> float:
    """F1 of the words in common, each as often as both have it. no_answer: by v2.0's rule."""
    if no_answer and not (prediction and answer):
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def answer_rows(answers, predictions, no_answer: bool = False) -> dict[str, np.ndarray]:
    """What each row contributes. answers: N lists of reference texts; predictions: N texts, empty for no answer.

    no_answer: by v2.0's rule, where a question without references has no answer, and references without a word are left
    out. loss: 1 - F1; wrong: no exact match. Raises FtjaxError for a question without references by v1.1's rule.
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
    """Exact match and F1; by v2.0 also those of questions with an answer, and the share of the others left empty."""
    columns = {name: rows[name] for name in ("exact_match", "f1")}

    def reduce(counts):
        n = counts.sum(1)
        out = {name: counts @ column / n for name, column in columns.items()}
        if "has_answer" in rows:
            has, without = rows["has_answer"], ~rows["has_answer"]
            for name, column in columns.items():
                out[f"{name}_has_answer"] = divide(counts @ (column * has), counts @ has)
            out["no_answer"] = divide(counts @ (rows["exact_match"] * without), counts @ without)
        return out

    return reduce


def answer_trials(rows) -> dict[str, float]:
    """Of how many questions a figure of `answer_metrics` is the share or the mean."""
    n = len(rows["f1"])
    has = rows.get("has_answer", np.ones(n, bool)).sum()
    found = {"exact_match": n, "f1": n, "no_answer": n - has}
    return found | {f"{name}_has_answer": has for name in ("exact_match", "f1")}
