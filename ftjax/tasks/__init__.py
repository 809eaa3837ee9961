"""The tasks, one file each: what a row is, what is minimised, and how predictions are scored.

Of the project, this module imports only the errors, so that every part may use it. The file of a task is imported when
the task is first needed, and may use every part.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ftjax.errors import FtjaxError, check_known

# Names of the files of this package, in the order in which a head is matched with a task.
FILES = ("causal", "preference", "policy", "gkd", "classify", "multilabel", "regress")
FILES += ("reward", "tag", "span", "masked", "embed")
ANSWERS = ("causal", "gkd")  # tasks whose rows hold the answers, which are scored by the loss of their tokens
TASKS: dict[str, Task] = {}  # the tasks that have been asked for, and those that were registered

# Usual names of the column of text and of the label, tried in order.
TEXTS = ("sentence", "text", "content", "sentence1", "premise", "question", "review", "gloss")
LABELS = ("label", "labels", "category", "class", "target")


class Columns(NamedTuple):
    """Usual names of the columns of a task, tried in order.

    Attributes:
        text: Names of the column of the first text.
        pair: Names of the column of the second text. Empty: there is one text, unless task.pair names a second column.
        label: Names of the column of the label. Empty: rows have no label.
    """

    text: tuple[str, ...] = TEXTS
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = LABELS


class Collected(NamedTuple):
    """What Task.collect returns.

    Attributes:
        batches: {name: host array (B, ...)} of each of the next Task.updates steps.
        noted: A row of metrics.jsonl besides the steps' figures, with names of rows of data as "rows"; empty: none.
    """

    batches: list[dict]
    noted: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Task:
    """All that ftjax knows of a value of `task.kind`.

    What is minimised:
        head: The task of ModelConfig.head.
        sums: sums(model, variables, batch, rngs=..., **options) -> (loss sum, weight sum, {"loss", "correct", ...}),
            see objectives.causal. Every sum is divided by the weight sum and reported by its name.
        options: options(config) -> options of `sums` in training only.
        always: always(config) -> options of `sums` in training and evaluation.
        problem: `problem_type` in transformers' config.json, if there is one.
        target: target(number of labels) -> shape and dtype of one target.
        once: once(config) -> a function (model, variables, batch) -> (B, M, ...), which is computed once for the model
            of task.reference and is `reference` in every batch; None where there is no such model.
        per_token: per_token(config, vocab_size) -> the shape of what `once` computes for a token.
        passes: passes(config) -> number of forward passes of a step beside those that have a gradient.
        whole_rows: Whether the loss reads more of a row than the states at the trained places, or others in each epoch.
        arrays: Names of further arrays (B, M) float32 that `sums` reads from a batch, for a plan without rows.
        private: Whether one row is one example whose loss depends on no other row, so that training can bound what an
            example changes, see training.privacy.
        check: check(config, method, spec, data) raises FtjaxError where a tuning method, with its Spec, or a row cannot
            be used.

    What a row is:
        encode: encode(Labelled, tokenizer, rows, places) -> examples: one for each row, unless Example.row says which;
            see data.labelled. None: rows are rendered by data.template.
        recipe: recipe(config, group `data`, columns, most tokens of a row, most tokens of a text) ->
            (data.prepare.Recipe, whether the form of the rows was guessed), without `encode`. None: a row's text is
            predicted.
        columns: Usual names of the columns.
        text: text(Labelled, row, place) -> the text of a row for people and for comparing rows. None: its columns of
            text, joined by line breaks.
        texts: Number of texts of a row that are encoded one after another.
        splits: Whether a text that is too long becomes several examples. If not, data.long says what becomes of it.
        labels: Names of the labels, if they do not depend on the rows.
        numeric: Whether labels are numbers to predict.
        several: Whether a row has several labels.
        unlabelled: Whether a row may have no label.
        order: order(set of names) -> the names of the labels in the order of their ids. It raises FtjaxError for names
            that the task cannot use.
        stratified: Whether a split gives each part the same share of each label.
        layout: layout(config, tokenizer) -> the arguments of Batches that depend on the task.
        trained: trained(config, T) -> number of trained places in a row of T tokens, for a plan without rows.
        unnamed: Number of labels that a plan assumes if nothing names them.

    Batches that depend on the state:
        collect: collect(lm, variables, data, config, step, examples) -> Collected: the batches of the next `updates`
            steps, made by the model in its present state. lm: an LM for the model, its tokenizer and its end tokens.
            variables: the Flax variables. step: the number of such calls before. examples: (n,) index in data.train of
            the examples of the step. Every process calls it with the same arguments and gets whole batches. Nothing
            is made ahead of it. None: batches are made of the rows alone.
        copies: copies(config) -> number of rows of a batch that `collect` makes of an example.
        updates: updates(config) -> number of steps that a call of `collect` is for. A run validates and saves only
            after the last of them.
        longest: longest(config, data) -> most tokens of a text that `collect` makes of the rows of data.train.
        draws: draws(config) -> (most tokens that `collect` draws for a text, number of its further forward passes over
            the texts), for a plan.
        measure: measure(lm, variables, part, config) -> {"loss", "answers", their number, and further means} on
            held-out rows, in place of `sums`.

    How predictions are scored:
        judge: The evaluation.outputs.Judge of its predictions. None: by generated answers.
        judged: The kind of evaluation.labelled that scores them; empty: by the loss alone.
        right: The figure that is the share of right rows, by which comparisons rank contenders; empty: there is none.
        takes: Fields of the config that its loss reads. A field that only other tasks take must have its default,
            because it would do nothing.
    """

    head: str
    sums: Callable
    options: Callable = lambda config: {}
    always: Callable = lambda config: {}
    problem: str = ""
    target: Callable = lambda labels: ((), "int32")
    once: Callable = lambda config: None
    per_token: Callable = lambda config, vocab_size: ()
    passes: Callable = lambda config: 0
    whole_rows: bool = False
    arrays: tuple[str, ...] = ()
    private: bool = False
    check: Callable = lambda config, method, spec, data: None
    encode: Callable | None = None
    recipe: Callable | None = None
    columns: Columns = Columns()
    text: Callable | None = None
    texts: int = 1
    splits: bool = False
    labels: tuple[str, ...] | None = None
    numeric: bool = False
    several: bool = False
    unlabelled: bool = False
    order: Callable | None = None
    stratified: bool = False
    layout: Callable = lambda config, tokenizer: {}
    trained: Callable = lambda config, T: 1
    unnamed: int = 2
    collect: Callable | None = None
    copies: Callable = lambda config: 1
    updates: Callable = lambda config: 1
    longest: Callable = lambda config, data: int(data.train.examples.length.max())
    draws: Callable = lambda config: (config.generate.max_new_tokens, 0)
    measure: Callable | None = None
    judge: Any = None
    judged: str = ""
    right: str = ""
    takes: tuple[str, ...] = ()


def register(kind: str, task: Task) -> None:
    """Add a task under the name of `task.kind`."""
    TASKS[kind] = task


def known(kind: str) -> bool:
    """Whether there is a task of this name."""
    return kind in names()


def names() -> tuple[str, ...]:
    """The values of `task.kind`: those of FILES, then those that were registered."""
    return tuple(dict.fromkeys((*FILES, *TASKS)))


def find(kind: str) -> Task:
    """The task of a `task.kind`. Raises FtjaxError if there is none."""
    check_known(kind, names(), "task.kind:")
    if kind not in TASKS:
        register(kind, importlib.import_module(f"{__name__}.{kind}").TASK)
    return TASKS[kind]


def every() -> dict[str, Task]:
    """{task.kind: the task} of all tasks."""
    return {kind: find(kind) for kind in names()}


def objective(config, model) -> Callable:
    """The sums of a config's task as training computes them: a function (variables, batch, rngs=...).

    Raises FtjaxError for losses of routers in a model without experts, in a mixture of tokens, or in private training.
    """
    task, train, shape = find(config.task.kind), config.train, model.config
    options = {**task.always(config), **task.options(config)}
    balance = shape.balance if train.balance is None and shape.balanced else train.balance or 0.0
    for key, weight in (("balance", balance), ("router_z", train.router_z)):
        if weight and (not shape.experts or shape.mixing or config.privacy.epsilon):
            why = "the loss of an example depends on the others" if shape.experts else "this model has no experts"
            if shape.experts and shape.mixing:
                why = "every expert of a mixture of tokens has the same load"
            raise FtjaxError(f"train.{key}: {weight:g}, but {why}; set it to 0")
    if config.distil.hidden:
        from ftjax.objectives import hidden

        layers = tuple(student for student, _ in config.distil.layers)
        return hidden.Sums(functools.partial(task.sums, **options), model, config.distil.hidden, layers)
    if not shape.experts or shape.mixing or config.privacy.epsilon:
        return functools.partial(task.sums, model, **options)
    from ftjax.objectives.routed import Sums

    return Sums(functools.partial(task.sums, **options), model, balance, train.router_z)


def kind_of(head: str, problem: str = "", labels: int = 0) -> str:
    """The `task.kind` of a model.

    Args:
        head: The task that its head is for.
        problem: Its `problem_type`. Without one, a head over texts with one label gives rewards.
        labels: Number of its labels; 0: unknown.
    """
    able = {kind: task for kind, task in every().items() if task.head == head}
    if head == "sequence" and labels == 1 and not problem:
        return "reward"
    return next((kind for kind, task in able.items() if problem and task.problem == problem), next(iter(able), ""))
