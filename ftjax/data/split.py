"""Which rows are trained on, validated on and tested on, and which rows of train overlap with evaluation rows."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ftjax.data.clean import Removed
from ftjax.data.compared import Texts, common, sides, telling
from ftjax.data.similar import clusters, first_equal, grams, near_pairs, normalise, shingles, without
from ftjax.data.table import Table, need_columns
from ftjax.errors import FtjaxError

PARTS = ("train", "validation", "test")

GRAM = 13  # consecutive words that overlapping rows share: Brown et al., "Language Models are Few-Shot Learners"
# (2020), appendix C
ALIKE = 0.8  # Jaccard similarity of word 3-grams from which rows overlap without sharing GRAM consecutive words
# GRAM words belong to a template if at least TEMPLATE_SHARE of an evaluation set's rows have them, and more than
# TEMPLATE_ROWS rows of train, as in GPT-3, or more than half of its rows if train is small.
TEMPLATE_SHARE = 0.05
TEMPLATE_ROWS = 10


def split(tables: dict[str, Table], data, seed: int, task=None) -> dict[str, np.ndarray]:
    """Assign rows to train, validation and test.

    A part with a table of its own consists of that table. Any other part takes its share, from data.split, of train's
    rows: at least one row, unless the share is 0. Train keeps the rest. Which rows a part takes is determined by
    `seed`:
    - By default, rows are taken at random.
    - With data.stratify or data.label, each part gets its share of the rows of every value, to within one row. If a
      value has too few rows for all parts, train comes first. A part that would be empty gets one row of train.
    - With data.group or data.group_near, whole groups are taken. The rows of a group share a value of one of the
      columns data.group, or have a similarity of at least data.group_near, directly or through other rows. A null is
      not a shared value. No group is divided. The shares, and the shares of each value, are therefore approximate:
      groups are assigned one by one, the largest first, each to the part that lacks its rows most.

    Args:
        tables: {part: its rows}, with train and any other part that has a file.
        data: The config's group `data`.
        seed: config.seed.
        task: The config's group `task`, see compared.sides.

    Returns:
        {part: ascending indices of its rows}, in the part's own table if it has one, otherwise in train's.

    Raises:
        FtjaxError: If a column does not exist, or there are too few rows, groups or values for a row in every part.
    """
    table = tables["train"]
    shares = {k: data.split[k] for k, name in enumerate(PARTS) if k and name not in tables and data.split[k]}
    order = _order(len(table), seed)
    part = np.zeros(len(table), np.int64)  # index in PARTS of each row of train's table
    if shares:
        # Shares refer to all rows of train's table, so that a file for one part does not change the other parts.
        shares = {0: round(1 - sum(shares.values()), 9), **shares}
        if shares[0] == 0:
            raise _none_left(len(table), data)
        key = "data.stratify" if data.stratify else "data.label"
        column = data.stratify or data.label
        need_columns([column] if column else [], table.columns, key)
        value = np.zeros(len(table), np.int64)  # (N,) number of each row's value, by first occurrence; null is a value
        if column:
            value = np.unique(first_equal(map(_key, table.column(column))), return_inverse=True)[1]
        if data.group or data.group_near:
            part = _by_group(_groups(table, data, seed, task), value, order, shares, data)
        elif column:
            part = _by_value(value, order, shares, f"{key}={column!r}")
        else:
            part = _at_random(order, shares, data)
    taken = {name: np.flatnonzero(part == k) for k, name in enumerate(PARTS)}
    return {name: np.arange(len(tables[name])) if k and name in tables else taken[name] for k, name in enumerate(PARTS)}


def limit(indices: np.ndarray, most: int, rows: int, seed: int) -> np.ndarray:
    """At most `most` of some rows of train's table, chosen at random.

    Args:
        indices: Indices of the rows to choose from.
        most: The limit; 0: all rows.
        rows: Number of rows of train's table.
        seed: Seed of the choice. The rows of a lower limit are among those of a higher one.

    Returns:
        The indices of the chosen rows, ascending.
    """
    order = _order(rows, seed)
    return np.sort(order[np.isin(order, indices)][:most]) if most else np.asarray(indices)


def shots(cells: dict[int, object], most: int, rows: int, seed: int) -> np.ndarray:
    """At most `most` rows of each value among some rows of train's table, chosen at random.

    Args:
        cells: {index of a row: its value}.
        most: Rows of each value.
        rows: Number of rows of train's table.
        seed: Seed of the choice. The rows of fewer shots are among those of more.

    Returns:
        The indices of the chosen rows, ascending.
    """
    taken = {}
    for i in _order(rows, seed).tolist():
        if i in cells:
            taken.setdefault(_key(cells[i]), []).append(i)
    return np.sort(np.concatenate([found[:most] for found in taken.values()]))


def absent(table: Table, column: str, parts: dict[str, Sequence[int]]) -> dict[str, list[str]]:
    """{value of a column as JSON text: the parts that have no row with it}, for values that some part lacks.

    Args:
        table: The rows.
        column: The column.
        parts: {part: indices of its rows}. Parts without any row are ignored.
    """
    names = [_key(cell) for cell in table.column(column)]
    there = {part: {names[i] for i in indices} for part, indices in parts.items() if len(indices)}
    lacking = {name: [part for part, found in there.items() if name not in found] for name in dict.fromkeys(names)}
    return {name: lack for name, lack in lacking.items() if lack}


def _order(rows: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).permutation(rows)


# ---------------------------------------------------------------------------------------------- dealing rows


def _at_random(order: np.ndarray, shares: dict[int, float], data) -> np.ndarray:
    part, at = np.zeros(len(order), np.int64), 0
    for k, share in shares.items():
        if k:
            size = max(1, round(len(order) * share))
            part[order[at : at + size]], at = k, at + size
    if at >= len(order):
        raise _none_left(len(order), data)
    return part


def _none_left(rows: int, data) -> FtjaxError:
    return FtjaxError(
        f"data.split={tuple(data.split)} leaves no row to train on, of {rows}: name data.validation and data.test, or "
        "set data.split=(1.0, 0.0, 0.0)"
    )


def _key(cell) -> str:
    """A text that is the same for equal values, including lists and objects."""
    return json.dumps(cell, sort_keys=True, default=str, ensure_ascii=False)


def _by_value(value: np.ndarray, order: np.ndarray, shares: dict[int, float], asked: str) -> np.ndarray:
    parts = np.array(list(shares))
    counts = _deal(np.bincount(value), np.array(list(shares.values())))
    for p in np.flatnonzero(counts.sum(axis=0) == 0):
        giver = int(np.argmax(counts[:, 0]))
        if counts[giver, 0] < 2:
            raise FtjaxError(
                f"{asked} has {len(counts)} values in {len(value)} rows, so that the part {PARTS[parts[p]]} would get "
                f"no row of any value; stratify by a column with fewer values, or name data.{PARTS[parts[p]]}"
            )
        counts[giver, 0] -= 1
        counts[giver, p] += 1
    part = np.empty(len(value), np.int64)
    part[order[np.argsort(value[order], kind="stable")]] = np.repeat(np.tile(parts, len(counts)), counts.ravel())
    return part


def _deal(sizes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(V, P) rows of each of V values for each of P parts: each within one row of sizes (V,) x shares (P,).

    The method of largest remainders is used. The remainder that a part is owed is carried over from value to value, so
    that its total is close to its share too. The first part gets a row of a value before the others do.
    """
    owed, counts = np.zeros(len(shares)), np.empty((len(sizes), len(shares)), np.int64)
    for v, size in enumerate(sizes.tolist()):
        exact = np.round(size * shares, 9)  # 0.29 * 100 is 28.999999999999996
        counts[v] = np.floor(exact)
        owed += exact - counts[v]
        rest = size - int(counts[v].sum())
        claim = np.where(exact > counts[v], owed, -np.inf)
        if counts[v, 0] == 0 and exact[0] > 0:
            claim[0] = np.inf
        more = np.argsort(-claim, kind="stable")[:rest]
        counts[v, more] += 1
        owed[more] -= 1
    return counts


