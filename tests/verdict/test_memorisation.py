"""Copied runs against a search of every place, and exposure against ranks by hand and known distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftjax.errors import FtjaxError
from ftjax.verdict.memorisation import copied, exposure

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4)


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_copied_runs_are_those_of_a_search_of_every_place(outputs, training, n):
    def runs(text):
        return {tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)}

    for out, found in zip(outputs, copied(outputs, training, n), strict=True):
        common = {run for run in runs(out) for text in training if run in runs(text)}
        longest = max((len(run) for run in common if len(run) >= n), default=0)
        grams = [tuple(out[i : i + n]) for i in range(len(out) - n + 1)]
        assert (found.grams, found.seen, found.longest) == (len(grams), sum(g in common for g in grams), longest)
        if longest:
            assert any(len(run) == longest for run in runs(out) & runs(training[found.source]))
        else:
            assert found.source is None


def test_a_run_does_not_go_on_from_one_text_into_another():
    training = ["the cat sat on the mat".split(), "on the mat lay a dog".split()]
    (found,) = copied(["the cat sat on the mat lay a dog".split()], training, n=3)
    assert found == (7, 7, 6, 0)  # each n-gram is seen, and no text has more than six words of it
    with pytest.raises(FtjaxError, match="found n=0"):
        copied([], [], n=0)


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
