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

COPIED = 8  # words of a run that counts as copied

# ---------------------------------------------------------------------------------------------- words


def question(data: dict) -> str:
    """What was asked, in a sentence."""
    others = [entry["name"] for entry in data["contenders"] if entry["name"] != data["base"]]
    return (
        f"On {data['rows']:,} held-out rows of {data['data']}, which of {_list(others)} has a better {data['metric']} "
        f"than {data['base']}, and at what cost? The model is {data['model']}."
    )


def answer(data: dict) -> str:
    """What came out, in a paragraph."""
    metric, entries = data["metric"], {entry["name"]: entry for entry in data["contenders"]}
    sign = 1 if data["higher"] else -1
    best = max(entries.values(), key=lambda entry: sign * entry["figures"][metric]["value"])
    out = [f"{best['name']} scores best: {metric} {_span(best['figures'][metric])}"]
    if best["name"] != data["base"]:
        out[0] += f", against {_span(entries[data['base']]['figures'][metric])} of {data['base']}"
    out[0] += "."
    groups = {"better": [], "worse": [], "cannot tell": []}
    for name, entry in entries.items():
        if entry["verdict"]:
            groups[entry["verdict"]["says"]].append(name)
    told = [f"{says}: {_list(names)}" for says, names in groups.items() if names]
    asked = f", corrected for {len(entries) - 1} comparisons" if len(entries) > 2 else ""
    out.append(f"Beside {data['base']}{asked}: {'; '.join(told)}.")
    trained = [entry for entry in entries.values() if entry["against_untrained"]]
    if trained:
        out.append(_worth_it(max(trained, key=lambda e: sign * e["figures"][metric]["value"]), data))
    curves = {one["name"]: one for one in data.get("curves", ()) if one["law"]}
    if curves:
        name = max(curves, key=lambda name: sign * entries[name]["figures"][metric]["value"])
        out.append(f"With more rows for {name}: {curves[name]['says']}.")
    if data["findings"]:
        names = dict.fromkeys(finding["check"] for finding in data["findings"])
        out.append(f"Before you trust this, see the findings: {_list(list(names))}.")
    return " ".join(out)


def _worth_it(best: dict, data: dict) -> str:
    """Whether the best of what was trained beats the best of what was not."""
    verdict, other = best["against_untrained"], data["untrained"]
    by = f"{verdict['difference']:+.3g} ({verdict['low']:+.3g} to {verdict['high']:+.3g}, p = {verdict['p']:.2g})"
    said = {
        "better": f"Training was worth it: {best['name']} beats {other}, the best without training, by {by}.",
        "worse": f"Training was not worth it: {best['name']} is worse than {other}, the best without training, by "
        f"{by}.",
        "cannot tell": f"Whether training was worth it is open: {best['name']} differs from {other}, the best without "
        f"training, by {by}; {verdict['text']}.",
    }[verdict["says"]]
    if verdict["says"] != "worse" and (paid := _paid(best["pays_after"])):
        said += f" Its training has paid for itself {paid}."
    return said


def _paid(after: dict[str, float]) -> str:
    """Of a contender's `pays_after`: when it has cost less than each prompt, as far as it ever does."""
    told = [f"{n:,.0f} requests by {name}" for name, n in after.items() if math.isfinite(n)]
    return f"after {_list(told)}" if told else ""


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _span(figure: dict) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


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
        beside = ["", "", "the base", ""]
        if v:
            beside = [f"{v['difference']:+.3g} ({v['low']:+.3g} to {v['high']:+.3g})", f"{v['p']:.2g}", v["text"]]
            beside += [f"{wins['win']['value']:.0%}, {wins['tie']['value']:.0%}"]
        figures = [_span(entry["figures"][name]) for name in (metric, *others)]
        lines.append([entry["name"], str(entry["seeds"]), figures[0], *beside, *figures[1:]])
    return titles, lines


def costs(data: dict) -> Table:
    """What each contender costs."""
    unit = data["contenders"][0]["price"]["unit"]
    titles = ["contender", "trained", "training", "training FLOPs", "training energy", "prompt tokens", "ms a request"]
    titles += ["FLOPs a request", "energy a request"]
    titles += [f"1,000 requests, {unit}", f"a month, {unit}", "training has paid"]
    lines = []
    for entry in data["contenders"]:
        c, p = entry["cost"], entry["price"]
        own = "" if p["unit"] == unit else f" {p['unit']}"
        line = [entry["name"], f"{c['trained']:,}" if c["trained"] else "", _number(c["train_seconds"], " s")]
        line += [_number(c["train_flops"]), _number(c["train_joules"] or 0.0, " J"), _number(c["prompt_tokens"])]
        line += [_number(1000 * c["request_seconds"]), _number(c["request_flops"])]
        line += [_number(c["request_joules"] or 0.0, " J"), _number(1000 * p["request"], own)]
        line += [_number(p["month"] or 0.0, own)]
        lines.append([*line, _paid(entry["pays_after"])])
    return _filled(titles, lines)


