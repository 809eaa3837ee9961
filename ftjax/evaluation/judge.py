"""How good what a model says of rows is, for every kind of task: predictions, figures, mistakes, pictures.

N examples, B rows, M places a row at most, C labels.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ftjax.data.batches import Batches
from ftjax.data.labelled import layout
from ftjax.data.prepare import Data, Part
from ftjax.errors import FtjaxError
from ftjax.evaluation import spans, tagged, vectors
from ftjax.evaluation.classification import best_thresholds
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.evaluation.said import Asked, Judge, at_places, logits
from ftjax.evaluation.said import text as said_text
from ftjax.files import replace_json, write_jsonl
from ftjax.foreign import listed, maybe, number, read_json
from ftjax.objectives import TASKS

MISTAKES = 50  # rows listed at most


def by_class(config, data: Data) -> tuple[dict, np.ndarray | None]:
    """How Batches draws examples (source, shares), and the weight of each class, as config.task says.

    Raises FtjaxError for settings that the task has no use for, and weights that are not one a label.
    """
    task, examples = config.task, data.train.examples
    drawn, C = {"source": data.train.source, "shares": data.shares}, len(data.labels)
    for key, kinds in (("class_weights", ("classify", "tag")), ("balanced", ("classify",))):
        if task[key] and task.kind not in kinds:
            raise FtjaxError(f"task.{key}: is of task.kind {' and '.join(kinds)}; this one is {task.kind}")
    if not task.class_weights and not task.balanced:
        return drawn, None
    classes = examples.truths()
    counts = np.bincount(classes, minlength=C)
    if task.balanced:
        if data.shares is not None:
            raise FtjaxError("task.balanced: a mixture already has shares of its own; set one or the other")
        drawn = {"source": classes, "shares": (counts > 0).astype(float)[counts > 0] if counts.all() else None}
        if drawn["shares"] is None:
            lacking = ", ".join(data.labels[c] for c in np.flatnonzero(counts == 0))
            raise FtjaxError(f"task.balanced: train has no row of {lacking}")
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


def say(asked: Asked) -> np.ndarray:
    """Logits (N, C) of the examples."""
    return np.concatenate(at_places(logits, asked))


def probabilities(kind: str, said: np.ndarray) -> np.ndarray:
    """Logits (N, C) -> what labelled.report takes as predictions of a task."""
    if kind == "multilabel":
        return 1 / (1 + np.exp(-said.astype(np.float64)))
    if kind == "regress":
        return said.astype(np.float64)[:, 0] if said.shape[1] == 1 else said.astype(np.float64)
    said = said.astype(np.float64) - said.max(1, keepdims=True)
    return np.exp(said) / np.exp(said).sum(1, keepdims=True)


def truths(part: Part, kind: str) -> np.ndarray:
    """The targets (N,) or (N, C) of examples with one place each, of a task; one number a row is (N,)."""
    values = part.examples.targets[part.examples.first]
    return values[:, 0] if kind == "regress" and values.shape[1] == 1 else values


def settings(asked: Asked, thresholds: list[float] | None) -> dict:
    """Thresholds as labelled.report takes them."""
    if thresholds is None:
        return {}
    return (
        {"threshold": thresholds[-1]} if asked.config.task.kind == "classify" else {"thresholds": np.array(thresholds)}
    )


def thresholds_of(config, part: Part, said: np.ndarray) -> list[float] | None:
    """The probabilities from which labels count as there, chosen on a part by task.threshold; None: 0.5."""
    kind, metric = config.task.kind, config.task.threshold
    if not metric:
        return None
    chances, labels = probabilities(kind, said), truths(part, kind)
    if kind == "classify" and chances.shape[1] != 2:
        raise FtjaxError(f"task.threshold: is for two labels or task.kind multilabel; there are {chances.shape[1]}")
    if kind == "classify":
        chances, labels = chances[:, 1:], labels[:, None]
    return [float(found["threshold"]) for found in best_thresholds(labels, chances, metric)]


def sides(asked: Asked, said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions as labelled.report takes them."""
    kind = asked.config.task.kind
    return truths(asked.part, kind), probabilities(kind, said)


def lines(asked: Asked, said: np.ndarray, thresholds=None) -> list[dict]:
    """One record a row: its place, its text, its label, what is predicted, and every label's probability."""
    part, labels, kind = asked.part, asked.data.labels, asked.config.task.kind
    chances, truth, out = probabilities(kind, said), truths(part, kind), []
    for i in range(len(part)):
        record = {"row": part.place(i), "text": part.rendered(i).prompt}
        if kind == "regress":
            out.append(record | {"label": truth[i].tolist(), "prediction": chances[i].tolist()})
            continue
        by_name = dict(zip(labels, np.round(chances[i], 6).tolist()))
        if kind == "multilabel":
            cut = np.array(thresholds or [0.5] * len(labels))
            told, said_so = ([n for n, yes in zip(labels, hit) if yes] for hit in (truth[i] > 0, chances[i] >= cut))
        else:
            first = int(chances[i, 1] >= thresholds[-1]) if thresholds else int(chances[i].argmax())
            told, said_so = labels[truth[i]], labels[first]
        out.append(record | {"label": told, "prediction": said_so, "probabilities": by_name})
    return out


def shown(record: dict) -> str:
    """What a row is, what it was taken for, and its text."""
    return f"{record['label']!r} taken for {record['prediction']!r}: {record['text'][:100]!r}"


