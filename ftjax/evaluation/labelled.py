"""Evaluate predictions on labelled rows: every figure with its interval, by group, and the worst mistakes.

This is the common entry to resample, classification, entities, squad, retrieval, regression and preferred. A new kind
of task is a Kind in a file of its own and a row of KINDS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftjax.errors import FtjaxError, check_known
from ftjax.evaluation import classification, entities, preferred, regression, retrieval, squad
from ftjax.evaluation.resample import Kind, intervals
from ftjax.evaluation.tables import grid

LOWER = ("log_loss", "calibration_error", "mse", "mae", "mean_rank")  # figures where less is better
SHOWN = 30  # most classes that `table` lists


KINDS = {
    "single_label": classification.SINGLE,
    "multi_label": classification.MULTI,
    "regression": regression.KIND,
    "tags": entities.KIND,
    "answers": squad.KIND,
    "retrieval": retrieval.KIND,
    "pairs": preferred.KIND,
}


def report(
    kind: str,
    labels,
    predictions,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    **settings,
) -> dict:
    """Evaluate predictions on N rows, as plain data for JSON.

    The same seed gives the same resamples for the same number of rows, whatever the kind.

    Args:
        kind: Key of KINDS. It decides the form of labels, predictions and settings:

            single_label  (N,) int        probabilities (N, C)             threshold: of class 1 of two
            multi_label   (N, C) 0 or 1   probabilities (N, C)             thresholds: one, or (C,); default 0.5
            regression    (N,)            (N,)
            tags          N lists of BIO, IOBES or BILOU tags, of either   strict: as seqeval's mode="strict"
            answers       N lists of texts; N texts                        no_answer: by SQuAD v2.0
            retrieval     (N, D) partners' vectors; (N, D) vectors
            pairs         (N,) scores of the worse; (N,) scores of the better answers

        labels: See `kind`.
        predictions: See `kind`.
        names: Names of the C classes; None: 0, 1, ...
        groups: The value of each row to group by; None: no groups.
        draws: Number of resamples, see resample.intervals.
        seed: Seed of the resamples.
        level: Level of the intervals.
        settings: See `kind`.

    Returns:
        {"kind", "rows", "level", "draws", "seed"} and:

        "metrics": {name: {"value", "low", "high"}}    None if undefined; "note" says why, and what averages leave out
        "groups":  {value: {"rows", "metrics"}}        with `groups`, in sorted order
        "per_class" or "per_type": {name: {"precision", "recall", "f1", as in metrics; "labelled", "predicted": counts}}
        "confusion": {"names", "counts"}               single_label; counts[label][prediction]
        "calibration": bins of classification.calibration   single_label

    Raises:
        FtjaxError: If there are no rows, if the kind is unknown, or if the kind does not accept the labels or
            predictions.
    """
    this, rows, classes = _rows(kind, labels, predictions, names, settings)
    how = {"draws": draws, "seed": seed, "level": level}
    N = len(rows["loss"])
    out = {"kind": kind, "rows": N, **how, "metrics": _metrics(this, rows, how)}
    if groups is not None:
        out["groups"] = {
            value: {"rows": len(chosen), "metrics": _metrics(this, {k: v[chosen] for k, v in rows.items()}, how)}
            for value, chosen in _members(groups, N).items()
        }
    if "tally" in rows:
        out["per_type" if kind == "tags" else "per_class"] = _each(this, rows, classes, how)
    if kind == "single_label":
        out["confusion"] = {"names": classes, "counts": classification.confusion(rows)}
        out["calibration"] = classification.calibration(rows)
    return out


def worst(kind: str, labels, predictions, n: int = 20, **settings) -> list[int]:
    """Indices, from 0, of the wrong rows with the highest loss, highest first. Of equal ones the earlier row comes
    first. The `*_rows` function of the kind documents the loss, and what counts as wrong.

    Args:
        kind, labels, predictions, settings: See `report`.
        n: Most rows.

    Raises:
        FtjaxError: As `report`.
    """
    _, rows, _ = _rows(kind, labels, predictions, None, settings)
    order = np.argsort(-rows["loss"], kind="stable")
    return order[rows["wrong"][order]][:n].tolist()


def _rows(kind, labels, predictions, names, settings):
    check_known(kind, KINDS, "unknown kind of task")
    if not len(labels):
        raise FtjaxError("nothing to judge: there are no rows; give at least one")
    this = KINDS[kind]
    rows, classes = this.rows(labels, predictions, **settings), []
    if kind == "tags":
        rows, classes = rows
    elif "tally" in rows:
        C = rows["probabilities"].shape[1]
        classes = [str(name) for name in (range(C) if names is None else names)]
        if len(classes) != C or len(set(classes)) != C:
            raise FtjaxError(f"names: expected {C} different names, one a class; found {classes}")
    return this, rows, classes


def _metrics(kind: Kind, rows, how) -> dict[str, dict]:
    N = len(rows["loss"])
    figures = intervals(N, kind.metrics(rows), **how)
    notes = {}
    if "probabilities" in rows:
        tally = tuple(x[0] for x in classification.tally(rows)(np.ones((1, N))))
        notes = classification.notes(tally, N, kind.absent)
    return {name: _noted(entry, kind.undefined.get(name), notes.get(name)) for name, entry in figures.items()}


def _noted(entry: dict, undefined: str | None, remark: str | None) -> dict:
    parts = [undefined] if entry["value"] is None else [remark, entry.get("note")]
    note = "; ".join(part for part in parts if part)
    return entry | ({"note": note} if note else {})


def _each(kind: Kind, rows, classes, how) -> dict[str, dict]:
    """Figures of each class or entity type."""
    N, tally = len(rows["loss"]), classification.tally(rows)
    whole = [x[0] for x in tally(np.ones((1, N)))]
    figures = intervals(N, lambda counts: classification.shares(*tally(counts)), **how)
    _, predicted, labelled = (x.astype(int).tolist() for x in whole)
    return {
        name: {metric: _noted(entries[c], kind.undefined[metric], None) for metric, entries in figures.items()}
        | {"labelled": labelled[c], "predicted": predicted[c]}
        for c, name in enumerate(classes)
    }


def _members(groups, N) -> dict[str, np.ndarray]:
    """{value as text: indices of its rows}, sorted."""
    if len(groups) != N:
        raise FtjaxError(f"groups: expected one value for each of {N} rows; found {len(groups)}")
    members = {}
    for i, value in enumerate(groups):
        members.setdefault(str(value), []).append(i)
    return {value: np.array(members[value]) for value in sorted(members)}


# For the terminal


def table(report: dict) -> str:
    """A report as text: figures with their intervals, then classes or entity types, then groups."""
    percent = f"{100 * report['level']:g} % interval"
    lines = [[_arrow(n), _figure(e["value"], 4), _range(e, 4), e.get("note", "")] for n, e in report["metrics"].items()]
    columns = 4 if any(note for *_, note in lines) else 3
    head = [("", 0), ("value", 1), (percent, 1), ("note", 0)]
    parts = [grid(head[:columns], [line[:columns] for line in lines])]
    classes = report.get("per_class") or report.get("per_type") or {}
    if classes:
        shown = list(classes.items())[:SHOWN]
        head = [("class" if "per_class" in report else "type", 0), ("labelled", 1), ("predicted", 1)]
        head += [(name, 1) for name in ("precision", "recall", "f1")]
        lines = [
            [name, f"{c['labelled']:,}", f"{c['predicted']:,}", *(_short(c[m]) for m in ("precision", "recall", "f1"))]
            for name, c in shown
        ]
        parts.append(grid(head, lines))
        if len(shown) < len(classes):
            parts.append(f"the first {len(shown)} of {len(classes):,}\n")
    if report.get("groups"):
        main = KINDS[report["kind"]].main
        head = [("group", 0), ("rows", 1)] + [(_arrow(name), 1) for name in main]
        lines = [
            [value, f"{g['rows']:,}", *(_short(g["metrics"][name]) for name in main)]
            for value, g in report["groups"].items()
        ]
        parts.append(grid(head, lines))
    how = f"{report['rows']:,} rows; intervals from {report['draws']:,} resamples of them, seed {report['seed']}"
    return "".join(parts) + f"↑ higher is better, ↓ lower is better; {how}"


def _arrow(name: str) -> str:
    return f"{name} {'↓' if name in LOWER else '↑'}"


def _figure(x: float | None, digits: int) -> str:
    return "undefined" if x is None else f"{x:.{digits}g}"


def _range(entry: dict, digits: int) -> str:
    return "" if entry["low"] is None else " to ".join(_figure(entry[end], digits) for end in ("low", "high"))


def _short(entry: dict) -> str:
    span = _range(entry, 3)
    return _figure(entry["value"], 3) + (f" ({span})" if span else "")
