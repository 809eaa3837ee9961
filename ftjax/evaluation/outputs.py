"""The output of a model on examples, and what the evaluation of every kind of task shares.

B rows, T tokens, M places of a row at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ftjax import cpus, tasks, xla
from ftjax.data.batches import by_example
from ftjax.data.prepare import Data, Part
from ftjax.data.table import need_columns
from ftjax.errors import WEIGHTS, NotFinite
from ftjax.evaluation import labelled
from ftjax.objectives import classify
from ftjax.progress import doing


@functools.partial(xla.jit, static_argnums=0)
def logits(model, variables, batch):
    """(B, M, C) float32, see objectives.classify."""
    return classify.logits(model, variables, batch)


DRAWS = 1000  # resamples for the intervals of a report


class Asked(NamedTuple):
    """A model and the rows that it is evaluated on: the `part` of `data`. `variables` are the Flax variables."""

    model: object
    variables: dict
    tokenizer: object
    data: Data
    part: Part
    config: object


class Judge(NamedTuple):
    """How one kind of task is predicted, evaluated and shown.

    Attributes:
        predict: predict(Asked) -> the model's output.
        sides: sides(Asked, output) -> (labels, predictions) as labelled.report takes them; None: the output is the
            report.
        lines: lines(Asked, output, thresholds) -> one record per row for predictions.jsonl; None: no records.
        shown: shown(record) -> a mistake in one line.
        known: Keys of a record that come from the row, not from the model.
        blank: blank(Asked) -> the output of a model without knowledge, in the form of `predict`.
        settings: settings(Asked, thresholds) -> further arguments of labelled's functions.
        thresholds: thresholds(part, output, metric) -> the least probability of each label that counts as predicted,
            chosen on a part by a metric. None: the task has no thresholds.
        note: note(Asked, output) -> a note for the reader of the report; empty: none.
    """

    predict: Callable
    sides: Callable | None = None
    lines: Callable | None = None
    shown: Callable | None = None
    known: tuple[str, ...] = ()
    blank: Callable | None = None
    settings: Callable = lambda asked, thresholds: {}
    thresholds: Callable | None = None
    note: Callable = lambda asked, outputs: ""

    def report(self, asked: Asked, outputs, thresholds=None, draws: int = DRAWS) -> dict:
        """The labelled.report of a model's output, for results.json.

        Args:
            asked: The model and rows.
            outputs: The output of `predict`.
            thresholds: The thresholds of labels; None: 0.5.
            draws: Number of resamples for the intervals; 0: no intervals.
        """
        if self.sides is None:
            return outputs
        found = labelled.report(
            tasks.find(asked.config.task.kind).judged, *self.sides(asked, outputs),
            names=list(asked.data.labels) or None,
            groups=groups(asked), draws=draws, seed=asked.config.seed, **self.settings(asked, thresholds),
        )  # fmt: skip
        note = self.note(asked, outputs)
        return found | ({"note": note} if note else {})

    def worst(self, asked: Asked, outputs, thresholds, n: int) -> list[int]:
        """Indices of the up to n wrong records with the highest loss."""
        kind, settings = tasks.find(asked.config.task.kind).judged, self.settings(asked, thresholds)
        return labelled.worst(kind, *self.sides(asked, outputs), n, **settings)


def at_places(f: Callable, asked: Asked, whole_rows: bool = False, **layout) -> list[np.ndarray]:
    """Apply a function to all examples, in batches.

    Args:
        f: f(model, variables, batch) -> (B, M, ...), or (B, T, ...) with `whole_rows`.
        asked: The model and rows.
        whole_rows: Whether f has a value for each token instead of each place.
        layout: Arguments of Batches for the task, see ftjax.tasks.Task.layout.

    Returns:
        The values (n, ...) at the places, or tokens, of each example, in order.

    Raises:
        NotFinite: If a value is NaN or infinite. It names the row.
    """
    examples, config = asked.part.examples, asked.config
    rows = config.evaluate.batch_size or config.train.batch_size or 16
    buckets, width = max(config.data.buckets, 8), asked.model.config.width
    with doing(f"asking the model about {len(examples):,} rows"), cpus.dealt(asked.variables, rows, width) as variables:
        f = functools.partial(f, asked.model, variables)
        found = by_example(f, examples, rows, asked.data.max_length, buckets, whole_rows=whole_rows, **layout)
    for i, values in enumerate(found):
        if not np.isfinite(values).all():
            raise NotFinite(
                f"{asked.part.place(i)}: the model's output for this row is not finite (NaN or infinite), so it "
                f"cannot be scored. {WEIGHTS}"
            )
    return found


def by_row(part: Part) -> list[list[int]]:
    """The examples of each row, in order, for rows that are split into several examples."""
    borders = np.flatnonzero(np.diff(part.numbers)) + 1
    return [members.tolist() for members in np.split(np.arange(len(part)), borders)]


def groups(asked: Asked) -> list[str] | None:
    """The value of config.task.group for each row; None if no column is named. Raises FtjaxError if there is no such
    column."""
    column = asked.config.task.group
    if not column:
        return None
    rows = [asked.part.row(examples[0]) for examples in by_row(asked.part)]
    need_columns([column], rows[0], "task.group")
    return [str(row[column]) for row in rows]


def text(report: dict) -> str:
    """A report as lines for the terminal."""
    if "kind" in report:
        return labelled.table(report) + (f"\n{report['note']}" if "note" in report else "")
    figures = {name: value for name, value in report.items() if name != "samples"}
    return "\n".join(f"{n:<12} {'undefined' if x is None else f'{x:,.6g}'}" for n, x in figures.items())
