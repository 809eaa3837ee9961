"""An Inspection for people and machines: a table for the terminal, one page of HTML with plots, plain data."""

from __future__ import annotations

import dataclasses
import textwrap
from html import escape

from ftjax.data.inspect import QUANTILES, SEVERITIES, Finding, Inspection, Lengths, Statistics

WIDTH = 100  # columns of the terminal
NUMBERS = 8  # row numbers shown of a finding in the terminal
SHOWN = 280  # characters of an example in the terminal
LABELS = 12  # labels shown
LISTED = 2000  # row numbers listed of a finding in the page; the JSON has all


def to_json(inspection: Inspection) -> dict:
    """Plain data: {"parts": {name: statistics}, "quantiles": [...], "findings": [...]}, every row number in it."""
    plain = dataclasses.asdict(inspection)
    return {**plain, "quantiles": list(QUANTILES), "findings": [
        {**finding, "count": f.count} for finding, f in zip(plain["findings"], inspection.findings)
    ]}  # fmt: skip


# ---------------------------------------------------------------------------------------------- terminal


def table(inspection: Inspection) -> str:
    """Figures of every part and all findings, the gravest first, in WIDTH columns."""
    lines = []
    for name, part in inspection.parts.items():
        lines += [*_wrap(f"{name}: {part.source}", ""), *(line for s in _sentences(part) for line in _wrap(s, "  "))]
        lines += [f"  {'length':<28}" + "".join(f"{_percent(q):>9}" for q in QUANTILES)]
        for what, lengths in _all_lengths(part):
            lines.append(f"  {what[:28]:<28}" + "".join(f"{v:>9,}" for v in lengths.quantiles))
        lines.append("")
    if not inspection.findings:
        return "\n".join([*lines, "Nothing was found that needs attention."])
    counts = {s: sum(f.severity == s for f in inspection.findings) for s in SEVERITIES}
    lines.append(", ".join(_count(n, s) for s, n in counts.items() if n))
    for finding in inspection.findings:
        lines += ["", *_wrap(f"{finding.severity.upper()} {finding.part}: {finding.message}", "", "  ")]
        lines += _wrap(f"do: {finding.advice}", "  ", "      ")
        lines += [
            line for file, numbers in finding.rows.items() for line in _wrap(_rows(file, numbers), "  ", "      ")
        ]
        for example in finding.examples[:1]:
            row = example["place"].rpartition(" row ")[2]
            shown = " ".join(f"row {row}, {example['note']}: {example['text']}".split())
            lines += _wrap(shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…", "  | ", "  | ")
    return "\n".join(lines)


def _wrap(text: str, indent: str, further: str | None = None) -> list[str]:
    further = indent + "  " if further is None else further
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)


def _rows(file: str, numbers: list[int]) -> str:
    more = len(numbers) - NUMBERS
    shown = ", ".join(map(str, numbers[:NUMBERS]))
    return f"{file}: {'row' if len(numbers) == 1 else 'rows'} {shown}" + (f" and {more:,} more" if more > 0 else "")


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _percent(q: float) -> str:
    return {0: "shortest", 0.5: "median", 1: "longest"}.get(q, f"{q:.0%}")


def _sentences(part: Statistics) -> list[str]:
    """Figures of a part, a sentence each."""
    form = "no form fits the columns" if part.form is None else f"form {part.form!r}"
    guessed = " (guessed by the columns)" if part.guessed else ""
    groups = f"{_count(part.clusters, 'cluster')} of like rows"
    out = [f"{_count(part.rows, 'row')}, {form}{guessed}, {groups}"]
    out += [
        f"column {name!r}: {c['type']}, {c['distinct']:,} distinct, {_share(c['empty'])} empty"
        for name, c in part.columns.items()
    ]
    if part.label is not None:
        how = " (guessed)" if part.label_guessed else ""
        total = max(sum(part.labels.values()), 1)
        shown = [f"{_quote(text)} {n:,} ({n / total:.1%})" for text, n in list(part.labels.items())[:LABELS]]
        more = len(part.labels) - len(shown)
        out.append(f"label {part.label!r}{how}: {', '.join(shown)}" + (f" and {more:,} more" if more else ""))
    words = "" if part.tokens_per_word is None else f"{part.tokens_per_word:.2f} tokens a word, "
    out.append(f"tokenizer: {words}{_share(part.unknown)} unknown, {_share(part.bytes)} for parts of characters")
    out.append("scripts: " + (", ".join(f"{s} {_share(v)}" for s, v in list(part.scripts.items())[:6]) or "no letters"))
    grams = ", ".join(f"{n}-grams {v:.2f}" for n, v in part.distinct_ngrams.items())
    return [*out, f"distinct by all, of the words of a sample: {grams}"]


def _share(share: float) -> str:
    return "below 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _all_lengths(part: Statistics) -> list[tuple[str, Lengths]]:
    return [(f"tokens of {name}", lengths) for name, lengths in part.tokens.items()] + [
        (f"characters of {name}", lengths) for name, lengths in part.chars.items()
    ]


# ---------------------------------------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --page: #fbfbfa; --card: #fff;

  --bar: #4477aa; --error: #b3261e; --warning: #a15c00; --note: #35669c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9ee; --soft: #9aa6b4; --line: #343c47; --page: #14181d;
  --card: #1c2128; --bar: #6c9fd2; --error: #ff8a80; --warning: #f0b35a; --note: #8ab8ea; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 0; } p { margin: .3rem 0; } code, pre, .mono { font: 13px/1.45 ui-monospace, monospace; }