# ---------------------------------------------------------------------------------------------- dealing groups


def _groups(table: Table, data, seed: int, task) -> np.ndarray:
    """(N,) index of the first row of each row's group."""
    need_columns(data.group, table.columns, "data.group")
    pairs, rows = [np.empty((0, 2), np.int64)], np.arange(len(table))
    for column in data.group:
        first = first_equal(i if cell is None else _key(cell) for i, cell in enumerate(table.column(column)))
        pairs.append(np.stack([first, rows], axis=1))
    if data.group_near:
        by = sides(data, table.columns, task)
        pairs.append(near_pairs(Texts((table, telling(by, common(table, by)))), data.group_near, seed))
    return clusters(np.concatenate(pairs), len(table))


def _by_group(group: np.ndarray, value: np.ndarray, order: np.ndarray, shares: dict[int, float], data) -> np.ndarray:
    firsts, which, sizes = np.unique(group, return_inverse=True, return_counts=True)
    if len(firsts) < len(shares):
        raise FtjaxError(
            f"data.group={tuple(data.group)}, data.group_near={data.group_near:g}: the {len(group)} rows make only "
            f"{len(firsts)} group{'s' * (len(firsts) > 1)}, the largest of {sizes.max()} rows, for {len(shares)} parts "
            f"({', '.join(PARTS[k] for k in shares)}); group by fewer columns, or name files for the parts"
        )
    counts = [Counter() for _ in firsts]
    for g, v in zip(which.tolist(), value.tolist()):
        counts[g][v] += 1
    total = np.bincount(value).tolist()
    lacks = {k: [share * n for n in total] for k, share in shares.items()}
    drawn = np.argsort(order)[firsts]  # position of each group's first row in the seeded order, which breaks ties
    given: dict[int, list[int]] = {k: [] for k in shares}
    for g in np.lexsort((drawn, -sizes)).tolist():
        # Choose the part that lacks most of the group's values. Rare values weigh as much as common ones.
        k = max(shares, key=lambda k: sum(n * lacks[k][v] / total[v] for v, n in counts[g].items()))
        given[k].append(g)
        for v, n in counts[g].items():
            lacks[k][v] -= n
    for k in shares:
        if not given[k]:  # the groups are too large for this share: it gets the smallest that another part can spare
            giver = max(shares, key=lambda other: len(given[other]))
            given[k].append(given[giver].pop())
    part = np.zeros(len(firsts), np.int64)
    for k, members in given.items():
        part[members] = k
    return part[which]


