"""Vectors that are close for texts that belong together."""

import functools

import numpy as np

from ftjax.data import labelled
from ftjax.evaluation.outputs import Asked, Judge, at_places
from ftjax.evaluation.retrieval import ranks
from ftjax.objectives import contrast
from ftjax.tasks import TEXTS, Columns, Task


def predict(asked: Asked) -> np.ndarray:
    """(N, 2, D) vectors of the two texts of each row; (N, 1, D) if a row has one text."""
    return np.stack(at_places(functools.partial(contrast.embed, pool=asked.config.task.pool), asked, apart=True))


def lines(asked: Asked, outputs: np.ndarray, thresholds) -> list[dict]:
    """{"row", "text", "pair", "rank"} of each pair; {"row", "text", "vector"} of single texts."""
    part, paired = asked.part, outputs.shape[1] == 2
    rank = ranks(outputs[:, 0], outputs[:, 1]).tolist() if paired else []
    out = []
    for i in range(len(part)):
        row, how = part.row(i), part.recipe(i)
        own = {"pair": row[how.pair], "rank": rank[i]} if paired else {"vector": outputs[i, 0].tolist()}
        out.append({"row": part.place(i), "text": row[how.text]} | own)
    return out


def shown(record: dict) -> str:
    """A pair in one line: its texts and the partner's rank."""
    return f"{record['text'][:70]!r} and {record['pair'][:70]!r}: rank {record['rank']:,}"


def blank(asked: Asked) -> np.ndarray:
    """As `predict`, for a model that gives all texts the same vector."""
    return np.ones((len(asked.part), 2, 1))


TASK = Task(
    head="none",
    sums=contrast.sums,
    always=lambda config: {"pool": config.task.pool, "temperature": config.task.temperature},
    encode=labelled.apart,
    columns=Columns(("anchor", "query", *TEXTS), ("positive", "answer", "sentence2", "hypothesis", "context"), ()),
    texts=2,
    labels=(),
    layout=lambda config, tokenizer: {"apart": True},
    unnamed=0,
    judge=Judge(predict, lambda asked, outputs: (outputs[:, 1], outputs[:, 0]), lines, shown, blank=blank),
    judged="retrieval",
)
