"""Figures and thresholds of classification, with one class per row or any number, as functions of counts of rows.

N rows, C classes, B resamples at a time (see ftjax.evaluation.resample). A tally is three arrays (..., C): correctly
predicted rows of a class, rows predicted as the class, rows labelled with the class. The entry "tally" of rows holds
that of each row, side by side: (N, 3 C), dense or sparse.

A figure with denominator 0 is NaN here, where scikit-learn's default is 0 (`zero_division`): precision of a class that
is never predicted, recall of one without labels, F1 of one with neither, and MCC and ROC-AUC of one class only. Within
a macro average it counts as 0, as in scikit-learn. As there, a macro average is over the classes that occur in labels
or predictions, and over all C if a row may have any number of classes.
"""

from __future__ import annotations

import numpy as np

from ftjax.errors import FtjaxError, check_known
from ftjax.evaluation.resample import Kind, Reduce, Share, divide, share, totals

BINS = 15  # bins of the calibration error, as in Guo et al. 2017
UNDEFINED = {  # why a figure is None
    "precision": "no row is predicted as it",
    "recall": "no row is labelled with it",
    "f1": "no row is labelled with it or predicted as it",
    "precision_micro": "no row is predicted as any class",
    "recall_micro": "no row is labelled with any class",
    "f1_micro": "no row is labelled with any class or predicted as any",
    "mcc": "labels or predictions hold one class only",
    "roc_auc": "labels hold one class only",
    "roc_auc_macro": "no class has both rows labelled with it and others",
}
UNDEFINED |= {f"{name}_macro": UNDEFINED["f1_micro"] for name in ("precision", "recall", "f1")}


# Figures of a tally


def tally(rows):
    """A function counts (B, N) -> the tally (B, C)."""
    return lambda counts: tuple(np.split(counts @ rows["tally"], 3, axis=1))


def shares(right, predicted, labelled) -> dict[str, Share]:
    """Precision, recall and F1 of each class, (..., C) each."""
    trials = predicted, labelled, (predicted + labelled) / 2
    return dict(zip(("precision", "recall", "f1"), (share(right, n) for n in trials), strict=True))


def micro(right, predicted, labelled) -> dict[str, Share]:
    """Precision, recall and F1 of all classes together, (...) each."""
    found = shares(right.sum(-1), predicted.sum(-1), labelled.sum(-1))
    return {f"{name}_micro": x for name, x in found.items()}


def macro(right, predicted, labelled, absent: bool = False) -> dict[str, Share]:
    """Mean precision, recall and F1 over the classes with labels or predictions, (...) each.

    The mean of C shares of n_c trials each varies like one share of C^2 / sum(1 / n_c) trials. Classes without trials
    do not vary, so they are left out of the number.

    Args:
        right, predicted, labelled: A tally.
        absent: Whether the other classes count too.
    """
    classes = (predicted + labelled > 0).sum(-1)
    if absent:
        classes = np.where(classes > 0, right.shape[-1], 0)
    found = {}
    for name, (x, n) in shares(right, predicted, labelled).items():
        trials = divide((n > 0).sum(-1) ** 2, np.nan_to_num(divide(1, n)).sum(-1))
        found[f"{name}_macro"] = Share(divide(np.nan_to_num(x).sum(-1), classes), trials)
    return found


def accuracy(right, predicted, labelled) -> np.ndarray:
    """Share of rows that are predicted correctly, for one class per row."""
    return divide(right.sum(-1), labelled.sum(-1))


def balanced_accuracy(right, predicted, labelled) -> np.ndarray:
    """Mean recall of the classes that have labels."""
    return divide(np.nan_to_num(divide(right, labelled)).sum(-1), (labelled > 0).sum(-1))


def mcc(right, predicted, labelled) -> np.ndarray:
    """Matthews correlation for one class per row and any number of classes (Gorodkin 2004)."""
    n = labelled.sum(-1)
    covariance = right.sum(-1) * n - (predicted * labelled).sum(-1)
    spread = [np.sqrt(n**2 - (x**2).sum(-1)) for x in (predicted, labelled)]
    return divide(covariance, spread[0] * spread[1])


# One class per row


