"""Vectors of texts, and the loss that brings pairs near, against sentence-transformers."""

import json

import numpy as np
import pytest
from tiny_labelled import make, values

import ftjax
from ftjax.data.batches import Batches
from ftjax.data.labelled import Labelled
from ftjax.errors import FtjaxError
from ftjax.evaluation.retrieval import rank_metrics, rank_rows, ranks
from ftjax.hub import pooling
from ftjax.objectives import contrast

TEXTS = [
    "the film was fine",
    "it was dull",
    "a clever film of it",
    "was the film moving and warm and clever it was",
    "stale",
]
PAIRS = list(zip(TEXTS, TEXTS[2:] + TEXTS[:2]))


def directory(tmp_path, pool: str, max_length: int = 0):
    folder = make(tmp_path / f"{pool}-{max_length}", "bert")
    pooling.write(folder, pooling.Pooling(pool, max_length), 16)
    return folder


@pytest.mark.parametrize(("pool", "max_length"), [("mean", 0), ("cls", 6)])
def test_vectors_and_loss_are_those_of_sentence_transformers(pool, max_length, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    folder = directory(tmp_path, pool, max_length)
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    lm = ftjax.load(folder)
    assert lm.kind == "embed" and lm.pooling == (pool, max_length)
    np.testing.assert_allclose(lm.embed(TEXTS), theirs.encode(TEXTS), atol=1e-5)

    features = [theirs.preprocess(list(side)) for side in zip(*PAIRS)]
    expected = MultipleNegativesRankingLoss(theirs, scale=20)(features, None).item()
    how = Labelled("embed", "a", "b", "", (), "", max_length)
    rows = [{"a": a, "b": b} for a, b in PAIRS]
    examples = how.encode(lm.tokenizer, rows, [""] * len(rows))
    for more in ({}, {"packing": True}):
        batch = Batches(examples, 8, 32, shuffle=False, apart=True, buckets=1, **more)[0]
        total, weight, _ = contrast.sums(lm.model, lm.variables, batch, pool=pool, temperature=0.05)
        assert weight == len(PAIRS)
        np.testing.assert_allclose(total / weight, expected, rtol=1e-5)


def test_what_a_directory_says_is_read_back_and_other_ways_are_refused(tmp_path):
    folder = directory(tmp_path, "cls", 7)
    assert pooling.read(folder) == ("cls", 7)
    assert pooling.read(tmp_path) is None
    file = folder / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": "mean"}))  # as version 6 writes it
    assert pooling.read(folder) == ("mean", 7)
    for said in ({"pooling_mode": "max"}, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}):
        file.write_text(json.dumps(said))
        with pytest.raises(FtjaxError, match="max.* is not supported"):
            pooling.read(folder)


def test_texts_that_cannot_be_embedded_are_told(tmp_path):
    lm = ftjax.load(directory(tmp_path, "mean"))
    assert lm.embed([]).shape == (0, 16)
    np.testing.assert_allclose(lm.embed(TEXTS, batch_size=8), lm.embed(TEXTS[::-1])[::-1], atol=1e-6)
    for texts, more, match in (
        ("a text", {}, "list of texts"),
        (["a", ""], {}, "empty"),
        (["a"], {"pool": "max"}, "mean"),
    ):
        with pytest.raises(FtjaxError, match=match):
            lm.embed(texts, **more)


def test_ranks_and_their_figures():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 1500, 8)).astype(np.float32)
    scores = first @ second.T
    expected = [1 + int((np.delete(row, i) >= row[i]).sum()) for i, row in enumerate(scores)]
    np.testing.assert_array_equal(ranks(first, second), expected)
    figures = values(1500, rank_metrics(rank_rows(second, first)))
    rank = np.array(expected)
    assert figures["mean_rank"] == pytest.approx(rank.mean()) and figures["mrr"] == pytest.approx((1 / rank).mean())
    assert figures["recall_at_1"] == pytest.approx((rank == 1).mean())
    assert figures["recall_at_10"] == pytest.approx((rank <= 10).mean())
    assert (ranks(np.ones((3, 2)), np.ones((3, 2))) == 3).all()  # ties are no success
