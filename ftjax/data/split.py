"""Which rows are trained on, validated on and tested on; and which rows of train an evaluation row gives away."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ftjax.data.clean import Removed, need_columns
from ftjax.data.compared import Texts, common, sides, telling
from ftjax.data.similar import clusters, grams, near_pairs, normalise, shingles, without
from ftjax.data.table import Table
from ftjax.errors import FtjaxError

PARTS = ("train", "validation", "test")

GRAM = 13  # words that two rows must share in a row to overlap: Brown et al., "Language Models are Few-Shot Learners"
# (2020), appendix C
ALIKE = 0.8  # Jaccard similarity of word 3-grams from which rows overlap without so many words in a row
TEMPLATE_SHARE = 0.05  # of an evaluation set's rows: 13 words that so many share are a template's
TEMPLATE_ROWS = 10  # and of more rows of train than these, as in GPT-3; or of more than half, where train is small


def split(tables: dict[str, Table], data, seed: int, task=None) -> dict[str, np.ndarray]:
    """{part: indices of its rows, ascending, in its own table or else in train's}; `data` and `task` are groups of the
    config.

    A part with a table of its own is all of it. Any other takes its share in data.split of train's rows, at least one
    row unless the share is 0; train keeps the rest. Which rows, config.seed says:
    - at random, where nothing else is asked for;
    - of each value of data.stratify or data.label, every part's share of its rows to within one row; where a value has
      too few rows for all parts, train comes first. Should a part come out empty, it gets one row of train's;
    - with data.group or data.group_near, whole groups: rows that share a value of one of these columns, or that are so
      alike, directly or through others. That is exact. The shares, and those of each value, are as near as taking the
      groups one by one comes, largest first, each to the part that lacks its rows most. Nulls share nothing.
    Raises FtjaxError for shares that do not add up, for a column that does not exist, and where the rows, groups or
    values do not suffice for a row in every part.
    """
    if len(data.split) != 3 or min(data.split) < 0 or abs(sum(data.split) - 1) > 1e-6:
        raise FtjaxError(f"data.split={tuple(data.split)}: expected three shares that add up to 1")
    table = tables["train"]
    shares = {k: data.split[k] for k, name in enumerate(PARTS) if k and name not in tables and data.split[k]}
    order = _order(len(table), seed)
    part = np.zeros(len(table), np.int64)  # index in PARTS of each row of train's table
    if shares:
        # Shares are of all rows of train's table, so that naming a file for one part leaves the others as they are.
        shares = {0: round(1 - sum(shares.values()), 9), **shares}
        if shares[0] == 0:
            raise _none_left(len(table), data)
        key = "data.stratify" if data.stratify else "data.label"
        column = data.stratify or data.label
        need_columns([column] if column else [], table.columns, key)
        value = _values(table, column) if column else np.zeros(len(table), np.int64)
        if data.group or data.group_near:
            part = _by_group(_groups(table, data, seed, task), value, order, shares, data)
        elif column:
            part = _by_value(value, order, shares, f"{key}={column!r}")
        else:
            part = _at_random(order, shares, data)
    taken = {name: np.flatnonzero(part == k) for k, name in enumerate(PARTS)}
    return {name: np.arange(len(tables[name])) if k and name in tables else taken[name] for k, name in enumerate(PARTS)}


def limit(indices: np.ndarray, most: int, rows: int, seed: int) -> np.ndarray:
    """At most so many of these indices of train's rows, at random by the seed, ascending; 0: all.

    rows: of train's table. The rows of a lower limit are among those of a higher one.
    """
    order = _order(rows, seed)
    return np.sort(order[np.isin(order, indices)][:most]) if most else np.asarray(indices)


def shots(cells: dict[int, object], most: int, rows: int, seed: int) -> np.ndarray:
    """Of some rows of train's table at most so many of each value, at random by the seed, ascending.

    cells: index of each of these rows -> its value; rows: of train's table. The rows of fewer shots are among those of
    more.
    """
    taken = {}
    for i in _order(rows, seed).tolist():
        if i in cells:
            taken.setdefault(_key(cells[i]), []).append(i)
    return np.sort(np.concatenate([found[:most] for found in taken.values()]))


def absent(table: Table, column: str, parts: dict[str, Sequence[int]]) -> dict[str, list[str]]:
    """{value of a column: the parts without a row of it}, for values that some part lacks; as JSON text.

    parts: indices of rows of the table; parts without any row are left aside.
    """
    names = [_key(cell) for cell in table.cells(column)]
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


def _values(table: Table, column: str) -> np.ndarray:
    """(N,) which value each row has in a column, numbered as they first come; null is a value."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(_key(cell), len(number)) for cell in table.cells(column)], np.int64)


def _key(cell) -> str:
    """Cells with the same key are the same value; also of lists and objects."""
    return json.dumps(cell, sort_keys=True, default=str, ensure_ascii=False)


def _by_value(value: np.ndarray, order: np.ndarray, shares: dict[int, float], asked: str) -> np.ndarray:
    parts = np.array(list(shares))
    counts = _deal(np.bincount(value), np.array(list(shares.values())))
    for p in np.flatnonzero(counts.sum(axis=0) == 0):
        giver = int(np.argmax(counts[:, 0]))
        if counts[giver, 0] < 2:
            raise FtjaxError(
                f"{asked} has {len(counts)} values in {len(value)} rows, too few rows of each for any in "
                f"{PARTS[parts[p]]}: stratify by a column with fewer values, or name data.{PARTS[parts[p]]}"
            )
        counts[giver, 0] -= 1
        counts[giver, p] += 1
    part = np.empty(len(value), np.int64)
    part[order[np.argsort(value[order], kind="stable")]] = np.repeat(np.tile(parts, len(counts)), counts.ravel())
    return part


def _deal(sizes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(V, P) rows of each of V values for each of P parts: each within one row of sizes (V,) x shares (P,).

    By largest remainder, where what a part is owed is carried from value to value: so its total is near its share too.
    The first part gets a value's row before the others do.
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
    pairs = [np.empty((0, 2), np.int64)]
    for column in data.group:
        first: dict[str, int] = {}
        cells = enumerate(table.cells(column))
        pairs.append(np.array([(first.setdefault(_key(c), i), i) for i, c in cells if c is not None], np.int64))
    if data.group_near:
        by = sides(data, table.columns, task)
        pairs.append(near_pairs(Texts(table, telling(by, common(table, by))), data.group_near, seed))
    return clusters(np.concatenate([p.reshape(-1, 2) for p in pairs]), len(table))


def _by_group(group: np.ndarray, value: np.ndarray, order: np.ndarray, shares: dict[int, float], data) -> np.ndarray:
    firsts, which, sizes = np.unique(group, return_inverse=True, return_counts=True)
    if len(firsts) < len(shares):
        raise FtjaxError(
            f"data.group={tuple(data.group)}, data.group_near={data.group_near:g}: the {len(group)} rows make only "
            f"{len(firsts)} group{'s' * (len(firsts) > 1)}, the largest of {sizes.max()} rows, for {len(shares)} parts "
            f"({', '.join(PARTS[k] for k in shares)}): group by less, or name files for the parts"
        )
    counts = [Counter() for _ in firsts]
    for g, v in zip(which.tolist(), value.tolist()):
        counts[g][v] += 1
    total = np.bincount(value).tolist()
    lacks = {k: [share * n for n in total] for k, share in shares.items()}
    drawn = np.argsort(order)[firsts]  # when each group's first row comes in the seeded order: settles ties
    given: dict[int, list[int]] = {k: [] for k in shares}
    for g in np.lexsort((drawn, -sizes)).tolist():
        # The part whose shares of the values come out nearest: rare values weigh as much as common ones.
        k = max(shares, key=lambda k: sum(n * lacks[k][v] / total[v] for v, n in counts[g].items()))
        given[k].append(g)
        for v, n in counts[g].items():
            lacks[k][v] -= n
    for k in shares:
        if not given[k]:  # groups are too large for the share: it gets the smallest that another part can spare
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
    """Indices of the rows of train that overlap with no row of the others; and the rest, with the reason.

    Rows overlap that share GRAM words in a row in what the model reads or is to say, or where what it reads is ALIKE as
    a whole: of fewer words than that, the same. Labels, ids and other columns do not count. Texts are compared as
    `normalise`d; words of a template, which many rows of both share, are left out on both sides, and a prompt that very
    many rows have counts with its answer. Evaluation rows never go.

    Args:
        train: the rows of train.
        others: (name, rows) of each evaluation set.
        data: the config's group, see compared.sides.
        task: the same.
    """
    evaluation = _Evaluation(train, others, data, task)
    mine, removed, i = evaluation.mine, [], 0
    labels = mine.labels(train)
    for _, rows in train.chunks():
        for row in rows:
            found = evaluation.overlap(row, labels[i])
            if found:
                removed.append(Removed(i, train.place(i), "decontaminate", *found))
            i += 1
    return np.setdiff1d(np.arange(len(train)), [r.index for r in removed]), removed


class _Evaluation:
    """The rows that no row of train may overlap, indexed. E rows of all sets together."""

    def __init__(self, train: Table, others: Sequence[tuple[str, Table]], data, task):
        self.mine = sides(data, train.columns, task)
        prompts = common(train, self.mine)
        self.read = telling(self.mine, prompts)
        theirs = [(table, sides(data, table.columns, task)) for _, table in others]
        self.rows = [(name, table, j) for name, table in others for j in range(len(table))]
        self.labels = [label for table, by in theirs for label in by.labels(table)]
        sets = [[normalise(text) for text in Texts(table, by.whole)] for table, by in theirs]
        self.template = _template(Texts(train, self.mine.whole), sets)
        reads = (normalise(text) for table, by in theirs for text in Texts(table, telling(by, prompts)))
        self.shingles = [shingles(self._own(text)) for text in reads]
        self.of_gram: dict[str, int] = {}
        self.of_shingle: dict[str, list[int]] = {}
        for e, text in enumerate(itertools.chain.from_iterable(sets)):
            for gram in grams(self._own(text), GRAM):
                self.of_gram.setdefault(gram, e)
            for shingle in sorted(self.shingles[e]):
                self.of_shingle.setdefault(shingle, []).append(e)

    def overlap(self, row: dict, label: str) -> tuple[str, str, bool] | None:
        """Why a row of train overlaps with an evaluation row, that row's place, and whether its label is another; None
        where it does not."""
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
        """A normalised text without the words that are a template's."""
        return without(text, GRAM, self.template) if self.template else text

    def _alike(self, own: set[str]) -> tuple[int, float]:
        """The evaluation row most like a text, with their Jaccard similarity; exact from ALIKE on, else any below.

        A row so alike shares `need` shingles at least, so it has one of the rarest left when need - 1 are set aside.
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
    """Runs of GRAM words that many evaluation rows share, and many of train: no sign of where a row is from."""
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
