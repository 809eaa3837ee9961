"""The tasks: one row of TASKS for each `task.kind`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from ftjax.objectives import causal, classify, contrast, span


class Task(NamedTuple):
    """A row of TASKS.

    Attributes:
        head: The task of ModelConfig.head.
        sums: sums(model, variables, batch, rngs=..., **options) -> (loss sum, weight sum, {"loss", "correct"}), see
            objectives.causal.
        options: options(config) -> options of `sums` in training only.
        always: always(config) -> options of `sums` in training and evaluation.
        judged: The kind of ftjax.evaluation.labelled that scores its predictions; empty: scored by generated answers,
            or by the loss alone.
        problem: `problem_type` in transformers' config.json, if there is one.
        target: target(number of labels) -> shape and dtype of one target.
        unnamed: Number of labels that a plan assumes if nothing names them.
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
    """The sums of a config's task as training computes them: a function (variables, batch, rngs=...)."""
    task = TASKS[config.task.kind]
    return functools.partial(task.sums, model, **task.always(config), **task.options(config))


def kind_of(head: str, problem: str = "") -> str:
    """The `task.kind` of a model whose head is for the task `head`. problem: its `problem_type`."""
    able = [kind for kind, task in TASKS.items() if task.head == head]
    return next((kind for kind in able if problem and TASKS[kind].problem == problem), able[0] if able else "")
