"""Output of an Inspection: a table for the terminal, one HTML page with plots, and plain data."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter

from ftjax.data.inspect import QUANTILES, SEVERITIES, Inspection, Lengths, Statistics
from ftjax.data.textchecks import short
from ftjax.pages import page
from ftjax.progress import counted

WIDTH = 100  # columns of the terminal
NUMBERS = 8  # row numbers shown of a finding in the terminal
SHOWN = 280  # characters of an example in the terminal
LABELS = 12  # labels shown
LISTED = 2000  # row numbers of a finding that the page lists; the JSON has all


def to_json(inspection: Inspection) -> dict:
    """Plain data with all row numbers: {"parts": {name: statistics}, "quantiles": [...], "findings": [...]}."""
    plain = dataclasses.asdict(inspection)
    return {**plain, "quantiles": list(QUANTILES), "findings": [
        {**finding, "count": f.count} for finding, f in zip(plain["findings"], inspection.findings)
    ]}  # fmt: skip


# ---------------------------------------------------------------------------------------------- terminal


def table(inspection: Inspection) -> str:
    """The statistics of every part and all findings, the most severe first, in WIDTH columns."""
    lines = []
    for name, part in inspection.parts.items():
        lines += [*_wrap(f"{name}: {part.source}", ""), *(line for s in _sentences(part) for line in _wrap(s, "  "))]
        lines += [f"  {'length':<28}" + "".join(f"{_percent(q):>9}" for q in QUANTILES)]
        for what, lengths in _all_lengths(part):
            lines.append(f"  {what[:28]:<28}" + "".join(f"{v:>9,}" for v in lengths.quantiles))
        lines.append("")
    if not inspection.findings:
        return "\n".join([*lines, "Nothing was found that needs attention."])
    lines.append(_counts(inspection))
    for finding in inspection.findings:
        lines += ["", *_wrap(f"{finding.severity.upper()} {finding.part}: {finding.message}", "", "  ")]
        lines += _wrap(f"do: {finding.advice}", "  ", "      ")
        lines += [
            line for file, numbers in finding.rows.items() for line in _wrap(_rows(file, numbers), "  ", "      ")
        ]
        for example in finding.examples[:1]:
            row = example["place"].rpartition(" row ")[2]
            shown = " ".join(f"row {row}, {example['note']}: {example['text']}".split())
            lines += _wrap(short(shown, SHOWN), "  | ", "  | ")
    return "\n".join(lines)


def _wrap(text: str, indent: str, further: str | None = None) -> list[str]:
    further = indent + "  " if further is None else further
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)


def _rows(file: str, numbers: list[int]) -> str:
    more = len(numbers) - NUMBERS
    shown = ", ".join(map(str, numbers[:NUMBERS]))
    return f"{file}: {'row' if len(numbers) == 1 else 'rows'} {shown}" + (f" and {more:,} more" if more > 0 else "")


def _counts(inspection: Inspection) -> str:
    """The number of findings of each severity."""
    counts = Counter(f.severity for f in inspection.findings)
    return ", ".join(counted(counts[s], s) for s in SEVERITIES if counts[s])


def _percent(q: float) -> str:
    return {0: "shortest", 0.5: "median", 1: "longest"}.get(q, f"{q:.0%}")


def _sentences(part: Statistics) -> list[str]:
    """The statistics of a part, one sentence each."""
    form = "no form fits the columns" if part.form is None else f"form {part.form!r}"
    guessed = " (guessed by the columns)" if part.guessed else ""
    groups = f"{counted(part.clusters, 'cluster')} of like rows"
    out = [f"{counted(part.rows, 'row')}, {form}{guessed}, {groups}"]
    out += [
        f"column {name!r}: {c['type']}, {c['distinct']:,} distinct, {_share(c['empty'])} empty"
        for name, c in part.columns.items()
    ]
    if part.label is not None:
        how = " (guessed)" if part.label_guessed else ""
        total = max(sum(part.labels.values()), 1)
        shown = [f"{text} {n:,} ({n / total:.1%})" for text, n in _labels(part)]
        more = len(part.labels) - len(shown)
        out.append(f"label {part.label!r}{how}: {', '.join(shown)}" + (f" and {more:,} more" if more else ""))
    words = "" if part.tokens_per_word is None else f"{part.tokens_per_word:.2f} tokens a word, "
    out.append(f"tokenizer: {words}{_share(part.unknown)} unknown, {_share(part.bytes)} for parts of characters")
    out.append("scripts: " + (", ".join(f"{s} {_share(v)}" for s, v in list(part.scripts.items())[:6]) or "no letters"))
    grams = ", ".join(f"{n}-grams {v:.2f}" for n, v in part.distinct_ngrams.items())
    return [*out, f"distinct by all, of the words of a sample: {grams}"]


def _labels(part: Statistics) -> list[tuple[str, int]]:
    """(label as it is shown, number of rows) of the first labels."""
    return [(repr(short(text, 40)), n) for text, n in list(part.labels.items())[:LABELS]]


def _share(share: float) -> str:
    return "below 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _all_lengths(part: Statistics) -> list[tuple[str, Lengths]]:
    return [(f"tokens of {name}", lengths) for name, lengths in part.tokens.items()] + [
        (f"characters of {name}", lengths) for name, lengths in part.chars.items()
    ]


# ---------------------------------------------------------------------------------------------- HTML


def html(inspection: Inspection) -> str:
    """A page that needs no other file. All text of rows is escaped."""
    size = f"{counted(sum(p.rows for p in inspection.parts.values()), 'row')}, {counted(len(inspection.parts), 'part')}"
    return page(
        "inspection.html",
        summary=f"{size}; {_counts(inspection) or 'no findings'}",
        findings=inspection.findings,
        listed=LISTED,
        quantiles=list(map(_percent, QUANTILES)),
        parts=[(name, part, _sentences(part), _all_lengths(part)) for name, part in inspection.parts.items()],
        share=_share,
        labels=_labels,
    )
