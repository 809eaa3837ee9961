"""Numbers of a run that are NaN or infinite: what stops it, the step at which they appear, and the likely cause."""

from __future__ import annotations

import math

from ftjax.errors import NotFinite


def check_step(step: int, values: dict, before: float | None, rate: float) -> None:
    """Refuse to go on from a step whose loss or gradient norm is not finite.

    Args:
        step: its number, from 1.
        values: its "loss", None where its rows weigh nothing, and "grad_norm".
        before: the last loss before; None where there is none.
        rate: the learning rate of the step before.

    Raises:
        NotFinite: naming the step and the likely cause.
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
            "the computation, or a row's target is extreme: set model.dtype=float32, and look at the rows with "
            "`ftjax data inspect`"
        )
    last = "" if before is None else f", and the loss before it was {before:.4g}"
    raise NotFinite(f"{what}{last}. {advice(rate)}")


SMALLER_UPDATES = "lower optim.lr, lengthen optim.warmup, or set optim.clip_norm=1"


def advice(rate: float) -> str:
    """What makes numbers overflow in a run whose first steps were fine; rate: its learning rate there."""
    return f"Updates at the learning rate {rate:.3g} are too large, most likely: {SMALLER_UPDATES}"
