"""Numbers that are NaN or infinite: they stop a run, with the step at which they appear and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Callable

from ftjax.errors import NotFinite


def check_step(
    step: int, values: dict, before: float | None, rate: float, decay: float, places: Callable[[], list[str]]
) -> None:
    """Stop a run after a step whose loss or gradient norm is not finite.

    Args:
        step: Number of the step, from 1.
        values: Its "loss" (None if its rows have weight 0) and "grad_norm".
        before: The last loss before it; None if there is none.
        rate: Learning rate of the step before.
        decay: optim.weight_decay.
        places: places() -> the names of the rows of its batch.

    Raises:
        NotFinite: It names the step, its rows and the likely cause.
    """
    loss, norm = values["loss"], values["grad_norm"]
    if (loss is None or math.isfinite(loss)) and math.isfinite(norm):
        return
    what = f"step {step}: the gradient norm is {norm}"
    if loss is not None and not math.isfinite(loss):
        what = f"step {step}: the loss is {loss}"
    if step == 1:
        raise NotFinite(
            f"{what}, in the first step, before any update: the learning rate is not the cause. A value overflows in "
            "the computation, or a row's target or a weight of task.class_weights is extreme: set model.dtype=float32, "
            f"and look at the {_rows(places())}, with `ftjax data inspect`"
        )
    last = "" if before is None else f", and the loss before it was {before:.4g}"
    raise NotFinite(f"{what}{last}. {advice(rate, decay)}; {_rows(places())}")


IN_A_ROW = 10  # bad steps after which a run stops


def check_bad(step: int, values: dict, places: list[str], report: dict, config, before: float | None) -> str:
    """What is said of a bad step that was left out.

    Args:
        step: Number of the step, from 1.
        values: Its "loss" (None if its rows have weight 0) and "grad_norm".
        places: Names of the rows of its batch.
        report: "skipped" and "in_a_row", see ftjax.training.step.judged.
        config: The whole config.
        before: The last loss before it; None if there is none.

    Raises:
        NotFinite: If train.on_bad_step is stop, for a spike, or after IN_A_ROW such steps in a row.
    """
    spike = math.isfinite(values["loss"] or 0.0) and math.isfinite(values["grad_norm"])
    what = f"step {step}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}"
    if spike:
        last = "" if before is None else f"; the loss before it was {before:.4g}"
        what = (
            f"step {step}: the loss {values['loss']:.4g} is above train.spike={config.train.spike:g} times the median "
            f"of the last losses{last}"
        )
    rows = _rows(places)
    if config.train.on_bad_step == "stop":
        raise NotFinite(f"{what}. Look at the {rows}. train.on_bad_step=skip leaves such batches out")
    if report["in_a_row"] >= IN_A_ROW:
        raise NotFinite(
            f"{what}. It is the last of {IN_A_ROW} bad steps in a row, which train.on_bad_step=skip left out; {rows}. "
            f"{SMALLER_UPDATES[0].upper()}{SMALLER_UPDATES[1:]}; a single bad row cannot be the cause"
        )
    return f"{what}. The step is left out (train.on_bad_step=skip; {int(report['skipped'])} so far); {rows}"


def _rows(places: list[str]) -> str:
    """The rows of a batch, for a message."""
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"rows of its batch: {', '.join(places[:SHOWN])}{more}"


SHOWN = 8  # most rows that a message names
SMALLER_UPDATES = "lower optim.lr, lengthen optim.warmup, or set optim.clip_norm=1"


def advice(rate: float, decay: float) -> str:
    """The likely cause of overflow in a run whose first steps were fine, and what to do.

    rate: the learning rate at that step; decay: optim.weight_decay, of which a step subtracts rate x decay from each
    weight.
    """
    if rate * decay > 1:
        return (
            f"optim.weight_decay={decay:.3g} at the learning rate {rate:.3g} takes {rate * decay:.3g} times a weight "
            f"off it each step, so that it grows: lower optim.weight_decay, or {SMALLER_UPDATES}"
        )
    return f"Updates at the learning rate {rate:.3g} are too large, most likely: {SMALLER_UPDATES}"
