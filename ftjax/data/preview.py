"""What is about to be trained, for a person to look at: figures, and one row with its trained tokens marked."""

from __future__ import annotations

import os
import sys

import numpy as np

from ftjax.data.prepare import PARTS, Data, Report
from ftjax.data.tokenise import Example

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def show(data: Data, tokenizer, colour: bool | None = None) -> str:
    """The report on `data` and its first training row, the trained tokens green, or in [[ ]] without colour.

    colour: None means where stdout is a terminal and NO_COLOR is not set.
    """
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    marks = (GREEN, RESET) if colour else ("[[", "]]")
    lines = [f"{'':10} {'rows':>9} {'tokens':>12} {'trained':>8} {'length 5%':>10} {'50%':>6} {'95%':>6} {'max':>6}"]
    reports = {name: getattr(data, name).report for name in PARTS}
    for name, r in reports.items():
        if r is None:
            lines.append(f"{name:10} {0:9,}")
            continue
        lengths = " ".join(f"{q:{w},}" for q, w in zip(r.quantiles, (10, 6, 6, 6)))
        lines.append(f"{name:10} {r.rows - r.dropped:9,} {r.tokens:12,} {r.trained / max(r.tokens, 1):8.1%} {lengths}")
    for name, r in reports.items():
        if r is not None:
            lines += [f"{name}: {line}" for line in _sentences(r)]
    lines += [f"one row of train, what is trained {'in green' if colour else f'in {marks[0]} {marks[1]}'}:"]
    return "\n".join([*lines, mark(data.train.examples[0], tokenizer, *marks)])


def mark(example: Example, tokenizer, before: str, after: str) -> str:
    """The text of an example, special tokens included, its trained stretches between `before` and `after`."""
    ids, trained = example.ids.tolist(), example.trained
    borders = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(ids)]
    # A tokenizer may decode a token differently at the beginning of a text, so each stretch is cut off a longer one.
    texts = [tokenizer.decode(ids[:b], clean_up_tokenization_spaces=False) for b in borders]
    out = ""
    for start, left, right in zip(borders, texts, texts[1:]):
        piece = right[len(left) :]
        out += f"{before}{piece}{after}" if trained[start] else piece
    return out


def _sentences(r: Report) -> list[str]:
    how = "guessed by the columns" if r.guessed else "as configured"
    lines = [f"{r.source}, form {r.form!r} ({how}), at most {r.max_length:,} tokens a row"]
    if r.long:
        lost = r.lost / max(r.trained + r.lost, 1)
        did = f"dropped {r.dropped:,} rows" if r.policy == "drop" else "cut at the end"
        lines += [
            f"{r.long:,} rows ({r.long / r.rows:.1%}) are longer: {did}, {r.lost:,} trained tokens lost ({lost:.1%})"
        ]
    kind = "packing efficiency" if r.packing else "share of tokens that are no padding"
    return [*lines, f"{kind} {r.efficiency:.1%}"]
