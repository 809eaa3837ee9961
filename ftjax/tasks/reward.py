"""How good an answer is, as a number that is learned from pairs of answers."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from ftjax.data import prepare, template
from ftjax.data.labelled import last_token
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError
from ftjax.evaluation.outputs import Asked, Judge, at_places, logits
from ftjax.objectives import preference
from ftjax.tasks import Task
from ftjax.tasks.preference import Pairs


@dataclasses.dataclass(frozen=True)
class Scored(Pairs):
    """How pairs of answers become tokens. A target is the margin, the same for both texts of a pair.

    Attributes:
        margin: Whether the column `margin` says by how much the score of the chosen answer should be greater.
    """

    margin: bool = False

    def read(self, rows: list[dict], places: list[str]) -> tuple[list[int], tuple, tuple]:
        """As Pairs.read. Raises FtjaxError also for a margin that is not a number."""
        for row, place in zip(rows, places, strict=True) if self.margin else ():
            if type(margin := row.get("margin")) not in (int, float) or not math.isfinite(margin):
                raise FtjaxError(f"{place}: column 'margin' holds {margin!r:.80}; expected a number")
        return super().read(rows, places)

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """As Pairs.encode."""
        out = []
        for i, chosen, rejected in zip(*self.both(tokenizer, rows, places), strict=True):
            both = self.pair(chosen, rejected, places[i])
            texts = both.ids[: both.second], both.ids[both.second :]
            trained = np.concatenate([last_token(ids, tokenizer) for ids in texts])
            margin = rows[i]["margin"] if self.margin else 0.0
            out.append(both._replace(trained=trained, targets=np.full(2, margin, np.float32), row=i))
        return out

    def describe(self, example: Example) -> str:
        """The margin of an example for people."""
        return f"margin {example.targets[0]:g}" if self.margin else ""


@dataclasses.dataclass(frozen=True)
class Single(prepare.Recipe):
    """How prompts with one answer each become tokens, to predict their scores.

    Attributes:
        max_positions: Most tokens of a text: data.max_length, or the model's positions if those are fewer.
    """

    shown: ClassVar[str] = "answers to score"
    max_positions: int

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """As Recipe.encode, with a text cut at its end if it is longer than max_positions."""
        found = [example.ids for example in super().encode(tokenizer, rows, places)]
        cut, zero = [ids[: self.max_positions] for ids in found], np.zeros(1, np.float32)
        return [Example(a, last_token(a, tokenizer), zero, whole=len(b)) for a, b in zip(cut, found, strict=True)]

    def check(self) -> None:
        """See prepare.Recipe.check."""
        raise FtjaxError(
            f"task.kind=reward: rows need the columns chosen and rejected, or another form of pairs; these are rows of "
            f"the form {self.form}, whose answers `ftjax predict` can score"
        )


def recipe(config, data, columns: list[str], max_length: int, max_positions: int) -> tuple[prepare.Recipe, bool]:
    """See Task.recipe."""
    found, guessed = prepare.recipe(data, columns)
    how = dataclasses.asdict(found) | {"train_on": "last", "max_positions": max_positions}
    if found.form not in template.PAIRED:
        return Single(**how | {"max_positions": min(max_length, max_positions)}), guessed
    cut = config.data.long == "truncate"
    return Scored(**how, max_length=max_length, cut=cut, margin="margin" in columns), guessed


def check(config, method, spec, data) -> None:
    """See Task.check: the score is read at the last token, which must have seen the whole text."""
    if not spec.model.causal:
        raise FtjaxError(f"task.kind=reward: needs a causal model; found a {spec.family.model_type} model")


def predict(asked: Asked) -> np.ndarray:
    """(N, 2) scores of the chosen and the rejected text of each pair; (N, 1) of single texts."""
    return np.stack(at_places(logits, asked, apart=True))[..., 0]


def sides(asked: Asked, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the rejected texts, scores of the chosen texts), (N,) each."""
    return outputs[:, 1], outputs[:, 0]


def lines(asked: Asked, outputs: np.ndarray, thresholds) -> list[dict]:
    """{"row", "prompt", "chosen", "rejected"} of each pair, with its scores; {"row", "prompt", "answer", "score"} of
    single answers."""
    out, places = [], (asked.part.place(i) for i in range(len(outputs)))
    for (rendered, _), place, scores in zip(asked.part.each(), places, outputs.tolist(), strict=True):
        line = {"row": place, "prompt": template.question(rendered)}
        if len(scores) == 2:
            out.append(line | {"chosen": scores[0], "rejected": scores[1]})
        else:
            out.append(line | {"answer": template.reference(rendered), "score": scores[0]})
    return out


def shown(record: dict) -> str:
    """A mistake in one line: both scores and the prompt."""
    return f"chosen {record['chosen']:.3g}, rejected {record['rejected']:.3g}: {record['prompt'][:100]!r}"


TASK = Task(
    head="sequence",
    sums=preference.bradley_terry,
    target=lambda labels: ((), "float32"),
    check=check,
    recipe=recipe,
    texts=2,
    labels=("reward",),
    layout=lambda config, tokenizer: {"apart": True},
    trained=lambda config, T: 2,
    unnamed=1,
    judge=Judge(predict, sides, lines, shown, blank=lambda asked: np.zeros((len(asked.part), 2))),
    judged="pairs",
)
