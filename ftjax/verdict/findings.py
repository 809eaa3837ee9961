"""Problems of a comparison: leaks, other templates, overfitting, lost refusals, forgetting, too few rows.

A new check is a function, a row of CHECKS and a macro with its texts in `assets/pages/findings.jinja`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax import config as configs
from ftjax.data.prepare import rows
from ftjax.data.split import decontaminate
from ftjax.errors import FtjaxError
from ftjax.pages import macros
from ftjax.training.finite import SMALLER_UPDATES
from ftjax.verdict import statistics
from ftjax.verdict.measure import Measured
from ftjax.verdict.setting import Setting

TURNED = 0.02  # a run overfits if its last validation loss is higher than the lowest by this share
FORGOT = 0.05  # nats per token on general text: a perplexity 5 % higher
ASKED_BY = ("prompt", "completion", "template", "system", "end")  # fields of `data` that decide how a row is rendered


class Case(NamedTuple):
    """A finished comparison, as the checks receive it."""

    setting: Setting
    measured: dict[str, Measured]
    base: str  # the contender that the others are compared with
    verdicts: dict[str, statistics.Verdict]
    lost: dict[str, str] = {}  # contenders that could not be measured -> why


class Finding(NamedTuple):
    """A problem that a check found with a contender, and what to do about it."""

    check: str  # a row of CHECKS
    contender: str
    seen: str
    advice: str
    share: float = 0.0  # of the held-out rows that are concerned, if known


def findings(case: Case) -> list[Finding]:
    """The findings of all checks, in the order of CHECKS."""
    return [Finding(check, *found) for check, look in CHECKS.items() for found in look(case)]


def _texts(name: str, **values) -> list[str]:
    """[what was seen, what to do], by the macro `name` of findings.jinja."""
    found = macros("findings.jinja", smaller_updates=SMALLER_UPDATES, infinite=math.inf)
    return getattr(found, name)(**values).strip().rsplit("\n", 1)


# ---------------------------------------------------------------------------------------------- overfitting


class Parted(NamedTuple):
    """Where the validation loss turned up while the training loss kept falling."""

    step: int  # of the lowest validation loss
    last: int  # step of the last validation
    val: tuple[float, float]  # validation loss at the two steps
    train: tuple[float, float]


def parted(history: list[dict]) -> Parted | None:
    """Find where the two losses in rows of metrics.jsonl part by TURNED; None if they do not.

    The training loss at a step is a mean of the last values logged up to it, a tenth as many as were logged in all.
    """
    val = [(row["step"], row["val_loss"]) for row in history if row.get("val_loss") is not None]
    train = [(row["step"], row["loss"]) for row in history if row.get("loss") is not None]
    if len(val) < 2 or not train:
        return None

    def near(step: int) -> float:
        before = [loss for at, loss in train if at <= step] or [train[0][1]]
        return float(np.mean(before[-max(1, len(train) // 10) :]))

    (best, lowest), (last, final) = min(val, key=lambda x: x[1]), val[-1]
    losses = near(best), near(last)
    if final < lowest * (1 + TURNED) or losses[1] >= losses[0]:
        return None
    return Parted(best, last, (lowest, final), losses)


def overfitting(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find runs of which the validation loss rose while the training loss fell."""
    for name, measured in case.measured.items():
        if not (found := [p for p in (parted(run.history) for run in measured.runs) if p]):
            continue
        worst = max(found, key=lambda p: p.val[1] / p.val[0])
        yield name, *_texts("overfitting", worst=worst, found=len(found), runs=len(measured.runs))


# ---------------------------------------------------------------------------------------------- leaks, templates


