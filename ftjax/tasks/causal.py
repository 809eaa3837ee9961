"""The next token of any text: conversations, prompts with completions, plain documents. With task.reference, a student
also learns the distributions of that teacher over the next token."""

import functools

from ftjax.objectives import causal, distil
from ftjax.tasks import Task


def teacher(config) -> distil.Teacher:
    """The Teacher of a config."""
    return distil.Teacher(**{name: config.distil[name] for name in distil.Teacher._fields})


def always(config) -> dict:
    """The options of the objective in training and evaluation."""
    return causal.chunk(config) | ({"teacher": teacher(config)} if config.task.reference else {})


def known(model, variables, batch, *, how: distil.Teacher, head_chunk: int):
    """What is kept of a teacher's distributions for the trained tokens of a batch, see `distil.known`."""
    f = functools.partial(distil.known, teacher=how)
    return causal.of_logits(f, model, variables, batch, head_chunk=head_chunk)


def once(config):
    """See Task.once: the distributions of the teacher."""
    if not config.task.reference:
        return None
    return functools.partial(known, how=teacher(config), head_chunk=config.model.head_chunk)


TASK = Task(
    head="causal",
    sums=causal.sums,
    private=True,
    options=causal.smoothing,
    always=always,
    once=once,
    per_token=lambda config, vocab_size: distil.per_token(teacher(config), vocab_size),
    stratified=True,
    trained=lambda config, T: T,
    unnamed=0,
    takes=("train.label_smoothing", "task.reference"),
)
