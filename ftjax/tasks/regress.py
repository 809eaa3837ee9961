"""One or more numbers for a text, or for a pair of texts."""

from __future__ import annotations

import numpy as np

from ftjax.data.labelled import Labelled, encoder
from ftjax.errors import FtjaxError
from ftjax.evaluation import by_label
from ftjax.objectives import classify
from ftjax.tasks import Task


def target(how: Labelled, row: dict, place: str):
    """The target numbers of a row.

    Args:
        how: The recipe.
        row: The row.
        place: Name of the row in errors.

    Returns:
        (C,) float32; 0 if rows have no labels.

    Raises:
        FtjaxError: If the cell does not hold C numbers between -1e18 and 1e18.
    """
    cell = row.get(how.label) if how.label else [0.0] * len(how.names)
    try:
        found = np.array([float(x) for x in (cell if isinstance(cell, list) else [cell])], np.float32)
    except (TypeError, ValueError):
        found = np.array([np.nan])
    # The loss squares the numbers, which must not overflow.
    if found.shape != (len(how.names),) or not (np.abs(found) < 1e18).all():
        expected = "a number" if len(how.names) == 1 else f"{len(how.names)} numbers"
        raise FtjaxError(f"{place}: column {how.label!r} holds {cell!r}; expected {expected} between -1e18 and 1e18")
    return found


def predicted(logits: np.ndarray) -> np.ndarray:
    """The head's output (N, C) as predictions: (N, C), or (N,) for one number."""
    return by_label.narrow(logits.astype(np.float64))


TASK = Task(
    head="sequence",
    sums=classify.numbers,
    private=True,
    problem="regression",
    target=lambda labels: ((labels,), "float32"),
    encode=encoder(target),
    numeric=True,
    unnamed=1,
    judge=by_label.judge(predicted),
    judged="regression",
)
