"""Which of two answers to a prompt is better."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from ftjax.data import prepare
from ftjax.data.template import Rendered
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError
from ftjax.objectives import preference
from ftjax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Pairs(prepare.Recipe):
    """How rows become pairs of texts: the prompt with the chosen answer, and with the rejected one.

    Attributes:
        max_length: Most tokens of both texts together.
        max_positions: Most tokens of a text.
        cut: Whether texts that are too long are cut at their end.
    """

    shown: ClassVar[str] = "preference pairs"  # in reports, where `preference` is the chosen answer alone
    max_length: int
    max_positions: int
    cut: bool

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """One Example for each row: the chosen text, and behind it, at Example.second, the rejected one.

        Args:
            tokenizer: The tokenizer, from transformers.
            rows: The rows.
            places: Names of the rows for errors.

        Raises:
            FtjaxError: If a row has no two different answers to one prompt, or if no token of an answer is left within
                max_length.
        """
        for row, place in zip(rows, places, strict=True):
            if row.get("rejected") is None:
                raise FtjaxError(f"{place}: column 'rejected' is empty; task.kind preference needs two answers")
        others = [row | {"chosen": row["rejected"]} for row in rows]
        there = [f"{place}, column 'rejected'" for place in places]
        chosen, rejected = self.render(rows, places), self.render(others, there)
        for one, other, place in zip(chosen, rejected, places, strict=True):
            _check(one, other, place)
        good, bad = super().encode(tokenizer, rows, places), super().encode(tokenizer, others, there)
        return [self._join(a, b, place) for a, b, place in zip(good, bad, places, strict=True)]

    def _join(self, a: Example, b: Example, place: str) -> Example:
        whole, lengths = len(a.ids) + len(b.ids), (len(a.ids), len(b.ids))
        if max(lengths) > self.max_positions:  # such a pair is too long, whatever data.max_length is
            whole = max(whole, self.max_length + 1)
        if self.cut and whole > self.max_length:
            # Each text has half of the room, and what the other one leaves.
            rooms = [min(self.max_positions, max(self.max_length // 2, self.max_length - n)) for n in reversed(lengths)]
            a, b = (x._replace(ids=x.ids[:n], trained=x.trained[:n]) for x, n in zip((a, b), rooms, strict=True))
            if not (a.trained.any() and b.trained.any()):
                raise FtjaxError(
                    f"{place}: of its {sum(lengths):,} tokens only {self.max_length:,} are kept (data.max_length), and "
                    "with them no token of one of its answers; raise data.max_length, or set data.long=drop"
                )
        ids, trained = (np.concatenate(both) for both in ((a.ids, b.ids), (a.trained, b.trained)))
        return Example(ids, trained, None, len(a.ids), whole=whole)


def _check(chosen: Rendered, rejected: Rendered, place: str) -> None:
    if chosen.messages is None:
        prompts, answers = (chosen.prompt, rejected.prompt), (chosen.completion, rejected.completion)
    else:
        prompts = chosen.messages[:-1], (rejected.messages or ())[:-1]
        answers = chosen.messages[-1], (rejected.messages or ({},))[-1]
    if prompts[0] != prompts[1]:
        raise FtjaxError(
            f"{place}: the conversations in 'chosen' and 'rejected' differ before their last message; expected two "
            "answers to one prompt"
        )
    if answers[0] == answers[1]:
        raise FtjaxError(f"{place}: 'chosen' and 'rejected' are the same answer; expected two different ones")


def recipe(config, data, columns: list[str], max_length: int, max_positions: int) -> tuple[Pairs, bool]:
    """See Task.recipe."""
    found, guessed = prepare.recipe(data, columns)
    if found.form != "preference":
        raise FtjaxError(
            f"task.kind=preference: rows need the columns chosen and rejected; found {', '.join(columns)}, which are "
            f"rows of the form {found.form}"
        )
    if data.train_on == "all":
        raise FtjaxError("data.train_on=all: task.kind preference compares answers; leave data.train_on at its default")
    how = dataclasses.asdict(found) | {"train_on": "last", "cut": config.data.long == "truncate"}
    return Pairs(**how, max_length=max_length, max_positions=max_positions), guessed


def check(config, method, spec) -> None:
    """See Task.check: where a loss needs the base model, the method has to leave its parameters as they are."""
    loss = config.task.loss
    if not config.task.beta:
        raise FtjaxError("task.beta: expected a number above 0 for task.kind=preference; found 0")
    if loss == "robust" and config.train.label_smoothing >= 0.5:
        raise FtjaxError("train.label_smoothing: expected less than 0.5 for task.loss=robust")
    if loss not in preference.WITH_REFERENCE:
        return
    free = ", ".join(name for name in preference.LOSSES if name not in preference.WITH_REFERENCE)
    keeps_base(method, spec, f"task.loss={loss}", f"a loss without a reference: {free}")


def keeps_base(method, spec, user: str, otherwise: str) -> None:
    """Raise FtjaxError if a tuning method changes parameters of the base model, which then is no reference.

    Args:
        method: The Method.
        spec: Its Spec.
        user: The setting that compares with the base, for the message.
        otherwise: What else can be done, for the message.
    """
    tuning = spec.tuning
    changed = [
        f"tuning.{name}={tuning[name]!r}"
        for name, changes in (
            ("method", method.of_parameters),
            ("init", tuning.init in ("pissa", "olora")),
            ("modules_to_save", bool(tuning.modules_to_save)),
        )
        if changes
    ]
    if changed:
        raise FtjaxError(
            f"{changed[0]}: changes parameters of the base model, which {user} compares with; use an adapter that "
            f"leaves the base as it is, or {otherwise}"
        )


def always(config) -> dict:
    """The options of the objective in training and evaluation."""
    task = config.task
    return {
        "loss": task.loss, "beta": task.beta, "margin": task.margin, "nll_weight": task.nll_weight,
        "head_chunk": config.model.head_chunk,
    }  # fmt: skip


TASK = Task(
    head="causal",
    sums=preference.sums,
    options=lambda config: {"label_smoothing": config.train.label_smoothing},
    always=always,
    whole_rows=True,
    check=check,
    recipe=recipe,
    texts=2,
    layout=lambda config, tokenizer: {"apart": True},
    trained=lambda config, T: T,
    unnamed=0,
)
