"""The verdict as a page of HTML that needs no other file, as Markdown, and as a table for the terminal."""

from __future__ import annotations

import base64
import difflib
import math
import re
from pathlib import Path

from ftjax.evaluation.tables import grid
from ftjax.pages import page
from ftjax.verdict.decision import NO, YES, amount, chance, gap, named, paid, seconds, short, sig, span

COPIED = 8  # words of an n-gram that counts as copied
SCORES = "scores.png"  # the picture next to the decision

# ---------------------------------------------------------------------------------------------- words


def question(data: dict) -> str:
    """The question of the comparison, in a sentence."""
    others = [entry["name"] for entry in data["contenders"] if entry["name"] != data["base"]]
    asked = f"which of {named(others)} has" if len(others) > 1 else f"does {named(others)} have"
    return (
        f"On {data['rows']:,} held-out rows of {data['data']}, {asked} a better {data['metric']} than {data['base']}, "
        f"and at what cost? The model is {data['model']}."
    )


def answer(data: dict) -> str:
    """The decision in a paragraph, see ftjax.verdict.decision."""
    said = data["decision"]
    return f"Fine-tune: {said['fine_tune']}. {said['why']} {said['cost']} {said['risk']}"


def detail(data: dict) -> str:
    """Further results, in a paragraph."""
    metric, entries = data["metric"], {entry["name"]: entry for entry in data["contenders"]}
    sign = 1 if data["higher"] else -1
    highest = max(sign * entry["figures"][metric]["value"] for entry in entries.values())
    best = [name for name, entry in entries.items() if sign * entry["figures"][metric]["value"] == highest]
    if len(best) == 1:
        out = [f"{best[0]} scores best: {metric} {span(entries[best[0]]['figures'][metric])}."]
    else:
        out = [f"{named(best)} score the same: {metric} {span(entries[best[0]]['figures'][metric])}."]
    groups = {"better": [], "worse": [], "cannot tell": []}
    for name, entry in entries.items():
        if entry["verdict"]:
            groups[entry["verdict"]["says"]].append(name)
    told = [f"{says}: {named(names)}" for says, names in groups.items() if names]
    asked = f", corrected for {len(entries) - 1} comparisons" if len(entries) > 2 else ""
    out.append(f"Beside {data['base']}{asked}: {'; '.join(told)}.")
    curves = {one["name"]: one for one in data.get("curves", ()) if one["law"]}
    if curves:
        name = max(curves, key=lambda name: sign * entries[name]["figures"][metric]["value"])
        out.append(f"With more rows for {name}: {curves[name]['says']}.")
    return " ".join(out)


