"""Hidden tokens of plain text, to adapt an encoder."""

import functools

from ftjax.data import masks
from ftjax.data.batches import Batches
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.evaluation.outputs import Asked, Judge
from ftjax.objectives import causal
from ftjax.tasks import Columns, Task


def layout(config, tokenizer) -> dict:
    """How a batch masks tokens anew, as an argument of Batches."""
    return {"masking": masks.masking(config.task, tokenizer)}


def loss(asked: Asked) -> dict:
    """Loss and accuracy of masked tokens, see loss.evaluate_loss."""
    part, config = asked.part, asked.config
    batches = Batches(
        part.examples, config.evaluate.batch_size or config.train.batch_size or 16, asked.data.max_length,
        buckets=config.data.buckets, seed=config.seed, shuffle=False, **layout(config, asked.tokenizer),
    )  # fmt: skip
    f = functools.partial(sums, asked.model, asked.variables, kind=config.task.kind, **causal.chunk(config))
    return evaluate_loss(f, (batches[i] for i in range(len(batches))))


TASK = Task(
    head="masked",
    sums=causal.sums,
    options=causal.smoothing,
    always=causal.chunk,
    encode=masks.encode,
    columns=Columns(label=()),
    splits=True,
    labels=(),
    whole_rows=True,  # other tokens are masked in each epoch
    layout=layout,
    trained=lambda config, T: round(T * config.task.mask_rate),
    unnamed=0,
    judge=Judge(loss),
    takes=("train.label_smoothing",),
)
