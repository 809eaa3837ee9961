"""Strict figures of the entities in tagged words: an entity is correct if its boundaries and its type are.

N rows (sentences), T entity types, B resamples at a time. There are two ways to read tags, as in seqeval:

- As conlleval.pl does (the default of seqeval and of ftjax): an entity starts wherever a tag cannot continue the one
  before, so `O I-PER` is a person. Published figures and Hugging Face's examples use this way.
- strict (seqeval's mode="strict"): an entity must follow the scheme. `I-` without `B-` is none. In IOBES an entity that
  is not ended is none.

The schemes are BIO (IOB2) and IOBES. BILOU's L is read as E and its U as S, also in the first way, where seqeval does
not know L and U. Figures with denominator 0 are NaN, where seqeval gives 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.classification import shares, tally
from ftjax.evaluation.resample import Kind, Reduce, share

SAME = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}
UNDEFINED = {  # why a figure is None
    "precision": "no entity is predicted",
    "recall": "no entity is labelled",
    "f1": "no entity is labelled or predicted",
    "token_accuracy": "no tokens",
}

Tag = tuple[str, str]  # (a value of SAME or "O", type)


def parse(tag: str, place: str) -> Tag:
    """`B-PER` -> ("B", "PER"). Raises FtjaxError, which names the place, if the text is not a tag."""
    if tag == "O":
        return "O", ""
    if not isinstance(tag, str) or tag[:1] not in SAME or tag[1:2] != "-" or len(tag) < 3:
        raise FtjaxError(
            f"{place}: expected the tag O or one such as B-PER that starts with B, I, E, S, L or U; found {tag!r}"
        )
    return SAME[tag[0]], tag[2:]


def entities(tags: Sequence[Tag]) -> list[tuple[str, int, int]]:
    """(type, first index, last index) of each entity, as conlleval.pl reads tags."""
    found, start = [], None
    previous = ("O", "")
    for i, (prefix, kind) in enumerate([*tags, ("O", "")]):
        # An entity continues while its type does, until after E or S and before B or S.
        goes_on = kind == previous[1] and previous[0] in "BI" and prefix in "IE"
        if start is not None and not goes_on:
            found.append((previous[1], start, i - 1))
            start = None
        if start is None and prefix != "O":
            start = i
        previous = prefix, kind
    return found


def strict_entities(tags: Sequence[Tag], ended: bool) -> list[tuple[str, int, int]]:
    """(type, first index, last index) of each entity that follows the scheme, with one type throughout.

    A BIO entity is B I*. If `ended` (IOBES), an entity is S or B I* E.
    """
    found = []
    for kind, first, last in entities(tags):
        prefixes = [prefix for prefix, _ in tags[first : last + 1]]
        if not ended:
            good = prefixes[0] == "B"
        else:
            good = prefixes == ["S"] or (prefixes[0] == "B" and len(prefixes) > 1 and prefixes[-1] == "E")
        if good:
            found.append((kind, first, last))
    return found


def tag_rows(labels, predictions, strict: bool = False) -> tuple[dict[str, np.ndarray], list[str]]:
    """The contribution of each row, and the entity types.

    `loss` is the number of missed entities plus that of wrongly predicted ones. A row is `wrong` if any tag differs.

    Args:
        labels, predictions: N lists of tags.
        strict: Whether to read tags strictly. The scheme is IOBES if any label or prediction has E, S, L or U, else
            BIO.

    Returns:
        ({"tally" (see ftjax.evaluation.classification), "tokens", "right", "loss", "wrong"}, each of N rows; the T
        types, sorted).

    Raises:
        FtjaxError: If labels and predictions differ in length, or if a text is not a tag.
    """
    if len(labels) != len(predictions):
        raise FtjaxError(
            f"expected labels and predictions of the same rows; found {len(labels)} and {len(predictions)} rows"
        )
    parsed = []
    for i, (label, predicted) in enumerate(zip(labels, predictions), 1):
        if len(label) != len(predicted):
            raise FtjaxError(
                f"row {i}: expected a predicted tag for each of {len(label)} labels; found {len(predicted)}"
            )
        sides = (label, "label"), (predicted, "prediction")
        parsed.append([[parse(tag, f"row {i}, {side} {j}") for j, tag in enumerate(tags, 1)] for tags, side in sides])
    ended = any(prefix in "ES" for row in parsed for tags in row for prefix, _ in tags)

    def read(tags):
        return set(strict_entities(tags, ended) if strict else entities(tags))

    spelled = [(read(label), read(predicted)) for label, predicted in parsed]
    types = sorted({kind for row in spelled for side in row for kind, _, _ in side})
    tally = np.zeros((len(spelled), 3, len(types)), int)
    for i, (label, predicted) in enumerate(spelled):
        for k, side in enumerate((label & predicted, predicted, label)):
            for kind, _, _ in side:
                tally[i, k, types.index(kind)] += 1
    tokens = np.array([len(label) for label in labels])
    right = np.array([sum(a == b for a, b in zip(*pair)) for pair in zip(labels, predictions)])
    loss = (tally[:, 1] + tally[:, 2] - 2 * tally[:, 0]).sum(1).astype(float)
    flat = tally.reshape(len(spelled), -1).astype(float)
    return {"tally": flat, "tokens": tokens, "right": right, "loss": loss, "wrong": right < tokens}, types


def tag_metrics(rows) -> Reduce:
    """Precision, recall and F1 of entities of all types together, and the share of tokens with the correct tag."""
    tallied = tally(rows)

    def reduce(counts):
        found = shares(*(x.sum(-1) for x in tallied(counts)))
        return found | {"token_accuracy": share(counts @ rows["right"], counts @ rows["tokens"])}

    return reduce


KIND = Kind(tag_rows, tag_metrics, UNDEFINED, ("precision", "recall", "f1"))