def spread(rows: list, n: int) -> list:
    """n rows at even distances, or all rows if there are fewer."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


# ---------------------------------------------------------------------------------------------- tables

Table = tuple[list[str], list[list[str]]]  # (titles, rows of cells as text)


def scores(data: dict) -> Table:
    """The table of figures and verdicts, with one row per contender."""
    metric = data["metric"]
    others = [name for name in data["contenders"][0]["figures"] if name != metric]
    titles = ["contender", "seeds", f"{metric} {'↑' if data['higher'] else '↓'}", f"beside {data['base']}", "p"]
    titles += ["verdict", "rows won, tied", *others]
    lines = []
    for entry in data["contenders"]:
        v, wins = entry["verdict"], entry["wins"]
        beside = ["", "", "the others are compared with it", ""]
        if v:
            beside = [gap(v), chance(v["p"]), v["text"], f"{wins['win']['value']:.0%}, {wins['tie']['value']:.0%}"]
        figures = [span(entry["figures"][name]) for name in (metric, *others)]
        lines.append([entry["name"], str(entry["seeds"]), figures[0], *beside, *figures[1:]])
    return titles, lines


def costs(data: dict) -> Table:
    """The table of costs, with one row per contender."""
    titles = ["contender", "trained parameters", "training", "with validation and compiling", "training costs"]
    titles += ["training FLOPs", "training energy", "prompt tokens", "ms a request", "FLOPs a request"]
    titles += ["energy a request", "1,000 requests cost", "fixed a month", f"a month of {data['requests']:,} requests"]
    titles += ["cheaper, training included"]
    lines = []
    for entry in data["contenders"]:
        c, p = entry["cost"], entry["price"]
        dollars, unit = p["unit"] == "dollars", p["unit"]
        line = [entry["name"], f"{c['trained']:,}" if c["trained"] else ""]
        line += [_if(c["train_seconds"], seconds), _if(c["run_seconds"], seconds)]
        line += [_if(dollars and c["trained"] and p["training"], amount)]
        line += [_if(c["train_flops"], short), _if(c["train_joules"], _joules)]
        line += [_if(c["prompt_tokens"], sig), _if(1000 * c["request_seconds"], sig), _if(c["request_flops"], short)]
        line += [_if(c["request_joules"], _joules)]
        line += [_if(dollars and 1000 * p["request"], amount, unit)]
        line += [_if(p["standing"], amount, unit), _if(p["month"], amount, unit)]
        lines.append([*line, paid(entry)])
    return _filled(titles, lines)


def _if(x: float | None, how, *args) -> str:
    """The text of a cell; empty if the number is missing, 0 or not finite."""
    return how(float(x), *args) if x and math.isfinite(x) else ""


def _joules(x: float) -> str:
    return f"{short(x)}J"


def changes(data: dict) -> Table:
    """The table of other changes beside the task, with one row per contender."""
    refused = list(data["contenders"][0]["refused"])
    titles = ["contender", "loss on general text", "KL from the base", "copied from training"]
    titles += ["unsupported by its passages"]
    lines = []
    for entry in data["contenders"]:
        loss, kl, copied = entry["forgetting"], entry["divergence"], entry["copied"]
        line = [entry["name"], f"{sum(loss) / len(loss):.2f}" if loss else "", "" if kl is None else sig(kl)]
        line += ["" if share is None else f"{share:.1%}" for share in (copied, entry["unsupported"])]
        lines.append([*line, *(f"{entry['refused'][name]:.0%}" for name in refused if name in entry["refused"])])
    return _filled([*titles, *(f"refused, {name}" for name in refused)], lines)


def learning(data: dict) -> Table:
    """The table of means over runs and their standard deviations, with one row per amount of rows."""
    titles = ["rows", *(one["name"] for one in data["curves"])]
    by = [{point["amount"]: point["values"] for point in one["points"]} for one in data["curves"]]
    every = sorted({n for points in by for n in points})
    return titles, [[f"{n:,}", *(_runs(points.get(n, [])) for points in by)] for n in every]


def _runs(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.2g}"


def laws(data: dict) -> list[str]:
    """A text for each learning curve: its law, and whether the prediction from the smaller amounts was right."""
    out = []
    for one in data["curves"]:
        text = f"{one['name']}: {one['says']}."
        if check := one["check"]:
            text += (
                f" Of {check['amount']:,} rows the law of the smaller amounts says {span(check)}; measured is "
                f"{check['measured']:.3g}, which lies {'within' if check['inside'] else 'OUTSIDE'}."
            )
        text += "".join(f" With {p['amount']:,} rows: {span(p)}." for p in one["predicted"])
        out.append(text + "".join(f" Failed: {failed}." for failed in one["failed"]))
    return out


LAW = (
    "Rows are drawn anew for each seed; the law is error(n) = a + b (n + n0)^-c. Intervals are of the mean that as "
    "many runs would reach: beside a measured one, and of twice the rows, on these very held-out rows, else on others "
    "of the kind."
)


def _filled(titles: list[str], lines: list[list[str]]) -> Table:
    """The table without columns of which all cells are empty."""
    kept = [k for k in range(len(titles)) if any(line[k] for line in lines)]
    return [titles[k] for k in kept], [[line[k] for k in kept] for line in lines]


PARTS = ("why", "cost", "risk")  # of a decision


def meanings(data: dict) -> list[str]:
    """A description of each contender and each metric."""
    out = [f"{entry['name']}: {entry['is']}." for entry in data["contenders"]]
    return out + [f"{name}: {text}." for name, text in data["metrics"].items()]


def table(data: dict) -> str:
    """The report for the terminal."""
    titles, lines = scores(data)
    out = [grid([(title, 0) for title in titles], lines) + data["detail"], *meanings(data)]
    out += laws(data)
    out += [f"{f['check']}: {f['contender']}: {f['seen']}. To do: {f['advice']}" for f in data["findings"]]
    said = data["decision"]
    out += ["", f"Fine-tune: {said['fine_tune']}", *(f"{part.capitalize()}: {said[part]}" for part in PARTS)]
    return "\n".join(out)


def notes(data: dict) -> list[str]:
    """Notes on how to read the figures."""
    by_words = any(entry["unsupported"] is not None for entry in data["contenders"])
    by_words |= any("unsupported" in entry["figures"] for entry in data["contenders"])
    beside = len(changes(data)[0]) > 1
    return page("notes.jinja", data=data, beside=beside, by_words=by_words, copied=COPIED).splitlines()


# ---------------------------------------------------------------------------------------------- differences


def words(text: str, other: str) -> list[tuple[str, bool]]:
    """Runs of words of a text, each with whether the other text lacks it at that place."""
    own, theirs = text.split(), other.split()
    codes = difflib.SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes()
    return [(" ".join(own[b1:b2]), code != "equal") for code, _, _, b1, b2 in codes if b2 > b1]


# ---------------------------------------------------------------------------------------------- pages


def markdown(data: dict) -> str:
    """The report as Markdown. Its pictures are files next to it."""
    return re.sub(r"\n{3,}", "\n\n", page("verdict.md", meanings=meanings(data), **_values(data)))


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
    return {
        "data": data,
        "parts": PARTS,
        "lead": [(caption, file) for caption, file in pictures if file == SCORES],
        "pictures": [(caption, file) for caption, file in pictures if file != SCORES],
        "scores": scores(data),
        "costs": costs(data),
        "changes": beside if len(beside[0]) > 1 else None,
        "notes": notes(data),
        "learning": learning(data) if data["curves"] else None,
        "laws": laws(data),
        "law": LAW,
        "sig": sig,
        "words": words,
    }
