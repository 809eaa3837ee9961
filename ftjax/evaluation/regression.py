"""Correlations and errors of predicted numbers, as functions of counts of rows (see ftjax.evaluation.resample)."""

from __future__ import annotations

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.resample import Kind, Reduce, divide, totals

UNDEFINED = {  # why a figure is None
    "pearson": "labels or predictions are all the same",
    "spearman": "labels or predictions are all the same",
    "r2": "labels are all the same",
}


def regression_rows(labels, predictions) -> dict[str, np.ndarray]:
    """The contribution of each row. labels, predictions: (N,) or (N, 1).

    `loss` is the squared error, and a row is `wrong` if the error is not 0. Raises FtjaxError if shapes differ or a
    number is not finite.
    """
    y, x = np.asarray(labels, float), np.asarray(predictions, float)
    y, x = (a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a for a in (y, x))
    if y.ndim != 1 or y.shape != x.shape:
        raise FtjaxError(f"expected one label and one prediction per row; found {y.shape} and {x.shape}")
    bad = ~(np.isfinite(y) & np.isfinite(x))
    if bad.any():
        i = int(bad.argmax())
        raise FtjaxError(f"row {i + 1}: expected finite numbers; found label {y[i]}, prediction {x[i]}")
    return {"label": y, "predicted": x, "loss": (y - x) ** 2, "wrong": y != x}


def regression_metrics(rows) -> Reduce:
    """Pearson, Spearman, mean squared and mean absolute error, and the coefficient of determination R2."""
    y, x = rows["label"], rows["predicted"]
    errors = np.stack([rows["loss"], abs(y - x)], axis=1)
    rank_y, rank_x = _ranks(y), _ranks(x)

    def reduce(counts):
        n, (squared, absolute) = counts.sum(1), (counts @ errors).T
        dy, dx = _deviations(counts, y), _deviations(counts, x)
        ranks = [_deviations(counts, rank(counts)) for rank in (rank_y, rank_x)]
        return {
            "pearson": _correlation(counts, dy, dx),
            "spearman": _correlation(counts, *ranks),
            "mse": squared / n,
            "mae": absolute / n,
            "r2": 1 - divide(squared, _product(counts, dy, dy)),
        }

    return reduce


def _deviations(counts, a):
    """a (N,) or (B, N) less its mean in each resample, (B, N). A deviation within rounding is exactly 0."""
    mean = ((counts * a).sum(1) / counts.sum(1))[:, None]
    away = a - mean
    return np.where(abs(away) <= 1e-14 * abs(mean), 0, away)


def _product(counts, a, b):
    return np.einsum("bn,bn,bn->b", counts, a, b)


def _correlation(counts, a, b):
    spread = np.sqrt(_product(counts, a, a)) * np.sqrt(_product(counts, b, b))
    return np.clip(divide(_product(counts, a, b), spread), -1, 1)


def _ranks(a):
    """A function counts (B, N) -> the rank of each row's value within its resample (B, N). Equal values have their mean
    rank."""
    distinct, codes = np.unique(a, return_inverse=True)
    held = totals(len(distinct), codes, np.arange(len(a)), len(a))

    def reduce(counts):
        n = held(counts)
        return (np.cumsum(n, axis=1) - (n - 1) / 2)[:, codes]

    return reduce


KIND = Kind(regression_rows, regression_metrics, UNDEFINED, ("pearson", "spearman", "mse"))
