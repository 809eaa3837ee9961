"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from ftjax.tuning.base import Method, register


def init(key, base, spec):
    """All parameters are trained, and none is frozen."""
    return base, {}


def variables(trained, frozen, spec):
    """The variables of a plain model, without adapters."""
    return {"params": trained}


def merge(trained, frozen, spec):
    """The trained parameters are the model already."""
    return trained


register(
    "full",
    Method(
        init=init,
        variables=variables,
        merge=merge,
        of_parameters=True,
        takes=(),
        lr=2e-5,  # what Llama-2, Tulu and Alpaca used for full supervised fine-tuning of billions of parameters
        batch_size=64,  # full training wants the larger batch: its gradient noise acts on every weight
    ),
)
