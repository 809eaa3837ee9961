"""The divergence of two models against their logits, summed by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from ftjax.errors import FtjaxError
from ftjax.loading import load
from ftjax.verdict.forgetting import divergence


@pytest.fixture(scope="module")
def base():
    return load("builtin:stories260K")


@pytest.fixture(scope="module")
def tuned(base):
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), base.params)
    return base.applied({"params": moved})


def by_hand(p, q, given, scored):
    logs = [
        log_softmax(lm.logits([given + scored])[0].astype(np.float64), axis=-1)[len(given) - 1 : -1] for lm in (p, q)
    ]
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum()


def test_divergence_is_that_of_the_logits(base, tuned):
    ids = base.tokenizer("Once upon a time, there was a little girl named Lily. She loved to play.")["input_ids"]
    pairs = [(ids[:5], ids[5:]), ([1], ids[1:9]), (ids[:1], ids[1:2])]
    found = divergence(tuned, base, pairs, batch_size=2, head_chunk=8)  # the last chunk of 22 tokens is filled up
    assert found.kl == pytest.approx([by_hand(tuned, base, *pair) for pair in pairs], rel=1e-3)
    assert found.tokens.tolist() == [len(ids) - 5, 8, 1] and found.tokens[0] > 16
    back = divergence(base, tuned, pairs, batch_size=2)
    assert back.kl == pytest.approx([by_hand(base, tuned, *pair) for pair in pairs], rel=1e-3)
    assert abs(back.kl[0] - found.kl[0]) > 0.01 * found.kl[0]  # it has a direction
    assert divergence(base, base, pairs, batch_size=2).kl == pytest.approx([0, 0, 0], abs=1e-4)


def test_vocabularies_must_agree(base):
    small = dataclasses.replace(base.model.config, vocab_size=500)
    other = dataclasses.replace(base, model=base.model.clone(config=small))
    with pytest.raises(FtjaxError, match="vocabularies have 512 and 500 tokens"):
        divergence(base, other, [([1], [5, 6])])


def test_pairs_that_cannot_be_scored_are_named(base):
    for pairs, message in (
        ([([1], [5]), ([1], [5] * 600)], "text 2: 1 context tokens and 600 tokens to score"),
        ([([], [5])], "text 1: 0 context tokens"),
    ):
        with pytest.raises(FtjaxError, match=message):
            divergence(base, base, pairs)
