"""A plan as text for a person."""

from __future__ import annotations

import math
import shlex

from ftjax.pages import page
from ftjax.plan.devices import GIB, PRICED
from ftjax.plan.run import check_numbers

SHARE = 0.5  # of the roofline that a run is assumed to reach: published runs reach 0.4 to 0.65 of their peak


def report(plan: dict, price: float | None = None, share: float = SHARE) -> str:
    """A plan as text, by the template `assets/pages/plan.jinja`.

    Args:
        plan: what ftjax.plan.run.plan returns.
        price: US dollars per device hour; None: the price in the table of devices.
        share: Share of the roofline that the run is assumed to reach, above 0 and at most 1.

    Raises:
        FtjaxError: If the price or the share is out of range.
    """
    check_numbers(price=price, share=share)
    asked = plan["asked"]
    seconds = sum(plan[part]["seconds"] for part in ("time", "drawing") if part in plan) / share
    return page(
        "plan.jinja",
        plan=plan,
        mesh=" x ".join(f"{axis}={n}" for axis, n in asked["mesh"].items() if n > 1 or axis != "expert"),
        held=sum(asked["held"].values()),
        seconds=seconds,
        share=share,
        price=plan["devices"]["price"] if price is None else price,
        by_table=price is None,
        priced=PRICED,
        paste=paste,
        ms=lambda seconds: f"{seconds * 1e3:,.3g} ms",
        gib=GIB,
        infinite=math.inf,
    ).rstrip("\n")


def paste(row: dict) -> str:
    """Overrides as they are written on a command line."""
    return shlex.join(f"--config.{key}={value}" for key, value in row["overrides"].items()) or "as asked"