# ---------------------------------------------------------------------------------------------- decontamination


def decontaminate(
    train: Table, others: Sequence[tuple[str, Table]], data, task=None
) -> tuple[np.ndarray, list[Removed]]:
    """Find the rows of train that overlap with evaluation rows.

    Two rows overlap if they share GRAM consecutive words in what the model reads or should answer, or if what the model
    reads has a similarity of at least ALIKE; texts of fewer than 3 words must be equal. Labels, ids and other columns
    are ignored. Texts are compared as `normalise`d. The words of a template, which many rows of both sides share, are
    ignored on both sides, and a prompt that very many rows have is compared together with its answer. Evaluation rows
    are never left out.

    Args:
        train: The rows of train.
        others: (name, rows) of each evaluation set.
        data: The config's group `data`, see compared.sides.
        task: The config's group `task`, see compared.sides.

    Returns:
        (indices of the rows of train that do not overlap, the other rows with the reason).
    """
    evaluation = _Evaluation(train, others, data, task)
    labels, removed = evaluation.mine.labels(train), []
    for start, rows in train.chunks():
        for i, row in enumerate(rows, start):
            if found := evaluation.overlap(row, labels[i]):
                removed.append(Removed(i, train.place(i), "decontaminate", *found))
    return np.setdiff1d(np.arange(len(train)), [r.index for r in removed]), removed


