"""Which of two answers to a prompt is better, or whether an answer is desirable."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from ftjax import tasks
from ftjax.config import FIELDS
from ftjax.data import prepare, template
from ftjax.data.template import Rendered
from ftjax.data.tokenise import Example, encode
from ftjax.errors import FtjaxError
from ftjax.objectives import preference
from ftjax.tasks import Task

# Field of config.task -> the losses that it is for.
OF_LOSS = {"reference": preference.WITH_REFERENCE, "margin": ("simpo",)}
OF_LOSS |= dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto",))


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
        """One Example for each pair: the chosen text, and behind it, at Example.second, the rejected one.

        Args:
            tokenizer: The tokenizer, from transformers.
            rows: The rows.
            places: Names of the rows for errors.

        Raises:
            FtjaxError: If a row has no two different answers to one prompt, if no token of an answer is left within
                max_length, or if what is left of both texts is the same.
        """
        index, *sides = self.both(tokenizer, rows, places)
        return [self.pair(a, b, places[i])._replace(row=i) for i, a, b in zip(index, *sides, strict=True)]

    def read(self, rows: list[dict], places: list[str]) -> tuple[list[int], tuple, tuple]:
        """(index of the row of each pair, (its chosen side, its rejected side) as text, names of both for errors)."""
        found = [(i, p) for i, row in enumerate(rows) for p in template.pairs(self.form, row, places[i], self.template)]
        index, pairs = [i for i, _ in found], [pair for _, pair in found]
        for i, pair in found:
            if pair.get("rejected") is None:
                raise FtjaxError(f"{places[i]}: column 'rejected' is empty; a preference needs two answers")
        others = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
        worse = "column 'rejected'" if self.form == "preference" else "its worse answer"
        there = [places[i] for i in index], [f"{places[i]}, {worse}" for i in index]
        how = dataclasses.replace(self, form="preference")
        rendered = how.render(pairs, there[0]), how.render(others, there[1])
        for chosen, rejected, place in zip(*rendered, there[0], strict=True):
            _check(chosen, rejected, place)
        return index, rendered, there

    def sides(self, row: dict, place: str) -> tuple[str, str]:
        """See Recipe.sides. Raises FtjaxError also if the row has no two answers that can be compared."""
        _, (chosen, _), _ = self.read([row], [place])
        return template.question(chosen[0]), template.reference(chosen[0])

    def both(self, tokenizer, rows: list[dict], places: list[str]) -> tuple[list[int], list[Example], list[Example]]:
        """(index of the row, prompt with the chosen answer, prompt with the rejected one) of pairs, see `encode`."""
        index, rendered, there = self.read(rows, places)
        asked = [template.question(chosen) for chosen in rendered[0]]
        twice = [
            prompt and all(template.reference(x).startswith(prompt) for x in pair)
            for prompt, *pair in zip(asked, *rendered, strict=True)
        ]
        if len(twice) > 1 and all(twice):
            raise FtjaxError(
                f"{there[0][0]}: both answers begin with the text of the prompt, here and in the rows after it, so "
                "that each text would have the prompt twice; remove it from the answers, or remove the column of the "
                "prompt: the common beginning of both answers is the prompt then"
            )
        return index, *(encode(x, tokenizer, self.train_on, at.__getitem__, self.end) for x, at in zip(rendered, there))

    def pair(self, a: Example, b: Example, place: str) -> Example:
        """As `join`. Raises FtjaxError also if both texts have the same tokens, from which nothing would be learned."""
        both = self.join(a, b, place)
        if np.array_equal(both.ids[: both.second], both.ids[both.second :]):
            raise FtjaxError(
                f"{place}: 'chosen' and 'rejected' become the same {both.second:,} tokens, by the tokenizer or because "
                f"only {self.max_length:,} tokens of both are kept (data.max_length); expected two that differ. Raise "
                "data.max_length, or leave the row out"
            )
        return both

    def join(self, a: Example, b: Example, place: str) -> Example:
        """Two texts as one Example. Raises FtjaxError if no trained token of one of them is left within max_length."""
        whole, lengths = len(a.ids) + len(b.ids), (len(a.ids), len(b.ids))
        before = np.count_nonzero(a.trained) + np.count_nonzero(b.trained)
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
        return Example(ids, trained, None, len(a.ids), whole=whole, lost=before - np.count_nonzero(trained))


@dataclasses.dataclass(frozen=True)
class Answers(Pairs):
    """How rows become single answers that are desirable or not, for KTO.

    Attributes:
        label: Column that says whether the answer of a row is desirable. Empty: rows are pairs, of which the chosen
            answer is desirable and the rejected one is not.
    """

    shown: ClassVar[str] = "answers that are desirable or not"
    label: str = ""

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """One Example for each answer: the prompt with the answer, and the same prompt with an answer to another one.

        The other answer is that of the nearest row before this one that has another prompt, as in TRL's KTOTrainer; the
        rows before the first are the last ones. Targets are 1 for the tokens of a desirable answer and 0 for others.

        Args:
            tokenizer: The tokenizer, from transformers.
            rows: The rows.
            places: Names of the rows for errors.

        Raises:
            FtjaxError: As in Pairs, or if a label is not true, false, 1 or 0.
        """
        if self.label:
            index, examples = list(range(len(rows))), prepare.Recipe.encode(self, tokenizer, rows, places)
            good = [desirable(row.get(self.label), self.label, place) for row, place in zip(rows, places, strict=True)]
        else:
            number, chosen, rejected = self.both(tokenizer, rows, places)
            examples = [example for pair in zip(chosen, rejected, strict=True) for example in pair]
            index, good = np.repeat(number, 2).tolist(), [True, False] * len(number)
        N, starts = len(examples), [int(e.trained.argmax()) for e in examples]
        prompts = [e.ids[:n] for e, n in zip(examples, starts, strict=True)]
        keys, out = [prompt.tobytes() for prompt in prompts], []
        for i, example in enumerate(examples):
            before = ((i - k) % N for k in range(1, N))
            other = examples[next((j for j in before if keys[j] != keys[i]), i - 1)]
            # Its length must not decide what is left of the row's own answer.
            room = min(self.max_positions, max(self.max_length // 2, self.max_length - len(example.ids)))
            ids = np.concatenate([prompts[i], other.ids[other.trained]])[:room]
            mismatched = Example(ids, np.arange(len(ids)) >= starts[i])
            both = self.join(example, mismatched, places[index[i]])
            out.append(both._replace(targets=np.full(both.trained.sum(), good[i], np.int32), row=index[i]))
        return out

    def sides(self, row: dict, place: str) -> tuple[str, str]:
        """See Recipe.sides. Raises FtjaxError also for a label that is not true, false, 1 or 0."""
        if not self.label:
            return super().sides(row, place)
        desirable(row.get(self.label), self.label, place)
        return prepare.Recipe.sides(self, row, place)

    def describe(self, example: Example) -> str:
        """The label of an example for people."""
        return "desirable" if example.targets[0] else "undesirable"


def desirable(cell, column: str, place: str) -> bool:
    """Whether a label says that an answer is desirable.

    Args:
        cell: The label.
        column: Its column.
        place: Name of the row in errors.

    Raises:
        FtjaxError: If it is not true, false, 1 or 0, or one of them as text.
    """
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = known.get(str(cell).strip().lower())
    if found is None:
        raise FtjaxError(
            f"{place}: column {column!r} holds {cell!r:.80}; expected true or 1 for a desirable answer, false or 0 for "
            "another"
        )
    return found


def _check(chosen: Rendered, rejected: Rendered, place: str) -> None:
    if chosen.messages is None:
        prompts, answers = (chosen.prompt, rejected.prompt), (chosen.completion, rejected.completion)
    else:
        prompts = chosen.messages[:-1], (rejected.messages or ())[:-1]
        answers = chosen.messages[-1], (rejected.messages or ({},))[-1]
    if chosen.messages is not None and {message.get("role") for message in answers} != {"assistant"}:
        raise FtjaxError(
            f"{place}: the conversations in 'chosen' and 'rejected' do not both end in a message of the assistant; end "
            "them with the two answers that are compared"
        )
    if prompts[0] != prompts[1]:
        raise FtjaxError(
            f"{place}: the conversations in 'chosen' and 'rejected' differ before their last message; expected two "
            "answers to one prompt"
        )
    if answers[0] == answers[1]:
        raise FtjaxError(f"{place}: 'chosen' and 'rejected' are the same answer; expected two different ones")


def recipe(config, data, columns: list[str], max_length: int, max_positions: int) -> tuple[Pairs, bool]:
    """See Task.recipe."""
    if {"chosen", "rejected"} <= {*columns} and (data.prompt or data.completion):
        raise FtjaxError(
            "data.prompt: does not apply to the columns chosen and rejected, whose prompt is the column prompt; write "
            "it there, and leave data.prompt and data.completion empty"
        )
    found, guessed = prepare.recipe(data, columns)
    kto, paired = config.task.loss == "kto", found.form in template.PAIRED
    how = dataclasses.asdict(found) | {"train_on": "last", "cut": config.data.long == "truncate"}
    how |= {"max_length": max_length, "max_positions": max_positions}
    if data.train_on == "all":
        raise FtjaxError("data.train_on=all: task.kind preference compares answers; leave data.train_on at its default")
    if paired:
        return (Answers if kto else Pairs)(**how), guessed
    usual = [data.label] if data.label else tasks.LABELS
    label = next((name for name in usual if name in columns), "")
    if not (kto and label):
        more = f", or for task.loss=kto an answer and a column {data.label or 'label'}" if kto else ""
        raise FtjaxError(
            f"task.kind=preference: rows need the columns chosen and rejected{more}; found {', '.join(columns)}, which "
            f"are rows of the form {found.form}"
        )
    return Answers(**how, label=label), guessed


def check(config, method, spec, data) -> None:
    """See Task.check: the settings must suit the loss, and where the base model is the reference, the method has to
    leave its parameters as they are."""
    loss, smoothing = config.task.loss, config.train.label_smoothing
    if not config.task.beta:
        raise FtjaxError("task.beta: expected a number above 0 for task.kind=preference; found 0")
    if loss == "robust" and smoothing >= 0.5:
        raise FtjaxError("train.label_smoothing: expected less than 0.5 for task.loss=robust")
    if config.train.spike and (loss == "hinge" or loss == "robust" and smoothing):  # a median that has no multiples
        raise FtjaxError(
            f"train.spike: task.loss={loss} may fall to 0 or below, so that no multiple of its median says which loss "
            f"is too large; expected 0, found {config.train.spike:g}"
        )
    if smoothing and loss not in preference.SMOOTHED:
        raise FtjaxError(
            f"train.label_smoothing: task.loss={loss} has none; set it to 0, or use {', '.join(preference.SMOOTHED)}"
        )
    if loss == "orpo" and config.task.nll_weight:
        raise FtjaxError("task.nll_weight: is always 1 for task.loss=orpo; leave it at 0")
    for name, losses in OF_LOSS.items():
        if config.task[name] != FIELDS[f"task.{name}"].default and loss not in losses:
            raise FtjaxError(f"task.{name}: is of task.loss {', '.join(losses)}; this one is {loss}")
    if loss == "kto" and config.train.accumulate > 1:
        raise FtjaxError(
            "train.accumulate: expected 1 for task.loss=kto, whose reference point is a mean over all answers of a "
            "step; model.remat=full saves memory instead"
        )
    if loss not in preference.WITH_REFERENCE or config.task.reference:
        return
    free = ", ".join(name for name in preference.LOSSES if name not in preference.WITH_REFERENCE)
    otherwise = f"name the reference's directory in task.reference, or use a loss without a reference: {free}"
    keeps_base(method, spec, f"task.loss={loss}", otherwise)


def keeps_base(method, spec, user: str, otherwise: str) -> None:
    """Raise FtjaxError if a tuning method changes parameters of the base model, which then is no reference.

    Args:
        method: The Method.
        spec: Its Spec.
        user: The setting that compares with the base, for the message.
        otherwise: What else can be done, for the message.
    """
    changed = changing(method, spec.tuning)
    if changed:
        raise FtjaxError(
            f"{changed[0]}: changes parameters of the base model, which {user} compares with; use an adapter that "
            f"leaves the base as it is, or {otherwise}"
        )


def changing(method, tuning) -> list[str]:
    """The settings by which a tuning method changes parameters of the base model. tuning: config.tuning of a run."""
    changes = {"method": method.of_parameters, "init": tuning.init in ("pissa", "olora")}
    changes["modules_to_save"] = bool(tuning.modules_to_save)
    changed = [f"tuning.{name}={tuning[name]!r}" for name, there in changes.items() if there]
    return changed + ["data.add_tokens"] * bool(tuning.token_ids)


def always(config) -> dict:
    """The options of the objective in training and evaluation."""
    task = config.task
    return {
        "loss": task.loss, "beta": task.beta, "margin": task.margin, "nll_weight": task.nll_weight,
        "weights": (task.desirable_weight, task.undesirable_weight), "stored": bool(once(config)),
        "head_chunk": config.model.head_chunk,
    }  # fmt: skip


def once(config):
    """See Task.once: the log-probabilities of a reference that is another model."""
    loss = config.task.loss
    if not config.task.reference or loss not in preference.WITH_REFERENCE:
        return None
    return functools.partial(preference.log_probs, loss=loss, head_chunk=config.model.head_chunk)


def passes(config) -> int:
    """See Task.passes: the pass of the reference, where it is the base model."""
    return int(config.task.loss in preference.WITH_REFERENCE and not once(config))


TASK = Task(
    head="causal",
    sums=preference.sums,
    options=lambda config: {"label_smoothing": config.train.label_smoothing},
    always=always,
    once=once,
    passes=passes,
    whole_rows=True,
    check=check,
    recipe=recipe,
    texts=2,
    layout=lambda config, tokenizer: {"apart": True},
    trained=lambda config, T: T,
    unnamed=0,
    takes=("train.label_smoothing", "task.loss", "task.nll_weight", *(f"task.{name}" for name in OF_LOSS)),
)
