"""How well vectors of texts find their partners: the rank of each text's own partner among all, and figures of ranks.

N pairs, D dimensions, B resamples at a time.
"""

from __future__ import annotations

import numpy as np

from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation.resample import Kind, Reduce, share

AT_ONCE = 1024  # texts compared with all partners at once
FEWEST = {"mrr": 1, "recall_at_1": 1, "recall_at_10": 10, "mean_rank": 1}  # rows up to which a figure is constant
ALONE = "there is one row, whose partner has no rival"
UNDEFINED = dict.fromkeys(("mrr", "recall_at_1", "mean_rank"), ALONE)  # why a figure is None
UNDEFINED["recall_at_10"] = "there are ten rows at most, so that every partner is among the ten nearest"


def ranks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) rank, from 1, of second[i] among all of `second` by the inner product with first[i]; after those that tie
    with it."""
    out = np.zeros(len(first), int)
    for start in range(0, len(first), AT_ONCE):
        scores = first[start : start + AT_ONCE].astype(np.float32) @ second.T.astype(np.float32)
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))]
        out[start : start + AT_ONCE] = (scores >= own[:, None]).sum(1)
    return out


def rank_rows(labels, predictions) -> dict[str, np.ndarray]:
    """The contribution of each row. labels: (N, D) vectors of the partners; predictions: (N, D) vectors of the texts.

    `loss` is 1 - 1 / rank, and a row is `wrong` if another partner is as near. Raises FtjaxError if shapes differ, and
    NotFinite if a vector is not finite.
    """
    first, second = np.asarray(predictions), np.asarray(labels)
    if first.shape != second.shape or first.ndim != 2:
        raise FtjaxError(f"expected two vectors of one length for each pair; found {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise NotFinite("vectors: expected finite numbers; found NaN or infinite ones, whose similarity is undefined")
    rank = ranks(first, second)
    return {"rank": rank, "loss": 1 - 1 / rank, "wrong": rank > 1}


def rank_metrics(rows) -> Reduce:
    """Mean reciprocal rank, shares of rows whose partner is the nearest or among the ten nearest, and mean rank."""
    rank = rows["rank"]
    columns = {"mrr": 1 / rank, "recall_at_1": rank <= 1, "recall_at_10": rank <= 10, "mean_rank": rank}

    def figure(name, column, counts):
        if len(rank) <= FEWEST[name]:
            return np.full(len(counts), np.nan)
        found = share(counts @ column.astype(float), counts.sum(1))
        return found.value if name == "mean_rank" else found

    return lambda counts: {name: figure(name, column, counts) for name, column in columns.items()}


KIND = Kind(rank_rows, rank_metrics, UNDEFINED, ("mrr", "recall_at_1", "recall_at_10"))
