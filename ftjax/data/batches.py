"""Examples -> batches. A batch is a pure function of examples, settings, seed and step; there is no state.

B rows of a batch, T tokens, M trained positions, N examples, R rows that the examples fill, Z sources.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ftjax.data.masks import Masking
from ftjax.data.pack import bucket_lengths, pack
from ftjax.data.store import Examples
from ftjax.data.tokenise import Example
from ftjax.hub.weights import whole

GRANULE = 8  # M is rounded up to a multiple of it, so that few shapes are compiled
POISSON_PARTS = 8  # of a batch of Poisson
LEAST = 8  # fewest rows a step outside of training, where rows cost little memory


class Batches:
    """Batches by step, over any number of epochs. Without `shares`, every epoch has each example once.

    Args:
        examples: The N examples.
        batch_size: B.
        max_length: Most tokens of a row.
        packing: Whether a row holds several examples. Otherwise a row holds one example, and rows of similar length
            share a batch that is padded to one of at most `buckets` lengths. Rows that do not fill a batch of one
            length move to the next longer one. Only the last batch of the greatest length is filled up with empty rows
            (weight 0).
        buckets: Most padded lengths without packing.
        seed: Seed of the order, and of masks.
        shuffle: Whether rows are distributed to batches, and batches ordered, anew in each epoch by (seed, epoch).
            Otherwise they keep the order of the examples.
        source: (N,) index of each example's source; needed with `shares`.
        shares: (Z,) share of each source. An epoch still has about N examples, of which each source contributes its
            share. A source goes through its rows in an order shuffled by (seed, source, pass) and then starts the next
            pass, so that over all epochs none of its rows occurs more than once more often than another. With packing,
            a row holds examples of one source only.
        factors: (N,) float32, factor of an example's weights; None: all are 1.
        ways: Number of parts into which each row is split. T and M are multiples of it, T even if max_length is not.
        class_weights: (C,) weight of a label by its class; None: all weights are 1.
        masking: See ftjax.data.masks. The trained tokens are then those that may be masked. The masks depend on (seed,
            epoch, example) only.
        apart: Whether the second text of an example is a segment of its own, with positions from 0.

    Raises:
        ValueError: If there are no examples, or if one is longer than max_length.
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
        source: np.ndarray | None = None,
        shares: Sequence[float] | None = None,
        factors: np.ndarray | None = None,
        ways: int = 1,
        class_weights: np.ndarray | None = None,
        masking: Masking | None = None,
        apart: bool = False,
    ):
        examples = Examples.of(examples)
        N = len(examples)
        if not N:
            raise ValueError("no examples")
        self.examples, self.batch_size, self.seed, self.shuffle = examples, batch_size, seed, shuffle
        self.class_weights, self.masking, self.apart, self.factors = class_weights, masking, apart, factors
        self.paired = not apart and bool(examples.second.any())
        if examples.length.max() > max_length:
            raise ValueError(f"an example has {examples.length.max()} tokens, more than max_length={max_length}")
        groups = [np.arange(N)] if shares is None else [np.flatnonzero(source == z) for z in range(len(shares))]
        if packing:
            lists = [group[row] for group in groups for row in pack(examples.length[group], max_length)]
            self.members = np.concatenate(lists)  # (N,) examples, row by row
            self.sizes = np.array([len(row) for row in lists])  # (R,) examples of each row
        else:
            self.members, self.sizes = np.concatenate(groups), np.ones(N, int)
        self.first = np.cumsum(self.sizes) - self.sizes  # (R,) where each row begins in `members`
        row_tokens = np.add.reduceat(examples.length[self.members], self.first)
        labels = examples.labels if masking is None else masking.count(examples.labels)
        row_labels = np.add.reduceat(labels[self.members], self.first)
        self.widths = bucket_lengths(row_tokens, 1 if packing else buckets, max_length)
        self.widths = -(-self.widths // ways) * ways  # T of each bucket
        self.bucket = np.searchsorted(self.widths, row_tokens)  # (R,)
        # Rows of a shorter bucket may move up to a longer one, whose M must be large enough for them too.
        most = [row_labels[self.bucket <= b].max() for b in range(len(self.widths))]
        granule = math.lcm(GRANULE, ways)
        self.label_widths = np.minimum(-(-np.array(most) // granule) * granule, self.widths)  # M of each bucket
        self.streams = None if shares is None else self._streams(groups, source, np.asarray(shares, float))
        dealt = np.arange(len(self.sizes)) if self.streams is None else self._dealt(0)
        # Share of T that is not padding, in full batches.
        self.efficiency = float(row_tokens[dealt].sum() / self.widths[self.bucket[dealt]].sum())
        self.rows_per_epoch = len(dealt)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _streams(self, groups, source, shares) -> list[tuple[np.ndarray, int]]:
        """(rows, number of them in an epoch) of each source."""
        row_source, N = source[self.members[self.first]], len(self.members)
        streams = []
        for z, share in enumerate(shares / shares.sum()):
            rows = np.flatnonzero(row_source == z)
            per_row = len(groups[z]) / len(rows)  # examples
            streams.append((rows, max(1, round(share * N / per_row))))
        return streams

    def _dealt(self, epoch: int) -> np.ndarray:
        """The rows of an epoch if sources have shares."""
        out = []
        for z, (rows, count) in enumerate(self.streams):
            at = np.arange(epoch * count, (epoch + 1) * count)
            for turn in range(at[0] // len(rows), at[-1] // len(rows) + 1):
                rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(z, turn))))
                order = rng.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
                out.append(rows[order[at[at // len(rows) == turn] % len(rows)]])
        return np.concatenate(out)

    def __len__(self) -> int:
        """Number of steps of an epoch."""
        return math.ceil(self.rows_per_epoch / self.batch_size)

    def shapes(self) -> list[tuple[int, int, int]]:
        """The distinct shapes (B, T, M) of the batches."""
        used = sorted({bucket for bucket, _ in self._epoch(0)})
        return sorted({(self.batch_size, int(self.widths[b]), int(self.label_widths[b])) for b in used})

    def rows(self, step: int) -> list[np.ndarray]:
        """The indices of the examples in each row of a step's batch. An empty row has none."""
        members, sizes = self._members(self._at(step)[1])
        return np.split(members, np.cumsum(sizes)[:-1])

    def _at(self, step: int) -> tuple[int, np.ndarray]:
        epoch, at = divmod(step, len(self))
        return self._epoch(epoch)[at]

    def _members(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(examples of these rows one after another, their number in each row)."""
        sizes = np.where(rows >= 0, self.sizes[rows], 0)
        return self.members[np.repeat(self.first[rows], sizes) + _ranges(sizes)], sizes

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The whole batch of a step; see `get`."""
        return self.get(step)

    def get(self, step: int, row_slice: slice = slice(None)) -> dict[str, np.ndarray]:
        """Some rows of the batch of a step.

        Args:
            step: The step, from 0; steps of later epochs follow those of earlier ones.
            row_slice: Which rows of the batch are built.

        Returns:
            A dict of arrays:
            - `tokens`, `positions` (from 0 in every segment) and `segment_ids` (from 1; 0: padding), all (B, T) int32.
            - `loss_index` (B, M) int32, the positions t whose hidden state predicts a label.
            - `labels` (B, M) int32, the token at t + 1 of the same segment. For examples with targets: (B, M, ...),
              their targets, predicted from the state at t. With masking: the original tokens, some of which are
              replaced in `tokens`.
            - `weights` (B, M) float32: 1, or the label's class weight, times the factor of its example; 0 for the
              padding of M.
            - `types` (B, T) int32, only if Example.second is not 0 for some example and `apart` is not set: 1 for
              tokens of a second text.
        """
        bucket, rows = self._at(step)
        rows, ex = rows[row_slice], self.examples
        B, T, M = len(rows), int(self.widths[bucket]), int(self.label_widths[bucket])
        example, sizes = self._members(rows)
        row, segment = np.repeat(np.arange(B), sizes), _ranges(sizes)
        length = ex.length[example]
        position = _ranges(length)
        row_of, column = np.repeat(row, length), np.repeat(_starts_by_row(length, row), length) + position
        source = np.repeat(ex.start[example], length) + position
        tokens, trained = ex.ids[source], ex.trained[source]
        batch = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions", "segment_ids")}
        batch["tokens"][row_of, column] = tokens
        batch["positions"][row_of, column] = position
        batch["segment_ids"][row_of, column] = np.repeat(segment + 1, length)

        second = np.repeat(ex.second[example], length)
        behind = (second > 0) & (position >= second)
        if self.paired:
            batch["types"] = np.zeros((B, T), np.int32)
            batch["types"][row_of, column] = behind
        if self.apart:
            batch["positions"][row_of, column] = position - second * behind
            batch["segment_ids"][row_of, column] = 2 * np.repeat(segment, length) + 1 + behind

        if self.masking:
            label, shown = self._masked(step // len(self), example, np.cumsum(length) - length, tokens, trained)
            values, back = tokens[label], 0
            batch["tokens"][row_of[label], column[label]] = shown
        elif ex.targets is None:
            # A label is predicted from the position before it, which the first token of a segment does not have.
            label = np.flatnonzero(trained & (position > 0))
            values, back = tokens[label], 1
        else:
            label = np.flatnonzero(trained)
            values, back = ex.targets[np.repeat(ex.first[example], ex.labels[example]) + _ranges(ex.labels[example])], 0
        row_of, column = row_of[label], column[label]
        nth = np.arange(len(label)) - np.searchsorted(row_of, row_of)  # within its row
        batch["loss_index"] = np.zeros((B, M), np.int32)
        batch["labels"] = np.zeros((B, M, *values.shape[1:]), values.dtype)
        batch["weights"] = np.zeros((B, M), np.float32)
        batch["loss_index"][row_of, nth] = column - back
        batch["labels"][row_of, nth] = values
        batch["weights"][row_of, nth] = 1 if self.class_weights is None else self.class_weights[values]
        if self.factors is not None:
            batch["weights"][row_of, nth] *= self.factors[np.repeat(example, length)[label]]
        return batch

    def _masked(self, epoch: int, example, start, tokens, trained) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the masked tokens among `tokens`, the tokens that replace them) for these examples.

        `start` holds the index in `tokens` at which each example begins.
        """
        ex, chosen, shown = self.examples, [np.zeros(0, int)], [np.zeros(0, np.int32)]
        for i, at in zip(example.tolist(), start.tolist()):
            able = at + np.flatnonzero(trained[at : at + ex.length[i]])
            word = ex.targets[ex.first[i] : ex.first[i] + ex.labels[i]]
            drawn, instead = self.masking.draw((self.seed, epoch, i), tokens[able], word)
            chosen.append(able[drawn])
            shown.append(instead)
        return np.concatenate(chosen), np.concatenate(shown)

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(bucket, rows (B,) int64, -1: an empty row) for each step of an epoch."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch))))
        dealt = np.arange(len(self.sizes)) if self.streams is None else self._dealt(epoch)
        B, plan, left = self.batch_size, [], np.zeros(0, int)
        for bucket in range(len(self.widths)):
            rows = dealt[self.bucket[dealt] == bucket]
            rows = np.concatenate([left, rng.permutation(rows) if self.shuffle else rows])
            full = len(rows) - len(rows) % B
            plan += [(bucket, batch) for batch in rows[:full].reshape(-1, B)]
            left = rows[full:]
        if len(left):
            plan.append((bucket, np.concatenate([left, np.full(B - len(left), -1)])))
        return [plan[i] for i in rng.permutation(len(plan))] if self.shuffle else plan


class Poisson(Batches):
    """Batches for which every step draws each unit independently, with the same probability (Poisson sampling).

    A unit is an example, or all examples of a person. It has K neighbouring rows, as many as the largest unit fills;
    those of a smaller one are filled up with empty rows. The units of a step depend on the seed and the step alone.
    Steps have different numbers of units; all batches have the number of rows that the fullest step needs, so that none
    is left out. Units of similar length stand beside each other in each of POISSON_PARTS parts of a batch, which
    devices may share, so that a step can compute groups of them without the padding that none of them needs. All
    batches therefore have the length of the longest example, and one program computes them.

    Args:
        examples: The N examples.
        batch_size: Expected number of units of a step; each is drawn with probability batch_size / number of units.
        max_length: Most tokens of a row.
        steps: Number of steps. Later ones cannot be built.
        multiple: The number of rows is a multiple of K times it.
        unit: (N,) number of each example's unit, from 0; None: each example is a unit.
        most: Examples of a unit that are used at all, drawn by the seed where it has more; 0: all of them.
        options: See Batches; `buckets` has no effect.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, max_length: int, *, steps: int, multiple: int, unit=None,
        most: int = 0, **options,
    ):  # fmt: skip
        super().__init__(examples, batch_size, max_length, **options | {"buckets": 1})
        unit = np.arange(len(self.sizes)) if unit is None else unit
        order = np.argsort(unit, kind="stable")
        if most and np.bincount(unit).max() > most:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(steps, most))))
            shuffled = rng.permutation(len(unit))
            order = shuffled[np.argsort(unit[shuffled], kind="stable")]
            order = order[_ranges(np.bincount(unit)) < most]
        unit = unit[order]
        counts = np.bincount(unit)
        self.units = np.full((len(counts) + 1, counts.max()), -1)  # (number of units + 1, K) rows; the last has none
        self.units[unit, _ranges(counts)] = order
        self.longest = np.maximum.reduceat(self.examples.length[order], np.cumsum(counts) - counts)
        self.expected, self.steps, self.rate = batch_size, steps, batch_size / len(counts)
        fullest = max(self._count(step)[0] for step in range(steps))
        self.slots = -(-max(1, fullest) // multiple) * multiple
        self.batch_size = self.slots * self.units.shape[1]

    def __len__(self) -> int:
        return math.ceil(len(self.longest) / self.expected)

    def shapes(self) -> list[tuple[int, int, int]]:
        return sorted((self.batch_size, int(T), int(M)) for T, M in zip(self.widths, self.label_widths, strict=True))

    def _count(self, step: int) -> tuple[int, np.random.Generator]:
        """(number of units of a step, the generator that then draws them)."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(step,))))
        return int(rng.binomial(len(self.longest), self.rate)), rng

    def _at(self, step: int) -> tuple[int, np.ndarray]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        # Independent draws are a binomial number of units, of which all sets are equally probable.
        count, rng = self._count(step)
        drawn = rng.choice(len(self.longest), count, replace=False)
        drawn = drawn[np.argsort(self.longest[drawn], kind="stable")]
        drawn = np.pad(drawn, (self.slots - count, 0), constant_values=-1)
        return 0, self.units[drawn.reshape(-1, math.gcd(self.slots, POISSON_PARTS)).T.ravel()].ravel()


def by_example(
    f: Callable, examples, rows: int, max_length: int, buckets: int = 8, *, whole_rows: bool = False, **layout
) -> list[np.ndarray]:
    """Apply a function to batches of the examples, and return its results by example.

    Args:
        f: f(batch) -> (B, M, ...); with `whole_rows` (B, T, ...).
        examples: The examples.
        rows: Rows of a batch. The number is lowered to that of the examples, and then raised to at least LEAST.
        max_length: Most tokens of a row.
        buckets: See Batches.
        whole_rows: Whether there is one result for each token, instead of one for each trained position.
        layout: Further arguments of Batches.

    Returns:
        The results (n, ...) of each example, in the order of the examples: n is the number of its trained positions, or
        with `whole_rows` of its tokens.
    """
    examples = Examples.of(examples)
    rows = max(LEAST, min(rows, len(examples)))
    batches = Batches(examples, rows, max_length, buckets=buckets, shuffle=False, **layout)
    counts = examples.length if whole_rows else examples.labels
    found: list[np.ndarray] = [None] * len(examples)
    for step in range(len(batches)):
        results = whole(f(batches[step]))
        for result, members in zip(results, batches.rows(step), strict=True):
            at = 0
            for example in members:
                found[example] = result[at : at + counts[example]]
                at += counts[example]
    return found


def loader(
    batches: Batches, start_step: int, steps: int, workers: int = 2, row_slice: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `steps` steps from `start_step` on, built ahead by threads of Grain.

    Args:
        batches: The batches.
        start_step: The first step.
        steps: Number of steps.
        workers: Number of threads; 0: none.
        row_slice: See Batches.get.
    """
    import grain

    built = grain.MapDataset.range(start_step, start_step + steps).map(lambda step: batches.get(step, row_slice))
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
    return iter(built.to_iter_dataset(options))


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 1, 2, 0, 1]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _starts_by_row(lengths: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The offset of each segment in its own row, for segments in the order of their (sorted) rows."""
    starts = np.cumsum(lengths) - lengths
    first = np.searchsorted(row, row)  # the first segment of the same row
    return starts - starts[first]
