"""The checks of `inspect`: each is a function and a row of CHECKS.

A row check looks at one row, a set check at one part, beside the others.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ftjax.data import textchecks
from ftjax.data.compared import Texts, common, nothing, telling
from ftjax.data.inspect_scan import Scan, View, fold
from ftjax.data.similar import first_equal, firsts, grams, near_pairs, normalise
from ftjax.data.split import PARTS

OPTIONAL = 0.2  # a column with a greater share of empty cells is optional
COMMON = 0.95  # share of the rows that have the common labels, script or ending; other rows are exceptions
NEAR = 0.8  # similarity of near duplicates if data.clean.near is not set
RARE = 0.05  # a label is rare if it has fewer rows than this share of those of the rarest common label


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The n rows of all parts one after another, and which of them have equal or similar texts.

    Attributes:
        scans: The parts.
        first: (n,) index of the first row with the same text.
        pairs: (P, 2) pairs i < j of these first rows whose texts are similar.
        alike: All pairs, for `similar.clusters`.
        read: The same comparison by the text that the model reads alone. None: `first` compares by that already.
    """

    scans: list[Scan]
    first: np.ndarray
    pairs: np.ndarray
    alike: np.ndarray
    read: Corpus | None = None

    def firsts(self, scan: Scan) -> np.ndarray:
        """`first`, for the rows of one part."""
        return self.first[scan.start : scan.start + len(scan)]

    def earliest(self, scan: Scan) -> np.ndarray:
        """(n,): for each index of a text's first row, the first row of this part that has the text; else -1."""
        out = np.full(len(self.first), -1)
        out[self.firsts(scan)[::-1]] = np.arange(len(scan))[::-1]
        return out


class Hit(NamedTuple):
    """What a check found in one part: notes on rows, and the subject of the message. Nothing if both are empty."""

    notes: dict[int, str] = {}  # by index of the row in the part
    subject: str = ""


class Check(NamedTuple):
    """A check. Either `row` or `part` is given.

    `message` and `advice` may contain {rows}, the number of rows with their share, {subject}, and {kinds}, the notes
    with their numbers. `advice` may also contain {near}.
    """

    severity: str  # error: the run stops or its results are meaningless | warning: to be checked | note: to be known
    message: str
    advice: str
    row: Callable[[View], str | bool | None] | None = None  # a note on the row, or a false value if nothing is found
    part: Callable[[Scan, Corpus], Iterator[Hit]] | None = None
    where: Callable[[str], int] | None = None  # index in the text around which the excerpt lies; None: both ends
    answer: bool = False  # whether it is about the answer, which is then shown instead of the row


# ---------------------------------------------------------------------------------------------- comparison of rows


def corpus(scans: list[Scan], seed: int) -> Corpus:
    """Compare all rows of all parts, by the text of each row and by the text that the model reads.

    The similarity of near duplicates is that of the first source's settings.
    """
    whole = _compared(scans, [scan.by.whole for scan in scans], seed)
    if all(scan.by.answer is nothing for scan in scans):
        return whole
    prompts = set().union(*(common(scan.table, scan.by) for scan in scans))
    read = _compared(scans, [telling(scan.by, prompts) for scan in scans], seed)
    return dataclasses.replace(whole, read=read)


def _compared(scans: list[Scan], text_of: list[Callable[[dict], str]], seed: int) -> Corpus:
    texts = Texts(*((scan.table, text) for scan, text in zip(scans, text_of, strict=True)))
    if not scans[0].data.streaming:
        texts = list(texts)
    first = firsts(texts)
    alike = near_pairs(texts, near(scans[0].data), seed)
    # `near_pairs` joins each of several equal texts to the first of them. All other pairs are similar texts.
    nearly = first[alike[:, 1]] == alike[:, 1]
    return Corpus(scans, first, alike[nearly], alike)


def near(data) -> float:
    """The similarity from which on rows are near duplicates."""
    return data.clean.near or NEAR


# ---------------------------------------------------------------------------------------------- one row


def _control(view: View) -> str | None:
    found = textchecks.control(view.text)
    return ", ".join(f"U+{code:04X}" for code in sorted({ord(view.text[i]) for i in found})) or None


def _long(view: View) -> str | None:
    most = view.scan.data.max_length
    return f"{len(view.ids):,} tokens" if view.scan.recipe and len(view.ids) > most else None


def _unknown(view: View) -> str | None:
    unknown = view.scan.unknown
    count = 0 if unknown is None else int(np.count_nonzero(np.asarray(view.ids) == unknown))
    return f"{count} unknown" if count else None


