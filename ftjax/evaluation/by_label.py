"""What tasks with one target a row share in scoring their predictions.

N examples, C labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ftjax.data.prepare import Part
from ftjax.evaluation.classification import best_threshold
from ftjax.evaluation.outputs import Asked, Judge, at_places, logits


def judge(
    predictions: Callable, record: Callable | None = None, binary: Callable | None = None, settings: Callable = dict
) -> Judge:
    """The Judge of a task with one target a row, from the logits of the head.

    Args:
        predictions: predictions(logits (N, C)) -> predictions as labelled.report takes them.
        record: record(names of the labels, target, predictions of a row, thresholds) -> (label, predicted label), for
            tasks whose predictions are the probabilities of labels. None: label and prediction are numbers.
        binary: binary(predictions, targets) -> (probabilities (N, K), targets (N, K)), for which thresholds are chosen.
            None: the task has no thresholds.
        settings: settings(thresholds) -> the argument of labelled.report that takes them.
    """

    def sides(asked: Asked, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        truths = targets(asked.part)
        return truths if record else narrow(truths), predictions(outputs)

    def lines(asked: Asked, outputs: np.ndarray, thresholds=None) -> list[dict]:
        """One record a row: its place, text and label, the prediction, and the probability of every label."""
        part, labels, out = asked.part, asked.data.labels, []
        for i, (target, found) in enumerate(zip(*sides(asked, outputs), strict=True)):
            label, predicted = (
                record(labels, target, found, thresholds) if record else (target.tolist(), found.tolist())
            )
            line = {"row": part.place(i), "text": part.rendered(i).prompt, "label": label, "prediction": predicted}
            if record:
                line["probabilities"] = dict(zip(labels, np.round(found, 6).tolist()))
            out.append(line)
        return out

    def thresholds(part: Part, outputs: np.ndarray, metric: str) -> list[float]:
        chances, truths = binary(predictions(outputs), targets(part))
        each = zip(truths.T, chances.T, strict=True)
        return [best_threshold(truth, chance, metric)["threshold"] for truth, chance in each]

    return Judge(
        predict, sides, lines, shown, known=("label",), blank=blank, thresholds=thresholds if binary else None,
        settings=lambda asked, cut: {} if cut is None else settings(cut),
    )  # fmt: skip


def predict(asked: Asked) -> np.ndarray:
    """Logits (N, C) of the examples."""
    return np.concatenate(at_places(logits, asked))


def blank(asked: Asked) -> np.ndarray:
    """As `predict`, for a model that gives all labels the same logit."""
    return np.zeros((len(asked.part), max(len(asked.data.labels), 1)))


def targets(part: Part) -> np.ndarray:
    """The targets of examples with one place each, (N,) or (N, C)."""
    return part.examples.targets[part.examples.first]


def narrow(values: np.ndarray) -> np.ndarray:
    """(N, C) numbers; (N,) for C = 1."""
    return values[:, 0] if values.shape[1] == 1 else values


def shown(record: dict) -> str:
    """A mistake in one line: the label, the prediction and the text."""
    return f"{record['label']!r} taken for {record['prediction']!r}: {record['text'][:100]!r}"
