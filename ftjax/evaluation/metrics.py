"""Scores of generated answers. A new metric is one function and one row of METRICS, or a user's own `file.py:function`.

The user's is called with (prediction: text, references: list of texts, row: dict) and returns a number; more is better
unless it has an attribute `higher = False`.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np

from ftjax import user_code
from ftjax.errors import FtjaxError, nearest
from ftjax.evaluation import squad


@dataclasses.dataclass(frozen=True)
class Metric:
    """rows(predictions, references, rows, settings) -> one score a prediction, best over its references.

    predictions: N texts; references: N lists of texts; rows: N rows of the data set, for metrics that need a column;
    settings: config.evaluate. corpus(predictions, references) -> the figure, for metrics whose figure is not the mean
    of the rows' scores. higher: whether more is better, None where neither is; best: what no score passes, None: there
    is no such bound.
    """

    rows: Callable[..., list[float]]
    corpus: Callable[..., float] | None = None
    higher: bool | None = True
    best: float | None = 1.0


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
    """The row `name` of METRICS, or the user's metric `file.py:function`. Raises FtjaxError for an unknown one."""
    if ":" in name:
        file = Path(name.rpartition(":")[0])
        return _users(name, file.stat().st_mtime_ns if file.is_file() else None)
    if name not in METRICS:
        raise FtjaxError(
            f"evaluate.metrics: unknown {name!r}{nearest(name, METRICS)}; known: {', '.join(METRICS)}, and your own as "
            "file.py:function"
        )
    return METRICS[name]


@functools.lru_cache  # a file is run once for each of its states
def _users(named: str, state: int | None) -> Metric:
    key = "evaluate.metrics"
    function = user_code.load(named, key)

    def rows(predictions, references, rows, settings):
        scores = []
        for number, given in enumerate(zip(predictions, references, rows, strict=True), 1):
            try:
                value = function(*given)
            except Exception as error:  # the user's own code may raise anything, and is told at which row it did
                raise FtjaxError(f"prediction {number}: {user_code.failed(named, key, error)}") from error
            if not isinstance(value, numbers.Real | np.bool_) or not np.isfinite(value):
                raise FtjaxError(f"prediction {number}: {key} {named!r} returned {value!r}; expected a finite number")
            scores.append(float(value))
        return scores

    return Metric(rows, higher=getattr(function, "higher", True), best=None)


def rouge(kind: str) -> Callable[..., list[float]]:
    """F1 of what a prediction has in common with its best reference (Lin 2004), by `rouge-score` with its stemmer.

    kind: rouge1 or rouge2 for words or pairs of them, rougeL for the longest common subsequence of words; 0 to 1.
    """

    def rows(predictions, references, rows, settings):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        return [scorer.score_multi(r, p)[kind].fmeasure for p, r in zip(predictions, references, strict=True)]

    return rows


def exact_match(predictions, references, rows, settings) -> list[float]:
    """1 where the prediction is one of its references, runs of white space counting as one space."""

    def plain(text):
        return " ".join(text.split())

    return [float(plain(p) in map(plain, r)) for p, r in zip(predictions, references, strict=True)]


def token_f1(predictions, references, rows, settings) -> list[float]:
    """F1 of the words in common by SQuAD v1.1's rule, see ftjax.evaluation.squad; 0 to 1."""
    return squad.answer_rows(references, predictions)["f1"].tolist()


