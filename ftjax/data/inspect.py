"""Statistics of the rows that a config names, and findings: which rows, what is wrong, what to do."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter

import numpy as np

from ftjax.data import prepare
from ftjax.data.compared import sides
from ftjax.data.inspect_checks import CHECKS, Check, Hit, corpus, near
from ftjax.data.inspect_scan import SAMPLE_WORDS, Scan, scan
from ftjax.data.inspect_scan import sides as prompt_and_answer
from ftjax.data.similar import clusters, normalise, row_text, units
from ftjax.data.textchecks import mask, short

SEVERITIES = ("error", "warning", "note")
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
EXAMPLES = 3  # rows shown of a finding
EXCERPT = 300  # characters shown of a row
BARS = 30  # bars of a histogram, at most


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found in one part.

    Attributes:
        check: Name of the check.
        part: Name of the part.
        severity: `error`, `warning` or `note`.
        message: What is wrong.
        advice: What to do.
        rows: {file: numbers of the rows in it}; empty if the finding is about the part as a whole.
        examples: Rows, each with `place`, `note` and `text`. Personal data is masked.
    """

    check: str
    part: str
    severity: str
    message: str
    advice: str
    rows: dict[str, list[int]]
    examples: list[dict[str, str]]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(map(len, self.rows.values()))


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of lengths.

    Attributes:
        quantiles: The quantiles at QUANTILES.
        mean: The mean.
        edges: (bars + 1) edges of a histogram.
        counts: (bars) its counts.
    """

    quantiles: list[int]
    mean: float
    edges: list[float]
    counts: list[int]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one part. Shares are from 0 to 1. None means that a value is not defined for these rows."""

    source: str
    rows: int
    form: str | None
    guessed: bool  # whether the form was guessed from the columns
    columns: dict[str, dict]  # of each column: type, empty (share of the rows), distinct (number of values)
    chars: dict[str, Lengths]  # characters by column
    tokens: dict[str, Lengths]  # keys `row` and `trained`; the columns if no form fits
    label: str | None
    label_guessed: bool
    labels: dict[str, int]
    scripts: dict[str, float]  # share of the letters
    tokens_per_word: float | None
    unknown: float  # share of the tokens that are the unknown token
    bytes: float  # share of the tokens that are a part of a character
    distinct_ngrams: dict[str, float]  # keys "1", "2", "3": distinct n-grams / all n-grams, of the words of a sample
    clusters: int  # groups of similar rows, including groups of a single row


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The statistics of each part, in order, and the findings, the most severe first."""

    parts: dict[str, Statistics]
    findings: list[Finding]


def inspect(config, tokenizer) -> Inspection:
    """Run every check of CHECKS on the rows of data.train, data.validation and data.test as they are in their files.

    All sources of a mixture are inspected. Nothing is split, cleaned or left out. If no form fits the columns, checks
    of prompts and answers are skipped. Raises FtjaxError for a file that cannot be read; see read.
    """
    checks = {name: check.row for name, check in CHECKS.items() if check.row}
    with tempfile.TemporaryDirectory(prefix="ftjax-inspect-") as folder:
        scans = [scan(one, checks) for one in _parts(config, tokenizer, folder)]
        whole = corpus(scans, config.seed)
        found = [
            _finding(name, check, one, hit)
            for name, check in CHECKS.items()
            for one in scans
            for hit in (check.part(one, whole) if check.part else [Hit(one.hits[name])])
            if hit.notes or hit.subject
        ]
        group = clusters(whole.alike, len(whole.first))
        parts = {one.name: _statistics(one, len(np.unique(group[one.start :][: len(one)]))) for one in scans}
    return Inspection(parts, sorted(found, key=lambda f: (SEVERITIES.index(f.severity), -f.count)))


def _parts(config, tokenizer, folder: str) -> list[Scan]:
    found = []
    for source, data, tables in prepare.read_sources(config, folder if config.data.streaming else None):
        for part, table in tables.items():
            recipe, guessed = prepare.recipe_if_any(data, table.columns)
            name = f"{part} of {source}" if source else part
            by, start = sides(data, table.columns, config.task), sum(map(len, found))
            found.append(Scan(name, part, data[part], data, table, recipe, guessed, tokenizer, by, start))
    return found


# ---------------------------------------------------------------------------------------------- findings


def _finding(name: str, check: Check, one: Scan, hit: Hit) -> Finding:
    rows = {}
    for i in hit.notes:
        rows.setdefault(one.table.files[one.table.file[i]], []).append(int(one.table.number[i]))
    number = len(hit.notes)
    share = f"{number / len(one):.1%}" if number >= 0.001 * len(one) else "below 0.1%"
    values = {
        "rows": f"{number:,} ({share})",
        "kinds": _kinds(hit.notes),
        "subject": hit.subject,
        "near": near(one.data),
    }
    return Finding(
        check=name,
        part=one.name,
        severity=check.severity,
        message=check.message.format(**values),
        advice=check.advice.format(**values),
        rows=rows,
        examples=[_example(check, one, i, hit.notes[i]) for i in _spread(hit.notes)],
    )


def _kinds(notes: dict[int, str], most: int = 4) -> str:
    """The notes by their number of rows, such as `email (30); phone (2)`."""
    counts = Counter(notes.values()).most_common()
    texts = [f"{short(note, 120)} ({count:,})" for note, count in counts[:most]]
    return "; ".join(texts + [f"{len(counts) - most:,} more"] * (len(counts) > most))


def _spread(notes: dict[int, str]) -> list[int]:
    """The first row of each of the first kinds of notes, then other first rows; at most EXAMPLES."""
    first = {}
    for i, note in notes.items():
        first.setdefault(note, i)
    return list(dict.fromkeys([*list(first.values())[:EXAMPLES], *list(notes)[:EXAMPLES]]))[:EXAMPLES]


def _example(check: Check, one: Scan, i: int, note: str) -> dict[str, str]:
    place = one.table.place(i)
    text = row_text(one.table.row(i))
    if check.answer:
        text = prompt_and_answer(*one.recipe.render([one.table.row(i)], [place]))[1]
    shown = mask(text)
    if check.where is not None:
        at = max(0, len(mask(text[: check.where(text)])) - EXCERPT // 2)
        shown = "…" * (at > 0) + short(shown[at:], EXCERPT)
    elif len(shown) > EXCERPT:
        shown = f"{shown[: EXCERPT // 2]} … {shown[-EXCERPT // 2 :]}"
    return {"place": place, "note": _visible(note), "text": _visible(shown)}


def _visible(text: str) -> str:
    """The text with control characters, which a terminal would obey, and invisible characters escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------- figures


