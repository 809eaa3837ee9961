"""Comparison of the rows of all parts: which are equal, and which are similar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ftjax.data.compared import Texts, common, nothing, telling
from ftjax.data.inspect_scan import Scan
from ftjax.data.similar import firsts, near_pairs

NEAR = 0.8  # similarity of near duplicates if data.clean.near is not set


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
