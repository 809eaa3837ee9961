"""What is about to be trained, for the user to check: statistics, and rows with their trained tokens marked.

T tokens of a row of a batch.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ftjax.data.batches import Batches
from ftjax.data.prepare import PARTS, Data, Gone, Report
from ftjax.data.template import FORMS
from ftjax.data.tokenise import Example
from ftjax.pages import page

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def show(data: Data, tokenizer, colour: bool | None = None, packing: bool = False) -> str:
    """The report on `data`, and its first training row with the trained tokens marked.

    Args:
        data: The prepared data.
        tokenizer: The tokenizer, from transformers.
        colour: Whether trained tokens are green; otherwise they are in [[ ]]. None: they are green if stdout is a
            terminal and NO_COLOR is not set.
        packing: Whether batches are packed.
    """
    marks = _marks(colour)
    lines = [f"{'':10} {'rows':>9} {'tokens':>12} {'trained':>8} {'length 5%':>10} {'50%':>6} {'95%':>6} {'max':>6}"]
    notes = []
    for part in PARTS:
        reports = getattr(data, part).reports
        for source, r in reports.items():
            lengths = " ".join(f"{q:{w},}" for q, w in zip(r.quantiles, (10, 6, 6, 6)))
            name = f"{part} {source}".strip()
            lines.append(
                f"{name:10} {r.rows - r.dropped:9,} {r.tokens:12,} {r.trained / max(r.tokens, 1):8.1%} {lengths}"
            )
            notes += [f"{name}: {line}" for line in _sentences(r)]
        if not reports:
            lines.append(f"{part:10} {0:9,}")
    lines += [*notes, *mixture(data), *data.notes, *([left_out(data.gone)] if data.gone else [])]
    kind = "packing efficiency" if packing else "share of tokens that are no padding"
    shares = ", ".join(f"{part} {getattr(data, part).efficiency:.1%}" for part in PARTS if len(getattr(data, part)))
    lines.append(f"{kind}: {shares}")
    first = data.train.examples[0]
    lines += [f"one row of train, what is trained {_said(marks)}:", mark(first, tokenizer, *marks)]
    return "\n".join([*lines, *filter(None, [target(data, 0, first)])])


def target(data: Data, i: int, example: Example) -> str:
    """The label of an example of train, such as `label: good`; empty if its own tokens are the labels.

    Args:
        data: The prepared data.
        i: Index of the example.
        example: The example.
    """
    recipe = data.train.recipe(i)
    if describe := getattr(recipe, "describe", None):
        return describe(example)
    if example.targets is None or (form := recipe.form) in ("masked", "embed"):
        return ""
    if form == "multilabel":
        return "labels: " + (", ".join(n for n, there in zip(data.labels, example.targets[0]) if there) or "none")
    if form in ("regress", "span"):
        return ", ".join(f"{name}: {value:g}" for name, value in zip(data.labels, example.targets[0].tolist()))
    names = [data.labels[k] for k in example.targets.tolist()]
    return f"{'tags' if form == 'tag' else 'label'}: {' '.join(names)}"


def _marks(colour: bool | None) -> tuple[str, str]:
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return (GREEN, RESET) if colour else ("[[", "]]")


def _said(marks: tuple[str, str]) -> str:
    return "in green" if marks[0] == GREEN else f"in {marks[0]} {marks[1]}"


def mark(example: Example, tokenizer, before: str, after: str) -> str:
    """The text of an example, including special tokens, with its trained stretches marked.

    Args:
        example: The example.
        tokenizer: The tokenizer, from transformers.
        before: Text before a trained stretch.
        after: Text after a trained stretch.
    """
    return _marked(pieces(example.ids.tolist(), tokenizer), example.trained, before, after)


def _marked(texts: list[str], trained: np.ndarray, before: str, after: str, between: str = "") -> str:
    starts = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(texts)]
    stretches = [(trained[a], between.join(texts[a:b])) for a, b in zip(starts, starts[1:])]
    return between.join(f"{before}{text}{after}" if mine else text for mine, text in stretches)


def pieces(ids: list[int], tokenizer) -> list[str]:
    """The text that each token adds to the text before it. Joined, they are the whole text.

    A tokenizer decodes a token differently at the beginning of a text, so each token is decoded after some others. If a
    character consists of several tokens, its last token has the whole character and the others are empty.
    """
    out, first, last = [], 0, 0  # ids[first:last] is the context, ids[last:i] is a character still incomplete
    for i in range(1, len(ids) + 1):
        known, text = (tokenizer.decode(ids[first:at], clean_up_tokenization_spaces=False) for at in (last, i))
        if text.endswith("\ufffd") and i < len(ids):
            out.append("")
            continue
        out.append(visible(text[len(known) :]))
        first, last = last, i
    return out


def visible(text: str) -> str:
    """The text with control and format characters replaced by their code points.

    So no text can move the cursor or hide itself.
    """
    return "".join(
        f"<U+{ord(c):04X}>" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t\u200c\u200d" else c
        for c in text
    )


def _sentences(r: Report) -> list[str]:
    how = "guessed by the columns" if r.guessed else "as configured"
    meaning = f": {FORMS[r.form].note}" if r.form in FORMS and FORMS[r.form].note else ""
    return [f"{r.source}, form {r.form!r} ({how}){meaning}, at most {r.max_length:,} tokens a row", *too_long(r)]


def too_long(r: Report) -> list[str]:
    """A list with one line on what was done with rows that are too long; empty if no row is."""
    if not r.long:
        return []
    lost = r.lost / max(r.trained + r.lost, 1)
    did = f"dropped {r.dropped:,} rows" if r.policy == "drop" else "cut at the end"
    return [
        f"{r.long:,} rows ({r.long / r.rows:.1%}) are longer than {r.max_length:,} tokens: {did}, {r.lost:,} trained "
        f"tokens lost ({lost:.1%})"
    ]


def left_out(gone: Iterable[Gone]) -> str:
    """How many rows cleaning and decontamination left out, and which rules removed them."""
    rules = Counter(removed.rule for step in gone for removed in step.removed)
    return f"{rules.total():,} rows left out: " + ", ".join(f"{rule} {n:,}" for rule, n in rules.items())


def mixture(data: Data) -> list[str]:
    """How often each source of a mixture occurs in an epoch, a line each."""
    if data.shares is None:
        return []
    counts = np.bincount(data.train.source, minlength=len(data.sources))
    return [
        f"mixture: {name} is {share:.1%} of an epoch's rows; each of its {count:,} comes "
        f"{share * counts.sum() / count:.2f} times on average"
        for name, share, count in zip(data.sources, data.shares, counts.tolist())
    ]


# ---------------------------------------------------------------------------------------------- rows of batches


class View(NamedTuple):
    """One row of a batch as the model receives it. All arrays but `members` are (T,).

    trained: whether the token is the label of the one before it or, for labelled rows, whether a label is predicted at
    it.
    """

    step: int
    members: np.ndarray  # the examples that it holds, each of one segment, or of two where its texts are apart
    tokens: np.ndarray
    segments: np.ndarray  # 1, 2, ...; 0: padding
    positions: np.ndarray  # from 0 in each segment
    trained: np.ndarray

    def parts(self) -> list[tuple[int, slice]]:
        """(example, slice of the row) for each example."""
        each = self.count // len(self.members)
        borders = np.searchsorted(self.segments[: self.filled], np.arange(1, self.count + 2, each))
        return [(int(i), slice(a, b)) for i, a, b in zip(self.members, borders, borders[1:])]

    @property
    def count(self) -> int:
        """Number of segments."""
        return int(self.segments.max())

    @property
    def filled(self) -> int:
        """Number of tokens before the padding."""
        return int(np.count_nonzero(self.segments))


def views(batches: Batches, count: int) -> list[View]:
    """The first `count` rows of the first epoch's batches, made from the batches' arrays, without empty rows."""
    found = []
    for step in range(len(batches)):
        batch, members = batches[step], batches.rows(step)
        for b in range(len(members)):
            if len(found) == count:
                return found
            if len(members[b]):
                trained = np.zeros(batch["tokens"].shape[1], bool)
                trained[batch["loss_index"][b][batch["weights"][b] > 0] + (batches.examples.targets is None)] = True
                arrays = (batch[name][b] for name in ("tokens", "segment_ids", "positions"))
                found.append(View(step, members[b], *arrays, trained))
    return found


def rows(data: Data, batches: Batches, tokenizer, count: int, ids: bool = False, colour: bool | None = None) -> str:
    """The first rows of the first batches of data.train, with their trained tokens marked.

    Each example is shown with its place and its text.

    Args:
        data: The prepared data.
        batches: The batches of data.train.
        tokenizer: The tokenizer, from transformers.
        count: Number of rows.
        ids: Whether the ids of the tokens are included.
        colour: See `show`.
    """
    marks = _marks(colour)
    lines = [f"rows of the first batches, what is trained {_said(marks)}:"]
    for number, view in enumerate(views(batches, count), 1):
        lines += ["", _about(number, view)]
        for example, at in view.parts():
            tokens, trained = view.tokens[at].tolist(), view.trained[at]
            lines += [
                f"── {_about_part(data, batches, example, trained)}",
                _marked(pieces(tokens, tokenizer), trained, *marks),
            ]
            lines += [f"ids: {_marked(list(map(str, tokens)), trained, *marks, between=' ')}"] if ids else []
    return "\n".join(lines)


def _about(number: int, view: View) -> str:
    filled, width = view.filled, len(view.tokens)
    trained, several = np.count_nonzero(view.trained), "s" if view.count > 1 else ""
    return (
        f"row {number} (step {view.step}): {width:,} tokens, {filled:,} in {view.count:,} segment{several} "
        f"({trained:,} trained) and {width - filled:,} of padding"
    )


def _about_part(data: Data, batches: Batches, example: int, trained: np.ndarray) -> str:
    text = f"{data.train.place(example)}: {len(trained):,} tokens, {np.count_nonzero(trained):,} trained"
    return ", ".join(filter(None, [text, target(data, example, batches.examples[example])]))


def html(data: Data, batches: Batches, tokenizer, count: int) -> str:
    """The same rows as a page that needs no other file. Each token shows its id and its position.

    Args:
        data: The prepared data.
        batches: The batches of data.train.
        tokenizer: The tokenizer, from transformers.
        count: Number of rows.
    """
    rows = []
    for number, view in enumerate(views(batches, count), 1):
        parts = [(_about_part(data, batches, example, view.trained[at]), at) for example, at in view.parts()]
        if view.filled < len(view.tokens):
            parts.append(("padding", slice(view.filled, len(view.tokens))))
        rows.append((_about(number, view), [(title, _tokens(view, at, tokenizer)) for title, at in parts]))
    return page("preview.html", rows=rows)


def _tokens(view: View, at: slice, tokenizer) -> list[tuple[str, str, bool]]:
    """(text, description, whether it is trained) of each token."""
    ids, out = view.tokens[at].tolist(), []
    names = tokenizer.convert_ids_to_tokens(ids)
    for k, (column, text) in enumerate(zip(range(at.start, at.stop), pieces(ids, tokenizer))):
        trained = bool(view.trained[column])
        about = f"id {ids[k]} {names[k]!r}, position {view.positions[column]}, column {column}"
        out.append((text.replace("\n", "↵\n") or "·", about + ", trained" * trained, trained))
    return out