.soft { color: var(--soft); } .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; margin: .7rem 0; } .finding { border-left: 4px solid; }
.error { border-left-color: var(--error); } .warning { border-left-color: var(--warning); }
.note { border-left-color: var(--note); }
.badge { font-size: .75rem; text-transform: uppercase; letter-spacing: .05em; }
.error .badge { color: var(--error); } .warning .badge { color: var(--warning); }
.note .badge { color: var(--note); }
table { border-collapse: collapse; margin: .5rem 0; } .wide { overflow-x: auto; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-weight: 500; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .6rem; padding: .5rem .7rem;
  background: var(--page); border-radius: 6px; } summary { cursor: pointer; color: var(--soft); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figcaption { color: var(--soft); font-size: .85rem; }
svg rect { fill: var(--bar); } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg line { stroke: var(--line); }
"""


def html(inspection: Inspection) -> str:
    """One page that needs no other file; every text of the rows is escaped."""
    findings = inspection.findings
    counts = ", ".join(_count(n, s) for s in SEVERITIES if (n := sum(f.severity == s for f in findings)))
    said = f"{_count(sum(p.rows for p in inspection.parts.values()), 'row')}, {_count(len(inspection.parts), 'part')}"
    body = [
        "<h1>Data inspection</h1>",
        f'<p class="soft">{said}; {counts or "no findings"}</p>',
        "<h2>Findings</h2>",
        *([_finding(f) for f in findings] or ["<p>Nothing was found that needs attention.</p>"]),
    ]
    for name, part in inspection.parts.items():
        body.append(_part(name, part))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Data inspection</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _finding(f: Finding) -> str:
    examples = "".join(
        f'<p class="soft">{escape(e["place"])}: {escape(e["note"])}</p><pre>{escape(e["text"])}</pre>'
        for e in f.examples
    )
    listed = "".join(_listed(file, numbers) for file, numbers in f.rows.items())
    return (
        f'<section class="card finding {f.severity}"><span class="badge">{f.severity} · {escape(f.part)} · '
        f"{escape(f.check.replace('_', ' '))}</span><h3>{escape(_upper(f.message))}</h3>"
        f"<p>What to do: {escape(f.advice)}</p>"
        + (f"<details open><summary>Examples</summary>{examples}</details>" if examples else "")
        + (f"<details><summary>All rows</summary>{listed}</details>" if listed else "")
        + "</section>"
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(file: str, numbers: list[int]) -> str:
    more = len(numbers) - LISTED
    tail = f" and {more:,} more, in the JSON" if more > 0 else ""
    return f'<p class="mono">{escape(file)}: {", ".join(map(str, numbers[:LISTED]))}{tail}</p>'


def _part(name: str, part: Statistics) -> str:
    sentences = "".join(f"<p>{escape(_upper(s))}</p>" for s in _sentences(part) if not s.startswith("column "))
    columns = _grid(
        ["column", "type", "distinct", "empty"],
        [[n, c["type"], f"{c['distinct']:,}", _share(c["empty"])] for n, c in part.columns.items()],
    )
    lengths = _grid(
        ["length", *map(_percent, QUANTILES), "mean"],
        [[what, *(f"{v:,}" for v in found.quantiles), f"{found.mean:,.1f}"] for what, found in _all_lengths(part)],
    )
    plots = [_histogram(what, found) for what, found in _all_lengths(part) if len(found.counts) > 1]
    if part.labels:
        plots.append(_bars(f"rows by {part.label}", list(part.labels.items())[:LABELS]))
    return (
        f'<h2>{escape(_upper(name))}</h2><p class="soft">{escape(part.source)}</p><div class="card">{sentences}'
        f'<div class="wide">{columns}</div><div class="wide">{lengths}</div></div>'
        f'<div class="card plots">{"".join(plots)}</div>'
    )


def _grid(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _histogram(caption: str, lengths: Lengths, width: int = 300, height: int = 110) -> str:
    """Rows by length; the axis from the shortest to the longest."""
    top, step = max(lengths.counts), width / len(lengths.counts)
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{14 + (height - 14) * (1 - n / top):.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{(height - 14) * n / top:.1f}">'
        f"<title>{lengths.edges[k]:,.0f} to {lengths.edges[k + 1]:,.0f}: {n:,}</title></rect>"
        for k, n in enumerate(lengths.counts)
    )
    ends = (
        f'<text x="0" y="{height + 14}">{lengths.edges[0]:,.0f}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{lengths.edges[-1]:,.0f}</text>'
        f'<text x="0" y="10">{top:,} rows</text><line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
    )
    return _figure(caption, bars + ends, width, height + 18)


def _bars(caption: str, counts: list[tuple[str, int]], width: int = 300) -> str:
    """A bar a label, the most common first."""
    top = max(n for _, n in counts)
    bars = "".join(
        f'<rect x="0" y="{k * 32 + 16}" width="{max(width * n / top, 1):.1f}" height="10"/>'
        f'<text x="0" y="{k * 32 + 12}">{escape(_quote(text))}</text>'
        f'<text x="{width}" y="{k * 32 + 12}" text-anchor="end">{n:,}</text>'
        for k, (text, n) in enumerate(counts)
    )
    return _figure(caption, bars, width, len(counts) * 32)


def _figure(caption: str, content: str, width: int, height: int) -> str:
    return (
        f'<figure><figcaption>{escape(_upper(caption))}</figcaption><svg role="img" aria-label="{escape(caption)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{content}</svg></figure>'
    )
