"""Evaluate a model's predictions for every kind of task: predictions, figures, mistakes and pictures.

N examples, B rows, M places of a row at most, C labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ftjax import config as configs
from ftjax import tasks
from ftjax.data.prepare import Data, Part
from ftjax.errors import FtjaxError
from ftjax.evaluation.outputs import Asked
from ftjax.evaluation.outputs import text as output_text
from ftjax.files import replace_json, write_jsonl

MISTAKES = 50  # most rows in mistakes.jsonl


def by_class(config, data: Data) -> tuple[dict, np.ndarray | None]:
    """How to draw examples and weight classes, as config.task says.

    Returns:
        ({"source", "shares", "factors"} for Batches, the weight (C,) of each class or None).

    Raises:
        FtjaxError: If the task cannot use a setting, or if there is not one weight for each label.
    """
    task, examples = config.task, data.train.examples
    drawn, C = {"source": data.train.source, "shares": data.shares}, len(data.labels)
    values, takes = configs.flat(config), {kind: other.takes for kind, other in tasks.every().items()}
    taken = {*takes[task.kind], *["task.reference"] * (config.distil.hidden > 0)}
    for key in sorted(set().union(*takes.values()) - taken):
        if values[key] != configs.FIELDS[key].default:
            kinds = [kind for kind in takes if key in takes[kind]]
            raise FtjaxError(f"{key}: is of task.kind {' and '.join(kinds)}; this one is {task.kind}")
    factors = np.array([source.loss_weight for source in configs.sources(config)], np.float32)
    if (factors != 1).any():
        able = [kind for kind, other in tasks.every().items() if other.private]
        if task.kind not in able:
            raise FtjaxError(
                f"data.mixture: loss_weight is for task.kind {', '.join(able)}, whose loss is a sum over rows; this "
                f"one is {task.kind}. Set the weight of a source instead"
            )
        drawn["factors"] = factors[data.train.source]
    if not task.class_weights and not task.balanced:
        return drawn, None
    classes = examples.truths()
    counts = np.bincount(classes, minlength=C)
    if task.balanced:
        if data.shares is not None:
            raise FtjaxError("task.balanced: a mixture already has shares of its own; set one or the other")
        if lacking := [data.labels[c] for c in np.flatnonzero(counts == 0)]:
            raise FtjaxError(f"task.balanced: train has no row of {', '.join(lacking)}")
        drawn |= {"source": classes, "shares": np.ones(len(counts))}
    weights = tuple(task.class_weights)
    if not weights:
        return drawn, None
    if weights == ("balanced",):
        return drawn, (counts.sum() / (C * np.maximum(counts, 1))).astype(np.float32)
    if len(weights) != C or not all(isinstance(w, int | float) and 0 <= w < np.inf for w in weights):
        raise FtjaxError(
            f'task.class_weights: expected {C} numbers from 0 on, one a label, or ("balanced",); found {weights!r}'
        )
    if not np.array(weights) @ counts:
        raise FtjaxError(f"task.class_weights: {weights!r} give every row of train the weight 0")
    return drawn, np.array(weights, np.float32)


def thresholds_of(config, part: Part, outputs) -> list[float] | None:
    """The thresholds that task.threshold chooses on a part.

    Args:
        config: The config.
        part: The rows, usually those of validation.
        outputs: The model's output on them, see Judge.predict.

    Returns:
        The least probability of each label that counts as predicted; None without task.threshold, which means 0.5.

    Raises:
        FtjaxError: If the task has no thresholds for the number of labels.
    """
    metric = config.task.threshold
    return tasks.find(config.task.kind).judge.thresholds(part, outputs, metric) if metric else None


def check(config, data: Data, tokenizer) -> list[str]:
    """Evaluate the predictions of a model without knowledge on the held-out rows, as a run does at its end.

    Anything that would fail at the end of the run then fails before its first step.

    Args:
        config: The whole config.
        data: The rows.
        tokenizer: The tokenizer that encoded them.

    Returns:
        Names of the figures on validation rows; empty if the task has no such figures, or without validation rows.

    Raises:
        FtjaxError: If predictions cannot be evaluated with a setting or a row.
    """
    task, this, names = config.task, tasks.find(config.task.kind).judge, []
    if task.threshold and not len(data.validation):
        raise FtjaxError(
            "task.threshold: is chosen on validation rows, and there are none: name data.validation, or give it a "
            "share of data.split"
        )
    if task.threshold and not (this and this.thresholds):
        raise FtjaxError(f"task.threshold: task.kind {task.kind} has no thresholds; leave it empty")
    for part in (data.test, data.validation) if this and this.blank else ():
        if len(part):
            asked = Asked(None, {}, tokenizer, data, part, config)
            outputs = this.blank(asked)
            cut = thresholds_of(config, part, outputs) if task.threshold else None
            names = list(this.report(asked, outputs, cut, draws=0)["metrics"])
    return names if len(data.validation) else []


class Finished(NamedTuple):
    """The result of `finish`: the content of results.json, lines for a person, and {name: written file}."""

    results: dict
    text: str
    files: dict[str, str]


def finish(run_dir: Path, model, variables, data: Data, config, tokenizer) -> Finished:
    """Evaluate on validation and test rows, and write every prediction, the worst mistakes and pictures to the run
    folder.

    Thresholds are chosen on validation rows. Predictions and mistakes are those of test, or of validation if there is
    no test part. If there are several processes, all must call, and the first writes.

    Args:
        run_dir: The run folder.
        model: The Flax module.
        variables: The Flax variables.
        data: The rows.
        config: The run's config.
        tokenizer: The tokenizer.

    Returns:
        The Finished.
    """
    run_dir, judge = Path(run_dir), tasks.find(config.task.kind).judge
    parts = {name: getattr(data, name) for name in ("validation", "test") if len(getattr(data, name))}
    asked = {name: Asked(model, variables, tokenizer, data, part, config) for name, part in parts.items()}
    outputs = {name: judge.predict(asked[name]) for name in parts}
    cut = thresholds_of(config, parts["validation"], outputs["validation"]) if config.task.threshold else None
    results = {"labels": list(data.labels), "thresholds": cut}
    results |= {name: judge.report(asked[name], outputs[name], cut) for name in parts}
    text = "\n".join(f"{name}:\n{output_text(results[name])}" for name in parts)
    if jax.process_index() or not parts:
        return Finished(results, text, {})
    last = list(parts)[-1]
    written, wrong = {"results": run_dir / "results.json"}, []
    replace_json(written["results"], results)
    if judge.lines:
        records = judge.lines(asked[last], outputs[last], cut)
        wrong = [records[i] for i in judge.worst(asked[last], outputs[last], cut, MISTAKES)]
        for key, rows in (("predictions", records), ("mistakes", wrong)):
            written[key] = run_dir / f"{key}.jsonl"
            write_jsonl(written[key], rows)
    if "confusion" in results[last]:
        from ftjax.evaluation.pictures import confusion_picture, reliability_picture

        for key, draw in (("confusion", confusion_picture), ("calibration", reliability_picture)):
            written[key] = draw(results[last], run_dir / f"{key}.png")
    if wrong:
        shown = [f"  {judge.shown(record)}" for record in wrong[: config.evaluate.samples]]
        text += "\n".join([f"\nworst mistakes on {last}:", *shown])
    return Finished(results, text, {key: str(path) for key, path in written.items()})


def judge(lm, part: Part, data: Data, config) -> dict:
    """The report of a loaded model on rows. If its run chose thresholds, they are used.

    Args:
        lm: The model.
        part: The rows.
        data: The Data that they are a part of.
        config: The config.
    """
    asked = Asked(lm.model, lm.variables, lm.tokenizer, data, part, config)
    this = tasks.find(lm.kind).judge
    return this.report(asked, this.predict(asked), _chosen(lm, config))


def predict(lm, part: Part, data: Data, config) -> list[dict]:
    """The records of a loaded model on rows whose labels are not known.

    Args:
        lm: The model.
        part: The rows.
        data: The Data that they are a part of.
        config: The config.

    Raises:
        FtjaxError: If the model's task has no records.
    """
    this = tasks.find(lm.kind).judge
    if this.lines is None:
        raise FtjaxError(
            f"predict: task {lm.kind} makes no prediction for a row; `ftjax evaluate` measures the model's loss"
        )
    asked = Asked(lm.model, lm.variables, lm.tokenizer, data, part, config)
    records = this.lines(asked, this.predict(asked), _chosen(lm, config))
    return [{key: value for key, value in record.items() if key not in this.known} for record in records]


def _chosen(lm, config) -> list[float] | None:
    """The thresholds that the run of a model chose; None if the config asks for none."""
    if not config.task.threshold:
        return None
    if not (thresholds := lm.recipe.get("thresholds")):
        raise FtjaxError(
            "task.threshold: the model has no thresholds. A run chooses them at its end, for the checkpoint that "
            "export.checkpoint names. Let the run end, name that checkpoint, or leave task.threshold empty"
        )
    if len(thresholds) != (needed := lm.model.config.head.labels - (lm.kind == "classify")):
        raise FtjaxError(
            f"task.threshold: {lm.folder} has {len(thresholds)} thresholds (in ftjax.json, or results.json of a "
            f"run); its labels need {needed}. Export the run again, or leave task.threshold empty"
        )
    return thresholds
