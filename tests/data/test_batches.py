"""Batches: every token and label of every row once an epoch, in its place; any step and slice reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.batches import Batches, loader
from ftjax.data.tokenise import Example

KEYS = {"tokens", "positions", "segment_ids", "loss_index", "labels", "weights"}


def make(lengths, seed=0):
    """Examples with tokens that tell them apart (row * 100 + place) and a random mask; the first is never trained."""
    rng = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate(lengths, 1):
        trained = rng.random(length) < 0.6
        trained[0], trained[-1] = False, True
        examples.append(Example(row * 100 + np.arange(length, dtype=np.int32), trained))
    return examples


def segments(batch):
    """[(tokens of a segment, its trained mask as the labels tell it)], read off a batch the slow way."""
    out = []
    for b in range(len(batch["tokens"])):
        tokens, ids = batch["tokens"][b], batch["segment_ids"][b]
        trained = np.zeros(len(tokens) + 1, bool)
        for t, label, weight in zip(*(batch[k][b] for k in ("loss_index", "labels", "weights"))):
            if weight:
                assert weight == 1 and ids[t] == ids[t + 1] != 0 and label == tokens[t + 1] and not trained[t + 1]
                trained[t + 1] = True
            else:
                assert (t, label, weight) == (0, 0, 0)
        for segment in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == segment)
            assert (np.diff(at) == 1).all() and (batch["positions"][b][at] == np.arange(len(at))).all()
            out.append((tokens[at].tolist(), trained[at].tolist()))
        assert not tokens[ids == 0].any() and not batch["positions"][b][ids == 0].any()
    return out


SETTINGS = dict(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    packing=st.booleans(),
    buckets=st.integers(1, 4),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)


@settings(deadline=None, max_examples=60)
@given(**SETTINGS)
def test_each_epoch_holds_every_row_once_and_nothing_else(lengths, batch_size, packing, buckets, shuffle, seed):
    examples = make(lengths)
    b = Batches(examples, batch_size, 37, packing=packing, buckets=buckets, seed=seed, shuffle=shuffle)
    expected = sorted((e.ids.tolist(), e.trained.tolist()) for e in examples)
    for epoch in (0, 2):
        found, shapes = [], set()
        for step in range(epoch * len(b), (epoch + 1) * len(b)):
            batch = b[step]
            assert batch.keys() == KEYS
            assert all(v.dtype == (np.float32 if k == "weights" else np.int32) for k, v in batch.items())
            shapes.add((*batch["tokens"].shape, batch["labels"].shape[1]))
            assert batch["labels"].shape[1] <= batch["tokens"].shape[1] <= 37
            rows = segments(batch)
            assert sorted(rows) == sorted(expected_rows(examples, b.rows(step)))
            found += rows
        assert sorted(found) == expected
        assert sorted(shapes) == b.shapes() and len(shapes) <= (1 if packing else buckets)


def expected_rows(examples, rows):
    return [(examples[i].ids.tolist(), examples[i].trained.tolist()) for row in rows for i in row]


@settings(deadline=None, max_examples=40)
@given(**SETTINGS, step=st.integers(0, 50), hosts=st.sampled_from([1, 2, 4]))
def test_any_step_again_and_in_slices(lengths, batch_size, packing, buckets, shuffle, seed, step, hosts):
    def build():
        return Batches(
            make(lengths), batch_size * hosts, 30, packing=packing, buckets=buckets, seed=seed, shuffle=shuffle
        )

    whole, other = build()[step], build()
    other[0], other[step + 3]
    slices = [other.get(step, slice(h * batch_size, (h + 1) * batch_size)) for h in range(hosts)]
    for key in KEYS:
        np.testing.assert_array_equal(whole[key], np.concatenate([s[key] for s in slices]))


def test_rows_of_like_length_share_a_batch():
    lengths = [8] * 64 + [64] * 64
    b = Batches(make(lengths), 16, 512, buckets=2)
    assert [shape[1] for shape in b.shapes()] == [8, 64] and b.efficiency == 1.0
    assert all(len({lengths[i] for row in b.rows(step) for i in row}) == 1 for step in range(len(b)))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_split_divide(packing):
    b = Batches(make([5, 18, 37, 37, 61]), 2, 61, buckets=3, packing=packing, ways=12)
    assert all(T % 12 == 0 and M % 12 == 0 for _, T, M in b.shapes())
    assert sum(np.count_nonzero(b[step]["segment_ids"]) for step in range(len(b))) == 5 + 18 + 37 + 37 + 61


def test_order_follows_seed_and_epoch():
    def orders(**options):
        b = Batches(make([9] * 40), 4, 16, **options)
        return [
            np.concatenate([np.concatenate(b.rows(s)) for s in range(e * len(b), (e + 1) * len(b))]) for e in (0, 1)
        ]

    (first, second), (again, _), (other, _) = orders(seed=1), orders(seed=1), orders(seed=2)
    assert (first == again).all() and (first != second).any() and (first != other).any()
    assert [o.tolist() for o in orders(shuffle=False)] == [list(range(40))] * 2


def test_only_one_batch_of_an_epoch_is_filled_up():
    b = Batches(make(np.random.default_rng(0).integers(2, 60, 101)), 8, 64, buckets=4)
    empty = [sum(len(row) == 0 for row in b.rows(step)) for step in range(len(b))]
    assert len(b) == 13 and sorted(empty) == [0] * 12 + [3]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    packing=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_mixture_gives_each_source_its_share_and_each_of_its_rows_its_turn(sizes, weights, packing, seed):
    source = np.repeat(np.arange(len(sizes)), sizes)
    shares = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
    lengths = np.random.default_rng(seed).integers(2, 30, len(source))
    b = Batches(make(lengths), 4, 30, packing=packing, seed=seed, source=source, shares=shares)
    epochs = 5
    rows = [r for step in range(epochs * len(b)) for r in b.rows(step) if len(r)]
    assert all(len(set(source[r])) == 1 for r in rows)
    per_epoch = len(rows) / epochs
    dealt = np.bincount([source[r[0]] for r in rows], minlength=len(sizes))
    seen = np.bincount(np.concatenate(rows), minlength=len(source))
    for z, share in enumerate(shares):
        mine = seen[source == z]
        assert mine.max() - mine.min() <= 1
        if not packing:
            # Rounded once an epoch, and every source comes at least once.
            assert abs(dealt[z] / epochs - max(1, share * len(source))) <= 0.5 + 1e-9
    if not packing:
        assert abs(per_epoch - len(source)) <= len(sizes)
    again = Batches(make(lengths), 4, 30, packing=packing, seed=seed, source=source, shares=shares)
    last = epochs * len(b) - 1
    assert all((x == y).all() for x, y in zip(again.rows(last), b.rows(last), strict=True))


def test_packed_rows_of_a_mixture_hold_its_shares_of_examples():
    lengths, source = np.repeat([4, 20], 300), np.repeat([0, 1], 300)
    b = Batches(make(lengths), 4, 60, packing=True, source=source, shares=[0.75, 0.25])
    seen = np.bincount(source[np.concatenate([r for step in range(len(b)) for r in b.rows(step)])])
    assert abs(seen[0] / seen.sum() - 0.75) < 0.01 and abs(seen.sum() - 600) < 15


def test_examples_must_fit():
    with pytest.raises(ValueError, match="an example has 9 tokens, more than max_length=8"):
        Batches(make([3, 9]), 2, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_starts_anywhere(workers):
    b = Batches(make([5, 9, 17] * 20), 4, 32, packing=True)
    found = list(loader(b, 3, 7, workers, row_slice=slice(1, 3)))
    assert len(found) == 7
    for step, batch in enumerate(found, 3):
        for key, value in b.get(step, slice(1, 3)).items():
            np.testing.assert_array_equal(batch[key], value)
