"""Where a text holds the answer to a question."""

from ftjax.data import spans
from ftjax.evaluation import spans as answers
from ftjax.objectives import span
from ftjax.tasks import Columns, Task

TASK = Task(
    head="span",
    sums=span.sums,
    target=lambda labels: ((2,), "int32"),
    whole_rows=True,
    encode=spans.encode,
    columns=Columns(("question",), ("context",), ("answers",)),
    splits=True,
    labels=("start", "end"),
    judge=answers.JUDGE,
    judged="answers",
)
