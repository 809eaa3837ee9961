"""Packing and bucket lengths against the plain, slow way of doing the same."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ftjax.data.pack import SHORT, bucket_lengths, pack
from ftjax.data.read import read_table

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def first_fit_decreasing(lengths, capacity):
    rows, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, space in enumerate(free) if space >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


@settings(deadline=None)
@given(LENGTHS, st.integers(40, 100))
def test_packing_conserves_rows_and_leaves_no_room_for_a_later_one(lengths, capacity):
    packed = pack(lengths, capacity)
    assert sorted(itertools.chain(*packed)) == list(range(len(lengths)))
    free = [capacity - sum(lengths[i] for i in row) for row in packed]
    assert min(free) >= 0
    for at, space in enumerate(free):
        assert all(lengths[i] > space for row in packed[at + 1 :] for i in row)
    assert pack(np.array(lengths), capacity) == packed


REAL = {
    "gsm8k": ("gsm8k/train.jsonl", "question", "answer"),
    "dolly": ("instruct/dolly_hhrlhf_train_small.jsonl", "prompt", "response"),
}


@pytest.mark.parametrize("capacity, share", [(512, 0.98), (1024, 0.99)])
@pytest.mark.parametrize("name", REAL)
def test_packing_is_tight_on_real_rows(shared, name, capacity, share):
    """And at least as tight as first-fit decreasing, on a part of them; rows longer than a packed one are cut."""
    path, *columns = REAL[name]
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    texts = ["\n".join(row[c] for c in columns) for row in read_table(str(shared / "data" / path))]
    lengths = [min(len(ids) + 1, capacity) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    packed = pack(lengths, capacity)
    assert sum(lengths) / (len(packed) * capacity) >= share
    assert len(pack(lengths[:1000], capacity)) <= len(first_fit_decreasing(lengths[:1000], capacity))


def test_packing_refuses_rows_that_do_not_fit():
    assert pack([], 8) == []
    for lengths in ([9], [0]):
        with pytest.raises(ValueError, match="lengths must lie in 1..8"):
            pack(lengths, 8)


def test_packing_is_fast_and_tight():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 100_000), 1, 1024).astype(int)
    start = time.perf_counter()
    rows = pack(lengths, 1024)
    assert time.perf_counter() - start < 5  # well under 1 s on a free machine
    assert lengths.sum() / (len(rows) * 1024) > 0.99
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_bucket_lengths_waste_least(lengths, buckets):
    def padded(widths):
        return sum(min(w for w in widths if w >= n) for n in lengths)

    found, step = bucket_lengths(lengths, buckets, 1000), 8 if np.mean(lengths) >= SHORT else 4
    assert len(found) <= buckets and (found % step == 0).all() and (np.diff(found) > 0).all()
    top = -(-max(lengths) // step) * step
    assert found[-1] == top
    others = range(step, top, step)
    assert padded(found) == min(
        padded([*some, top]) for k in range(buckets) for some in itertools.combinations(others, min(k, len(others)))
    )


def test_bucket_lengths_of_many_lengths_cover_all():
    lengths = np.arange(1, 20_001)
    found = bucket_lengths(lengths, 4, 19_999)
    assert len(found) == 4 and found[-1] == 19_999
    assert np.abs(found - np.array([5_000, 10_000, 15_000, 20_000])).max() < 200
