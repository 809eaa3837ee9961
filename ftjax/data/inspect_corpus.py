"""The rows of all parts side by side: which say the same, which nearly."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ftjax.data.compared import Texts, common, nothing, telling
from ftjax.data.inspect_scan import Scan, fold
from ftjax.data.similar import firsts, near_pairs

NEAR = 0.8  # similarity of near duplicates where data.clean.near does not say another


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All parts, their n rows one after the other, and which of them say the same.

    starts (parts + 1,): where each part begins; first (n,): index of the first row with the same text; pairs (P, 2):
    of these first rows, those that are nearly the same, i < j; alike: all pairs, as `similar.clusters` takes them.
    """

    scans: list[Scan]
    starts: np.ndarray
    first: np.ndarray
    pairs: np.ndarray
    alike: np.ndarray
    read: Corpus | None = None  # the same by what the model reads alone, where that is not all

    def firsts(self, part: int) -> np.ndarray:
        """`first` of one part's rows."""
        return self.first[self.starts[part] : self.starts[part + 1]]

    def earliest(self, part: int) -> np.ndarray:
        """(n,): for each text, by the index of its first row anywhere, its first row in this part; -1 where none."""
        out = np.full(len(self.first), -1)
        out[self.firsts(part)[::-1]] = np.arange(self.starts[part], self.starts[part + 1])[::-1]
        return out

    def _at(self, index: int) -> tuple[Scan, int]:
        """The part of one of all rows, and its index there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.scans[part], int(index - self.starts[part])

    def place(self, index: int) -> str:
        """Where one of all rows came from."""
        scan, at = self._at(index)
        return scan.table.place(at)

    def labels(self, index: int) -> tuple[str, ...] | None:
        """The labels of one of all rows, however they are spelled; None where there are none."""
        scan, at = self._at(index)
        return None if scan.labels is None else tuple(map(fold, scan.labels[at]))


def corpus(scans: list[Scan], seed: int) -> Corpus:
    """Compare all rows of all parts with one another, by the first source's settings: by all that counts of a row, and
    by what the model reads."""
    whole = _compared(scans, [scan.by.whole for scan in scans], seed)
    if all(scan.by.said is nothing for scan in scans):
        return whole
    prompts = set().union(*(common(scan.table, scan.by) for scan in scans))
    read = _compared(scans, [telling(scan.by, prompts) for scan in scans], seed)
    return dataclasses.replace(whole, read=read)


def _compared(scans: list[Scan], text_of: list[Callable[[dict], str]], seed: int) -> Corpus:
    texts = _Texts([Texts(scan.table, text) for scan, text in zip(scans, text_of, strict=True)])
    if not scans[0].data.streaming:
        texts = list(texts)
    first = firsts(texts)
    alike = near_pairs(texts, near(scans[0].data), seed)
    # Of identical texts, `near_pairs` joins each to the first; what it joins besides is merely similar.
    nearly = first[alike[:, 1]] == alike[:, 1]
    return Corpus(scans, np.cumsum([0, *map(len, scans)]), first, alike[nearly], alike)


class _Texts(Sequence[str]):
    """The texts of all parts, one after the other."""

    def __init__(self, parts: list[Texts]):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts)

    def __getitem__(self, index: int) -> str:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - int(self.starts[part])]


def near(data) -> float:
    """The similarity from which rows are near duplicates."""
    return data.clean.near or NEAR
