"""Losses of labelled rows, and their gradients, against torch's on the same model and rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_encoders import make

from ftjax.models.transformer import Transformer
from ftjax.objectives import classify
from ftjax.tree import flatten

B, T, C = 6, 10, 3


def batch(targets, weights=None) -> dict:
    """Rows of several lengths, one place each: their first."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, T + 1, B)
    mask = (np.arange(T) < lengths[:, None]).astype(np.int32)
    tokens = np.where(mask, rng.integers(2, 50, (B, T)), 0)
    ones = np.ones((B, 1), np.float32)
    return {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(T), (B, T)),
        "segment_ids": mask,
        "loss_index": np.zeros((B, 1), np.int32),
        "labels": np.asarray(targets)[:, None],
        "weights": ones if weights is None else np.asarray(weights, np.float32)[:, None],
    }


def cases():
    import torch
    from torch.nn import functional as F

    rng = np.random.default_rng(1)
    classes = rng.integers(0, C, B)
    several = (rng.random((B, C)) > 0.5).astype(np.float32)
    numbers = rng.standard_normal((B, C)).astype(np.float32)
    weight = np.array([0.5, 1.0, 2.5], np.float32)
    truth, cut = torch.tensor(classes), torch.tensor(weight)

    def focal(logits):
        right = F.log_softmax(logits, -1)[range(B), truth]
        return (-right * (1 - right.exp()) ** 2).mean()

    return {
        "plain": (classify.one_class, {}, classes, None, lambda y: F.cross_entropy(y, truth)),
        "smoothed": (
            classify.one_class, {"label_smoothing": 0.1}, classes, None,
            lambda y: F.cross_entropy(y, truth, label_smoothing=0.1),
        ),
        "weighted": (
            classify.one_class, {}, classes, weight[classes], lambda y: F.cross_entropy(y, truth, weight=cut),
        ),
        "focal": (classify.one_class, {"focal": 2.0}, classes, None, focal),
        "several": (
            classify.many_classes, {}, several, None,
            lambda y: F.binary_cross_entropy_with_logits(y, torch.tensor(several)),
        ),
        "numbers": (classify.numbers, {}, numbers, None, lambda y: F.mse_loss(y, torch.tensor(numbers))),
    }  # fmt: skip


@pytest.mark.parametrize("case", ["plain", "smoothed", "weighted", "focal", "several", "numbers"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_loss_and_gradients_are_torchs(name, case, tmp_path):
    import torch

    from ftjax.hub.families import tensor_names

    model, family, shape, params = make(name, "sequence", tmp_path)
    sums, options, targets, weights, theirs = cases()[case]
    rows = batch(targets, weights)
    out = model(torch.tensor(rows["tokens"]).long(), attention_mask=torch.tensor(rows["segment_ids"]))
    expected = theirs(out.logits)
    expected.backward()

    def loss(params):
        total, weight, _ = functools.partial(sums, Transformer(shape))({"params": params}, rows, **options)
        return total / weight

    found, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    named = dict(model.named_parameters())
    leaves = flatten(gradient)
    for path, (stored, _) in tensor_names(family, shape).items():
        for layer, tensor in enumerate(stored):
            if tensor:
                ours = leaves[path][layer] if path.startswith("layers/") else leaves[path]
                np.testing.assert_allclose(ours, named[tensor].grad, atol=2e-6, err_msg=tensor)


def test_metrics_are_plain_and_count_what_is_right(tmp_path):
    _, _, shape, params = make("bert", "sequence", tmp_path)
    rows = batch(np.array([0, 1, 2, 0, 1, 2]), [1, 1, 1, 1, 0, 1])
    logits = np.asarray(classify.logits(Transformer(shape), {"params": params}, jax.tree.map(jnp.asarray, rows)))[:, 0]
    total, weight, metrics = classify.one_class(Transformer(shape), {"params": params}, rows, label_smoothing=0.3)
    right = logits.argmax(-1) == rows["labels"][:, 0]
    assert (float(weight), float(metrics["correct"])) == (5.0, right[[0, 1, 2, 3, 5]].sum())
    assert metrics["loss"] != total