def single_rows(labels, probabilities, threshold: float | None = None) -> dict[str, np.ndarray]:
    """The contribution of each row, for one class per row.

    The predicted class is that of the highest probability, and the first of equal ones. With `threshold` it is class 1
    if its probability is at least the threshold. `loss` is -log of the label's probability (nats), clipped at the
    precision of the probabilities' dtype as in scikit-learn.

    Args:
        labels: (N,) int.
        probabilities: (N, C), each row summing to 1.
        threshold: Threshold of class 1 of two; None: the highest probability decides.

    Returns:
        {"label", "predicted", "probabilities", "loss", "wrong", "tally"}, each of N rows.

    Raises:
        FtjaxError: If a label is out of range, or if values are not probabilities.
    """
    from scipy.sparse import csr_array

    labels, p = np.asarray(labels), _probabilities(probabilities)
    N, C = p.shape
    if labels.shape != (N,) or not np.issubdtype(labels.dtype, np.integer):
        raise FtjaxError(f"expected one integer label per row, shape ({N},); found {labels.shape} {labels.dtype}")
    if C < 2 or (threshold is not None and C != 2):
        raise FtjaxError(
            f"expected {'at least two classes' if C < 2 else 'two classes, because a threshold is set'}; found {C}"
        )
    _refuse((labels < 0) | (labels >= C), labels, f"a label from 0 to {C - 1}")
    total = p.sum(1, dtype=float)
    _refuse(abs(total - 1) > 1e-2, total, "probabilities that sum to 1 (the softmax of logits)")
    tiny = np.finfo(p.dtype).eps
    p = p.astype(float)
    predicted = p.argmax(1) if threshold is None else (p[:, 1] >= threshold).astype(int)
    loss = -np.log(np.clip(p[np.arange(N), labels], tiny, 1 - tiny))
    labels = labels.astype(int)  # wide enough for label * C + predicted
    place, right, wrong = np.arange(N), np.flatnonzero(predicted == labels), predicted != labels
    codes = np.concatenate([labels[right], C + predicted, 2 * C + labels])
    tally = csr_array((np.ones(len(codes)), (np.concatenate([right, place, place]), codes)), shape=(N, 3 * C))
    return {
        "label": labels, "predicted": predicted, "probabilities": p, "loss": loss, "wrong": wrong, "tally": tally,
    }  # fmt: skip


def single_metrics(rows) -> Reduce:
    """Figures for one class per row. Of two classes, precision, recall and F1 without a suffix are those of class 1.

    All micro averages equal the accuracy. ROC-AUC uses the probability of class 1 of two classes. For more classes it
    is the mean over the classes with labels of each against the rest. The calibration error is that of `calibration`.
    """
    tallied, p = tally(rows), rows["probabilities"]
    binary = p.shape[1] == 2
    classes = [1] if binary else range(p.shape[1])
    curves = [roc_auc(rows["label"] == c, p[:, c]) for c in classes]
    bins, gaps = _confidence_bins(rows)
    gaps_of_bins = np.where(bins[:, None] == np.arange(BINS), gaps[:, None], 0)

    def reduce(counts):
        t, n = tallied(counts), counts.sum(1)
        means = macro(*t)
        out = {"accuracy": Share(accuracy(*t), n)}
        out["balanced_accuracy"] = Share(balanced_accuracy(*t), means["recall_macro"].trials)
        if binary:
            out |= shares(*(x[:, 1] for x in t))
        out |= means | micro(*t)
        out |= {"mcc": mcc(*t), "roc_auc" if binary else "roc_auc_macro": _mean([curve(counts) for curve in curves])}
        out["log_loss"] = counts @ rows["loss"] / n
        out["calibration_error"] = abs(counts @ gaps_of_bins).sum(1) / n
        return out

    return reduce


def _confidence_bins(rows):
    """The bin of each row (N,) int, and its confidence less 1 if it is right, or less 0 if not (N,)."""
    confidence = rows["probabilities"].max(1)
    right = rows["probabilities"].argmax(1) == rows["label"]
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence, side="left"), confidence - right


def calibration(rows) -> list[dict]:
    """The bins of the expected calibration error (Guo et al. 2017) that hold rows, lowest first.

    A row's confidence is its highest probability. There are 15 bins of equal width, and bin m holds confidences above
    (m - 1) / 15 up to m / 15. The error is the mean over rows of |mean confidence - accuracy| of their bins.
    """
    bins, gaps = _confidence_bins(rows)
    confidence = rows["probabilities"].max(1)
    out = []
    for m in range(BINS):
        held = bins == m
        if held.any():
            mean, gap = float(confidence[held].mean()), float(gaps[held].mean())
            entry = {"low": m / BINS, "high": (m + 1) / BINS, "rows": int(held.sum())}
            out.append(entry | {"confidence": mean, "accuracy": mean - gap})
    return out


