"""How well vectors of texts find their partners: the rank of each text's own among all, and figures of ranks.

N pairs, D width, B resamples at a time.
"""

from __future__ import annotations

import numpy as np

from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation.resample import Reduce

AT_ONCE = 1024  # texts compared with all partners at once
FEWEST = {"mrr": 1, "recall_at_1": 1, "recall_at_10": 10, "mean_rank": 1}  # rows of which a figure is the same always
ALONE = "there is one row, whose partner has no rival"
UNDEFINED = dict.fromkeys(("mrr", "recall_at_1", "mean_rank"), ALONE)  # why a figure is None
UNDEFINED["recall_at_10"] = "there are ten rows at most, so that every partner is among the ten nearest"


def ranks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) the place, from 1, of second[i] among all by its inner product with first[i]; of equal ones the last."""
    out = np.zeros(len(first), int)
    for start in range(0, len(first), AT_ONCE):
        scores = first[start : start + AT_ONCE].astype(np.float32) @ second.T.astype(np.float32)
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))]
        out[start : start + AT_ONCE] = (scores >= own[:, None]).sum(1)
    return out


def rank_rows(labels, predictions) -> dict[str, np.ndarray]:
    """What each row contributes; labels: N vectors of partners (N, D), predictions: of the texts (N, D).

    loss: 1 - 1 / rank; wrong: another one is as near.
    """
    first, second = np.asarray(predictions), np.asarray(labels)
    if first.shape != second.shape or first.ndim != 2:
        raise FtjaxError(f"expected two vectors of one length for each pair; found {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise NotFinite("vectors: expected finite numbers; found NaN or infinite ones, which are near to nothing")
    rank = ranks(first, second)
    return {"rank": rank, "loss": 1 - 1 / rank, "wrong": rank > 1}


def rank_metrics(rows) -> Reduce:
    """Mean reciprocal rank, shares of rows whose partner is the nearest, or among the ten nearest, and mean rank."""
    rank = rows["rank"]
    columns = {"mrr": 1 / rank, "recall_at_1": rank <= 1, "recall_at_10": rank <= 10, "mean_rank": rank}

    def reduce(counts):
        found = {name: counts @ column.astype(float) / counts.sum(1) for name, column in columns.items()}
        return {name: x if len(rank) > FEWEST[name] else np.full(len(x), np.nan) for name, x in found.items()}

    return reduce


def rank_trials(rows) -> dict[str, float]:
    """Of how many pairs a figure of `rank_metrics` is the share or the mean, for those from 0 to 1."""
    return {name: len(rows["rank"]) for name in ("mrr", "recall_at_1", "recall_at_10")}
