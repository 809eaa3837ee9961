"""Scores of generated answers. A new metric is a function and a row of METRICS, or a user's own `file.py:function`.

A user's metric is called with (prediction: text, references: list of texts, row: dict) and returns a finite number, or
None if it has no score. More is better unless the function has an attribute `higher = False`.

An undefined score is None, never 0, 1 or NaN. A row whose references hold no text has no score, and a metric's own
docstring names further cases. A figure is taken over the rows that have a score, and is None if no row has one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal

import numpy as np

from ftjax import tasks, user_code
from ftjax.errors import FtjaxError, check_known, nearest
from ftjax.evaluation import classification, squad
from ftjax.evaluation.words import composed, grams, spaced, stem, words

IN_COMMON = "that answer and right answer have in common, from 0 to"
LARGEST = 1e18  # a user's score; sums and squares of such numbers are finite in float32 too


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of generated answers.

    Attributes:
        row: row(prediction, references, row, settings) -> the score of a text, the best over its references, which are
            a list of texts. `row` is the row of the data set, for metrics that need a column, and settings is
            config.evaluate.
        corpus: corpus(predictions, references) -> the figure; None: the mean of the rows' scores.
        higher: Whether more is better; None: neither.
        best: The best possible score; None: no such bound.
        worst: The score of a row without one if every row must have one, as in a comparison; None: there is no such
            number.
        compares: Whether it reads the references.
        description: For a reader who knows no metric.
    """

    row: Callable[..., float | None]
    corpus: Callable[..., float | None] | None = None
    higher: bool | None = True
    best: float | None = 1.0
    worst: float | None = 0.0
    compares: bool = True
    description: str = "by your own function"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lowest and the highest score of a row; None if it has no bounds."""
        return None if self.best is None else (0.0, self.best or 1.0)

    @property
    def described(self) -> str:
        """The description, and whether more or less is better."""
        return self.description + ("" if self.higher is None else f"; {'more' if self.higher else 'less'} is better")


def score(
    name: str, predictions: list[str], references: list[list[str]], rows: list[dict], settings
) -> tuple[float | None, list[float | None]]:
    """The figure of a metric over all predictions, and the score of each.

    Args:
        name: A row of METRICS, or a user's own metric `file.py:function`.
        predictions: N texts.
        references: N lists of texts; references without text are left out.
        rows: N rows of the data set.
        settings: config.evaluate.

    Returns:
        (figure, N scores), None if undefined.

    Raises:
        FtjaxError: If the metric is unknown, if N is 0, or if a row has no score for a reason that the user can mend.
    """
    metric = find(name)
    if not predictions:
        raise FtjaxError(f"evaluate.metrics: {name} got no predictions; evaluate at least one held-out row")
    if metric.compares:
        references = [[text for text in texts if text.strip()] for texts in references]
    asked = [i for i, texts in enumerate(references) if texts or not metric.compares]
    if not asked:
        return None, [None] * len(predictions)
    found: list[float | None] = [None] * len(predictions)
    for i in asked:
        try:
            found[i] = metric.row(predictions[i], references[i], rows[i], settings)
        except FtjaxError as error:
            raise FtjaxError(f"prediction {i + 1}: {error}") from error
    figure = (
        metric.corpus(*([x[i] for i in asked] for x in (predictions, references))) if metric.corpus else mean(found)
    )
    return figure, found


def mean(scores: Iterable[float | None]) -> float | None:
    """The mean of the defined scores; None if there is none."""
    there = [x for x in scores if x is not None]
    return float(np.mean(there)) if there else None


def find(name: str, key: str = "evaluate.metrics") -> Metric:
    """The row `name` of METRICS, or the user's metric `file.py:function`. Raises FtjaxError, naming the config's `key`,
    for an unknown one."""
    if ":" in name:
        return _users(name, key)
    check_known(name, METRICS, f"{key}: unknown metric", ", or your own as file.py:function")
    return METRICS[name]


def find_any(name: str) -> Metric:
    """As `find`, also for the figure of a task with labels: a share, of which more is better."""
    if task := next((task for task in tasks.every().values() if task.right == name), None):
        description = f"share of rows that get {'exactly the right labels' if task.several else 'the right label'}"
        return Metric(lambda *_: None, description=description)
    return find(name)


def _users(named: str, key: str) -> Metric:
    function = user_code.loaded(named, key)

    def score_of(prediction, references, row, settings):
        try:
            # Copies, because a function that changes them would change what the next answers and functions read.
            value = function(prediction, list(references), copy.deepcopy(row))
        except user_code.ERRORS as error:  # the message names the row
            raise FtjaxError(user_code.failed(named, key, error)) from error
        if value is not None and not (isinstance(value, numbers.Real | np.bool_) and abs(value) <= LARGEST):
            score = f"a finite number of at most {LARGEST:g} for each answer"
            score += ", or None where there is no score" if key == "evaluate.metrics" else ""
            raise FtjaxError(f"{key} {named!r} returned {value!r:.200}; expected {score}")
        return None if value is None else float(value)

    return Metric(score_of, higher=getattr(function, "higher", True), best=None, worst=None, compares=False)


@functools.cache
def _rouge_scorer(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        def tokenize(self, text):
            return [stem(word) if len(word) > 3 and word.isascii() else word for word in words(text)]

    return RougeScorer([kind], tokenizer=Words())


def rouge(kind: str, what: str) -> Metric:
    """F1 of the units that a prediction shares with its best reference (Lin 2004), by `rouge-score` with its stemmer; 0
    to 1.

    For ASCII text the scores are those of rouge-score. Its own tokenizer deletes all other letters, so words are split
    by ftjax.evaluation.words instead. Only words in ASCII are stemmed, because the stemmer is for English.

    kind: `rouge1` for words, `rouge2` for pairs of words, `rougeL` for the longest common subsequence of words. what:
    their name in the description.
    """
    return Metric(
        lambda prediction, references, *_: _rouge_scorer(kind).score_multi(references, prediction)[kind].fmeasure,
        description=f"{what} {IN_COMMON} 1",
    )


def exact_match(prediction, references, *_) -> float:
    """1 if the prediction equals one of its references, where a run of white space counts as one space; else 0."""
    return float(_plain(prediction) in map(_plain, references))


def f1_macro(predictions, references) -> float:
    """The mean over the distinct references of the F1 of answers that equal them; 0 to 1.

    The reference of a prompt with several is the one that was answered, or the first. Texts are compared as in
    `exact_match`.
    """
    plain = [_plain(p) for p in predictions]
    right = [p if p in (texts := list(map(_plain, r))) else texts[0] for p, r in zip(plain, references, strict=True)]
    hits = [text for text, answer in zip(right, plain, strict=True) if text == answer]
    tally = (np.array([found[name] for name in dict.fromkeys(right)]) for found in map(Counter, (hits, plain, right)))
    return float(classification.macro(*tally)["f1_macro"].value)


def _plain(text: str) -> str:
    return " ".join(composed(text).split())


def token_f1(prediction, references, *_) -> float:
    """F1 of the shared words by SQuAD v1.1's rule, see ftjax.evaluation.squad; 0 to 1.

    An answer that equals its reference scores 1, even if the rule drops all of its words (`The`, `+`).
    """
    own = squad.words(prediction)
    shared = [squad.f1(own, squad.words(text)) for text in references]
    return max(*shared, exact_match(prediction, references))


# A number with its sign, a dollar, commas between digits and a fraction; a hyphen after a digit is no sign (`3-5`).
NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The final answer of a worked solution: the number after the first `####`, or the last number if there is no
    `####`.

    This is GSM8K's rule (Cobbe et al. 2021, grade_school_math/dataset.py), `#### (-?[0-9.,]+)` without its commas. In
    addition, `$` and a dot that ends a sentence are left out, and the space after the mark is optional. None if there
    is no number.
    """
    text = text.replace("\u2212", "-")  # the minus sign of typeset mathematics
    _, mark, behind = text.partition(MARK)
    found = NUMBER.match(behind.lstrip()) if mark else [*NUMBER.finditer(text), None][-2:][0]
    return Decimal(found[0].replace(",", "").replace("$", "")) if found else None