def confusion(rows) -> list[list[int]]:
    """(C, C) counts, with labels as rows and predictions as columns."""
    C = rows["probabilities"].shape[1]
    return np.bincount(rows["label"] * C + rows["predicted"], minlength=C * C).reshape(C, C).tolist()


SINGLE = Kind(single_rows, single_metrics, UNDEFINED, ("accuracy", "f1_macro", "mcc"))

# Any number of classes per row


def multi_rows(labels, probabilities, thresholds=0.5) -> dict[str, np.ndarray]:
    """The contribution of each row, for any number of classes per row.

    A class is predicted if its probability is at least its threshold. `loss` is the binary cross-entropy summed over
    classes (nats).

    Args:
        labels: (N, C) of 0 and 1.
        probabilities: (N, C).
        thresholds: One for all classes, or (C,).

    Returns:
        {"label", "predicted", "probabilities", "loss", "wrong", "tally"}, each of N rows.

    Raises:
        FtjaxError: If shapes differ, or if values are not labels or probabilities.
    """
    labels, p = np.asarray(labels), _probabilities(probabilities)
    if labels.shape != p.shape:
        raise FtjaxError(f"expected labels of the shape of the probabilities, {p.shape}; found {labels.shape}")
    _refuse(((labels != 0) & (labels != 1)).any(1), labels, "labels of 0 and 1")
    thresholds = np.asarray(thresholds, float)
    if thresholds.shape not in ((), p.shape[1:]):
        raise FtjaxError(f"expected one threshold, or one for each of {p.shape[1]} classes; found {thresholds.shape}")
    tiny, labels, p = np.finfo(p.dtype).eps, labels.astype(bool), p.astype(float)
    predicted = p >= thresholds
    loss = -np.log(np.clip(np.where(labels, p, 1 - p), tiny, 1 - tiny)).sum(1)
    wrong = (predicted != labels).any(1)
    tally = np.concatenate([labels & predicted, predicted, labels], axis=1).astype(float)
    return {"label": labels, "probabilities": p, "loss": loss, "wrong": wrong, "tally": tally}


def multi_metrics(rows) -> Reduce:
    """Figures for any number of classes per row. ROC-AUC is the mean over the classes that some rows have and some do
    not."""
    tallied = tally(rows)
    curves = [roc_auc(label, p) for label, p in zip(rows["label"].T, rows["probabilities"].T, strict=True)]

    def reduce(counts):
        t, n = tallied(counts), counts.sum(1)
        out = {"subset_accuracy": share(counts @ ~rows["wrong"], n)} | micro(*t) | macro(*t, absent=True)
        return out | {"roc_auc_macro": _mean([curve(counts) for curve in curves])}

    return reduce


MULTI = Kind(multi_rows, multi_metrics, UNDEFINED, ("subset_accuracy", "f1_micro", "f1_macro"), absent=True)

# For both


def roc_auc(positive: np.ndarray, scores: np.ndarray):
    """A function counts (B, N) -> (B,): the probability that a positive row scores above a negative one; ties count
    half."""
    pos, neg, n = np.flatnonzero(positive), np.flatnonzero(~positive), len(scores)
    levels, level = np.unique(scores[pos], return_inverse=True)
    K = len(levels)
    # A negative row is below level k if k >= first; if it ties with the level, it counts half.
    ties, first = (np.searchsorted(levels, scores[neg], side) for side in ("left", "right"))
    at_level = totals(K, level, pos, n)
    entering = totals(K + 1, np.concatenate([ties, first]), np.concatenate([neg, neg]), n, 0.5)

    def reduce(counts):
        held, below = at_level(counts), np.cumsum(entering(counts), axis=1)
        return divide((held * below[:, :-1]).sum(1), held.sum(1) * below[:, -1])

    return reduce


