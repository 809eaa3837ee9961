"""How often, and by how much, the better of two answers has the greater score.

N pairs (see ftjax.evaluation.resample).
"""

from __future__ import annotations

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.resample import Kind, Reduce, share


def pair_rows(labels, predictions) -> dict[str, np.ndarray]:
    """The contribution of each pair. labels: (N,) scores of the worse answers; predictions: (N,) of the better ones.

    `loss` is -log σ of their difference, and a pair is `wrong` unless the better answer has the greater score. Raises
    FtjaxError if shapes differ or a score is not finite.
    """
    worse, better = np.asarray(labels, float), np.asarray(predictions, float)
    if worse.ndim != 1 or worse.shape != better.shape or not np.isfinite(worse + better).all():
        raise FtjaxError(f"expected two finite scores for each pair; found {worse.shape} and {better.shape}")
    margin = better - worse
    return {"margin": margin, "loss": np.logaddexp(0, -margin), "wrong": margin <= 0}


def pair_metrics(rows) -> Reduce:
    """Share of pairs whose better answer has the greater score, mean difference of the scores, and mean loss."""

    def reduce(counts):
        n = counts.sum(1)
        accuracy = share(counts @ ~rows["wrong"], n)
        return {"accuracy": accuracy, "margin": counts @ rows["margin"] / n, "log_loss": counts @ rows["loss"] / n}

    return reduce


KIND = Kind(pair_rows, pair_metrics, {}, ("accuracy", "margin"))
