"""Vectors that are close for texts that belong together."""

from ftjax.data import pairs
from ftjax.evaluation import vectors
from ftjax.objectives import contrast
from ftjax.tasks import TEXTS, Columns, Task

TASK = Task(
    head="none",
    sums=contrast.sums,
    always=lambda config: {"pool": config.task.pool, "temperature": config.task.temperature},
    encode=pairs.encode,
    columns=Columns(("anchor", "query", *TEXTS), ("positive", "answer", "sentence2", "hypothesis", "context"), ()),
    texts=2,
    labels=(),
    layout=lambda config, tokenizer: {"apart": True},
    unnamed=0,
    judge=vectors.JUDGE,
    judged="retrieval",
)
