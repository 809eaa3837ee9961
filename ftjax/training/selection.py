"""The score by which a run keeps its best checkpoint and stops early: `train.select`."""

from __future__ import annotations

from typing import NamedTuple

from ftjax import config as configs
from ftjax import tasks
from ftjax.data.prepare import Part
from ftjax.errors import FtjaxError, nearest
from ftjax.evaluation import compare, judge
from ftjax.evaluation.labelled import LOWER
from ftjax.evaluation.metrics import METRICS, find, score
from ftjax.evaluation.outputs import Asked

LOSS = "val_loss"
OF_SOURCES = ("val_mean_loss", "val_worst_loss")  # over the sources of a mixture
OF_TOKENS = ("accuracy",)  # figures that the validation loss brings along, where a task has no others
SPEED = "batch_size"  # field of config.generate that changes no answer
MOST_ANSWERS = 500  # validation rows that may be answered at each validation


class Selection(NamedTuple):
    """How checkpoints are compared.

    Attributes:
        name: Name of the score.
        higher: Whether more is better.
        part: The validation rows that it is measured on.
    """

    name: str
    higher: bool
    part: Part

    def rank(self, value: float | None) -> float | None:
        """The value as a number of which more is better; None stays None, and is never the best."""
        return value if value is None or self.higher else -value


def selection(config, part: Part, figures: list[str], tokenizer, shape, virtual: int) -> Selection:
    """The Selection that a config asks for.

    Args:
        config: The whole config.
        part: The validation rows that a run uses.
        figures: Names of the scores of the task, see judge.check.
        tokenizer: The tokenizer that rows are encoded with.
        shape: The ModelConfig.
        virtual: Number of virtual tokens before a prompt.

    Raises:
        FtjaxError: If there are no validation rows, if the task does not have this score, if neither more nor less of
            it is better, or if it cannot be computed on these rows.
    """
    name, causal = config.train.select, config.task.kind in tasks.ANSWERS
    if not len(part):
        for key, wanted in (("train.select", name != LOSS), ("train.patience", config.train.patience > 0)):
            if wanted:
                raise FtjaxError(
                    f"{key} needs validation rows, and there are none; set data.validation, or its share in data.split"
                )
    measured = tasks.find(config.task.kind).measure
    of_tokens = () if measured else OF_TOKENS
    losses = (LOSS, *(OF_SOURCES if len(config.data.mixture) > 1 and not measured else ()))
    known = (*losses, *(figures or of_tokens), *(METRICS if causal else ()))
    if name not in known and not (causal and ":" in name):
        more = ", and your own as file.py:function" if causal else ""
        raise FtjaxError(
            f"train.select: {name!r} is no score of task.kind {config.task.kind}{nearest(name, known)}; its scores are "
            f"{', '.join(known)}{more}"
        )
    if not causal or name in (*losses, *OF_TOKENS):
        return Selection(name, name not in losses and name not in LOWER, part)
    metric = find(name)
    if metric.higher is None:
        raise FtjaxError(
            f"train.select: {name} has no better direction (neither more nor less is better); choose another score"
        )
    if len(part) > MOST_ANSWERS:
        raise FtjaxError(
            f"train.select: {name} scores generated answers, and each validation would generate {len(part):,} of them; "
            f"set evaluate.rows to at most {MOST_ANSWERS}"
        )
    compare.check_answers(part, tokenizer, config, shape, virtual)
    # What the metric asks of rows and references is found out on empty answers.
    rows = [part.row(i) for i in range(len(part))]
    score(name, [""] * len(rows), [[part.reference(i, tokenizer)] for i in range(len(rows))], rows, config.evaluate)
    return Selection(name, metric.higher, part)


def check_same(config, before: dict, where: str) -> None:
    """Check that a run which goes on measures its score as before, so that its checkpoints can be compared.

    Args:
        config: The config with which the run goes on.
        before: The fields {key: value} with which its last checkpoint was scored.
        where: Name of the run in errors.

    Raises:
        FtjaxError: If a field that the score depends on has changed.
    """
    name, task, keys = config.train.select, tasks.find(config.task.kind), ("evaluate.rows",)
    with_loss = comes_with_loss(name, task)
    if task.measure or not (with_loss or task.judged):  # answers are generated
        keys += ("evaluate.words", "evaluate.passage", *(f"generate.{key}" for key in config.generate if key != SPEED))
    if task.judged and not with_loss:
        keys += ("task.threshold", "task.max_answer")
    now = configs.flat(config)
    if changed := [f"{key} was {before[key]!r}, is {now[key]!r}" for key in keys if now[key] != before[key]]:
        raise FtjaxError(
            f"{where}: {'; '.join(changed)}, so that {name} (train.select) of later steps could not be compared with "
            "that of earlier ones. Put the value back until the run has ended"
        )


def comes_with_loss(name: str, task: tasks.Task) -> bool:
    """Whether a score is among the figures of a validation's loss, so that nothing else has to be measured for it."""
    return name in (LOSS, *OF_SOURCES) or not task.judged and name in OF_TOKENS


def measure(chosen: Selection, job, model, variables: dict, losses: dict[str, float]) -> float | None:
    """The score of a model on the selection's rows; None if it is undefined.

    Args:
        chosen: The run's Selection.
        job: The run's Job.
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        losses: The figures of the same validation, see start.validate.
    """
    config = job.config
    if comes_with_loss(chosen.name, job.task):
        return losses[chosen.name]
    if job.generates:
        alone = configs.copy(config)
        alone.evaluate.update(metrics=(chosen.name,), compare_rows=0)
        return compare.answers(job.lm(model), variables, chosen.part, alone)[0][chosen.name]
    asked = Asked(model, variables, job.tokenizer, job.data, chosen.part, config)
    outputs = job.task.judge.predict(asked)
    cut = judge.thresholds_of(config, chosen.part, outputs)
    return job.task.judge.report(asked, outputs, cut, draws=0)["metrics"][chosen.name]["value"]
