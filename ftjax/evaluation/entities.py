"""Tags of words: which entities they spell, and strict figures of them: boundaries and type must both be right.

N rows (sentences), T entity types, B resamples at a time. Two readings of tags, as in seqeval:

- As conlleval.pl reads them (seqeval's default, and ours): an entity starts wherever a tag cannot continue the one
  before, so `O I-PER` spells a person. This is the reading behind published figures and Hugging Face's examples.
- strict (seqeval's mode="strict"): only what the scheme allows spells an entity. `I-` without `B-` is none; where tags
  end entities (IOBES), one that is not ended is none.

The schemes are BIO (IOB2) and IOBES, in which BILOU's L is E and its U is S, in the first reading too, where seqeval
does not know L and U. Figures without a denominator are NaN, where seqeval gives 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.evaluation.classification import micro, trials
from ftjax.evaluation.resample import Reduce, divide

SAME = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}
UNDEFINED = {  # why a figure is None
    "precision": "no entity is predicted",
    "recall": "no entity is labelled",
    "f1": "no entity is labelled or predicted",
    "token_accuracy": "no tokens",
}

Tag = tuple[str, str]  # prefix of SAME's values or "O", type


def parse(tag: str, place: str) -> Tag:
    """`B-PER` -> ("B", "PER"). Raises FtjaxError, which names the place, for what is no tag."""
    if tag == "O":
        return "O", ""
    if not isinstance(tag, str) or tag[:1] not in SAME or tag[1:2] != "-" or len(tag) < 3:
        raise FtjaxError(f"{place}: expected O or a tag such as B-PER, with B, I, E, S, L or U first; found {tag!r}")
    return SAME[tag[0]], tag[2:]


def entities(tags: Sequence[Tag]) -> list[tuple[str, int, int]]:
    """(type, first, last) of each entity, as conlleval.pl reads tags."""
    found, start = [], None
    previous = ("O", "")
    for i, (prefix, kind) in enumerate([*tags, ("O", "")]):
        # An entity goes on while its type does, up to E or S and before B or S.
        goes_on = kind == previous[1] and previous[0] in "BI" and prefix in "IE"
        if start is not None and not goes_on:
            found.append((previous[1], start, i - 1))
            start = None
        if start is None and prefix != "O":
            start = i
        previous = prefix, kind
    return found


def strict_entities(tags: Sequence[Tag], ended: bool) -> list[tuple[str, int, int]]:
    """(type, first, last) of each entity by the scheme: B I* of one type; with `ended` (IOBES) B I* E or S."""
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
    """What each row contributes, and the T entity types, sorted. labels, predictions: N lists of tags.

    With `strict` the scheme is IOBES where any label or prediction has E, S, L or U, else BIO. loss: entities missed
    plus entities made up; wrong: any tag differs. Raises FtjaxError for rows of unequal length and for what is no tag.
    """
    if len(labels) != len(predictions):
        raise FtjaxError(
            f"expected tags for each row; found {len(labels)} rows labelled and {len(predictions)} predicted"
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
    return {"tally": tally, "tokens": tokens, "right": right, "loss": loss, "wrong": right < tokens}, types


def tag_tally(rows):
    """counts (B, N) -> entities right, predicted and labelled, of each type (B, T)."""
    N, _, T = rows["tally"].shape
    flat = rows["tally"].reshape(N, 3 * T).astype(float)
    return lambda counts: tuple((counts @ flat).reshape(len(counts), 3, T).swapaxes(0, 1))


def tag_metrics(rows) -> Reduce:
    """Precision, recall and F1 of entities, all types as one, and the share of tokens with the right tag."""
    tally = tag_tally(rows)

    def reduce(counts):
        accuracy = divide(counts @ rows["right"], counts @ rows["tokens"])
        return micro(*tally(counts)) | {"token_accuracy": accuracy}

    return reduce


def tag_trials(rows) -> dict[str, float]:
    """Of how many trials, entities or tokens, a figure of `tag_metrics` is a share."""
    return trials(*rows["tally"].sum((0, 2))) | {"token_accuracy": rows["tokens"].sum()}
