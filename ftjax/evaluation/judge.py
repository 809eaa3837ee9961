"""What a model with a head over labels says of rows, and how good that is: predictions, figures, mistakes, pictures.

N examples, B rows, M places a row at most, C labels.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ftjax.data.batches import Batches
from ftjax.data.prepare import Data, Part
from ftjax.errors import FtjaxError
from ftjax.evaluation import labelled
from ftjax.evaluation.classification import best_thresholds
from ftjax.files import replace_text
from ftjax.hub.weights import whole
from ftjax.objectives import TASKS, classify

MISTAKES = 50  # rows listed at most
LEAST = 8  # rows a step at least: where nothing is trained they cost little memory


@functools.partial(jax.jit, static_argnums=0)
def logits(model, variables, batch):
    """(B, M, C) float32, see objectives.classify."""
    return classify.logits(model, variables, batch)


def by_class(config, data: Data) -> tuple[dict, np.ndarray | None]:
    """How Batches draws examples (source, shares), and the weight of each class, as config.task says.

    Raises FtjaxError for settings that the task has no use for, and weights that are not one a label.
    """
    task, examples = config.task, data.train.examples
    drawn, C = {"source": data.train.source, "shares": data.shares}, len(data.labels)
    if task.kind != "classify":
        for key in ("class_weights", "balanced"):
            if task[key]:
                raise FtjaxError(f"task.{key}: is of task.kind classify; this one is {task.kind}")
        return drawn, None
    classes = examples.targets[examples.first]
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
    if len(weights) != C or not all(isinstance(w, int | float) and w >= 0 for w in weights):
        raise FtjaxError(f'task.class_weights: expected {C} numbers, one a label, or ("balanced",); found {weights!r}')
    return drawn, np.array(weights, np.float32)


def predictions(model, variables, part: Part, config, max_length: int) -> list[np.ndarray]:
    """What the head says at each place of each example, (n, C) float32, in the order of the examples."""
    rows = config.evaluate.batch_size or config.train.batch_size or 16
    rows = max(LEAST, min(rows, len(part)))
    batches = Batches(part.examples, rows, max_length, buckets=max(config.data.buckets, 8), shuffle=False)
    found: list[np.ndarray] = [None] * len(part)
    for step in range(len(batches)):
        told = whole(logits(model, variables, batches[step]))
        for said, members in zip(told, batches.rows(step), strict=True):
            at = 0
            for example in members:
                count = part.examples.labels[example]
                found[example] = said[at : at + count]
                at += count
    return found


def probabilities(kind: str, said: np.ndarray) -> np.ndarray:
    """Logits (N, C) -> what labelled.report takes as predictions of a task."""
    if kind == "multilabel":
        return 1 / (1 + np.exp(-said.astype(np.float64)))
    if kind == "regress":
        return said.astype(np.float64)[:, 0] if said.shape[1] == 1 else said.astype(np.float64)
    said = said.astype(np.float64) - said.max(1, keepdims=True)
    return np.exp(said) / np.exp(said).sum(1, keepdims=True)


def truths(part: Part) -> np.ndarray:
    """The targets (N,) or (N, C) of examples with one place each."""
    values = part.examples.targets[part.examples.first]
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def settings(kind: str, thresholds: list[float] | None) -> dict:
    """Thresholds as labelled.report takes them."""
    if thresholds is None:
        return {}
    return {"threshold": thresholds[-1]} if kind == "classify" else {"thresholds": np.array(thresholds)}


def thresholds_of(config, part: Part, said: np.ndarray) -> list[float] | None:
    """The probabilities from which labels count as there, chosen on a part by task.threshold; None: 0.5."""
    kind, metric = config.task.kind, config.task.threshold
    if not metric:
        return None
    chances, labels = probabilities(kind, said), truths(part)
    if kind == "classify" and chances.shape[1] != 2:
        raise FtjaxError(f"task.threshold: is for two labels or task.kind multilabel; there are {chances.shape[1]}")
    if kind not in ("classify", "multilabel"):
        raise FtjaxError(f"task.threshold: task.kind {kind} has no thresholds; leave it empty")
    if kind == "classify":
        chances, labels = chances[:, 1:], labels[:, None]
    return [float(found["threshold"]) for found in best_thresholds(labels, chances, metric)]


def report(config, part: Part, said: np.ndarray, labels, thresholds=None) -> dict:
    """labelled.report of what a model said (N, C) of a part's rows."""
    kind = config.task.kind
    groups = None
    if config.task.group:
        rows = [part.row(i) for i in range(len(part))]
        if config.task.group not in rows[0]:
            raise FtjaxError(f"task.group: {config.task.group!r} is no column; they are {', '.join(rows[0])}")
        groups = [str(row[config.task.group]) for row in rows]
    names = None if kind == "regress" else list(labels)
    return labelled.report(
        TASKS[kind].judged, truths(part), probabilities(kind, said), names=names, groups=groups, seed=config.seed,
        **settings(kind, thresholds),
    )  # fmt: skip


