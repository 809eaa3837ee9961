"""Problems of a comparison: leaks, other templates, overfitting, lost refusals, forgetting, too few rows.

A new check is a function and a row of CHECKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax import config as configs
from ftjax.data.prepare import rows
from ftjax.data.split import decontaminate
from ftjax.data.table import Table
from ftjax.errors import FtjaxError
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
        found = [p for p in (parted(run.history) for run in measured.runs) if p]
        if not found:
            continue
        worst = max(found, key=lambda p: p.val[1] / p.val[0])
        yield (
            name,
            f"in {len(found)} of {len(measured.runs)} runs validation loss rose from its lowest value, "
            f"{worst.val[0]:.3f} at step {worst.step:,}, to {worst.val[1]:.3f} at step {worst.last:,}, while training "
            f"loss fell from {worst.train[0]:.3f} to {worst.train[1]:.3f}. The checkpoint with the lowest validation "
            "loss is compared",
            f"stop near step {worst.step:,} (train.patience, or fewer train.epochs); more rows, data.augment or "
            "tuning.dropout delay overfitting",
        )


# ---------------------------------------------------------------------------------------------- leaks, templates


def held_out(setting: Setting) -> list[tuple[str, Table]]:
    """(name, rows) of the part that contenders are evaluated on."""
    on = setting.config.evaluate.compare_on
    return [(on, piece.table.select(piece.kept)) for piece in getattr(setting.data, on).pieces]


def leaks(case: Case) -> Iterator[tuple]:
    """Find training rows that overlap with held-out rows, as data.decontaminate does."""
    others = held_out(case.setting)
    read = [n for n, m in case.measured.items() if m.contender.kind == "tuned" or m.contender.how.shots]
    own = [(", ".join(read), None)]
    own += [(n, run.config) for n, m in case.measured.items() if m.contender.kind == "model" for run in m.runs[:1]]
    for name, config in own:
        if not name:
            continue
        try:
            tables = _trained_on(case.setting, config)
        except FtjaxError as error:
            yield (
                name,
                f"its training rows could not be read: {error}",
                "check by yourself that they contain no held-out rows",
            )
            continue
        removed = [r for table in tables for r in decontaminate(table, others, (config or case.setting.config).data)[1]]
        if removed:
            twins = len({r.twin for r in removed})
            yield (
                name,
                f"{len(removed):,} of {sum(map(len, tables)):,} training rows overlap with {twins:,} held-out rows; "
                f"{removed[0].place} {removed[0].why} ({removed[0].twin})",
                f'scores are too high: set data.decontaminate=("{case.setting.config.evaluate.compare_on}",) and train '
                "again",
                twins / max(sum(len(table) for _, table in others), 1),
            )


def _trained_on(setting: Setting, config) -> list[Table]:
    if config is None:
        return [piece.table for piece in setting.data.train.pieces]
    return [source.tables["train"] for source in rows(config, augmented=False)[0]]


def templates(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find runs that were trained on another template than the rows have, and chat models that receive plain text."""
    now = configs.flat(case.setting.config.data)
    for name, measured in case.measured.items():
        for run in measured.runs[:1]:
            before = configs.flat(run.config.data)
            other = [key for key in ASKED_BY if before[key] != now[key]]
            if other and not run.config.data.mixture:
                changed = "; ".join(f"data.{key} was {before[key]!r} in training and is {now[key]!r}" for key in other)
                yield (
                    name,
                    f"it was trained with another template: {changed}",
                    "compare with the template of the training",
                )
        if not measured.runs and measured.chat_unused:
            yield (
                name,
                "the model has a chat template, but its prompts are plain text",
                'if it was trained on chats, set data.template="tokenizer"',
            )


# ---------------------------------------------------------------------------------------------- what was lost


def refusals_lost(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find contenders that refuse fewer unsafe prompts than the base, or more harmless ones."""
    base = case.measured[case.base].refused
    for name, measured in case.measured.items():
        for kind, down, advice in (
            ("unsafe", True, "mix refusals into the training rows (data.mixture), or train less of the model"),
            ("harmless", False, "remove refusals from the answers of the training rows"),
        ):
            if kind not in measured.refused or kind not in base or name == case.base:
                continue
            before, after = base[kind].mean(0), measured.refused[kind].mean(0)
            c = statistics.compare(after, before) if len(after) > 1 else None
            if c and c.p < 1 - statistics.LEVEL and (c.difference < 0) == down:
                rates = f"{after.mean():.0%} of {len(before):,} {kind} prompts; the base refused {before.mean():.0%}"
                yield name, f"it refused {rates} (p = {c.p:.2g})", advice


def forgetting(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find contenders whose loss on general text is higher than the base's by more than FORGOT."""
    base = np.mean(case.measured[case.base].forgetting or [np.nan])
    for name, measured in case.measured.items():
        if measured.forgetting and (more := np.mean(measured.forgetting) - base) > FORGOT:
            yield (
                name,
                f"the loss on {case.setting.config.evaluate.forgetting} rose from {base:.3f} to {base + more:.3f} nats "
                f"a token: its perplexity is {np.expm1(more):.0%} higher",
                "to forget less, lower optim.lr, train fewer steps or fewer parameters, or add general rows by "
                "data.mixture",
            )


# ---------------------------------------------------------------------------------------------- what cannot be said


def _seen(smallest: float) -> str:
    if not np.isfinite(smallest):
        return "these rows could not have shown any difference"
    return f"these rows can only show differences of at least {smallest:.2g}"


def too_few_rows(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find verdicts that these rows cannot decide."""
    for name, verdict in case.verdicts.items():
        if verdict.says == "cannot tell":
            yield (
                name,
                f"{verdict.text}; {_seen(verdict.smallest)}",
                "add held-out rows of the same kind, or raise compare.seeds",
            )


def shortened(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find prompts that were too long for their examples or passages."""
    for name, measured in case.measured.items():
        if measured.shortened:
            n = measured.scores[next(iter(measured.scores))].shape[-1]
            yield (
                name,
                f"{measured.shortened:,} of {n:,} prompts were too long for the model's positions and lost examples or "
                "passages",
                "lower compare.shots or compare.passage_words, or use a model with more positions",
            )


def failures(case: Case) -> Iterator[tuple[str, str, str]]:
    """Find seeds that ended without a model, runs that have not ended, and contenders that could not be measured."""
    left_out = [(name, text) for name, measured in case.measured.items() for text in measured.failed]
    left_out += [(name, f"it is left out of this report: {why}") for name, why in case.lost.items()]
    stopped = [(name, run) for name, measured in case.measured.items() for run in measured.runs if not run.finished]
    as_is = "has not finished, and is measured with its best checkpoint"
    left_out += [(name, f"{run.path} {as_is}") for name, run in stopped]
    for name, text in left_out:
        rerun = "fix the reason and run the same command again: it runs only what is missing"
        yield name, text, SMALLER_UPDATES if SMALLER_UPDATES in text else rerun


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