def _statistics(one: Scan, groups: int) -> Statistics:
    columns = {
        name: {"type": column.type, "empty": len(column.empty) / len(one), "distinct": column.distinct}
        for name, column in one.columns.items()
    }
    letters = max(one.scripts.total(), 1)
    labels = Counter(text for values in one.labels or () for text in values)
    return Statistics(
        source=one.source,
        rows=len(one),
        form=one.recipe.form if one.recipe else None,
        guessed=one.guessed,
        columns=columns,
        chars={name: _lengths(column.chars) for name, column in one.columns.items() if column.text},
        tokens={name: _lengths(values) for name, values in one.tokens.items() if len(values)},
        label=one.label,
        label_guessed=one.label is not None and not one.data.label,
        labels=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
        scripts={name: count / letters for name, count in one.scripts.most_common()},
        **one.coverage,
        distinct_ngrams=_diversity(one.sample),
        clusters=groups,
    )


def _lengths(values) -> Lengths:
    values = np.frombuffer(values, np.int32)
    counts, edges = np.histogram(values, bins=min(BARS, max(1, int(np.ptp(values)))))
    return Lengths(
        quantiles=np.quantile(values, QUANTILES, method="nearest").tolist(),
        mean=float(values.mean()),
        edges=edges.tolist(),
        counts=counts.tolist(),
    )


def _diversity(sample: list[str]) -> dict[str, float]:
    """Distinct n-grams of words divided by all n-grams. An n-gram lies within a row (Li et al. 2016, distinct-n)."""
    total, grams, left = Counter(), {n: set() for n in (1, 2, 3)}, SAMPLE_WORDS
    for text in sample:
        words = units(normalise(text))[0][:left]
        left -= len(words)
        for n, found in grams.items():
            found.update(zip(*(words[k:] for k in range(n))))
            total[n] += max(len(words) - n + 1, 0)
    return {str(n): len(found) / max(total[n], 1) for n, found in grams.items()}
