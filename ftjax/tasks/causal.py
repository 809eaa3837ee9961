"""The next token of any text: conversations, prompts with completions, plain documents."""

from ftjax.objectives import causal
from ftjax.tasks import Task

TASK = Task(
    head="causal",
    sums=causal.sums,
    private=True,
    options=causal.smoothing,
    always=causal.chunk,
    stratified=True,
    trained=lambda config, T: T,
    unnamed=0,
)
