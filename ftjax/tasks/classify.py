"""One label for a text, or for a pair of texts."""

from __future__ import annotations

import numpy as np

from ftjax.data.labelled import Labelled, encoder, in_order, label_id
from ftjax.errors import FtjaxError
from ftjax.evaluation import by_label
from ftjax.objectives import classify
from ftjax.tasks import Task


def target(how: Labelled, row: dict, place: str):
    """The class of a row.

    Args:
        how: The recipe.
        row: The row.
        place: Name of the row in errors.

    Returns:
        () int32; 0 if rows have no labels.

    Raises:
        FtjaxError: If the label is unknown.
    """
    return np.int32(label_id(how, row.get(how.label), place) if how.label else 0)


def order(names: set[str]) -> tuple[str, ...]:
    """Names of the labels in the order of their ids. Raises FtjaxError if there are fewer than two."""
    if len(names) < 2:
        raise FtjaxError(f"data.label: the rows of train have the label {', '.join(names)!r} only; expected two")
    return in_order(names)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (N, C) as probabilities that sum to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def record(labels, truth, chances, thresholds) -> tuple[str, str]:
    """(label, predicted label) of a row. With a threshold, which is for two labels, it decides for the second."""
    first = int(chances[1] >= thresholds[-1]) if thresholds else int(chances.argmax())
    return labels[truth], labels[first]


def binary(chances: np.ndarray, truths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities (N, 1), truths (N, 1)) of the second of two labels. Raises FtjaxError for another number."""
    if chances.shape[1] != 2:
        raise FtjaxError(f"task.threshold: is for two labels or task.kind multilabel; there are {chances.shape[1]}")
    return chances[:, 1:], truths[:, None]


TASK = Task(
    head="sequence",
    sums=classify.one_class,
    private=True,
    options=classify.options,
    problem="single_label_classification",
    encode=encoder(target),
    order=order,
    stratified=True,
    judge=by_label.judge(softmax, record, binary, lambda cut: {"threshold": cut[-1]}),
    judged="single_label",
    right="accuracy",
    takes=("task.class_weights", "task.balanced", "task.focal", "train.label_smoothing"),
)