REPEATED = 5  # fewest words of a prompt, or of one of its lines, whose repetition is not a coincidence


def _repeats(view: View) -> str | None:
    """A note if an answer contains its whole prompt, or begins with a line of it."""
    if not view.prompt or not view.answer:
        return None
    answer, prompt = normalise(view.answer), normalise(view.prompt)
    if grams(prompt, REPEATED) and prompt in answer:
        return "the whole prompt"
    lines = map(normalise, view.prompt.splitlines())
    return "a line of the prompt" if any(answer.startswith(x) and grams(x, REPEATED) for x in lines) else None


# ---------------------------------------------------------------------------------------------- columns


def _empty(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    notes = defaultdict(list)
    for name, column in scan.columns.items():
        if len(column.empty) <= OPTIONAL * len(scan) or name == scan.label:
            for i in column.empty:
                notes[i].append(name)
    yield Hit({i: ", ".join(notes[i]) for i in sorted(notes)})


def _optional(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    for name, column in scan.columns.items():
        share = len(column.empty) / len(scan)
        if share > OPTIONAL and name != scan.label:
            yield Hit(subject=f"{name!r} is empty in {share:.1%} of the rows")


def _constant(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    for name, column in scan.columns.items():
        if len(scan) > 1 and column.distinct == 1:
            yield Hit(subject=repr(name))


def _columns(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    head = corpus.scans[0]
    if scan.data.train == head.data.train and set(scan.columns) != set(head.columns):
        yield Hit(subject=f"{scan.name} has {', '.join(scan.columns)}; {head.name} has {', '.join(head.columns)}")


# ---------------------------------------------------------------------------------------------- the same twice


def _duplicates(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    twins = first_equal((same, scan.folded(i)) for i, same in enumerate(corpus.firsts(scan).tolist()))
    yield Hit({i: f"as {scan.beside(i, twin)}" for i, twin in enumerate(twins) if twin != i})


def _near(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    yield Hit(dict(sorted((j, f"nearly {scan.beside(j, i)}") for i, j in _pairs_within(scan, corpus))))


def _pairs_within(scan: Scan, corpus: Corpus) -> list[list[int]]:
    """[earlier, later] indices of similar rows within one part."""
    found = corpus.earliest(scan)[corpus.pairs]
    return np.sort(found[(found >= 0).all(axis=1)], axis=1).tolist()


def _overlap(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    """Rows of train with the input text of an evaluation row, and rows of validation with that of a test row.

    The texts are equal or similar.
    """
    corpus = corpus.read or corpus
    for other in corpus.scans:
        if PARTS.index(scan.part) >= PARTS.index(other.part):
            continue
        there = corpus.earliest(other)
        nearly = {}
        for i, j in corpus.pairs.tolist():
            for a, b in ((i, j), (j, i)):
                if there[b] >= 0:
                    nearly.setdefault(a, there[b])
        notes, conflicts = {}, 0
        for i, same in enumerate(corpus.firsts(scan).tolist()):
            twin = there[same]
            if twin >= 0:
                notes[i] = f"as {other.table.place(twin)}"
                mine, theirs = scan.folded(i), other.folded(twin)
                if mine and theirs and mine != theirs:
                    conflicts += 1
                    notes[i] += f", with the label {_said(scan, i)!r} and not {_said(other, twin)!r}"
            elif same in nearly:
                notes[i] = f"nearly {other.table.place(nearly[same])}"
        if notes:
            yield Hit(notes, other.name + (f" ({conflicts:,} with another label)" if conflicts else ""))


# ---------------------------------------------------------------------------------------------- labels and answers


def _spelling(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    """Labels that differ from a more common label only in their spelling."""
    counts = Counter(text for labels in scan.labels or () for text in labels)
    usual = {}
    for text, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        usual.setdefault(fold(text), text)
    odd = {text: f"{text!r} for {usual[fold(text)]!r}" for text in counts if text != usual[fold(text)]}
    rows = enumerate(dict.fromkeys(labels) for labels in scan.labels or ())
    yield Hit({i: "; ".join(odd[x] for x in labels if x in odd) for i, labels in rows if odd.keys() & labels})


def _rare(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    """Rows with rare labels: much rarer than the rarest of the labels that nearly all rows have."""
    if scan.labels is None or any(len(labels) > 1 for labels in scan.labels):  # rows of tags, most of which are O
        return
    folded = [fold(labels[0]) if labels else None for labels in scan.labels]
    counts = Counter(text for text in folded if text is not None)
    covered, least = 0, 0
    for _, count in counts.most_common():
        if covered < COMMON * counts.total():
            covered, least = covered + count, count
    rare = {text for text, count in counts.items() if count < RARE * least}
    yield Hit({i: repr(scan.labels[i][0]) for i, text in enumerate(folded) if text in rare})


def _conflict(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    """Rows whose text another row has with another label: those in the minority, and of a tie the later ones."""
    if scan.labels is None:
        return
    corpus = corpus.read or corpus
    groups, notes = defaultdict(list), {}
    for i, same in enumerate(corpus.firsts(scan).tolist()):
        groups[same].append(i)
    for rows in groups.values():
        counts = Counter(map(scan.folded, rows)) if len(rows) > 1 else ()
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]  # of equally common labels, the first that occurs
            kept = next(i for i in rows if scan.folded(i) == usual)
            others = (i for i in rows if scan.folded(i) != usual)
            notes |= {i: f"{_said(scan, i)}, but {_said(scan, kept)} in {scan.beside(i, kept)}" for i in others}
    for i, j in _pairs_within(scan, corpus):
        labels = scan.folded(i), scan.folded(j)
        # Lists of tags are not compared, because they differ wherever the words do.
        if labels[0] != labels[1] and len(labels[0]) == len(labels[1]) == 1:
            notes.setdefault(j, f"{_said(scan, j)}, but {_said(scan, i)} in the similar {scan.beside(j, i)}")
    yield Hit(dict(sorted(notes.items())))


def _said(scan: Scan, i: int) -> str:
    return textchecks.short(" ".join(scan.labels[i]) or "nothing", 40)


def _several(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    """Prompts with several answers, if rows have no labels. With labels, `_conflict` finds them."""
    if scan.labels is None:
        twins, answers = enumerate(first_equal(scan.prompts)), scan.answers
        others = ((i, twin) for i, twin in twins if scan.prompts[i] and answers[i] != answers[twin])
        yield Hit({i: f"prompt as {scan.beside(i, twin)}" for i, twin in others})


def _imbalance(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    counts = Counter(fold(labels[0]) for labels in scan.labels or () if len(labels) == 1)
    most = counts.most_common()
    if len(most) > 1 and most[0][1] > 0.9 * counts.total():
        yield Hit(subject=f"{most[0][0]!r} is the label of {most[0][1] / counts.total():.1%} of the rows")


def _minority(feature: str, least: float) -> Callable[[Scan, Corpus], Iterator[Hit]]:
    """A check for rows that differ in a feature from the common value, which at least the share `least` of rows has."""

    def check(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
        values = scan.features[feature]
        counts = Counter(filter(None, values))
        for usual, count in counts.most_common(1):
            if least * counts.total() <= count < counts.total():
                yield Hit({i: value for i, value in enumerate(values) if value not in ("", usual)}, usual)

    return check


# ---------------------------------------------------------------------------------------------- the tokenizer


def _coverage(scan: Scan, corpus: Corpus) -> Iterator[Hit]:
    found = scan.coverage
    yield Hit(subject=", ".join(text.format(found[k]) for k, (most, text) in COVERED.items() if (found[k] or 0) > most))


COVERED = {  # (the most that is usual for a tokenizer and text of its kind, the message about a higher value)
    "tokens_per_word": (2.5, "{:.1f} tokens a word"),
    "unknown": (0.001, "{:.1%} unknown tokens"),
    "bytes": (0.02, "{:.1%} of the tokens stand for parts of characters"),
}


# ---------------------------------------------------------------------------------------------- all of them

CHECKS: dict[str, Check] = {
    "unusable": Check(
        "error", "rows that cannot be used: {rows}: {kinds}",
        "correct or remove them: a run stops at the first",
        row=lambda view: view.error,
    ),
    "overlap": Check(
        "error", "rows that are also in {subject}, equal or nearly equal: {rows}",
        'data.decontaminate=("validation", "test") removes them from train; remove them from other parts yourself',
        part=_overlap,
    ),
    "empty": Check(
        "warning", "rows without text in a column: {rows}: {kinds}",
        "fill the cells or remove the rows; an empty answer stops a run",
        part=_empty,
    ),
    "duplicates": Check(
        "warning", "rows that repeat an earlier one: {rows}",
        "data.clean.exact=True removes them",
        part=_duplicates,
    ),
    "near_duplicates": Check(
        "warning", "rows that nearly equal an earlier one: {rows}",
        "data.clean.near={near:g} removes them; data.group_near={near:g} keeps them in one part of the split",
        part=_near,
    ),
    "label_conflict": Check(
        "warning", "rows with the same or nearly the same text as another row, but another label: {rows}",
        "decide which label is right",
        part=_conflict,
    ),
    "label_spelling": Check(
        "warning", "labels that are spelled differently from most: {rows}: {kinds}",
        "write each label in one way: every spelling is learnt as its own label",
        part=_spelling,
    ),
    "label_rare": Check(
        "warning", "labels that very few rows have: {rows}: {kinds}",
        "correct them, or remove the rows",
        part=_rare,
    ),
    "mojibake": Check(
        "warning", "rows with characters that were decoded by the wrong encoding (mojibake): {rows}",
        "data.clean.mojibake=True repairs them; a character U+FFFD is lost, so write the file again from its source",
        row=lambda view: textchecks.mojibake(view.text) and "broken characters", where=textchecks.mojibake_at,
    ),
    "control": Check(
        "warning", "rows with control characters or zero-width characters: {rows}: {kinds}",
        "data.clean.control=True removes the characters",
        row=_control, where=lambda text: textchecks.control(text)[0],
    ),
    "personal": Check(
        "warning", "rows with personal data: {rows}: {kinds}",
        'data.clean.personal="mask" masks it, "drop" removes the rows',
        row=lambda view: ", ".join(sorted({kind for kind, _, _ in textchecks.personal(view.text)})),
        where=lambda text: textchecks.personal(text)[0][1],
    ),
    "special_tokens": Check(
        "warning", "rows with the text of a special token: {rows}: {kinds}",
        "remove it from the text, because outside of messages the tokenizer reads it as the token itself; "
        "data.clean.drop removes rows by patterns",
        row=lambda view: ", ".join(token for token in view.scan.special if token in view.text),
    ),
    "long": Check(
        "warning", "rows with more tokens than data.max_length: {rows}",
        "raise data.max_length, or let data.long cut or drop them",
        row=_long,
    ),
    "unknown_tokens": Check(
        "warning", "rows with characters that the tokenizer does not know: {rows}",
        'use a model whose tokenizer knows them; data.clean.unicode="NFKC" may help',
        row=_unknown,
    ),
    "refusals": Check(
        "warning", "answers that refuse: {rows}",
        "remove the rows, unless the model should learn to refuse",
        row=lambda view: textchecks.refusal(view.answer) and "a refusal", answer=True,
    ),
    "repeated_prompt": Check(
        "warning", "answers that repeat the prompt: {rows}: {kinds}",
        "remove the prompt from the answer, because the model is trained to repeat it",
        row=_repeats, answer=True,
    ),
    "white_space": Check(
        "warning", "answers whose white space at the ends differs from most answers ({subject}): {rows}: {kinds}",
        "data.clean.whitespace=True strips it; white space at the ends changes the tokens",
        part=_minority("edges", 0.5), answer=True,
    ),
    "columns": Check(
        "warning", "the parts have different columns: {subject}",
        "use the same column names in both files",
        part=_columns,
    ),
    "boilerplate": Check(
        "note", "answers with stock phrases of an assistant, or placeholders instead of an answer: {rows}",
        "data.clean.drop removes rows by patterns",
        row=lambda view: textchecks.boilerplate(view.answer) and "a stock phrase", answer=True,
    ),
    "format": Check(
        "note", "answers that are not {subject}, as most are: {rows}: {kinds}",
        "decide whether all answers should have one format",
        part=_minority("layout", 0.5), answer=True,
    ),
    "ending": Check(
        "note", "answers that do not end with {subject}, as most do: {rows}: {kinds}",
        "check whether they were cut off",
        part=_minority("ending", COMMON), answer=True,
    ),
    "script": Check(
        "note", "rows in another script than {subject}: {rows}: {kinds}",
        "check whether they belong here",
        part=_minority("script", COMMON),
    ),
    "several_answers": Check(
        "note", "rows with the prompt of an earlier row but another answer: {rows}",
        "if that is intended, data.group with the prompt's columns keeps them in one part of the split",
        part=_several,
    ),
    "imbalance": Check(
        "note", "very unbalanced labels: {subject}",
        "split by data.stratify, and use a metric that weights classes equally",
        part=_imbalance,
    ),
    "optional": Check("note", "column {subject}", "use no template that needs it", part=_optional),
    "constant": Check("note", "column {subject} is the same in all rows", "leave it out of prompts", part=_constant),
    "coverage": Check(
        "note", "the tokenizer does not suit this text: {subject}",
        "a model made for this language or kind of text needs fewer tokens",
        part=_coverage,
    ),
}  # fmt: skip
