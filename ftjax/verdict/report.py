"""The verdict for a reader: one page of HTML that needs no other file, Markdown, and a table for the terminal."""

from __future__ import annotations

import base64
import difflib
import math
from html import escape
from pathlib import Path

from ftjax.data.template import Rendered
from ftjax.data.template import question as question_of
from ftjax.evaluation.tables import grid
from ftjax.verdict.decision import NO, YES, amount, chance, gap, named, paid, seconds, short, sig, span

COPIED = 8  # words of a run that counts as copied
SCORES = "scores.png"  # the picture that stands with the decision

# ---------------------------------------------------------------------------------------------- words


def question(data: dict) -> str:
    """What was asked, in a sentence."""
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
    """What else came out, in a paragraph."""
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


def shown(rendered: Rendered) -> str:
    """What a row asks, as text."""
    return question_of(rendered)


def spread(rows: list, n: int) -> list:
    """n of them, evenly apart."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


# ---------------------------------------------------------------------------------------------- tables

Table = tuple[list[str], list[list[str]]]  # titles, and cells as text


def scores(data: dict) -> Table:
    """Figures and verdicts, a contender a row."""
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
    """What each contender costs."""
    titles = ["contender", "trained parameters", "training", "with validation and compiling", "training costs"]
    titles += ["training FLOPs", "training energy", "prompt tokens", "ms a request", "FLOPs a request"]
    titles += ["energy a request", "1,000 requests cost", "fixed a month", f"a month of {data['requests']:,} requests"]
    titles += ["training has paid"]
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
    """A cell; empty where there is no number, or none but 0."""
    return how(float(x), *args) if x and math.isfinite(x) else ""


def _joules(x: float) -> str:
    return f"{short(x)}J"


def changes(data: dict) -> Table:
    """What else each contender does, beside the task."""
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
    """Means over runs and their standard deviations, an amount of rows a row."""
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
    """What the law of each learning curve says, and whether it held."""
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
    """Without columns of empty cells."""
    kept = [k for k in range(len(titles)) if any(line[k] for line in lines)]
    return [titles[k] for k in kept], [[line[k] for k in kept] for line in lines]


PARTS = ("why", "cost", "risk")  # of a decision


def meanings(data: dict) -> list[str]:
    """What each contender and each metric is."""
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


ENERGY = "Energy is that of the machine's processors, with all that they did beside."
NO_ENERGY = "Energy is not readable here: /sys/class/powercap has no counters of it that this process may read."
BESIDE = (
    "Losses and KL are in nats a token; KL is that of a model from its base on its own answers. Copied: of all runs of "
    f"{COPIED} words in its answers, those that stand in the training answers."
)
UNSUPPORTED = (
    "Unsupported: sentences of an answer with less than half of their content in the passages, or with a number that "
    "these do not have; by words alone, which takes a paraphrase for unsupported and sees no negation."
)


def notes(data: dict) -> list[str]:
    """How to read the figures."""
    by_words = any(entry["unsupported"] is not None for entry in data["contenders"])
    by_words |= any("unsupported" in entry["figures"] for entry in data["contenders"])
    return [
        f"In brackets is where the true value lies with a confidence of {data['level']:.0%}, were other rows of the "
        "kind asked and, where there are several seeds, were it trained again. p: how often chance alone would give "
        "such a difference, corrected for all contenders (Holm). Figures are means over rows, also of metrics that "
        f"are usually given for a whole set. Rows won: with a better {data['metric']} than {data['base']}.",
        "Training is the time of the steps alone. FLOPs are by formula and the rows' mean length; seconds are measured "
        f"on {data['device']}, a request's in a full batch. {ENERGY if data['energy'] else NO_ENERGY}",
        *([BESIDE] if len(changes(data)[0]) > 1 else []),
        *([UNSUPPORTED] if by_words else []),
        "Words that are not in the base's answer are marked.",
    ]


# ---------------------------------------------------------------------------------------------- differences


def words(text: str, other: str) -> list[tuple[str, bool]]:
    """Runs of words of a text, and whether they are missing in the other at that place."""
    own, theirs = text.split(), other.split()
    codes = difflib.SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes()
    return [(" ".join(own[b1:b2]), code != "equal") for code, _, _, b1, b2 in codes if b2 > b1]


# ---------------------------------------------------------------------------------------------- Markdown


def markdown(data: dict) -> str:
    """The report as Markdown, its pictures in files beside it."""
    said, pictures = data["decision"], dict(data["pictures"])
    out = [f"# Fine-tune: {said['fine_tune']}", *(f"**{part.capitalize()}.** {_md(said[part])}" for part in PARTS)]
    out += [f"![{caption}]({file})" for caption, file in pictures.items() if file == SCORES]
    out += ["## Scores", _md(data["question"]), _md_table(*scores(data)), _md(data["detail"])]
    out += ["\n".join(f"- {_md(text)}" for text in meanings(data)), "## Cost", _md_table(*costs(data))]
    out += ["## Beside the task", _md_table(*changes(data))] if len(changes(data)[0]) > 1 else []
    out += ["\n".join(f"- {note}" for note in notes(data))]
    if data["curves"]:
        said = "\n".join(f"- {_md(text)}" for text in (*laws(data), LAW))
        out += ["## Learning curves", _md_table(*learning(data)), said]
    out += ["## Findings"]
    rows = [[f["check"], f["contender"], f["seen"], f["advice"]] for f in data["findings"]]
    out += [
        _md_table(["check", "contender", "seen", "to do"], rows) if rows else "Nothing was found that needs attention."
    ]
    rest = {caption: file for caption, file in pictures.items() if file != SCORES}
    out += ["## Pictures"] if rest else []
    out += [f"![{caption}]({file})" for caption, file in rest.items()]
    out += ["## Samples"] if data["samples"] else []
    for sample in data["samples"]:
        right = " / ".join(sample["references"][:3])
        base = sample["answers"][data["base"]]["text"]
        out.append(f"> {_md(sample['prompt'])}\n>\n> right: {_md(right)}")
        lines = [[name, sig(said["score"]), said["text"] if name == data["base"] else _bold(said["text"], base)]
                 for name, said in sample["answers"].items()]  # fmt: skip
        out.append(_md_table(["contender", data["metric"], "answer"], lines, raw=2))
    out += ["## Again", f"```text\n{data['repeat']}\n```", f"ftjax {data['ftjax']}, {data['device']}."]
    return "\n\n".join(out) + "\n"


def _bold(text: str, base: str) -> str:
    return " ".join(f"**{_md(run)}**" if new else _md(run) for run, new in words(text, base))


def _md(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _md_table(titles: list[str], lines: list[list[str]], raw: int | None = None) -> str:
    """raw: a column whose cells are Markdown."""
    rows = [[cell if k == raw else _md(cell) for k, cell in enumerate(line)] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(map(_md, titles)), ["---"] * len(titles), *rows])


# ---------------------------------------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --page: #fbfbfa; --card: #fff;
  --better: #1d7a3a; --worse: #b3261e; --mark: #fff1b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9ee; --soft: #9aa6b4; --line: #343c47; --page: #14181d;
  --card: #1c2128; --better: #6fcf8b; --worse: #ff8a80; --mark: #5a4a00; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 1.5rem auto;
  max-width: 76rem; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
.question { color: var(--soft); } .answer { font-size: 1.1rem; margin: 0 0 .8rem; } h1 { font-size: 1.8rem; }
.top { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
.better { color: var(--better); } .worse { color: var(--worse); } tr.better, tr.worse { color: inherit; }
td small { display: block; font-weight: 400; max-width: 16rem; }
.soft { color: var(--soft); font-size: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: .7rem 0; }
.finding { border-left: 4px solid var(--worse); } .finding h3 { font-size: 1rem; margin: 0; }
ul { margin: .4rem 0; padding-left: 1.2rem; } .finding p { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td:first-child { font-weight: 600; }
.better td:nth-child(6) { color: var(--better); } .worse td:nth-child(6) { color: var(--worse); }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 .1em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; height: auto; border-radius: 6px; background: #fff; }
figcaption { color: var(--soft); font-size: .9rem; } pre { white-space: pre-wrap; margin: 0; font: .95rem/1.5 inherit; }
code { font: .9rem ui-monospace, monospace; }
@media (max-width: 46rem) { thead { display: none; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td { display: grid; grid-template-columns: 8rem minmax(0, 1fr); gap: .6rem; border: 0; padding: .1rem 0; }
  td > span { overflow-wrap: anywhere; }
  td::before { content: attr(data-title); color: var(--soft); font-weight: 400; } td:empty { display: none; } }
"""


