"""Numbers that are NaN or infinite: they stop a run, with the step at which they appear and the likely cause."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.errors import NotFinite


def check_step(
    step: int,
    values: dict,
    before: float | None,
    rate: float,
    decay: float,
    places: Callable[[], list[str]],
    norms: dict | None = None,
) -> None:
    """Stop a run after a step whose loss or gradient norm is not finite.

    Args:
        step: Number of the step, from 1.
        values: Its "loss" (None if its rows have weight 0) and "grad_norm".
        before: The last loss before it; None if there is none.
        rate: Learning rate of the step before.
        decay: optim.weight_decay.
        places: places() -> the names of the rows of its batch.
        norms: Norms of its gradient by layer, see `step.norms_by_layer`.

    Raises:
        NotFinite: It names the step, its layers and rows, and the likely cause.
    """
    loss, norm = values["loss"], values["grad_norm"]
    if (loss is None or math.isfinite(loss)) and math.isfinite(norm):
        return
    what = f"step {step}: the gradient norm is {norm}"
    if loss is not None and not math.isfinite(loss):
        what = f"step {step}: the loss is {loss}"
    what += by_layer(norms)
    if step == 1:
        raise NotFinite(
            f"{what}, in the first step, before any update: the learning rate is not the cause. A value overflows in "
            "the computation, or a row's target or a weight of task.class_weights is extreme: set model.dtype=float32, "
            f"and look at the {_rows(places())}, with `ftjax data inspect`"
        )
    last = "" if before is None else f", and the loss before it was {before:.4g}"
    raise NotFinite(f"{what}{last}. {advice(rate, decay)}; {_rows(places())}")


IN_A_ROW = 10  # bad steps after which a run stops


def by_layer(norms: dict | None) -> str:
    """The layers whose gradients are not finite, or else those with the largest, in parentheses."""
    each = _named(norms or {})
    wrong = [name for name, x in each.items() if not math.isfinite(x)]
    if not each or len(wrong) == len(each):
        return " (all gradients are NaN or infinite)" if wrong else ""
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        return f" (gradients are NaN or infinite in {', '.join(wrong[:SHOWN])}{more})"
    most = sorted(each, key=each.__getitem__, reverse=True)[:3]
    largest = ", ".join(f"{name} {each[name]:.3g}" for name in most if each[name])
    return f" (largest gradient norms: {largest})" if largest else ""


KEPT = 50  # good steps whose gradient norms a run remembers
GROWN = 3.0  # a gradient has grown if its norm is so many times the smallest of these steps


def grown(known: Sequence[dict]) -> str:
    """A sentence about the layers whose gradients grew before a run diverged; empty for fewer than two steps.

    known: norms of the gradients of the latest good steps, the newest last, see `step.norms_by_layer`.
    """
    if len(known) < 2:
        return ""
    steps = [_named(norms) for norms in known]
    least, last = {name: min(step[name] for step in steps) for name in steps[0]}, steps[-1]
    names = sorted((n for n in last if last[n] > GROWN * least[n] > 0), key=lambda n: least[n] / last[n])
    layers = ", ".join(f"{name} ({least[name]:.3g} to {last[name]:.3g})" for name in names[:3])
    grew = f"the gradient norm grew most in {layers}" if layers else "no layer's gradient grew much"
    return f" In the {len(known)} good steps before, {grew}."


def _named(norms: dict) -> dict[str, float]:
    """{a layer, or a part outside the layers: norm of its gradient}."""
    each = {}
    for part, x in norms.items():
        each |= {f"layer {i}": float(n) for i, n in enumerate(x)} if np.ndim(x) else {part: float(x)}
    return each


LAST = 5  # logged steps at the end of a run by which it is judged


def doubt(first: float | None, history: Sequence[dict], measured: bool) -> str:
    """Why a run whose numbers are all finite cannot have learned; empty where nothing says so.

    Args:
        first: The loss of the first step, before any update; None if it is unknown.
        history: The rows of metrics.jsonl.
        measured: Whether a lower loss is a better model, which it is not where the model writes its own batches.
    """
    last = [row for row in history if row.get("loss") is not None][-LAST:]
    if len(last) < LAST:
        return ""
    advice = f"The model has most likely diverged: {SMALLER_UPDATES}, and train again"
    if measured and not any(row["loss"] or row["grad_norm"] for row in last):
        return (
            f"the loss and its gradient were exactly 0 in the last {LAST} logged steps: it has reached its least "
            "value, so that these steps trained nothing more. Fewer steps are enough"
        )
    if not any(row["grad_norm"] for row in last):
        if all(row.get("flat") == 1 for row in last):  # see tasks.policy
            return (
                f"all answers to a prompt had the same reward in the last {LAST} logged steps, so that nothing was "
                "trained. Look at samples of the answers and at task.rewards"
            )
        return f"the gradient was exactly 0 in the last {LAST} logged steps, so that nothing was trained. {advice}"
    losses = [row["loss"] for row in last]
    end, scatter = statistics.median(losses), statistics.stdev(losses)
    if measured and first is not None and end - first > max(0.1 * abs(first), 3 * scatter):
        return f"the training loss ended at {end:.4g}, far above {first:.4g}, where it began. {advice}"
    return ""


def check_bad(step: int, values: dict, places: list[str], report: dict, config, before: float | None, good: int) -> str:
    """What is said of a bad step that was left out, or from which the run goes back.

    Args:
        step: Number of the step, from 1.
        values: Its "loss" (None if its rows have weight 0) and "grad_norm".
        places: Names of the rows of its batch.
        report: "skipped" and "in_a_row", see ftjax.training.step.bad_step, and "norms".
        config: The whole config.
        before: The last loss before it; None if there is none.
        good: Step of the checkpoint to which train.on_bad_step=rewind goes back; 0: there is none.

    Raises:
        NotFinite: If train.on_bad_step is stop, for a spike, after IN_A_ROW such steps in a row, or if there is no
            checkpoint to go back to.
    """
    spike = math.isfinite(values["loss"] or 0.0) and math.isfinite(values["grad_norm"])
    what = f"step {step}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}"
    if spike:
        last = "" if before is None else f"; the loss before it was {before:.4g}"
        what = (
            f"step {step}: the loss {values['loss']:.4g} is above train.spike={config.train.spike:g} times the median "
            f"of the last losses{last}"
        )
    what += by_layer(report["norms"])
    rows, how = _rows(places), config.train.on_bad_step
    if how == "stop":
        raise NotFinite(f"{what}. Look at the {rows}. train.on_bad_step=skip leaves such batches out")
    if report["in_a_row"] >= IN_A_ROW:
        raise NotFinite(
            f"{what}. It is the last of {IN_A_ROW} bad steps in a row, which train.on_bad_step={how} left out; {rows}. "
            f"{SMALLER_UPDATES[0].upper()}{SMALLER_UPDATES[1:]}; a single bad row cannot be the cause"
        )
    if how == "rewind" and not good:
        raise NotFinite(f"{what}. There is no checkpoint to go back to: lower train.save_every, or look at the {rows}")
    if how == "rewind":
        over = f"steps {good + 1:,} to {step:,} change nothing" if step > good + 1 else f"step {step:,} changes nothing"
        back = f"The run goes back to the checkpoint of step {good:,}, and {over} (train.on_bad_step=rewind)"
        return f"{what}. {back}; {rows}"
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