def number_match(prediction, references, *_) -> float:
    """1 if the final number equals that of a reference by value (`18.00` is `18`), else 0. See final_number.

    Raises FtjaxError if a reference has no number.
    """
    right = [final_number(text) for text in references]
    if None in right:
        raise FtjaxError(
            f"number_match: the reference {references[right.index(None)]!r} contains no number; correct the row, or "
            "use another metric"
        )
    return float(final_number(prediction) in right)


def distinct(n: int, what: str) -> Metric:
    """Number of distinct n-grams of words divided by that of all n-grams (Li et al. 2016); 0 to 1.

    The score is that of one answer, and the figure that of all answers together. Words are separated by white space and
    in lower case. A character of a script without spaces is a word. Text without an n-gram has no score. The figure
    falls as the amount of text grows, so compare contenders on the same prompts.

    n: Words of an n-gram. what: the name of these n-grams in the description.
    """

    def share(predictions, _=None):
        found = [gram for text in predictions for gram in grams(spaced(text).lower().split(), n)]
        return len(set(found)) / len(found) if found else None

    description = f"share of an answer's {what} that do not occur earlier in it"
    return Metric(lambda prediction, *_: share([prediction]), share, compares=False, description=description)


def length(prediction, *_) -> float:
    """Number of words: runs without white space, and single characters of scripts without spaces."""
    return float(len(spaced(prediction).split()))