def masked_loss(asked: Asked) -> dict:
    """Loss and accuracy of masked tokens, see loss.evaluate_loss."""
    part, config = asked.part, asked.config
    batches = Batches(
        part.examples, config.evaluate.batch_size or config.train.batch_size or 16, asked.data.max_length,
        buckets=config.data.buckets, seed=config.seed, shuffle=False, **layout(config, asked.tokenizer),
    )  # fmt: skip
    options = TASKS[config.task.kind].always(config)
    loss = functools.partial(sums, asked.model, asked.variables, kind=config.task.kind, **options)
    return evaluate_loss(loss, (batches[i] for i in range(len(batches))))


def blank(asked: Asked) -> np.ndarray:
    """As `say`, of a model for which all labels are alike."""
    return np.zeros((len(asked.part), max(len(asked.data.labels), 1)))


BY_LABEL = Judge(say, sides, lines, shown, known=("label",), blank=blank, settings=settings)
JUDGES = {
    "classify": BY_LABEL,
    "multilabel": BY_LABEL,
    "regress": BY_LABEL,
    "tag": tagged.JUDGE,
    "span": spans.JUDGE,
    "masked": Judge(masked_loss),
    "embed": vectors.JUDGE,
}


def check(config, data: Data, tokenizer) -> list[str]:
    """Judge the answers of a model that knows nothing on the held-out rows, as a run does at its end.

    Whatever would fail there then fails before the first step.

    Args:
        config: the whole config.
        data: the rows.
        tokenizer: the one that they are encoded with.

    Returns:
        The names of the figures on validation rows; none of a task that has no such figures, or without such rows.

    Raises:
        FtjaxError: for a setting or a row by which predictions cannot be judged.
    """
    task, this, names = config.task, JUDGES.get(config.task.kind), []
    if task.threshold and not len(data.validation):
        raise FtjaxError(
            "task.threshold: is chosen on validation rows, and there are none: name data.validation, or give it a "
            "share of data.split"
        )
    if task.threshold and task.kind not in ("classify", "multilabel"):
        raise FtjaxError(f"task.threshold: task.kind {task.kind} has no thresholds; leave it empty")
    for part in (data.test, data.validation) if this and this.blank else ():
        if len(part):
            asked = Asked(None, {}, tokenizer, data, part, config)
            said = this.blank(asked)
            cut = thresholds_of(config, part, said) if task.threshold else None
            names = list(this.report(asked, said, cut, draws=0)["metrics"])
    return names if len(data.validation) else []


class Finished(NamedTuple):
    """What `finish` made: the content of results.json, lines for a person, and files by name."""

    results: dict
    text: str
    files: dict[str, str]


def finish(run_dir: Path, model, variables, data: Data, config, tokenizer) -> Finished:
    """Figures on validation and test rows, with every prediction, the worst mistakes and pictures in the run folder.

    Thresholds are chosen on validation rows. Predictions and mistakes are those of test, or of validation where there
    is no test. Of several processes all must call, and the first writes.
    """
    run_dir, judge = Path(run_dir), JUDGES[config.task.kind]
    parts = {name: getattr(data, name) for name in ("validation", "test") if len(getattr(data, name))}
    asked = {name: Asked(model, variables, tokenizer, data, part, config) for name, part in parts.items()}
    said = {name: judge.say(asked[name]) for name in parts}
    cut = thresholds_of(config, parts["validation"], said["validation"]) if config.task.threshold else None
    results = {"labels": list(data.labels), "thresholds": cut}
    results |= {name: judge.report(asked[name], said[name], cut) for name in parts}
    text = "\n".join(f"{name}:\n{said_text(results[name])}" for name in parts)
    if jax.process_index() or not parts:
        return Finished(results, text, {})
    last = list(parts)[-1]
    written, wrong = {"results": run_dir / "results.json"}, []
    replace_json(written["results"], results)
    if judge.lines:
        records = judge.lines(asked[last], said[last], cut)
        wrong = [records[i] for i in judge.worst(asked[last], said[last], cut, MISTAKES)]
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
    """The report of a loaded model on rows; thresholds as the run chose them, where it did."""
    asked = Asked(lm.model, lm.variables, lm.tokenizer, data, part, config)
    this = JUDGES[lm.kind]
    return this.report(asked, this.say(asked), _chosen(config))


def predict(lm, part: Part, data: Data, config) -> list[dict]:
    """The records of a loaded model on rows whose labels are not known. Raises FtjaxError where a task has none."""
    this = JUDGES[lm.kind]
    if this.lines is None:
        raise FtjaxError(f"predict: a model for the task {lm.kind} says nothing of rows; `ftjax evaluate` measures it")
    asked = Asked(lm.model, lm.variables, lm.tokenizer, data, part, config)
    records = this.lines(asked, this.say(asked), _chosen(config))
    return [{key: value for key, value in record.items() if key not in this.known} for record in records]


def _chosen(config) -> list[float] | None:
    """The thresholds of a run, which its results.json holds; None where its config asks for none."""
    if not config.task.threshold:
        return None
    file = Path(config.run_dir) / "results.json"
    if not file.is_file():
        raise FtjaxError(
            f"{file}: no such file. It holds the thresholds that task.threshold chose; let the run end, or leave "
            "task.threshold empty"
        )
    return read_json(file, thresholds=maybe(listed(number()))).get("thresholds")
