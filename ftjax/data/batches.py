"""Examples -> batches. A batch is a pure function of examples, settings, seed and step: nothing is remembered.

B rows of a batch, T tokens, M trained positions, S segments (examples) of a row, N examples, R rows of an epoch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from ftjax.data.pack import bucket_lengths, pack
from ftjax.data.tokenise import Example

GRANULE = 8  # T and M are multiples of it, so that few shapes compile


class Batches:
    """Batches by step, over as many epochs as are asked for; every example stands in each epoch exactly once.

    packing: rows hold several examples, at most max_length tokens. Otherwise a row holds one, and rows of like length
    share a batch, padded to one of at most `buckets` lengths. What does not fill a batch of one length goes up to the
    next; only the last batch of the greatest length is filled up with empty rows (weight 0). shuffle: rows are dealt
    to batches, and batches ordered, anew in each epoch by (seed, epoch); else in the order of the examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        max_length: int,
        *,
        packing: bool = False,
        buckets: int = 4,
        seed: int = 0,
        shuffle: bool = True,
    ):
        if not examples:
            raise ValueError("no examples")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.length = np.array([len(e.ids) for e in examples])  # (N,) tokens
        if self.length.max() > max_length:
            raise ValueError(f"an example has {self.length.max()} tokens, more than max_length={max_length}")
        self.start = np.concatenate([[0], np.cumsum(self.length)])[:-1]  # (N,) first token in `tokens`
        self.tokens = np.concatenate([e.ids for e in examples]).astype(np.int32)
        # A label at t + 1 is predicted from t; the first token of a segment has nothing before it.
        predicting = [np.flatnonzero(e.trained[1:]).astype(np.int32) for e in examples]
        self.labels = np.array([len(p) for p in predicting])  # (N,) trained tokens
        self.label_start = np.concatenate([[0], np.cumsum(self.labels)])[:-1]
        self.predicting = np.concatenate(predicting)  # positions t within their example
        if packing:
            rows = pack(self.length, max_length)
            self.table = np.full((len(rows), max(map(len, rows))), -1, np.int32)  # (R, S) examples of a row, -1: none
            for row, members in zip(self.table, rows):
                row[: len(members)] = members
        else:
            self.table = np.arange(len(examples), dtype=np.int32)[:, None]
        there = self.table >= 0
        row_tokens = np.where(there, self.length[self.table], 0).sum(1)
        row_labels = np.where(there, self.labels[self.table], 0).sum(1)
        self.widths = bucket_lengths(row_tokens, 1 if packing else buckets, max_length)  # T of each bucket
        self.bucket = np.searchsorted(self.widths, row_tokens)  # (R,)
        # Rows of a shorter bucket may come up into a longer one, so that its M must hold theirs too.
        most = [row_labels[self.bucket <= b].max() for b in range(len(self.widths))]
        self.label_widths = np.minimum(-(-np.array(most) // GRANULE) * GRANULE, self.widths)  # M of each bucket
        self.efficiency = float(row_tokens.sum() / self.widths[self.bucket].sum())  # share of T that is no padding
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.table) / self.batch_size)

    def shapes(self) -> list[tuple[int, int, int]]:
        """The distinct (B, T, M) that batches have."""
        used = sorted({bucket for bucket, _ in self._epoch(0)})
        return sorted({(self.batch_size, int(self.widths[b]), int(self.label_widths[b])) for b in used})

    def rows(self, step: int) -> np.ndarray:
        """Which examples make up the batch of a step: (B, S) int32, -1 where a row holds no further example."""
        epoch, at = divmod(step, len(self))
        rows = self._epoch(epoch)[at][1]
        return np.where(rows[:, None] >= 0, self.table[rows], -1)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The whole batch of a step; see `get`."""
        return self.get(step)

    def get(self, step: int, row_slice: slice = slice(None)) -> dict[str, np.ndarray]:
        """Some rows of the batch of a step.

        `tokens`, `positions` (from 0 in every segment) and `segment_ids` (from 1; 0: padding), all (B, T) int32;
        `loss_index` (B, M) int32, positions t of which the hidden state predicts; `labels` (B, M) int32, the token at
        t + 1 of the same segment; `weights` (B, M) float32, 1, or 0 for the padding of M.
        """
        epoch, at = divmod(step, len(self))
        bucket, rows = self._epoch(epoch)[at]
        rows = rows[row_slice]
        table = np.where(rows[:, None] >= 0, self.table[rows], -1)
        B, T, M = len(rows), int(self.widths[bucket]), int(self.label_widths[bucket])
        row, segment = np.nonzero(table >= 0)
        example = table[row, segment]
        length, labels = self.length[example], self.labels[example]
        column = _starts_by_row(length, row)  # of each segment within its row

        position = _ranges(length)
        to = np.repeat(row * T + column, length) + position
        batch = {name: np.zeros(B * T, np.int32) for name in ("tokens", "positions", "segment_ids")}
        batch["tokens"][to] = self.tokens[np.repeat(self.start[example], length) + position]
        batch["positions"][to] = position
        batch["segment_ids"][to] = np.repeat(segment + 1, length)

        nth = _ranges(labels)
        to = np.repeat(row * M + _starts_by_row(labels, row), labels) + nth
        predicting = self.predicting[np.repeat(self.label_start[example], labels) + nth]
        batch |= {"loss_index": np.zeros(B * M, np.int32), "labels": np.zeros(B * M, np.int32)}
        batch["weights"] = np.zeros(B * M, np.float32)
        batch["loss_index"][to] = predicting + np.repeat(column, labels)
        batch["labels"][to] = self.tokens[np.repeat(self.start[example], labels) + predicting + 1]
        batch["weights"][to] = 1
        return {name: array.reshape(B, -1) for name, array in batch.items()}

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(bucket, rows (B,) int64, -1: empty) for each step of an epoch."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch))))
        B, plan, left = self.batch_size, [], np.zeros(0, int)
        for bucket in range(len(self.widths)):
            rows = np.flatnonzero(self.bucket == bucket)
            rows = np.concatenate([left, rng.permutation(rows) if self.shuffle else rows])
            full = len(rows) - len(rows) % B
            plan += [(bucket, batch) for batch in rows[:full].reshape(-1, B)]
            left = rows[full:]
        if len(left):
            plan.append((bucket, np.concatenate([left, np.full(B - len(left), -1)])))
        return [plan[i] for i in rng.permutation(len(plan))] if self.shuffle else plan


def loader(
    batches: Batches, start_step: int, steps: int, workers: int = 2, row_slice: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `steps` steps from `start_step` on, built ahead by `workers` threads of Grain (0: none)."""
    import grain

    class Source:
        def __len__(self):
            return steps

        def __getitem__(self, i):
            return batches.get(start_step + int(i), row_slice)

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
    return iter(grain.MapDataset.source(Source()).to_iter_dataset(options))


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 1, 2, 0, 1]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _starts_by_row(lengths: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Where each segment starts in its own row, for segments in order of their (sorted) rows."""
    starts = np.cumsum(lengths) - lengths
    first = np.searchsorted(row, row)  # the first segment of the same row
    return starts - starts[first]