def coverage(prediction, references, row, settings) -> float:
    """Share of the distinct given words that the prediction uses, compared by their English stems (Porter 1980); 0 to
    1.

    The given words are in the column `evaluate.words`, as text or a list of texts. Raises FtjaxError if it has none.
    """

    def stems(text):
        return {stem(word) for word in words(text)}

    column = settings.words
    if not column or column not in row:
        raise FtjaxError(
            f"evaluate.words: the metric coverage needs the column with the words to use; found {column!r}"
            f"{nearest(column, row)}, the columns are {', '.join(row)}"
        )
    cell = row[column]
    given = stems(cell if isinstance(cell, str) else " ".join(map(str, cell or ())))
    if not given:
        raise FtjaxError(
            f"evaluate.words: the column {column!r} contains no word in the row {row}; correct or remove the row"
        )
    return len(given & stems(prediction)) / len(given)


def unsupported(prediction, references, row, settings) -> float | None:
    """Share of the sentences with content that the passage does not support, see ftjax.evaluation.support; 0 to 1.

    The passage is the column `evaluate.passage`. If none is named, it is the reference that supports most. An answer
    without content has no score.
    """
    from ftjax.evaluation.support import unsupported_rate

    column = settings.passage
    if column and not isinstance(row.get(column), str):
        raise FtjaxError(
            f"evaluate.passage: the metric unsupported needs text in the column {column!r}{nearest(column, row)}; "
            f"the columns are {', '.join(row)}"
        )
    rates = [unsupported_rate(prediction, passage) for passage in ([row[column]] if column else references)]
    return None if None in rates else min(rates, default=None)


def _sacrebleu():
    try:
        import sacrebleu
    except ImportError:
        raise FtjaxError("evaluate.metrics: bleu and chrf need sacrebleu; pip install sacrebleu") from None
    return sacrebleu


def bleu(lowercase: bool = False) -> Metric:
    """BLEU (Papineni et al. 2002, Post 2018), by `sacrebleu` with its defaults; 0 to 100. A sentence's has effective
    order.

    Each character of a script without spaces is a word, as in sacrebleu's tokenizer `zh`. The figure is None if no
    prediction and no reference has four consecutive words, because BLEU counts 4-grams.

    lowercase: Whether letters count as their small ones.
    """

    def row(prediction, references, *_):
        whole = _sacrebleu().BLEU(lowercase=lowercase, effective_order=True)
        score = whole.sentence_score(spaced(prediction), [spaced(text) for text in references]).score
        return min(100.0, score)  # rounding may exceed 100

    def corpus(predictions, references):
        whole = _sacrebleu().BLEU(lowercase=lowercase)
        predictions, references = [spaced(p) for p in predictions], [[spaced(text) for text in r] for r in references]
        longest = [text for texts in references for text in texts]
        found = whole.corpus_score(predictions, _streams(references))
        four_words = found.totals[-1] or whole.corpus_score(longest, [longest]).totals[-1]
        return min(100.0, found.score) if four_words else None

    what = f"runs of words {IN_COMMON} 100"
    what = what.replace(", from", ", in lower case, from") if lowercase else what
    return Metric(row, corpus, best=100.0, description=what)


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """References in sacrebleu's form: the first of every prediction, then the second, and so on; None where there is
    none."""
    return [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]


def chrf_row(prediction, references, *_) -> float:
    """Sentence chrF with `sacrebleu`'s defaults, of text in composed form (NFC); 0 to 100."""
    return _sacrebleu().CHRF().sentence_score(composed(prediction), [composed(text) for text in references]).score


def chrf_corpus(predictions, references) -> float:
    """Corpus chrF (Popović 2015), by `sacrebleu` with its defaults: chrF2, characters up to 6-grams; 0 to 100."""
    references = [[composed(text) for text in texts] for texts in references]
    return _sacrebleu().CHRF().corpus_score([composed(p) for p in predictions], _streams(references)).score


UNSUPPORTED = "share of an answer's sentences that the passage does not support, by words in common"
METRICS = {
    "exact_match": Metric(exact_match, description="share of answers that equal a right one"),
    "f1_macro": Metric(
        exact_match,
        f1_macro,
        description="how well each of the right answers is found and kept from the others, on average, from 0 to 1",
    ),
    "token_f1": Metric(token_f1, description=f"words {IN_COMMON} 1"),
    "rouge_1": rouge("rouge1", "words"),
    "rouge_2": rouge("rouge2", "pairs of words"),
    "rouge_l": rouge("rougeL", "words in the same order"),
    "bleu": bleu(),
    "bleu_lower": bleu(lowercase=True),  # the E2E challenge's convention
    "chrf": Metric(chrf_row, chrf_corpus, best=100.0, description=f"runs of characters {IN_COMMON} 100"),
    "coverage": Metric(
        coverage, compares=False, description="share of the required words that an answer uses, from 0 to 1"
    ),
    "number_match": Metric(number_match, description="share of answers whose last number is the right one"),
    "distinct_1": distinct(1, "words"),
    "distinct_2": distinct(2, "pairs of words"),
    "unsupported": Metric(unsupported, higher=False, best=0.0, worst=1.0, compares=False, description=UNSUPPORTED),
    "length": Metric(length, higher=None, best=None, compares=False, description="number of words in an answer"),
}
