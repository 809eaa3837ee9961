"""Scores of generated answers. A new metric is one function and one row of METRICS."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from ftjax.errors import FtjaxError, nearest


@dataclasses.dataclass(frozen=True)
class Metric:
    """rows(predictions, references, rows, settings) -> one score a prediction, best over its references.

    predictions: N texts; references: N lists of texts; rows: N rows of the data set, for metrics that need a column;
    settings: config.evaluate. corpus(predictions, references) -> the figure, for metrics whose figure is not the mean
    of the rows' scores. higher: whether more is better.
    """

    rows: Callable[..., list[float]]
    corpus: Callable[..., float] | None = None
    higher: bool = True


def score(
    name: str, predictions: list[str], references: list[list[str]], rows: list[dict], settings
) -> tuple[float, list[float]]:
    """(figure, one score a prediction) of the metric `name`. Raises FtjaxError for an unknown one, and when N is 0."""
    metric = find(name)
    if not predictions:
        raise FtjaxError(f"evaluate.metrics: {name} of no predictions at all; give at least one held-out row")
    scores = metric.rows(predictions, references, rows, settings)
    return metric.corpus(predictions, references) if metric.corpus else float(np.mean(scores)), scores


def find(name: str) -> Metric:
    """The row `name` of METRICS. Raises FtjaxError for an unknown one."""
    if name not in METRICS:
        raise FtjaxError(f"evaluate.metrics: unknown {name!r}{nearest(name, METRICS)}; known: {', '.join(METRICS)}")
    return METRICS[name]


def rouge_l(predictions, references, rows, settings) -> list[float]:
    """F1 of the longest common subsequence of words (Lin 2004), by `rouge-score` with its stemmer; 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score_multi(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]


def exact_match(predictions, references, rows, settings) -> list[float]:
    """1 where the prediction is one of its references, runs of white space counting as one space."""

    def plain(text):
        return " ".join(text.split())

    return [float(plain(p) in map(plain, r)) for p, r in zip(predictions, references, strict=True)]


def coverage(predictions, references, rows, settings) -> list[float]:
    """Share of the distinct given words that the prediction uses, both by their English stem (Porter 1980); 0 to 1.

    The words are those of the column `evaluate.words`: text, or a list of texts.
    """
    from nltk.stem.porter import PorterStemmer

    stemmer, column = PorterStemmer(), settings.words

    def stems(text):
        return {stemmer.stem(word) for word in re.findall(r"[^\W_]+", text.lower())}

    scores = []
    for prediction, row in zip(predictions, rows, strict=True):
        if not column or column not in row:
            raise FtjaxError(
                f"evaluate.words: the metric coverage needs the column of the given words; found {column!r}"
                f"{nearest(column, row)}, the columns are {', '.join(row)}"
            )
        words = row[column]
        given = stems(words if isinstance(words, str) else " ".join(map(str, words or ())))
        if not given:
            raise FtjaxError(f"evaluate.words: the column {column!r} holds no word in the row {row}")
        scores.append(len(given & stems(prediction)) / len(given))
    return scores


def _sacrebleu():
    try:
        import sacrebleu
    except ImportError:
        raise FtjaxError("evaluate.metrics: bleu needs sacrebleu; pip install sacrebleu") from None
    return sacrebleu


def bleu_rows(predictions, references, rows, settings) -> list[float]:
    """Sentence BLEU with effective order, by `sacrebleu`; 0 to 100."""
    bleu = _sacrebleu().BLEU(effective_order=True)
    return [bleu.sentence_score(p, r).score for p, r in zip(predictions, references, strict=True)]


def bleu_corpus(predictions, references) -> float:
    """Corpus BLEU (Papineni et al. 2002, Post 2018), by `sacrebleu` with its defaults; 0 to 100."""
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return _sacrebleu().corpus_bleu(predictions, streams).score


METRICS = {
    "rouge_l": Metric(rouge_l),
    "coverage": Metric(coverage),
    "exact_match": Metric(exact_match),
    "bleu": Metric(bleu_rows, bleu_corpus),
}