# A number with its sign, a dollar, commas between digits and a fraction; a hyphen behind a digit is no sign (`3-5`).
NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The answer of a worked solution: the number behind the first `####` if there is one, else the last number.

    GSM8K's rule (Cobbe et al. 2021, grade_school_math/dataset.py): `#### (-?[0-9.,]+)` without its commas. Further, `$`
    and dots that end a sentence are left out, and the space behind the mark may lack. None: there is no number.
    """
    _, mark, behind = text.partition(MARK)
    found = NUMBER.match(behind.lstrip()) if mark else [*NUMBER.finditer(text), None][-2:][0]
    return Decimal(found[0].replace(",", "").replace("$", "")) if found else None


def number_match(predictions, references, rows, settings) -> list[float]:
    """1 where the final number is that of a reference, by value: `18.00` is `18`. See final_number."""
    scores = []
    for i, (prediction, texts) in enumerate(zip(predictions, references, strict=True), 1):
        right = [final_number(text) for text in texts]
        if None in right:
            raise FtjaxError(
                f"number_match: the reference {texts[right.index(None)]!r} of prediction {i} has no number"
            )
        scores.append(float(final_number(prediction) in right))
    return scores


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n))))


def distinct(n: int) -> Metric:
    """Distinct n-grams of words by all n-grams, of one answer, and of all answers together (Li et al. 2016); 0 to 1.

    Words are what white space divides, in lower case. Text without an n-gram has 0. The figure falls as more text is
    taken together: it compares contenders on the same prompts.
    """

    def share(grams):
        return len(set(grams)) / len(grams) if grams else 0.0

    return Metric(
        lambda predictions, references, rows, settings: [share(_grams(p, n)) for p in predictions],
        lambda predictions, references: share([gram for p in predictions for gram in _grams(p, n)]),
    )


def length(predictions, references, rows, settings) -> list[float]:
    """Words, as white space divides them."""
    return [float(len(p.split())) for p in predictions]


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


def unsupported(predictions, references, rows, settings) -> list[float]:
    """Share of the sentences that say something which the passage does not bear out, see ftjax.evaluation.support.

    The passage is the column `evaluate.passage`; where it names none, the reference that bears out most. 0 to 1.
    """
    from ftjax.evaluation.support import unsupported_rate

    column, scores = settings.passage, []
    for prediction, texts, row in zip(predictions, references, rows, strict=True):
        if column and not isinstance(row.get(column), str):
            raise FtjaxError(
                f"evaluate.passage: the metric unsupported needs text in the column {column!r}{nearest(column, row)}; "
                f"the columns are {', '.join(row)}"
            )
        passages = [row[column]] if column else texts
        scores.append(min(unsupported_rate(prediction, passage) for passage in passages))
    return scores


def _sacrebleu():
    try:
        import sacrebleu
    except ImportError:
        raise FtjaxError("evaluate.metrics: bleu and chrf need sacrebleu; pip install sacrebleu") from None
    return sacrebleu


def bleu_rows(predictions, references, rows, settings) -> list[float]:
    """Sentence BLEU with effective order, by `sacrebleu`; 0 to 100."""
    bleu = _sacrebleu().BLEU(effective_order=True)
    return [bleu.sentence_score(p, r).score for p, r in zip(predictions, references, strict=True)]


def bleu_corpus(predictions, references) -> float:
    """Corpus BLEU (Papineni et al. 2002, Post 2018), by `sacrebleu` with its defaults; 0 to 100."""
    return _sacrebleu().corpus_bleu(predictions, _streams(references)).score


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of every prediction, then the second, None where there is none."""
    return [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]


def lowered(metric: Metric) -> Metric:
    """A metric, which has a figure of its own, of all texts in lower case."""

    def low(texts):
        return [text.lower() for text in texts]

    def rows(predictions, references, rows, settings):
        return metric.rows(low(predictions), [low(texts) for texts in references], rows, settings)

    def corpus(predictions, references):
        return metric.corpus(low(predictions), [low(texts) for texts in references])

    return dataclasses.replace(metric, rows=rows, corpus=corpus)


def chrf_rows(predictions, references, rows, settings) -> list[float]:
    """Sentence chrF with `sacrebleu`'s defaults; 0 to 100."""
    chrf = _sacrebleu().CHRF()
    return [chrf.sentence_score(p, r).score for p, r in zip(predictions, references, strict=True)]


def chrf_corpus(predictions, references) -> float:
    """Corpus chrF (Popović 2015), by `sacrebleu` with its defaults: chrF2, characters up to 6-grams; 0 to 100."""
    return _sacrebleu().CHRF().corpus_score(predictions, _streams(references)).score


METRICS = {
    "exact_match": Metric(exact_match),
    "token_f1": Metric(token_f1),
    "rouge_1": Metric(rouge("rouge1")),
    "rouge_2": Metric(rouge("rouge2")),
    "rouge_l": Metric(rouge("rougeL")),
    "bleu": Metric(bleu_rows, bleu_corpus, best=100.0),
    "bleu_lower": lowered(Metric(bleu_rows, bleu_corpus, best=100.0)),  # the E2E challenge's convention
    "chrf": Metric(chrf_rows, chrf_corpus, best=100.0),
    "coverage": Metric(coverage),
    "number_match": Metric(number_match),
    "distinct_1": distinct(1),
    "distinct_2": distinct(2),
    "unsupported": Metric(unsupported, higher=False, best=0.0),
    "length": Metric(length, higher=None, best=None),
}
