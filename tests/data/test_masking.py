"""Masked tokens: how many, which, what stands there; drawn by (seed, epoch, example) and by nothing else."""

import collections

import numpy as np
import pytest
from tiny_words import wordpiece

from ftjax.data.batches import Batches
from ftjax.data.labelled import Labelled
from ftjax.data.masks import Masking
from ftjax.errors import FtjaxError

TEXTS = ["The quick brown foxes jumped over a remarkably lazy dog.", "Sphinx of black quartz, judge my vow!"] * 40
TEXTS = [f"{text} {i} times around." for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece(TEXTS, 120)


def examples(tokenizer, max_length=24):
    how = Labelled("masked", "text", "", "", (), "", max_length)
    return how.encode(tokenizer, [{"text": text} for text in TEXTS], [f"row {i}" for i in range(len(TEXTS))])


def test_pieces_hold_every_token_once_between_special_ones(tokenizer):
    found = examples(tokenizer)
    by_row = collections.defaultdict(list)
    for example in found:
        assert example.ids[0] == tokenizer.cls_token_id and example.ids[-1] == tokenizer.sep_token_id
        assert len(example.ids) <= 24 and not example.trained[[0, -1]].any() and example.trained[1:-1].all()
        assert len(example.targets) == example.trained.sum()
        by_row[example.row].append(example)
    assert len(found) > len(TEXTS)
    whole = tokenizer(TEXTS)
    for i, pieces in by_row.items():
        assert np.concatenate([p.ids[1:-1] for p in pieces]).tolist() == whole["input_ids"][i][1:-1]
        assert np.concatenate([p.targets for p in pieces]).tolist() == whole.word_ids(i)[1:-1]


@pytest.mark.parametrize("whole_words", [False, True])
def test_as_many_as_asked_are_masked_and_most_are_out_of_sight(whole_words, tokenizer):
    masking = Masking(0.15, whole_words, 4, 1000)
    rng = np.random.default_rng(0)
    kinds, count = collections.Counter(), 0
    for key in range(800):
        n = int(rng.integers(1, 80))
        word = np.cumsum(rng.random(n) < 0.6)
        tokens = rng.integers(2000, 3000, n)
        places, shown = masking.draw((key,), tokens, word)
        assert 1 <= len(places) <= masking.count(n) and (np.diff(places) > 0).all()
        if not whole_words:
            assert len(places) == max(1, round(0.15 * n))
        elif masking.count(n) >= np.bincount(word).max():
            for w in np.unique(word[places]):
                assert np.isin(np.flatnonzero(word == w), places).all()
        kinds["mask"] += (shown == 4).sum()
        kinds["same"] += (shown == tokens[places]).sum()
        count += len(places)
    assert abs(kinds["mask"] / count - 0.8) < 0.02 and abs(kinds["same"] / count - 0.1) < 0.02


@pytest.mark.parametrize("packing", [False, True])
def test_masks_are_of_the_epoch_and_the_example_alone(packing, tokenizer):
    found, masking = examples(tokenizer), Masking(0.15, False, tokenizer.mask_token_id, len(tokenizer))

    def masked(batches, step, rows=slice(None)):
        """example -> (its tokens as shown, its labels)."""
        batch, out = batches.get(step, rows), {}
        for b, members in enumerate(batches.rows(step)[rows]):
            place, nth = 0, 0
            for i in members:
                n, k = batches.examples.length[i], masking.count(batches.examples.labels[i])
                own = slice(nth, nth + k)
                index = batch["loss_index"][b, own] - place
                shown = batch["tokens"][b, place : place + n]
                original = shown.copy()
                original[index] = batch["labels"][b, own]
                np.testing.assert_array_equal(original, batches.examples[i].ids)
                assert batches.examples[i].trained[index].all() and (batch["weights"][b, own] == 1).all()
                out[int(i)] = shown.tobytes()
                place, nth = place + n, nth + k
            assert not batch["weights"][b, nth:].any()
        return out

    def epoch(batches, number):
        out = {}
        for step in range(number * len(batches), (number + 1) * len(batches)):
            out |= masked(batches, step)
        return out

    how = {"packing": packing, "masking": masking, "seed": 3}
    eight = Batches(found, 8, 64 if packing else 24, **how)
    one, two = epoch(eight, 0), epoch(eight, 1)
    assert len(one) == len(found) and np.mean([one[i] == two[i] for i in one]) < 0.2
    # however rows are dealt to batches, on one host or two, from whichever step on
    assert epoch(Batches(found, 4, 64 if packing else 24, **how), 1) == two
    fresh = Batches(found, 8, 64 if packing else 24, **how)
    step = len(fresh) + 2
    parts = [masked(fresh, step, rows) for rows in (slice(0, 4), slice(4, 8))]
    assert parts[0] | parts[1] == masked(eight, step)
    # and on validation rows they are the same each time
    held_out = Batches(found, 8, 64 if packing else 24, shuffle=False, **how)
    assert epoch(held_out, 0) == one


def test_a_tokenizer_must_have_a_mask(tokenizer, shared):
    from transformers import AutoTokenizer

    from ftjax import config
    from ftjax.tasks.masked import layout

    c = config.default()
    c.task.kind = "masked"
    assert layout(c, tokenizer)["masking"].mask == tokenizer.mask_token_id
    with pytest.raises(FtjaxError, match="masked needs a mask token"):
        layout(c, AutoTokenizer.from_pretrained(shared / "tokenizers/qwen3"))