def changes(data: dict) -> Table:
    """What else each contender does, beside the task."""
    refused = list(data["contenders"][0]["refused"])
    titles = ["contender", "loss on general text", "KL from the base", "copied from training"]
    titles += ["unsupported by its passages"]
    lines = []
    for entry in data["contenders"]:
        loss, kl, copied = entry["forgetting"], entry["divergence"], entry["copied"]
        line = [entry["name"], f"{sum(loss) / len(loss):.3f}" if loss else "", "" if kl is None else f"{kl:.3g}"]
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
                f" Of {check['amount']:,} rows the law of the smaller amounts says {_span(check)}; measured is "
                f"{check['measured']:.3g}, which lies {'within' if check['inside'] else 'OUTSIDE'}."
            )
        text += "".join(f" With {p['amount']:,} rows: {_span(p)}." for p in one["predicted"])
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


def _number(x: float, unit: str = "") -> str:
    return f"{x:.3g}{unit}" if x and math.isfinite(x) else ""


def table(data: dict) -> str:
    """The report for the terminal."""
    titles, lines = scores(data)
    out = [grid([(title, 0) for title in titles], lines) + data["answer"]]
    out += laws(data)
    out += [f"{f['check']}: {f['contender']}: {f['seen']}. To do: {f['advice']}" for f in data["findings"]]
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
        f"Intervals are at {data['level']:.0%}, over rows, and over seeds where there are several; p values are "
        "corrected for all contenders (Holm). Figures are means over rows, also of metrics that are usually told of a "
        f"whole set. Rows won: with a better {data['metric']} than {data['base']}.",
        f"Training FLOPs are by formula and the rows' mean length; seconds are measured on {data['device']}, a "
        f"request's in a full batch. {ENERGY if data['energy'] else NO_ENERGY}",
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
    out = ["# Verdict", f"**{_md(data['question'])}**", _md(data["answer"]), "## Scores", _md_table(*scores(data))]
    out += ["## Cost", _md_table(*costs(data))]
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
    out += ["## Pictures"] if data["pictures"] else []
    out += [f"![{caption}]({file})" for caption, file in data["pictures"].items()]
    out += ["## Samples"] if data["samples"] else []
    for sample in data["samples"]:
        right = " / ".join(sample["references"][:3])
        base = sample["answers"][data["base"]]["text"]
        out.append(f"> {_md(sample['prompt'])}\n>\n> right: {_md(right)}")
        lines = [[name, f"{said['score']:.3g}", said["text"] if name == data["base"] else _bold(said["text"], base)]
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
.question { color: var(--soft); } .answer { font-size: 1.1rem; max-width: 60rem; }
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
    body = ["<h1>Verdict</h1>", f'<p class="question">{escape(data["question"])}</p>']
    body += [f'<p class="answer">{escape(data["answer"])}</p>', "<h2>Scores</h2>", _html_table(*scores(data), verdicts)]
    body += ["<h2>Cost</h2>", _html_table(*costs(data))]
    body += ["<h2>Beside the task</h2>", _html_table(*changes(data))] if len(changes(data)[0]) > 1 else []
    body += [f'<p class="soft">{escape(note)}</p>' for note in notes(data)]
    if data["curves"]:
        body += ["<h2>Learning curves</h2>", _html_table(*learning(data)), *(f"<p>{escape(t)}</p>" for t in laws(data))]
        body += [f'<p class="soft">{escape(LAW)}</p>']
    body += ["<h2>Findings</h2>", _findings(data["findings"]) or NOTHING]
    if data["pictures"]:
        figures = "".join(_figure(caption, folder / file) for caption, file in data["pictures"].items())
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


def _html_table(titles: list[str], lines: list[list[str]], classes: dict[str, str] | None = None) -> str:
    """classes: of rows, by their first cell."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    rows = []
    for line in lines:
        kind = (classes or {}).get(line[0], "").replace(" ", "-")
        cells = "".join(_cell(title, escape(cell)) for title, cell in zip(titles, line))
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
        cells = zip(titles, (escape(name), f"{said['score']:.3g}", text))
        rows.append("<tr>" + "".join(_cell(title, cell) for title, cell in cells) + "</tr>")
    right = escape(" / ".join(sample["references"][:3]))
    return (
        f'<section class="card"><pre>{escape(sample["prompt"])}</pre><p class="soft">right: {right}</p>'
        f"<table><tbody>{''.join(rows)}</tbody></table></section>"
    )