def html(data: dict, folder: Path) -> str:
    """One page that asks for nothing from elsewhere; folder: where the pictures lie, which go into the page."""
    verdicts = {entry["name"]: (entry["verdict"] or {}).get("says", "") for entry in data["contenders"]}
    means = {entry["name"]: entry["is"] for entry in data["contenders"]}
    said, pictures = data["decision"], data["pictures"]
    kind = {YES: "better", NO: "worse"}.get(said["fine_tune"], "open")
    body = [f'<h1>Fine-tune: <span class="{kind}">{escape(said["fine_tune"])}</span></h1>', '<div class="top"><div>']
    body += [f'<p class="answer"><b>{part.capitalize()}.</b> {escape(said[part])}</p>' for part in PARTS]
    body += ["</div>", *(_figure(c, folder / file) for c, file in pictures.items() if file == SCORES), "</div>"]
    body += ["<h2>Scores</h2>", f'<p class="question">{escape(data["question"])}</p>']
    body += [_html_table(*scores(data), verdicts, means), f"<p>{escape(data['detail'])}</p>"]
    body += [f'<p class="soft">{escape(f"{name}: {text}.")}</p>' for name, text in data["metrics"].items()]
    body += ["<h2>Cost</h2>", _html_table(*costs(data))]
    body += ["<h2>Beside the task</h2>", _html_table(*changes(data))] if len(changes(data)[0]) > 1 else []
    body += [f'<p class="soft">{escape(note)}</p>' for note in notes(data)]
    if data["curves"]:
        body += ["<h2>Learning curves</h2>", _html_table(*learning(data)), *(f"<p>{escape(t)}</p>" for t in laws(data))]
        body += [f'<p class="soft">{escape(LAW)}</p>']
    body += ["<h2>Findings</h2>", _findings(data["findings"]) or NOTHING]
    figures = "".join(_figure(caption, folder / file) for caption, file in pictures.items() if file != SCORES)
    if figures:
        body += ["<h2>Pictures</h2>", f'<div class="plots">{figures}</div>']
    if data["samples"]:
        body += ["<h2>Samples</h2>", *(_sample(sample, data) for sample in data["samples"])]
    body += ["<h2>Again</h2>", f"<p><code>{escape(data['repeat'])}</code></p>"]
    body += [f'<p class="soft">ftjax {escape(data["ftjax"])}, {escape(data["device"])}</p>']
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Verdict</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


