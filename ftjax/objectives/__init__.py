"""What a run minimises: one row of TASKS for each `task.kind`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from ftjax.objectives import causal, classify


class Task(NamedTuple):
    """A row of TASKS.

    head: the task of ModelConfig.head; sums(model, variables, batch, rngs=..., **options) -> (loss sum, weight sum,
    {"loss", "correct"}), see objectives.causal; options: config -> those; judged: the kind of
    ftjax.evaluation.labelled that its predictions are judged as, empty: by generation; problem: `problem_type` in
    transformers' config.json, where it has one; target(labels) -> shape and dtype of one target.
    """

    head: str
    sums: Callable
    options: Callable
    judged: str = ""
    problem: str = ""
    target: Callable = lambda labels: ((), "int32")


def _text(config) -> dict:
    return {"label_smoothing": config.train.label_smoothing, "head_chunk": config.model.head_chunk}


def _classes(config) -> dict:
    return {"label_smoothing": config.train.label_smoothing, "focal": config.task.focal}


TASKS = {
    "causal": Task("causal", causal.sums, _text),
    "classify": Task("sequence", classify.one_class, _classes, "single_label", "single_label_classification"),
    "multilabel": Task(
        "sequence",
        classify.many_classes,
        lambda config: {"focal": config.task.focal},
        "multi_label",
        "multi_label_classification",
        lambda labels: ((labels,), "float32"),
    ),
    "regress": Task(
        "sequence",
        classify.numbers,
        lambda config: {},
        "regression",
        "regression",
        lambda labels: ((labels,), "float32"),
    ),
}


def objective(config, model) -> Callable:
    """(variables, batch, rngs=...) -> sums of a config's task; without smoothing and the like: see `measured`."""
    task = TASKS[config.task.kind]
    return functools.partial(task.sums, model, **task.options(config))


def kind_of(head: str, problem: str = "") -> str:
    """The `task.kind` of a model with a head for the task `head`; problem: its `problem_type`."""
    able = [kind for kind, task in TASKS.items() if task.head == head]
    return next((kind for kind in able if problem and TASKS[kind].problem == problem), able[0] if able else "")
