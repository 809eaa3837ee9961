"""A plan as text for a person."""

from __future__ import annotations

import shlex

from ftjax.plan.devices import PRICED
from ftjax.plan.run import check_numbers

GIB = 2**30
SHARE = 0.5  # of the roofline that a run is assumed to reach: published runs reach 0.4 to 0.65 of their peak


def report(plan: dict, price: float | None = None, share: float = SHARE) -> str:
    """A plan as text.

    Args:
        plan: what ftjax.plan.run.plan returns.
        price: US dollars per device hour; None: the price in the table of devices.
        share: Share of the roofline that the run is assumed to reach, above 0 and at most 1.

    Raises:
        FtjaxError: If the price or the share is out of range.
    """
    check_numbers(price=price, share=share)
    asked, devices = plan["asked"], plan["devices"]
    lines = [*_what(plan), "", *_memory(asked)]
    if not asked["fits"]:
        return "\n".join(lines + ["", *_instead(plan)])
    lines += ["", *_work(plan), "", *_time(plan, devices["price"] if price is None else price, price is None, share)]
    return "\n".join(lines + ["", *_choices(plan)])


def does_not_fit(plan: dict) -> str:
    """`does not fit: 23.4 of 15.8 GiB a device`."""
    return f"does not fit: {plan['asked']['total'] / GIB:.3g} of {plan['asked']['limit'] / GIB:.3g} GiB a device"


def _what(plan) -> list[str]:
    asked, rows, devices = plan["asked"], plan["rows"], plan["devices"]
    parameters = asked["parameters"]
    trained, total = parameters["trained"], parameters["total"]
    mesh = " x ".join(f"{axis}={n}" for axis, n in asked["mesh"].items() if n > 1 or axis != "expert")
    batch = f"{rows['batch']} rows of {rows['length']:,} tokens"
    batch += f", at most {rows['labels']:,} trained" if rows["from_data"] else " (data.max_length), all trained"
    by = "the TPU compiler"
    if plan["simulated"]:
        by = "XLA's CPU compiler (a GPU's program keeps no float32 copies of bfloat16: it needs less)"
    elif devices["name"].startswith("cpu"):
        by = "XLA's CPU compiler, as in training"
    return [
        *plan["chosen"],
        f"{plan['model']}, {plan['method']}, on {devices['name']} "
        f"({devices['count']:,} device{'s' * (devices['count'] > 1)}): {mesh}, remat {asked['remat']}",
        f"a step: {batch}" + (f", in {asked['accumulate']} microbatches" if asked["accumulate"] > 1 else ""),
        f"parameters: {trained:,} trained, {total - trained:,} frozen",
        f"compiled by {by} in {asked['compile_seconds']:.0f} s ({asked['compile_cpu_seconds']:.0f} s of CPU, "
        f"{asked['compile_memory'] / 1e9:.1f} GB of this machine's memory)",
    ]


def _memory(asked) -> list[str]:
    parts = {name: size for name, size in asked["held"].items()}
    if "arguments" in asked:
        parts["padding"] = asked["arguments"] - sum(parts.values())
    lines = [f"  {name:<24}{size / GIB:>9.3f} GiB" for name, size in parts.items() if size]
    lines.append(f"  {'temporaries':<24}{asked['temporaries'] / GIB:>9.3f} GiB, the most at once; among them")
    lines.append(f"    {'gradients':<22}{asked['gradients'] / GIB:>9.3f}")
    lines.append(f"    {'logits of one chunk':<22}{asked['head'] / GIB:>9.3f}")
    rest = max(0.0, asked["temporaries"] - asked["gradients"] - asked["head"])
    lines.append(f"    {'activations, the rest':<22}{rest / GIB:>9.3f}")
    limit = "" if asked["limit"] == float("inf") else f" of {asked['limit'] / GIB:.2f}"
    return ["memory a device:", *lines, f"  {'in all':<24}{asked['total'] / GIB:>9.3f} GiB{limit}"]


