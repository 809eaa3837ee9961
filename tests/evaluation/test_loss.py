"""Losses against torch in float64 and against the figure published with the starter model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.decoding import choose
from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation.loss import evaluate_loss, read_documents, text_loss
from ftjax.objectives import causal


def test_means_are_over_all_tokens_of_all_batches():
    batches = [{"loss": 6.0, "correct": 2.0, "n": 3.0}, {"loss": 1.0, "correct": 1.0, "n": 1.0}] * 10
    out = evaluate_loss(lambda b: (jnp.nan, b["n"], {"loss": b["loss"], "correct": b["correct"]}), iter(batches))
    assert out == {"loss": 1.75, "perplexity": math.exp(1.75), "accuracy": 0.75, "tokens": 40}


def test_sums_are_kept_in_float64():
    one = np.float32(1.0)
    batches = [np.float32(2**24)] + [one] * 4  # in float32 the ones would vanish
    out = evaluate_loss(lambda b: (b, np.float32(b), {"loss": b, "correct": b}), batches)
    assert out["tokens"] == 2**24 + 4


def test_no_trained_token_is_refused():
    with pytest.raises(FtjaxError, match="no row has a token whose loss counts"):
        evaluate_loss(lambda b: b, [])


@pytest.fixture(scope="module")
def starter(shared):
    from ftjax.lm import open_base

    lm, _ = open_base(shared / "models/stories260K", "float32")
    return lm, functools.partial(jax.jit(causal.sums, static_argnums=0), lm.model, lm.variables)


def test_starter_has_its_published_loss(starter, shared):
    lm, sums = starter
    documents = read_documents(shared / "data/tinystories/tinystories_sample.txt")
    assert len(documents) == 5
    out = text_loss(sums, lm.tokenizer, documents, max_positions=512)
    assert round(out["loss"], 3) == 1.266
    assert out["tokens"] == 1804


def test_long_documents_are_cut_and_every_token_scored_once(starter, shared):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    lm, sums = starter
    documents = read_documents(shared / "data/tinystories/tinystories_sample.txt")
    out = text_loss(sums, lm.tokenizer, documents, max_positions=100, batch_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models/stories260K").eval()
    total = count = 0
    for document in documents:
        ids = torch.tensor([1] + lm.tokenizer(document, add_special_tokens=False)["input_ids"])
        for first in range(0, len(ids) - 1, 99):
            piece = ids[first : first + 100]
            with torch.no_grad():
                logits = model(piece[None]).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    assert out["tokens"] == count == 1804
    assert out["loss"] == pytest.approx(total / count, rel=1e-5)


def test_bad_text_files_are_named(tmp_path):
    with pytest.raises(FtjaxError, match="absent.txt"):
        read_documents(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FtjaxError, match="latin.txt: expected a readable text file in UTF-8"):
        read_documents(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n")
    with pytest.raises(FtjaxError, match="empty.txt: contains no text"):
        read_documents(tmp_path / "empty.txt")


def test_a_loss_that_is_no_number_is_refused_and_nothing_counts_as_right(starter):
    lm, _ = starter
    damaged = jax.tree.map(lambda x: x, lm.params)
    damaged["final_norm"] = {"scale": lm.params["final_norm"]["scale"].at[3].set(jnp.nan)}
    sums = functools.partial(jax.jit(causal.sums, static_argnums=0), lm.model, {"params": damaged})
    tokens = np.arange(1, 9)[None]
    batch = {"tokens": tokens, "positions": tokens - 1, "segment_ids": np.ones_like(tokens)}
    batch |= {"loss_index": tokens[:, :7] - 1, "labels": tokens[:, 1:], "weights": np.ones((1, 7), np.float32)}
    assert float(sums(batch)[2]["correct"]) == 0
    with pytest.raises(NotFinite, match="the loss is nan, so no score of this model is meaningful. Its weights hold"):
        evaluate_loss(sums, [batch])
    broken = dataclasses.replace(lm, params=damaged)
    with pytest.raises(NotFinite, match="prompt 1: the model's logits are NaN or infinite"):
        broken.generate(["Once upon a time"], max_new_tokens=1)
    logits, keys = jnp.array([[1.0, jnp.nan, 0.0], [0.0, 2.0, -jnp.inf]]), jax.random.split(jax.random.key(0), 2)
    for sampling in ((0.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 2, 0.9)):
        assert (np.asarray(choose(logits, keys, *sampling)) >= 0).tolist() == [False, True]
