"""The causal objective against torch's cross entropy, in values and gradients."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest
import tiny

from ftjax.objectives import causal
from ftjax.tree import flatten

LENGTHS, PROMPTS = (14, 9, 5, 2), (5, 0, 2, 1)
DOCS = tiny.documents(LENGTHS)
T = 16


def padded():
    return tiny.batch([[doc] for doc in DOCS] + [[]], [[p] for p in PROMPTS] + [[]], T)


def packed():
    rows = [[DOCS[0], DOCS[3]], [DOCS[2], DOCS[1]]]
    return tiny.batch(rows, [[PROMPTS[0], PROMPTS[3]], [PROMPTS[2], PROMPTS[1]]], T)


@functools.cache
def compiled(model, **options):
    def run(params, batch):
        def loss(params):
            total, weight, metrics = causal.sums(model, {"params": params}, batch, **options)
            return total, (weight, metrics)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return tiny.jit(run)


def ours(pair, batch, **options):
    """(loss sum, weight sum, metric sums, flat gradient of the loss sum)."""
    (total, (weight, metrics)), gradient = compiled(pair.model, **options)(pair.params, batch)
    return float(total), float(weight), {k: float(v) for k, v in metrics.items()}, flatten(gradient)


def theirs(pair, **options):
    """(loss sum, count, flat gradient) of transformers and torch, over the same documents."""
    pair.torch.zero_grad()
    total, count = tiny.torch_loss(pair.torch, DOCS, PROMPTS, **options)
    total.backward()
    return float(total.detach()), count, tiny.torch_gradients(pair, pair.torch)


def assert_same_gradient(got, want, tolerance):
    assert got.keys() == want.keys()
    for path, g in want.items():
        np.testing.assert_allclose(got[path], g, rtol=0, atol=tolerance * np.abs(g).max(), err_msg=path)


@pytest.mark.parametrize("name", ["gpt2", "llama-biases", "llama-tied", "mistral", "qwen3-biases"])
def test_equals_torch_in_value_and_gradient(name):
    pair = tiny.pair(name)
    want, count, want_gradient = theirs(pair)
    total, weight, metrics, gradient = ours(pair, packed())
    assert weight == count == sum(n - max(p, 1) for n, p in zip(LENGTHS, PROMPTS, strict=True))
    assert total == pytest.approx(want, rel=1e-6)
    assert metrics["loss"] == total
    # 1e-4 is what torch's own float32 gradients leave: a norm's is a sum of terms that cancel.
    assert_same_gradient(gradient, want_gradient, 1e-4)


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied"])
def test_label_smoothing_equals_torch(name):
    pair = tiny.pair(name)
    want, _, want_gradient = theirs(pair, label_smoothing=0.1)
    plain, _, _ = theirs(pair)
    total, _, metrics, gradient = ours(pair, padded(), label_smoothing=0.1)
    assert total == pytest.approx(want, rel=1e-6)
    assert metrics["loss"] == pytest.approx(plain, rel=1e-6)  # what is reported is comparable with and without
    assert_same_gradient(gradient, want_gradient, 1e-4)


def test_correct_counts_the_most_likely_tokens():
    """Random models are seldom right: every other label is made transformers' own guess."""
    pair, batch = tiny.pair("llama-biases"), padded()
    right = np.zeros(batch["labels"].shape, bool)
    right[:, ::2] = True
    for row, doc in enumerate(DOCS):
        guess = tiny.torch_logits(pair.torch, doc[None])[0].argmax(-1)[batch["loss_index"][row] % len(doc)]
        batch["labels"][row] = np.where(right[row], guess, (guess + 1) % 50)
    _, _, metrics, _ = ours(pair, batch)
    assert metrics["correct"] == batch["weights"][right].sum() > 0


@pytest.mark.parametrize("name", ["gpt2", "llama-biases"])
def test_packed_equals_padded(name):
    pair = tiny.pair(name)
    one, other = ours(pair, padded()), ours(pair, packed())
    assert one[1] == other[1]
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[2] == pytest.approx(other[2], rel=1e-6)
    assert_same_gradient(one[3], other[3], 1e-5)


@pytest.mark.parametrize("places", [1, 4, 5])
def test_chunks_change_nothing(places):
    pair, batch = tiny.pair("llama-biases"), padded()
    B, M = batch["labels"].shape
    whole = ours(pair, batch, label_smoothing=0.1)
    chunked = ours(pair, batch, label_smoothing=0.1, head_chunk=places * B)
    assert M % 5  # the last chunk of one of the cases is short
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    assert chunked[1] == whole[1]
    assert chunked[2] == pytest.approx(whole[2], rel=1e-6)
    assert_same_gradient(chunked[3], whole[3], 1e-6)


def test_chunks_bound_the_logits():
    """Logits of head_chunk tokens exist at once, forward and backward, and are computed once."""
    pair, batch = tiny.pair("llama-biases"), padded()
    B, M = batch["labels"].shape
    V = pair.model.config.vocab_size
    for head_chunk, places in ((0, M), (4 * B, 4), (1, 1)):
        text = compiled(pair.model, head_chunk=head_chunk).lower(pair.params, batch).as_text()
        assert (f"tensor<{B}x{M}x{V}xf32>" in text) == (places == M)
        made = rf"dot_general.* -> tensor<({B}x{places}x{V}|{V}x{B * places})xf32>"  # the latter: of few rows
        assert len(re.findall(made, text)) == 1


def test_what_nobody_trains_costs_the_head_nothing():
    """A frozen head takes no product for its kernel's gradient, states that were computed before none for theirs."""
    pair, batch = tiny.pair("llama-biases"), padded()
    (B, M), D = batch["labels"].shape, pair.model.config.width
    assert not pair.model.config.tied
    head, rest = {"lm_head": pair.params["lm_head"]}, {k: v for k, v in pair.params.items() if k != "lm_head"}
    states = np.ones((B, M, D), np.float32)

    def flops(trained, given):
        loss = lambda trained: causal.sums(pair.model, {"params": given["params"] | trained}, batch | given)[0]  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(trained).compile().cost_analysis()["flops"]

    product = 2 * B * M * D * pair.model.config.vocab_size
    saved = flops(pair.params, {"params": {}}) - flops(rest, {"params": head})
    assert 0.9 * product < saved < 1.5 * product
    assert flops(head, {"params": {}, "states": states}) < 2.7 * product


def test_untrained_places_are_ignored():
    pair, batch = tiny.pair("llama-biases"), padded()
    other = dict(batch)
    rng = np.random.default_rng(1)
    off = batch["weights"] == 0
    assert off.any()
    other["labels"] = np.where(off, rng.integers(0, 50, off.shape), batch["labels"]).astype(np.int32)
    other["loss_index"] = np.where(off, rng.integers(0, T, off.shape), batch["loss_index"]).astype(np.int32)
    one, two = ours(pair, batch), ours(pair, other)
    assert one[:3] == two[:3]
    assert_same_gradient(one[3], two[3], 1e-6)
