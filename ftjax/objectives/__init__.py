"""What a run minimises: one row of TASKS for each `task.kind`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from ftjax.objectives import causal, classify, contrast, span


class Task(NamedTuple):
    """A row of TASKS.

    head: the task of ModelConfig.head; sums(model, variables, batch, rngs=..., **options) -> (loss sum, weight sum,
    {"loss", "correct"}), see objectives.causal; options: config -> those of training alone; always: config -> those of
    evaluation too; judged: the kind of ftjax.evaluation.labelled that its predictions are judged as, empty: by
    generation, or its loss alone; problem: `problem_type` in transformers' config.json, where it has one;
    target(labels) -> shape and dtype of one target; unnamed: labels of its head that a plan takes where nobody names
    any.
    """

    head: str
    sums: Callable
    options: Callable = lambda config: {}
    always: Callable = lambda config: {}
    judged: str = ""
    problem: str = ""
    target: Callable = lambda labels: ((), "int32")
    unnamed: int = 2


def _smoothing(config) -> dict:
    return {"label_smoothing": config.train.label_smoothing}


def _chunk(config) -> dict:
    return {"head_chunk": config.model.head_chunk}


def _classes(config) -> dict:
    return {"label_smoothing": config.train.label_smoothing, "focal": config.task.focal}


TASKS = {
    "causal": Task("causal", causal.sums, _smoothing, _chunk, unnamed=0),
    "classify": Task(
        "sequence", classify.one_class, _classes, judged="single_label", problem="single_label_classification"
    ),
    "multilabel": Task(
        "sequence",
        classify.many_classes,
        lambda config: {"focal": config.task.focal},
        judged="multi_label",
        problem="multi_label_classification",
        target=lambda labels: ((labels,), "float32"),
    ),
    "regress": Task(
        "sequence",
        classify.numbers,
        judged="regression",
        problem="regression",
        unnamed=1,
        target=lambda labels: ((labels,), "float32"),
    ),
    "tag": Task("token", classify.one_class, _classes, judged="tags"),
    "span": Task("span", span.sums, judged="answers", target=lambda labels: ((2,), "int32")),
    "masked": Task("masked", causal.sums, _smoothing, _chunk, unnamed=0),
    "embed": Task(
        "none",
        contrast.sums,
        always=lambda config: {"pool": config.task.pool, "temperature": config.task.temperature},
        judged="retrieval",
        unnamed=0,
    ),
}


def objective(config, model) -> Callable:
    """(variables, batch, rngs=...) -> sums of a config's task, as training computes them."""
    task = TASKS[config.task.kind]
    return functools.partial(task.sums, model, **task.always(config), **task.options(config))


def kind_of(head: str, problem: str = "") -> str:
    """The `task.kind` of a model with a head for the task `head`; problem: its `problem_type`."""
    able = [kind for kind, task in TASKS.items() if task.head == head]
    return next((kind for kind in able if problem and TASKS[kind].problem == problem), able[0] if able else "")
