"""Any number of labels for a text, or for a pair of texts."""

from __future__ import annotations

import numpy as np

from ftjax.data.labelled import BITS, Labelled, encoder, label_id, split_labels
from ftjax.errors import FtjaxError
from ftjax.evaluation import by_label
from ftjax.objectives import classify
from ftjax.tasks import Task


def target(how: Labelled, row: dict, place: str):
    """The labels of a row that may have several.

    Args:
        how: The recipe.
        row: The row.
        place: Name of the row in errors.

    Returns:
        (C,) float32: 1 for each label that the row has, 0 for the others.

    Raises:
        FtjaxError: If a label is unknown or occurs twice, or if the cell has another format.
    """
    out, cell = np.zeros(len(how.names), np.float32), row.get(how.label)
    labels = split_labels(cell) if how.label else []
    if how.vectors:
        if len(labels) != len(out) or any(x not in BITS for x in labels):
            raise FtjaxError(
                f"{place}: column {how.label!r} holds {cell!r:.80}; expected {len(out)} numbers, each 0 or 1"
            )
        return np.array([x in (1, "1") for x in labels], np.float32)
    if isinstance(cell, int | float) and how.label:
        raise FtjaxError(
            f"{place}: column {how.label!r} holds {cell!r}; expected a list of labels, or a text with commas between "
            "them; where every label has a column of its own, write the names of those that a row has into one"
        )
    for label in labels:
        at = label_id(how, label, place)
        if out[at]:
            raise FtjaxError(
                f"{place}: column {how.label!r} holds {cell!r:.80}, which names {label!r} twice; expected each "
                f"label once, or in all rows vectors of {len(out)} numbers, each 0 or 1"
            )
        out[at] = 1
    return out


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits (N, C) as probabilities, one for each label."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def record(labels, truth, chances, thresholds) -> tuple[list[str], list[str]]:
    """(labels, predicted labels) of a row. A label is predicted from its threshold on, which is 0.5 by default."""
    cut = np.array(thresholds or [0.5] * len(labels))
    held, predicted = ([name for name, yes in zip(labels, hit) if yes] for hit in (truth > 0, chances >= cut))
    return held, predicted


TASK = Task(
    head="sequence",
    sums=classify.many_classes,
    private=True,
    options=lambda config: {"focal": config.task.focal},
    problem="multi_label_classification",
    target=lambda labels: ((labels,), "float32"),
    encode=encoder(target),
    several=True,
    unlabelled=True,
    stratified=True,
    judge=by_label.judge(
        sigmoid, record, lambda chances, truths: (chances, truths), lambda cut: {"thresholds": np.array(cut)}
    ),
    judged="multi_label",
    right="subset_accuracy",
    takes=("task.focal",),
)
