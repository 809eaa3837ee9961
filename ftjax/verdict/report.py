"""The verdict as a page of HTML that needs no other file, as Markdown, and as a table for the terminal."""

from __future__ import annotations

import base64
import difflib
import math
import re
from pathlib import Path

import numpy as np

from ftjax.evaluation.tables import grid
from ftjax.pages import page
from ftjax.verdict.decision import NO, YES, amount, chance, gap, paid, seconds, sentences, short, sig, span

COPIED = 8  # words of an n-gram that counts as copied
SCORES = "scores.png"  # the picture next to the decision

# ---------------------------------------------------------------------------------------------- words


def question(data: dict) -> str:
    """The question of the comparison, in a sentence."""
    return sentences().question(data, [e["name"] for e in data["contenders"] if e["name"] != data["base"]])


def answer(data: dict) -> str:
    """The decision in a paragraph, see ftjax.verdict.decision."""
    decision = data["decision"]
    return f"Fine-tune: {decision['fine_tune']}. {decision['why']} {decision['cost']} {decision['risk']}"


def detail(data: dict) -> str:
    """Further results, in a paragraph."""
    sign, figures = 1 if data["higher"] else -1, {e["name"]: e["figures"][data["metric"]] for e in data["contenders"]}
    value = {name: sign * figure["value"] for name, figure in figures.items()}
    best = [entry for entry in data["contenders"] if value[entry["name"]] == max(value.values())]
    groups = {"better": [], "worse": [], "cannot tell": []}
    for entry in data["contenders"]:
        if entry["verdict"]:
            groups[entry["verdict"]["says"]].append(entry["name"])
    curves = [one for one in data.get("curves", ()) if one["law"]]
    return sentences().detail(data, best, groups, max(curves, key=lambda one: value[one["name"]], default=None))


# ---------------------------------------------------------------------------------------------- tables

Table = tuple[list[str], list[list[str]]]  # (titles, rows of cells as text)


def _table(rows: list[dict[str, str]]) -> Table:
    """The table of rows {title: cell}, all with the same titles, without columns of which all cells are empty."""
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    return titles, [[row[title] for title in titles] for row in rows]


def scores(data: dict) -> Table:
    """The table of figures and verdicts, with one row per contender."""
    metric, rows = data["metric"], []
    for entry in data["contenders"]:
        v, wins, figures = entry["verdict"], entry["wins"], {n: span(x) for n, x in entry["figures"].items()}
        rows.append({
            "contender": entry["name"], "seeds": str(entry["seeds"]),
            f"{metric} {'↑' if data['higher'] else '↓'}": figures.pop(metric),
            f"beside {data['base']}": gap(v) if v else "", "p": chance(v["p"]) if v else "",
            "verdict": v["text"] if v else "the others are compared with it",
            "rows won, tied": f"{wins['win']['value']:.0%}, {wins['tie']['value']:.0%}" if v else "",
        } | figures)  # fmt: skip
    return _table(rows)


def costs(data: dict) -> Table:
    """The table of costs, with one row per contender."""
    rows = []
    for entry in data["contenders"]:
        c, p = entry["cost"], entry["price"]
        dollars, unit = p["unit"] == "dollars", p["unit"]
        rows.append({
            "contender": entry["name"],
            "trained parameters": f"{c['trained']:,}" if c["trained"] else "",
            "training": _if(c["train_seconds"], seconds),
            "with validation and compiling": _if(c["run_seconds"], seconds),
            "training costs": _if(dollars and c["trained"] and p["training"], amount),
            "training FLOPs": _if(c["train_flops"], short),
            "training energy": _if(c["train_joules"], _joules),
            "prompt tokens": _if(c["prompt_tokens"], sig),
            "ms a request": _if(1000 * c["request_seconds"], sig),
            "FLOPs a request": _if(c["request_flops"], short),
            "energy a request": _if(c["request_joules"], _joules),
            "1,000 requests cost": _if(dollars and 1000 * p["request"], amount, unit),
            "fixed a month": _if(p["standing"], amount, unit),
            f"a month of {data['requests']:,} requests": _if(p["month"], amount, unit),
            "cheaper, training included": paid(entry),
        })  # fmt: skip
    return _table(rows)


def _if(x: float | None, how, *args) -> str:
    """The text of a cell; empty if the number is missing, 0 or not finite."""
    return how(float(x), *args) if x and math.isfinite(x) else ""