def _work(plan) -> list[str]:
    asked, tokens = plan["asked"], plan["rows"]["batch"] * plan["rows"]["length"]
    lines = [
        f"arithmetic: {asked['model_flops_per_token'] / 1e9:,.3g} GFLOP a token by formula (causal, without "
        f"recomputation), {asked['flops'] / tokens / 1e9:,.3g} executed; {asked['flops'] / 1e12:,.4g} TFLOP a step",
        f"memory traffic: {asked['traffic'] / 1e9:,.3g} GB a step and device",
    ]
    for c in asked["collectives"]:
        lines.append(f"  {c['kind']:<20}{c['count']:>7,} a step, {c['bytes'] / 1e9:>9.3f} GB sent by a device")
    return lines


def _time(plan, price, from_table, share) -> list[str]:
    time, count = plan["time"], plan["devices"]["count"]
    names = ("arithmetic", "memory", "links", *(("host",) if time["host"] else ()))
    parts = ", ".join(f"{name} {time[name] * 1e3:,.3g} ms" for name in names)
    seconds, drawing = time["seconds"] / share, []
    if draws := plan.get("drawing"):
        seconds += draws["seconds"] / share
        drawing = [
            f"drawing the answers of a step, each as long as it may be: {draws['seconds'] * 1e3:,.3g} ms more, bound "
            f"by {draws['bound']} (arithmetic {draws['arithmetic'] * 1e3:,.3g} ms, memory {draws['memory'] * 1e3:,.3g} "
            "ms)"
        ]
    steps = plan["steps"] or 1000
    hours = seconds * steps / 3600
    told = f"{steps:,} steps" if plan["steps"] else "1,000 steps (train.steps is not set; --data counts them)"
    speed = plan["tokens_per_step"] / seconds
    lines = [
        f"time a step at the devices' peaks: {time['seconds'] * 1e3:,.3g} ms, bound by {time['bound']} ({parts})",
        *drawing,
        f"at {share:.0%} of that: {seconds:,.3g} s a step, {speed:,.0f} tokens/s, {speed / count:,.0f} a device",
        f"{told}: {hours:,.3g} hours, {hours * count:,.4g} device hours"
        + (f", {hours * count * price:,.4g} US dollars" if price else ""),
    ]
    if price is None:
        lines.append("no price is known for this device: give --price DOLLARS_A_DEVICE_HOUR")
    elif price and from_table:
        lines.append(f"at {price:.2f} dollars a device hour ({PRICED})")
    return lines


def _choices(plan) -> list[str]:
    rows = plan["choices"]
    if not rows:
        return []
    lines = ["faster or smaller, at the peaks; ~: estimated, not compiled:"]
    lines.append(f"  {'GiB':>9} {'ms a step':>10} {'tokens/s a device':>18}  overrides")
    for row in rows:
        seconds, mark = row["time"]["seconds"], " " if row["compiled"] else "~"
        speed = row["batch"] * plan["rows"]["length"] / seconds / plan["devices"]["count"]
        lines.append(f" {mark}{row['total'] / GIB:>9.3f} {seconds * 1e3:>10,.4g} {speed:>18,.0f}  {paste(row)}")
    return lines


def _instead(plan) -> list[str]:
    lines = [does_not_fit(plan)]
    if plan["asked"].get("at_first_sight"):
        lines.append(
            "(refused by an estimate, before the compiler saved any memory: the compiled program may need less, but "
            "too much)"
        )
    if not plan["instead"]:
        return lines + ["none of the tried settings fits either: use larger devices or a smaller model"]
    lines.append("by estimate, these settings fit:")
    for row in plan["instead"]:
        devices = "" if row["devices"] == plan["devices"]["name"] else f"--devices {row['devices']} "
        lines.append(f"  {row['total'] / GIB:>8.3g} GiB  {devices}{paste(row)}")
    return lines


def paste(row: dict) -> str:
    """Overrides as they are written on a command line."""
    return shlex.join(f"--config.{key}={value}" for key, value in row["overrides"].items()) or "as asked"
