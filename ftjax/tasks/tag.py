"""A label for each word, such as named entities."""

from ftjax.data import tags
from ftjax.evaluation import tagged
from ftjax.objectives import classify
from ftjax.tasks import Columns, Task

TASK = Task(
    head="token",
    sums=classify.one_class,
    private=True,
    options=classify.options,
    encode=tags.encode,
    columns=Columns(("tokens", "words"), (), ("tags", "ner_tags", "labels")),
    text=lambda how, row, place: " ".join(tags.cell(row, how.text, place)),
    several=True,
    order=tags.in_order,
    trained=lambda config, T: T,
    judge=tagged.JUDGE,
    judged="tags",
    takes=("task.class_weights", "task.focal", "train.label_smoothing"),
)