def _joules(x: float) -> str:
    return f"{short(x)}J"


def changes(data: dict) -> Table:
    """The table of other changes beside the task, with one row per contender."""
    rows = []
    for entry in data["contenders"]:
        loss, kl = entry["forgetting"], entry["divergence"]
        copied, unsupported = ("" if entry[key] is None else f"{entry[key]:.1%}" for key in ("copied", "unsupported"))
        rows.append({
            "contender": entry["name"],
            "loss on general text": f"{sum(loss) / len(loss):.2f}" if loss else "",
            "KL from the base": "" if kl is None else sig(kl),
            "copied from training": copied,
            "unsupported by its passages": unsupported,
        } | {f"refused, {name}": f"{share:.0%}" for name, share in entry["refused"].items()})  # fmt: skip
    return _table(rows)


def learning(data: dict) -> Table:
    """The table of means over runs and their standard deviations, with one row per amount of rows."""
    by = {c["name"]: {point["amount"]: point["values"] for point in c["points"]} for c in data["curves"]}
    every = sorted({n for points in by.values() for n in points})
    lines = [[f"{n:,}", *(mean_text(points.get(n, []), 3) for points in by.values())] for n in every]
    return ["rows", *by], lines


def mean_text(values: list[float], digits: int) -> str:
    """The mean of some runs' values with so many digits, and their standard deviation; empty without a value."""
    if not values:
        return ""
    return f"{np.mean(values):.{digits}g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def laws(data: dict) -> list[str]:
    """A text for each learning curve: its law, and whether the prediction from the smaller amounts was right."""
    return [sentences().law(one) for one in data["curves"]]


REASONS = ("why", "cost", "risk")  # of a decision


def table(data: dict) -> str:
    """The report for the terminal."""
    titles, lines = scores(data)
    table = grid([(title, 0) for title in titles], lines)
    return table + page("terminal.jinja", data=data, laws=laws(data), parts=REASONS).rstrip("\n")


# ---------------------------------------------------------------------------------------------- differences


def words(text: str, other: str) -> list[tuple[str, bool]]:
    """Runs of words of a text, each with whether the other text lacks it at that place."""
    own, theirs = text.split(), other.split()
    codes = difflib.SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes()
    return [(" ".join(own[b1:b2]), code != "equal") for code, _, _, b1, b2 in codes if b2 > b1]


# ---------------------------------------------------------------------------------------------- pages


def markdown(data: dict) -> str:
    """The report as Markdown. Its pictures are files next to it."""
    return re.sub(r"\n{3,}", "\n\n", page("verdict.md", **_values(data)))


def html(data: dict, folder: Path) -> str:
    """The report as one HTML page that loads nothing else. folder: the folder of the pictures, which are embedded in
    the page."""
    findings: dict[str, list[dict]] = {}
    for finding in data["findings"]:
        findings.setdefault(finding["check"], []).append(finding)
    return page(
        "verdict.html",
        kind={YES: "better", NO: "worse"}.get(data["decision"]["fine_tune"], "open"),
        verdicts={entry["name"]: (entry["verdict"] or {}).get("says", "") for entry in data["contenders"]},
        means={entry["name"]: entry["is"] for entry in data["contenders"]},
        findings=findings,
        base64=lambda file: base64.b64encode((folder / file).read_bytes()).decode(),
        **_values(data),
    )


def _values(data: dict) -> dict:
    """Values for both pages. A table or list that is empty or None gets no section."""
    beside, pictures = changes(data), data["pictures"].items()
    by_words = any(e["unsupported"] is not None or "unsupported" in e["figures"] for e in data["contenders"])
    notes = page("notes.jinja", data=data, beside=len(beside[0]) > 1, by_words=by_words, copied=COPIED)
    return {
        "data": data,
        "parts": REASONS,
        "lead": [(caption, file) for caption, file in pictures if file == SCORES],
        "pictures": [(caption, file) for caption, file in pictures if file != SCORES],
        "scores": scores(data),
        "costs": costs(data),
        "changes": beside if len(beside[0]) > 1 else None,
        "notes": notes.splitlines(),
        "learning": learning(data) if data["curves"] else None,
        "laws": laws(data),
        "law": sentences().about_laws(),
        "sig": sig,
        "words": words,
    }