def lines(config, part: Part, said: np.ndarray, labels, thresholds=None) -> list[dict]:
    """One record a row: its place, its text, its label, what is predicted, and every label's probability."""
    kind, chances, truth = config.task.kind, probabilities(config.task.kind, said), truths(part)
    out = []
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


class Finished(NamedTuple):
    """What `finish` made: the content of results.json, lines for a person, and files by name."""

    results: dict
    text: str
    files: dict[str, str]


def finish(run_dir: Path, model, variables, data: Data, config) -> Finished:
    """Figures on validation and test rows, with every prediction, the worst mistakes and pictures in the run folder.

    Thresholds are chosen on validation rows. Predictions and mistakes are those of test, or of validation where there
    is no test. Of several processes all must call, and the first writes.
    """
    run_dir, kind = Path(run_dir), config.task.kind
    parts = {name: getattr(data, name) for name in ("validation", "test") if len(getattr(data, name))}
    said = {
        name: np.concatenate(predictions(model, variables, part, config, data.max_length))
        for name, part in parts.items()
    }
    if config.task.threshold and "validation" not in parts:
        raise FtjaxError("task.threshold: chosen on validation rows, and there are none")
    cut = thresholds_of(config, parts["validation"], said["validation"]) if config.task.threshold else None
    results = {"labels": list(data.labels), "thresholds": cut}
    results |= {name: report(config, part, said[name], data.labels, cut) for name, part in parts.items()}
    text = "\n".join(f"{name}:\n{labelled.table(results[name])}" for name in parts)
    if jax.process_index() or not parts:
        return Finished(results, text, {})
    last = list(parts)[-1]
    part, chances = parts[last], probabilities(kind, said[last])
    records = lines(config, part, said[last], data.labels, cut)
    wrong = labelled.worst(TASKS[kind].judged, truths(part), chances, MISTAKES, **settings(kind, cut))
    files = {
        "results": ("results.json", json.dumps(results, indent=2) + "\n"),
        "predictions": ("predictions.jsonl", _jsonl(records)),
        "mistakes": ("mistakes.jsonl", _jsonl([records[i] for i in wrong])),
    }
    for name, content in files.values():
        replace_text(run_dir / name, content)
    written = {key: str(run_dir / name) for key, (name, _) in files.items()}
    if "confusion" in results[last]:
        from ftjax.evaluation.pictures import confusion_picture, reliability_picture

        for key, draw in (("confusion", confusion_picture), ("calibration", reliability_picture)):
            written[key] = str(run_dir / f"{key}.png")
            draw(results[last], written[key])
    if wrong:
        text += f"\nworst mistakes on {last}:\n" + "\n".join(
            f"  {records[i]['label']!r} taken for {records[i]['prediction']!r}: {records[i]['text'][:100]!r}"
            for i in wrong[: config.evaluate.samples]
        )
    return Finished(results, text, written)


def _jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def judge(lm, part: Part, data: Data, config) -> dict:
    """`report` of a loaded model on rows; thresholds as the run chose them, where it did."""
    said = np.concatenate(predictions(lm.model, lm.variables, part, config, data.max_length))
    return report(config, part, said, lm.labels, _chosen(config))


def predict(lm, part: Part, data: Data, config) -> list[dict]:
    """`lines` of a loaded model on rows whose labels are not known."""
    said = np.concatenate(predictions(lm.model, lm.variables, part, config, data.max_length))
    records = lines(config, part, said, lm.labels, _chosen(config))
    return [{key: value for key, value in record.items() if key != "label"} for record in records]


def _chosen(config) -> list[float] | None:
    file = Path(config.run_dir) / "results.json"
    return json.loads(file.read_text()).get("thresholds") if config.task.threshold and file.is_file() else None
