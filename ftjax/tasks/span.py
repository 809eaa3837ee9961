"""Where a text holds the answer to a question: the most probable span of those that the model's scores allow.

T tokens of a window, K tokens at which an answer may begin.
"""

from typing import NamedTuple

import numpy as np

from ftjax import xla
from ftjax.data import spans
from ftjax.evaluation.outputs import Asked, Judge, at_places, by_row
from ftjax.objectives import span
from ftjax.tasks import Columns, Task

BEST = 3  # number of other answers in a record


logits = xla.jit(span.logits, static_argnums=0)


class Answer(NamedTuple):
    """A span. score: sum of the logits of its start and its end; start, end: its first character and one past its
    last."""

    score: float
    start: int
    end: int


def best(scores: np.ndarray, offsets: np.ndarray, longest: int, n: int) -> list[Answer]:
    """The spans of a window with the highest scores, highest first.

    A span lies within the text, does not end before it starts, and has at most `longest` tokens.

    Args:
        scores: (T, 2) logits of start and end.
        offsets: Characters of each token, see ftjax.data.spans.Window.
        longest: Most tokens of a span.
        n: Number of spans.
    """
    text = np.flatnonzero(offsets[:, 1] >= 0)
    start, end = scores[text].astype(np.float64).T
    longest = min(longest, len(text))
    ends = np.pad(end, (0, longest - 1), constant_values=-np.inf)
    sums = start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)  # (K, tokens after the first)
    flat = sums.ravel()
    chosen = np.argsort(-flat, kind="stable")[:n]
    first, behind = np.divmod(chosen[np.isfinite(flat[chosen])], longest)
    at = zip(offsets[text[first], 0], offsets[text[first + behind], 1], strict=True)
    return [Answer(float(sums[f, b]), int(s), int(e)) for f, b, (s, e) in zip(first, behind, at, strict=True)]


def predict(asked: Asked) -> list[dict]:
    """Predict the answer of each row.

    The answer is the best span of all windows. If config.task.no_answer is set, the empty answer competes with it. Its
    score is that of the first token, in the window where that score is lowest (Devlin et al. 2019).

    Returns:
        {"row", "question", "answers", "prediction", "score", "others"} of each row; without "answers" for unlabelled
        rows.
    """
    part, task = asked.part, asked.config.task
    outputs, out = at_places(logits, asked, whole_rows=True), blank(asked)
    for record, members in zip(out, by_row(part), strict=True):
        how, row, place = part.recipe(members[0]), part.row(members[0]), part.place(members[0])
        text = row[how.pair]
        found, none = [], np.inf
        for i, window in zip(members, spans.windows(how, asked.tokenizer, [row], [place]), strict=True):
            found += best(outputs[i], window.offsets, task.max_answer, BEST + 1)
            none = min(none, float(outputs[i][0].sum()))
        found = sorted(found, key=lambda answer: -answer.score)
        texts = [{"text": text[a.start : a.end].strip(), "score": round(a.score, 4)} for a in found]
        if task.no_answer:
            texts = sorted([{"text": "", "score": round(none, 4)}, *texts], key=lambda answer: -answer["score"])
        distinct = {}
        for answer in texts:
            distinct.setdefault(answer["text"], answer)
        first, *others = distinct.values()
        record |= {"prediction": first["text"], "score": first["score"], "others": others[:BEST]}
    return out


def blank(asked: Asked) -> list[dict]:
    """As `predict`, for a model that answers nothing."""
    out = []
    for members in by_row(asked.part):
        how, row, place = (f(members[0]) for f in (asked.part.recipe, asked.part.row, asked.part.place))
        known = {"answers": [answer for _, answer in spans.answers(how, row, place)]} if how.label else {}
        out.append({"row": place, "question": row[how.text]} | known | {"prediction": ""})
    return out


def sides(asked: Asked, outputs: list[dict]) -> tuple[list, list]:
    """The reference answers and the predicted answer of each row."""
    return [record["answers"] for record in outputs], [record["prediction"] for record in outputs]


def settings(asked: Asked, thresholds) -> dict:
    """Answers are scored by the rule of SQuAD v2.0 if config.task.no_answer is set, else by that of v1.1."""
    return {"no_answer": asked.config.task.no_answer}


def shown(record: dict) -> str:
    """A mistake in one line: the question, the prediction and a correct answer."""
    right = record["answers"][0] if record["answers"] else ""
    return f"{record['question'][:100]!r}: {record['prediction'][:60]!r}, expected {right[:60]!r}"


TASK = Task(
    head="span",
    sums=span.sums,
    target=lambda labels: ((2,), "int32"),
    whole_rows=True,
    encode=spans.encode,
    columns=Columns(("question",), ("context",), ("answers",)),
    splits=True,
    labels=("start", "end"),
    judge=Judge(
        predict,
        sides,
        lambda asked, found, thresholds: found,
        shown,
        known=("answers",),
        blank=blank,
        settings=settings,
    ),
    judged="answers",
)
