"""Real rows of the starter model, packed or padded: the same loss and the same update."""

import functools

import jax
import numpy as np
import pytest
import tiny

from ftjax import config
from ftjax.assets import resolve
from ftjax.data.batches import Batches
from ftjax.data.prepare import prepare
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.hub import families, weights
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.training.step import gradients

ROWS, LENGTH = 24, 192


@pytest.fixture(scope="module")
def starter():
    folder = resolve("builtin:stories260K")
    family, shape = families.read_config(folder)
    return Transformer(shape), {"params": weights.read_params(folder, family, shape)}, load_tokenizer(folder)


@pytest.fixture(scope="module")
def examples(starter):
    c = config.default()
    c.data.update(train="builtin:commongen/validation.jsonl", split=(1.0, 0.0, 0.0), limit=ROWS, cache="")
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}")
    return prepare(c, starter[2], 512).train.examples


def whole(examples, packing):
    """All rows in batches of one shape: two packed rows a batch, or eight padded ones."""
    batches = Batches(examples, 2 if packing else 8, LENGTH, packing=packing, buckets=1, seed=1)
    return [batches[i] for i in range(len(batches))]


def test_evaluation(starter, examples):
    model, variables, _ = starter
    loss = functools.partial(sums, model, variables, head_chunk=64)
    packed, padded = (evaluate_loss(loss, whole(examples, packing)) for packing in (True, False))
    assert packed["tokens"] == padded["tokens"] == examples.labels.sum()
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["accuracy"] == padded["accuracy"]


def test_training(starter, examples):
    """One step over all rows: the gradient of their loss, divided once by all trained tokens."""
    model, variables, _ = starter
    step = tiny.jit(
        lambda params, batch: gradients(
            functools.partial(causal.sums, model, head_chunk=64), lambda p, _: {"params": p}, params, {}, batch,
            jax.random.key(0), 1,
        )
    )  # fmt: skip
    found = []
    for packing in (True, False):
        rows = whole(examples, packing)
        parts = [step(variables["params"], batch) for batch in rows]
        share = np.array([float(weight) for _, weight, _ in parts]) / examples.labels.sum()
        # A batch's gradient is divided by its own tokens; weighted by its share of them, it is a term of the whole.
        terms = [jax.tree.map(lambda g, s=s: s * np.asarray(g), gradient) for s, (gradient, _, _) in zip(share, parts)]
        loss = sum(float(sums["loss"]) for _, _, sums in parts) / examples.labels.sum()
        found.append((loss, jax.tree.map(lambda *g: sum(g), *terms)))
    (loss, gradient), (other_loss, other) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(other))
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * scale)
