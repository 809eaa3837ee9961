"""The verdict in plain language: whether to fine-tune, why, at what cost and risk, and what contenders and metrics are.

The sentences are for readers who know no technical term of machine learning.
"""

from __future__ import annotations

import math

from ftjax.pages import macros
from ftjax.verdict.contenders import MAJORITY, Contender
from ftjax.verdict.statistics import rounded

YES, NO, OPEN = "yes", "no", "not enough evidence"

# ---------------------------------------------------------------------------------------------- numbers


def sig(x: float, digits: int = 2) -> str:
    """A number with so many significant digits and without an exponent, such as 0.0065, 41 or 118,000."""
    if not x or not math.isfinite(x):
        return f"{x:g}"
    places = digits - 1 - math.floor(math.log10(abs(x)))
    return f"{round(x, places):,.{max(places, 0)}f}"


def short(x: float) -> str:
    """A large number with an SI prefix, such as 1.9 T."""
    step = min(max(int(math.log10(abs(x)) // 3), 0), 7) if x else 0
    return f"{sig(x / 1000**step)} {' kMGTPEZ'[step]}".strip()


def span(figure: dict, sign: str = "") -> str:
    """A figure with its interval, such as `0.30 (0.27 to 0.33)`.

    The interval's width has two significant digits. A figure of at most 1 has at least two decimals.

    figure: {"value", "low", "high"}. sign: `+` if the figure is a difference, so that its sign is always written.
    """
    three = [figure[key] for key in ("value", "low", "high")]
    width, least = three[2] - three[1], 2 if max(map(abs, three)) <= 1 else 0
    places = min(max(1 - math.floor(math.log10(width)), least), 4) if 0 < width < math.inf else 2
    value, low, high = (f"{round(x, places) + 0.0:{sign}.{places}f}" for x in three)  # + 0.0 avoids -0.00
    return f"{value} ({low} to {high})"


def gap(verdict: dict) -> str:
    """The difference of a verdict, with its interval."""
    return span({"value": verdict["difference"], **verdict}, "+")


def chance(p: float) -> str:
    """A p value as text."""
    return "<0.001" if p < 0.001 else sig(p) if p < 0.995 else "1"


def seconds(x: float) -> str:
    """A duration as text, in s, min or h."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if x >= 2 * size:
            return f"{sig(x / size)} {unit}"
    return f"{sig(x)} s"


def amount(x: float, unit: str = "dollars") -> str:
    """An amount in dollars as text; a duration if `unit` is not dollars."""
    if unit != "dollars":
        return seconds(x)
    return f"${x:,.2f}" if x >= 1 or x == 0 else f"${sig(x)}"


def named(names) -> str:
    """`a, b and c`."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---------------------------------------------------------------------------------------------- what things are

TUNING = {  # tuning.method -> what it trains
    "full": "all weights of the model",
    "bitfit": "only the biases of the model",
    "lora": "small matrices beside the model's weights, which stay as they are",
    "dora": "small matrices and a scale beside the model's weights, which stay as they are",
    "ia3": "a factor for some of the model's inner values; its weights stay as they are",
    "prompt": "a few made-up words before each question; the model stays as it is",
    "ptuning": "a few made-up words before each question; the model stays as it is",
    "prefix": "a made-up beginning that every layer sees; the model stays as it is",
    "head": "only the last layer, which turns the model's internal state into an answer",
    "last_layers": "only the last layers of the model",
    "norms": "only the scales of the model's normalisation layers",
    "pattern": "only some of the model's weights, by their names",
}


def contender_is(contender: Contender, config) -> str:
    """A description of a contender for a reader who knows no name of a method."""
    method = contender.config(config).tuning.method if contender.kind == "tuned" else ""
    return sentences().contender(contender, TUNING.get(method, f"by the method {method}"))


# ---------------------------------------------------------------------------------------------- the answer

RISKS = {  # check of ftjax.verdict.findings -> what it means; the most serious first
    "leaked rows": "The score may be too high",
    "failed runs": "Something failed",
    "template mismatch": "The prompts look different from those in training",
    "lost refusals": "It refuses other requests than before",
    "forgetting": "It has forgotten part of what it knew, and predicts general text less well",
    "overfitting": "It memorises its training rows",
    "prompts shortened": "Some prompts were too long",
    "too few rows": "There are too few rows",
}


FAR = 100  # if more rows than this multiple are needed, no number is given


def sentences():
    """The macros of `assets/pages/sentences.jinja`."""
    return macros(
        "sentences.jinja", sig=sig, span=span, gap=gap, seconds=seconds, amount=amount, named=named, rounded=rounded,
        risks=RISKS, far=FAR, infinite=math.inf,
    )  # fmt: skip


def decide(data: dict) -> dict[str, str]:
    """Decide whether to fine-tune, from a verdict as plain data.

    Returns:
        {"fine_tune": YES, NO or OPEN, "why", "cost", "risk"}, the last three with a sentence or two each.
    """
    entries, say = {entry["name"]: entry for entry in data["contenders"]}, sentences()
    sign, other = 1 if data["higher"] else -1, entries.get(data["untrained"])
    trained = [entry for entry in entries.values() if entry["against_untrained"]]
    order = ("better", "cannot tell", "worse")
    best = max(
        trained,
        key=lambda e: (-order.index(e["against_untrained"]["says"]), sign * e["figures"][data["metric"]]["value"]),
        default=None,
    )
    fine_tune, why = OPEN, nobody(data) or ("" if best else say.untried(data))
    if not why:
        says = best["against_untrained"]["says"]
        leaked = says == "better" and _leaked(best, data)
        fine_tune = OPEN if leaked else {"better": YES, "worse": NO}.get(says, OPEN)
        why = say.why(best, other, data, leaked)
    alike = best and other and other["kind"] != MAJORITY and other["price"]["unit"] == best["price"]["unit"]
    cost = say.cost(best, other if alike else None, paid(best) if fine_tune == YES else "", data)
    mine = [f for f in data["findings"] if not best or best["name"] in f["contender"] or f["check"] == "failed runs"]
    mine.sort(key=lambda f: list(RISKS).index(f["check"]) if f["check"] in RISKS else len(RISKS))
    return {"fine_tune": fine_tune, "why": why, "cost": cost, "risk": say.risk(best, mine, data)}


def nobody(data: dict) -> str:
    """A paragraph for a comparison in which every contender has the worst score on every row; empty for any other."""
    worst, figures = data["worst"], [entry["figures"][data["metric"]] for entry in data["contenders"]]
    if worst is None or any(figure["value"] != worst for figure in figures):
        return ""
    gain, value = max((abs(figure[end] - worst), figure[end]) for figure in figures for end in ("low", "high"))
    return sentences().nothing_right(data, value, gain)


def _leaked(best: dict, data: dict) -> bool:
    """Whether held-out rows that are also training rows can explain all of the gain that is beyond chance."""
    found = [f for f in data["findings"] if f["check"] == "leaked rows" and best["name"] in f["contender"]]
    v = best["against_untrained"]
    sure = v["low"] if data["higher"] else -v["high"]
    return any(not f["share"] or data["reach"] is None or f["share"] * data["reach"] >= sure for f in found)


def paid(entry: dict) -> str:
    """When a contender, its training included, becomes cheaper than each prompt; empty if it never does.

    The text continues a sentence: `than few-shot after 920 requests`.
    """
    out = []
    for name, requests in entry["pays_after"].items():
        load = entry.get("pays_from", {}).get(name, 0)
        total = f" after {rounded(requests):,} requests" if math.isfinite(requests) else ""
        monthly = f" with at least {rounded(load):,} requests a month" if load and math.isfinite(load) else ""
        out += [f"than {name}{total}{monthly}"] if total or monthly else []
    return named(out) if out else ""