def leaks(case: Case) -> Iterator[tuple]:
    """Find training rows that overlap with held-out rows, as data.decontaminate does."""
    shared, on = case.setting, case.setting.config.evaluate.compare_on
    others = [(on, piece.table.select(piece.kept)) for piece in getattr(shared.data, on).pieces]
    read = [n for n, m in case.measured.items() if m.contender.kind == "tuned" or m.contender.how.shots]
    own = [(", ".join(read), None)] if read else []
    own += [(n, run.config) for n, m in case.measured.items() if m.contender.kind == "model" for run in m.runs[:1]]
    trained_on = [piece.table for piece in shared.data.train.pieces]
    for name, config in own:
        try:
            tables = [source.tables["train"] for source in rows(config, augmented=False)[0]] if config else trained_on
        except FtjaxError as error:
            yield name, *_texts("unread", error=error)
            continue
        removed = [r for table in tables for r in decontaminate(table, others, (config or shared.config).data)[1]]
        if removed:
            twins = len({r.twin for r in removed})
            texts = _texts("leaks", removed=removed, trained=sum(map(len, tables)), twins=twins, on=on)
            yield name, *texts, twins / max(sum(len(table) for _, table in others), 1)


def templates(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find runs that were trained on another template than the rows have, and chat models that receive plain text."""
    now = configs.flat(case.setting.config.data)
    for name, measured in case.measured.items():
        for run in measured.runs[:1]:
            before = configs.flat(run.config.data)
            other = [key for key in ASKED_BY if before[key] != now[key]]
            if other and not run.config.data.mixture:
                changed = "; ".join(f"data.{key} was {before[key]!r} in training and is {now[key]!r}" for key in other)
                yield name, *_texts("templates", changed=changed)
        if not measured.runs and measured.chat_unused:
            yield name, *_texts("chat_unused")


# ---------------------------------------------------------------------------------------------- what was lost


def refusals_lost(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find contenders that refuse fewer unsafe prompts than the base, or more harmless ones."""
    base = case.measured[case.base].refused
    for name, measured in case.measured.items():
        for kind, down in (("unsafe", True), ("harmless", False)):
            if kind not in measured.refused or kind not in base or name == case.base:
                continue
            before, after = base[kind].mean(0), measured.refused[kind].mean(0)
            c = statistics.compare(after, before) if len(after) > 1 else None
            if c and c.p < 1 - statistics.LEVEL and (c.difference < 0) == down:
                rates = {"before": before.mean(), "after": after.mean()}
                yield name, *_texts("refusals_lost", kind=kind, prompts=len(before), p=c.p, **rates)


def forgetting(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find contenders whose loss on general text is higher than the base's by more than FORGOT."""
    base = np.mean(case.measured[case.base].forgetting or [np.nan])
    for name, measured in case.measured.items():
        if measured.forgetting and (more := np.mean(measured.forgetting) - base) > FORGOT:
            on = case.setting.config.evaluate.forgetting
            yield name, *_texts("forgetting", on=on, base=base, more=more, perplexity=np.expm1(more))


# ---------------------------------------------------------------------------------------------- what cannot be said


def too_few_rows(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find verdicts that these rows cannot decide."""
    for name, verdict in case.verdicts.items():
        if verdict.says == "cannot tell":
            yield name, *_texts("too_few_rows", verdict=verdict)


def shortened(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find prompts that were too long for their examples or passages."""
    for name, measured in case.measured.items():
        if measured.shortened:
            n = measured.scores[next(iter(measured.scores))].shape[-1]
            yield name, *_texts("shortened", prompts=measured.shortened, all=n)


def failures(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find seeds that ended without a model, runs that have not ended, and contenders that could not be measured."""
    left_out = [(name, text) for name, measured in case.measured.items() for text in measured.failed]
    left_out += [(name, f"it is left out of this report: {why}") for name, why in case.lost.items()]
    stopped = [(name, run) for name, measured in case.measured.items() for run in measured.runs if not run.finished]
    as_is = "has not finished, and is measured with its best checkpoint"
    left_out += [(name, f"{run.path} {as_is}") for name, run in stopped]
    for name, text in left_out:
        yield name, *_texts("failures", text=text)


CHECKS: dict[str, Callable[[Case], Iterator[tuple[str, str, str]]]] = {
    "leaked rows": leaks,
    "template mismatch": templates,
    "overfitting": overfitting,
    "lost refusals": refusals_lost,
    "forgetting": forgetting,
    "too few rows": too_few_rows,
    "prompts shortened": shortened,
    "failed runs": failures,
}