class _Evaluation:
    """An index of all evaluation rows, with which no row of train may overlap. E rows of all sets together."""

    def __init__(self, train: Table, others: Sequence[tuple[str, Table]], data, task):
        self.mine = sides(data, train.columns, task)
        prompts = common(train, self.mine)
        self.read = telling(self.mine, prompts)
        theirs = [(table, sides(data, table.columns, task)) for _, table in others]
        self.rows = [(name, table, j) for name, table in others for j in range(len(table))]
        self.labels = [label for table, by in theirs for label in by.labels(table)]
        sets = [[normalise(text) for text in Texts((table, by.whole))] for table, by in theirs]
        self.template = _template(Texts((train, self.mine.whole)), sets)
        reads = Texts(*((table, telling(by, prompts)) for table, by in theirs))
        self.shingles = [shingles(self._own(normalise(text))) for text in reads]
        self.of_gram: dict[str, int] = {}
        self.of_shingle: dict[str, list[int]] = {}
        for e, text in enumerate(itertools.chain.from_iterable(sets)):
            for gram in grams(self._own(text), GRAM):
                self.of_gram.setdefault(gram, e)
            for shingle in sorted(self.shingles[e]):
                self.of_shingle.setdefault(shingle, []).append(e)

    def overlap(self, row: dict, label: str) -> tuple[str, str, bool] | None:
        """(reason, place of the evaluation row, whether its label differs) if a row of train overlaps; else None."""
        e, alike = self._alike(shingles(self._own(normalise(self.read(row)))))
        if alike >= ALIKE:
            why = f"is {alike:.2f} alike to a row of {{}}"
        else:
            mine = grams(self._own(normalise(self.mine.whole(row))), GRAM)
            gram = next((gram for gram in mine if gram in self.of_gram), None)
            if gram is None:
                return None
            run = f"{GRAM} words" if " " in gram else f"{len(gram)} characters"
            e, why = self.of_gram[gram], f"shares {run} with a row of {{}}: {gram!r}"
        (name, table, j), other = self.rows[e], self.labels[e]
        conflict = alike == 1 and bool(label and other and label != other)
        why += f"; its label is {label[:40]!r}, there {other[:40]!r}" if conflict else ""
        return why.replace("{}", name, 1), table.place(j), conflict

    def _own(self, text: str) -> str:
        """A normalised text without the words that belong to a template."""
        return without(text, GRAM, self.template) if self.template else text

    def _alike(self, own: set[str]) -> tuple[int, float]:
        """(the most similar evaluation row, their Jaccard similarity). Below ALIKE, another row may be more similar.

        A row with a similarity of at least ALIKE shares at least `need` shingles. So it shares one of the rarest
        shingles that remain when the need - 1 most common ones are set aside.
        """
        known = [shingle for shingle in own if shingle in self.of_shingle]
        need = math.ceil(ALIKE * len(own) - 1e-9)
        if not known or len(known) < need:
            return 0, 0.0
        known.sort(key=lambda shingle: len(self.of_shingle[shingle]))
        candidates = {e for shingle in known[: len(known) - need + 1] for e in self.of_shingle[shingle]}
        return max(
            ((e, len(own & self.shingles[e]) / len(own | self.shingles[e])) for e in candidates),
            key=lambda found: (found[1], -found[0]),
        )


def _template(train: Texts, sets: list[list[str]]) -> set[str]:
    """Runs of GRAM words that many evaluation rows and many rows of train share, and that hence prove no overlap."""
    shared = set()
    for texts in sets:
        counts = Counter(gram for text in texts for gram in set(grams(text, GRAM)))
        shared |= {gram for gram, count in counts.items() if count >= max(2, TEMPLATE_SHARE * len(texts))}
    if not shared:
        return shared
    counts = Counter()
    for text in train:
        counts.update(shared.intersection(grams(normalise(text), GRAM)))
    return {gram for gram, count in counts.items() if count > min(TEMPLATE_ROWS, len(train) / 2)}