def notes(tally, n: int, absent: bool = False) -> dict[str, str]:
    """What the averages of a tally leave out or count as 0.

    Args:
        tally: The tally (C,).
        n: Number of rows.
        absent: Whether macro averages include classes without labels and predictions.

    Returns:
        {name of a figure: one sentence}.
    """
    right, predicted, labelled = tally
    neither = (predicted + labelled) == 0

    def say(classes, what):
        count = int(classes.sum())
        return [what.format(f"{count:,} class{'' if count == 1 else 'es'}")] if count else []

    counted = np.ones_like(neither) if absent else ~neither
    left_out = [] if absent else say(neither, "without {} that labels and predictions lack")
    out = {
        "precision_macro": say(counted & (predicted == 0), "{} never predicted counted as 0") + left_out,
        "recall_macro": say(counted & (labelled == 0), "{} without labels counted as 0") + left_out,
        "f1_macro": say(counted & neither, "{} without labels and predictions counted as 0") + left_out,
        "balanced_accuracy": say(labelled == 0, "without {} that labels lack"),
        "roc_auc_macro": say((labelled == 0) | (labelled == n), "without {} that no row is labelled with, or all"),
    }
    return {name: "; ".join(parts) for name, parts in out.items() if parts}


def _mean(figures) -> np.ndarray:
    """Mean over the figures that are defined."""
    figures = np.array(figures)
    return divide(np.nansum(figures, axis=0), (~np.isnan(figures)).sum(0))


def _probabilities(p) -> np.ndarray:
    p = np.asarray(p)
    if p.ndim != 2 or not np.issubdtype(p.dtype, np.floating):
        raise FtjaxError(f"expected probabilities (rows, classes) of a float type; found {p.shape} {p.dtype}")
    _refuse(~((p >= 0) & (p <= 1)).all(1), p, "probabilities from 0 to 1")
    return p


def _refuse(bad, found, wanted: str) -> None:
    if bad.any():
        i = int(bad.argmax())
        raise FtjaxError(f"row {i + 1}: expected {wanted}; found {found[i]}")


# Thresholds

THRESHOLD_METRICS = {  # functions of a tally of two classes, (K, 2)
    "f1": lambda *tally: shares(*tally)["f1"].value[:, 1],
    "mcc": mcc,
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
}


def best_threshold(labels, scores, metric: str = "f1") -> dict:
    """The threshold that maximises a metric over all possible thresholds.

    A row is positive if its score is at least the threshold. A threshold is midway between the two scores that it
    separates, exact in the scores' dtype. Of equally good thresholds it is the one nearest to 0.5.

    Args:
        labels: (N,) of 0 and 1.
        scores: (N,) float.
        metric: Key of THRESHOLD_METRICS.

    Returns:
        {"threshold", "value"}. If labels or (for MCC) scores are all equal, nothing can be chosen: the threshold is
        0.5, the value None, and "note" says why.

    Raises:
        FtjaxError: If the metric is unknown, if a label is not 0 or 1, or if a score is not finite.
    """
    check_known(metric, THRESHOLD_METRICS, "threshold: unknown metric")
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise FtjaxError(
            f"threshold: expected one label and one score per row; found {labels.shape} and {scores.shape}"
        )
    _refuse((labels != 0) & (labels != 1), labels, "a label of 0 or 1")
    _refuse(~np.isfinite(scores), scores, "a finite score")
    distinct, codes = np.unique(scores, return_inverse=True)
    pos, every = (np.bincount(codes, w, len(distinct)) for w in (labels.astype(float), None))
    n, positives = len(labels), pos.sum()
    if positives in (0, n):
        return {"threshold": 0.5, "value": None, "note": "nothing to choose by: labels hold one class only"}
    # For each cut below distinct[k], k = 0..K: the rows from distinct[k] on are positive.
    right, predicted = (np.append(np.cumsum(x[::-1])[::-1], 0.0) for x in (pos, every))
    negative = (n - predicted) - (positives - right)
    labelled = np.broadcast_to([n - positives, positives], (len(predicted), 2))
    figures = THRESHOLD_METRICS[metric](
        np.stack([negative, right], 1), np.stack([n - predicted, predicted], 1), labelled
    )
    if np.isnan(figures).all():
        return {"threshold": 0.5, "value": None, "note": "nothing to choose by: all scores are the same"}
    low, high = distinct[:-1], distinct[1:]
    middle = low + (high - low) / 2
    middle = np.where(middle > low, middle, high)  # adjacent floats have no number between them
    cuts = np.concatenate([distinct[:1], middle, np.nextafter(distinct[-1:], np.inf)])
    best = np.flatnonzero(figures == np.nanmax(figures))
    k = best[np.argmin(abs(cuts[best].astype(float) - 0.5))]
    return {"threshold": float(cuts[k]), "value": float(figures[k])}
