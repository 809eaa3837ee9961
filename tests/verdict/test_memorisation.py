"""The copied share against a search of every place, and exposure against ranks by hand and known distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftjax.errors import FtjaxError
from ftjax.verdict.memorisation import copied, exposure

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4)


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_the_copied_share_is_that_of_a_search_of_every_place(outputs, training, n):
    def runs(text):
        return [text[i : i + n] for i in range(len(text) - n + 1)]

    own = [run for text in outputs for run in runs(text)]
    share = sum(any(run in runs(text) for text in training) for run in own) / len(own) if own else None
    assert copied(outputs, training, n) == share


def test_a_text_that_joins_two_training_texts_is_copied_gram_by_gram():
    training = ["the cat sat on the mat".split(), "on the mat lay a dog".split()]
    assert copied(["the cat sat on the mat lay a dog".split()], training, n=3) == 1
    assert copied(["the cat sat on a mat".split()], training, n=3) == 1 / 2


def test_exposure_is_the_rank_in_bits():
    others = list(range(1, 1024))
    assert exposure(0.5, others) == 10  # of 1,024 the first
    assert exposure(1.5, others) == 9 and exposure(1, others) == 9  # a tie ranks before it
    assert exposure(2000, others) == 0


def test_canaries_that_were_not_learnt_have_1_44_bits():
    plain = np.random.default_rng(0).normal(size=(300, 50))
    assert np.mean([exposure(row[0], row[1:]) for row in plain]) == pytest.approx(1 / math.log(2), abs=0.25)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: exposure(1.0, []), "at least one other text"),
        (lambda: exposure(1.0, [math.nan]), "finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(FtjaxError, match=message):
        call()
