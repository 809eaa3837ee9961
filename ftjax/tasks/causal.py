"""The next token of any text: conversations, prompts with completions, plain documents."""

from ftjax.objectives import causal
from ftjax.tasks import Columns, Task

TASK = Task(
    head="causal",
    sums=causal.sums,
    options=causal.smoothing,
    always=causal.chunk,
    columns=Columns(),
    stratified=True,
    trained=lambda config, T: T,
    unnamed=0,
)
