"""A label for each word, such as named entities."""

import numpy as np

from ftjax.data import tags
from ftjax.data.labelled import Labelled, label_id
from ftjax.evaluation.entities import entities, parse
from ftjax.evaluation.outputs import Asked, Judge, at_places, logits
from ftjax.objectives import classify
from ftjax.tasks import Columns, Task

OUTSIDE = "O"


def predict(asked: Asked) -> list[dict]:
    """{"row", "words", "tags", "predicted"} of each row; without "tags" for rows that have none.

    A word has the tag that is predicted at its first token. A word without a token, such as one that was cut off, gets
    O.
    """
    part, out = asked.part, blank(asked)
    for i, output in enumerate(at_places(logits, asked)):
        how, record = part.recipe(i), out[i]
        (found,) = tags.in_words(asked.tokenizer, [record["words"]], how.max_length)
        carriers, first = (tags.carriers(found.word, which) for which in (how.subwords, "first"))
        for word, tag in zip(found.word[first], output.argmax(-1)[first[carriers]], strict=True):
            record["predicted"][word] = asked.data.labels[tag]
    return out


def blank(asked: Asked) -> list[dict]:
    """As `predict`, for a model that finds no entity."""
    part, names, out = asked.part, asked.data.labels, []
    for i in range(len(part)):
        how, row, place = part.recipe(i), part.row(i), part.place(i)
        words = tags.cell(row, how.text, place)
        known = {"tags": [names[label_id(how, x, place)] for x in row[how.label]]} if how.label else {}
        out.append({"row": place, "words": words} | known | {"predicted": [OUTSIDE] * len(words)})
    return out


def note(asked: Asked, outputs: list[dict]) -> str:
    """How many words were cut off, as a note for the report."""
    cut = sum(len(record["words"]) - _seen(asked, i, record["words"]) for i, record in enumerate(outputs))
    return f"{cut:,} words have no token within data.max_length: taken for O" if cut else ""


def _seen(asked: Asked, i: int, words: list[str]) -> int:
    """Number of words of which the model received tokens."""
    how: Labelled = asked.part.recipe(i)
    if how.subwords == "first":
        return int(asked.part.examples.labels[i])
    (found,) = tags.in_words(asked.tokenizer, [words], how.max_length)
    return len(np.unique(found.word[found.word >= 0]))


def sides(asked: Asked, outputs: list[dict]) -> tuple[list, list]:
    """Tags and predicted tags of each row."""
    return [record["tags"] for record in outputs], [record["predicted"] for record in outputs]


def shown(record: dict) -> str:
    """A mistake in one line: entities that the prediction misses, and entities that it makes up."""
    predicted, meant = (
        {(kind, " ".join(record["words"][a : b + 1])) for kind, a, b in entities([parse(t, "") for t in record[side]])}
        for side in ("predicted", "tags")
    )
    parts = {"missed": sorted(meant - predicted), "made up": sorted(predicted - meant)}
    return "; ".join(
        f"{what} " + ", ".join(f"{text!r} ({kind})" for kind, text in found) for what, found in parts.items() if found
    )


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
    judge=Judge(predict, sides, lambda asked, found, thresholds: found, shown, known=("tags",), blank=blank, note=note),
    judged="tags",
    takes=("task.class_weights", "task.focal", "train.label_smoothing"),
)