NOTHING = "<p>Nothing was found that needs attention.</p>"


def _html_table(
    titles: list[str], lines: list[list[str]], classes: dict | None = None, means: dict | None = None
) -> str:
    """classes: of rows, by their first cell; means: what stands below that cell."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    rows = []
    for line in lines:
        kind = (classes or {}).get(line[0], "").replace(" ", "-")
        below = f'<small class="soft">{escape(means[line[0]])}</small>' if means else ""
        cells = _cell(titles[0], escape(line[0]) + below)
        cells += "".join(_cell(title, escape(cell)) for title, cell in zip(titles[1:], line[1:]))
        rows.append(f'<tr class="{kind}">{cells}</tr>')
    return f'<div class="wide card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(title: str, content: str) -> str:
    """On a narrow screen its title stands beside it; content: HTML."""
    return f'<td data-title="{escape(title)}">' + (f"<span>{content}</span>" if content else "") + "</td>"


def _findings(found: list[dict]) -> str:
    """A card for each check, with all contenders that it has something to say of."""
    out = []
    for check in dict.fromkeys(finding["check"] for finding in found):
        mine = [finding for finding in found if finding["check"] == check]
        seen = "".join(f"<li><b>{escape(f['contender'])}</b>: {escape(f['seen'])}</li>" for f in mine)
        advice = "; ".join(dict.fromkeys(f["advice"] for f in mine))
        out.append(
            f'<section class="card finding"><h3>{escape(check)}</h3><ul>{seen}</ul><p>To do: {escape(advice)}</p>'
            "</section>"
        )
    return "".join(out)


def _figure(caption: str, file: Path) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _sample(sample: dict, data: dict) -> str:
    base = sample["answers"][data["base"]]["text"]
    rows = []
    for name, said in sample["answers"].items():
        text = escape(said["text"])
        if name != data["base"]:
            runs = words(said["text"], base)
            text = " ".join(f"<mark>{escape(run)}</mark>" if new else escape(run) for run, new in runs)
        titles = ("contender", data["metric"], "answer")
        cells = zip(titles, (escape(name), sig(said["score"]), text))
        rows.append("<tr>" + "".join(_cell(title, cell) for title, cell in cells) + "</tr>")
    right = escape(" / ".join(sample["references"][:3]))
    return (
        f'<section class="card"><pre>{escape(sample["prompt"])}</pre><p class="soft">right: {right}</p>'
        f"<table><tbody>{''.join(rows)}</tbody></table></section>"
    )
