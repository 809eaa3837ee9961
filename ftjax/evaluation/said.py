"""What a model says of examples, and what it takes to judge a kind of task by it: what `judge` and its kin share.

B rows, T tokens, M places a row at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ftjax import cpus
from ftjax.data.batches import by_example
from ftjax.data.prepare import Data, Part
from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation import labelled
from ftjax.evaluation.loss import WEIGHTS
from ftjax.objectives import TASKS, classify
from ftjax.progress import doing


@functools.partial(cpus.jit, static_argnums=0)
def logits(model, variables, batch):
    """(B, M, C) float32, see objectives.classify."""
    return classify.logits(model, variables, batch)


DRAWS = 1000  # resamples behind the intervals of a report


class Asked(NamedTuple):
    """What is asked of a model: variables: what it is applied to; data: the rows, of which `part` is judged."""

    model: object
    variables: dict
    tokenizer: object
    data: Data
    part: Part
    config: object


class Judge(NamedTuple):
    """One kind of task: how predictions are made of what a model says, judged and shown.

    say(Asked) -> what the model says. sides(Asked, said) -> labels and predictions as labelled.report takes them; None:
    what is said is the report. settings(Asked, thresholds) -> further arguments of labelled's functions. note(Asked,
    said) -> what a reader of the report should know. lines(Asked, said, thresholds) -> one record a row for
    predictions.jsonl; shown(record) -> a mistake in a line; None: there is nothing to write. known: names in a record
    of what the row says and not the model. blank(Asked) -> what a model could say that knows nothing, as `say` gives
    it.
    """

    say: Callable
    sides: Callable | None = None
    lines: Callable | None = None
    shown: Callable | None = None
    known: tuple[str, ...] = ()
    blank: Callable | None = None
    settings: Callable = lambda asked, thresholds: {}
    note: Callable = lambda asked, said: ""

    def report(self, asked: Asked, said, thresholds=None, draws: int = DRAWS) -> dict:
        """labelled.report of what a model said of a part's rows, for results.json; draws: resamples behind the
        intervals, 0: without."""
        if self.sides is None:
            return said
        found = labelled.report(
            TASKS[asked.config.task.kind].judged, *self.sides(asked, said), names=list(asked.data.labels) or None,
            groups=groups(asked), draws=draws, seed=asked.config.seed, **self.settings(asked, thresholds),
        )  # fmt: skip
        note = self.note(asked, said)
        return found | ({"note": note} if note else {})

    def worst(self, asked: Asked, said, thresholds, n: int) -> list[int]:
        """The places of the up to n records of highest loss among those told wrongly."""
        kind, settings = TASKS[asked.config.task.kind].judged, self.settings(asked, thresholds)
        return labelled.worst(kind, *self.sides(asked, said), n, **settings)


def at_places(f: Callable, asked: Asked, whole_rows: bool = False, **layout) -> list[np.ndarray]:
    """f(model, variables, batch) (B, M, ...) or, of whole_rows, (B, T, ...) of every example: at its places, or at its
    tokens, (n, ...), in the order of the examples. layout: see labelled.layout.

    Raises NotFinite, naming the row, where any value is NaN or infinite.
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
                f"{asked.part.place(i)}: what the model says of this row is not finite (NaN or infinite), so it cannot "
                f"be judged. {WEIGHTS}"
            )
    return found


def by_row(part: Part) -> list[list[int]]:
    """The examples of each row, for rows that several are made of; in order."""
    found = []
    for i in range(len(part)):
        if not found or part.origin(found[-1][0]) != part.origin(i):
            found.append([])
        found[-1].append(i)
    return found


def groups(asked: Asked) -> list[str] | None:
    """The value of config.task.group in each row; None where no column is named."""
    column = asked.config.task.group
    if not column:
        return None
    rows = [asked.part.row(examples[0]) for examples in by_row(asked.part)]
    if column not in rows[0]:
        raise FtjaxError(f"task.group: {column!r} is no column; they are {', '.join(rows[0])}")
    return [str(row[column]) for row in rows]


def text(report: dict) -> str:
    """A report as lines for the terminal."""
    if "kind" in report:
        return labelled.table(report) + (f"\n{report['note']}" if "note" in report else "")
    figures = {name: value for name, value in report.items() if name != "samples"}
    return "\n".join(f"{n:<12} {'undefined' if x is None else f'{x:,.6g}'}" for n, x in figures.items())
