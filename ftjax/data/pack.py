"""Which rows are packed together, and to which lengths batches are padded. Both depend on the rows' lengths only."""

from __future__ import annotations

import numpy as np

SHORT = 32  # mean tokens of a row below which padded lengths are multiples of 4 instead of 8


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of the rows in each packed row. No row is cut, dropped or repeated.

    The method is first-fit decreasing, one packed row after another. A packed row begins with the longest row that is
    left, and continues with the longest that still fits; but two rows that fill it exactly are preferred. (With them
    0.996 of the packed tokens of GSM8K are useful at a length of 1,024; without, 0.987.) The same lengths give the same
    packing. Sets of lengths are stored as the bits of an integer, so that each choice takes a few shifts.

    Args:
        lengths: (N,) int, each from 1 to `capacity` tokens.
        capacity: Most tokens of a packed row.

    Raises:
        ValueError: If a length is out of range.
    """
    lengths = np.asarray(lengths, int)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, found {lengths.min()}..{lengths.max()}")
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    for index in range(len(lengths) - 1, -1, -1):
        waiting[lengths[index]].append(index)
    there = sum(1 << n for n in range(capacity + 1) if waiting[n])
    mirror = sum(1 << (capacity - n) for n in range(capacity + 1) if waiting[n])
    packed = []
    while there:
        row, space = [], capacity
        while fitting := there & ((2 << space) - 1):
            n = fitting.bit_length() - 1
            if row and n < space:
                pairs = there & (mirror >> (capacity - space))  # every length n for which a row of space - n is left
                n = (pairs or fitting).bit_length() - 1
            row.append(waiting[n].pop())
            space -= n
            if not waiting[n]:
                there ^= 1 << n
                mirror ^= 1 << (capacity - n)
        packed.append(row)
    return packed


def bucket_lengths(lengths: np.ndarray, buckets: int, max_length: int) -> np.ndarray:
    """Choose the lengths to which rows are padded, so that the fewest tokens are wasted on padding.

    Each row is padded to the next length. The choice is exact, by dynamic programming over at most 256 quantiles of the
    rows' lengths.

    Args:
        lengths: (N,) int, tokens of each row.
        buckets: Most lengths to choose.
        max_length: Cap of the last length.

    Returns:
        int64, ascending. They are multiples of 8, or of 4 if the rows are so short that multiples of 8 would waste
        much; the last one may be `max_length` instead.
    """
    step = 8 if np.mean(lengths) >= SHORT else 4
    candidates, counts = np.unique(-(-np.asarray(lengths) // step) * step, return_counts=True)
    if len(candidates) > 256:
        keep = np.unique(np.quantile(np.arange(len(candidates)), np.linspace(0, 1, 256), method="higher").astype(int))
        counts = np.add.reduceat(counts, np.concatenate([[0], keep[:-1] + 1]))
        candidates = candidates[keep]
    n = len(candidates)
    total = np.concatenate([[0], np.cumsum(counts)])  # rows no longer than the first i candidates
    cost = (total[None, 1:] - total[:-1, None]) * candidates[None, :]  # [i, j]: candidates i..j padded to the j-th
    cost = np.where(np.arange(n)[:, None] <= np.arange(n)[None, :], cost, np.iinfo(np.int64).max // 4)
    best, starts = cost[0], [np.zeros(n, int)]
    for _ in range(min(buckets, n) - 1):
        choices = np.concatenate([[0], best[:-1]])[:, None] + cost
        starts.append(choices.argmin(0))
        best = choices.min(0)
    ends, j = [], n - 1
    for start in reversed(starts):
        ends.append(j)
        if start[j] == 0:
            break
        j = start[j] - 1
    return np.minimum(candidates[ends[::-1]], max_length)
