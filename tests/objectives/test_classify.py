"""Losses of labelled rows, and their gradients, against torch's on the same model and rows."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_encoders import make

from ftjax.hub.families import read_config
from ftjax.hub.weights import read_params
from ftjax.models.transformer import MAPS, Transformer
from ftjax.objectives import classify, hidden
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
    same_gradients(gradient, model, family, shape, atol=2e-6)


def same_gradients(gradient, model, family, shape, **tolerance):
    """Ours are those that a torch model holds after `backward`."""
    from ftjax.hub.families import tensor_names

    named, leaves = dict(model.named_parameters()), flatten(gradient)
    for path, (stored, *_) in tensor_names(family, shape).items():
        for layer, tensor in enumerate(stored):
            if tensor and named[tensor].grad is not None:
                ours = leaves[path][layer] if path.startswith("layers/") else leaves[path]
                np.testing.assert_allclose(ours, named[tensor].grad, err_msg=tensor, **tolerance)


@pytest.mark.parametrize("name, wide", [("bert", True), ("distilbert", False), ("modernbert", True)])
def test_the_distance_of_hidden_states_is_torchs(name, wide, tmp_path):
    """Of all layers of a student and a deeper teacher, which may be wider; with its maps, and the loss of labels."""
    import torch
    import transformers
    from torch.nn import functional as F

    model, family, shape, params = make(name, "sequence", tmp_path / "student")
    settings = model.config.to_dict()
    settings |= {"layer_types": None, "num_hidden_layers": 6, "n_layers": 6} | ({"hidden_size": 32} if wide else {})
    torch.manual_seed(1)
    teacher = transformers.AutoModel.from_config(type(model.config)(**settings)).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    _, other = read_config(tmp_path / "teacher")
    lm = Transformer(other), {"params": read_params(tmp_path / "teacher", _, other)}
    rows, last = batch(np.arange(B) % C), shape.layers
    pairs = [(i, i * 6 // last) for i in range(last + 1 - shape.final_norm)]  # transformers has the last one normed
    rows["reference"] = jax.jit(functools.partial(hidden.states, lm[0], layers=tuple(t for _, t in pairs)))(lm[1], rows)
    config = SimpleNamespace(hidden=0.7, layers=pairs, width=other.width)
    maps = hidden.maps(jax.random.key(0), config, shape.width)
    assert bool(maps) == wide
    sums = functools.partial(classify.one_class, label_smoothing=0.1)
    f = hidden.Sums(sums, Transformer(shape), 0.7, tuple(s for s, _ in pairs))

    def loss(trained):
        own, maps = hidden.divided(trained)
        total, weight, figures = f({"params": own} | maps, rows)
        return total / weight, figures["hidden"] / weight

    (found, far), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params | maps)
    how = {"attention_mask": torch.tensor(rows["segment_ids"]), "output_hidden_states": True}
    ids, there = torch.tensor(rows["tokens"]).long(), how["attention_mask"] > 0
    out, known = model(ids, **how), teacher(ids, **how).hidden_states
    kernel = torch.tensor(np.asarray(maps[MAPS]["kernel"]), requires_grad=True) if wide else [None] * len(pairs)
    each = [
        F.mse_loss(out.hidden_states[s][there] @ W if wide else out.hidden_states[s][there], known[t][there].detach())
        for W, (s, t) in zip(kernel, pairs)
    ]
    expected = F.cross_entropy(out.logits, torch.tensor(rows["labels"][:, 0]).long(), label_smoothing=0.1)
    expected = expected + 0.7 * sum(each)
    expected.backward()
    np.testing.assert_allclose(far, sum(each).item(), rtol=1e-5)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    own, found = hidden.divided(gradient)
    same_gradients(own, model, family, shape, rtol=1e-4, atol=1e-5)
    if wide:
        np.testing.assert_allclose(found[MAPS]["kernel"], kernel.grad, rtol=1e-4, atol=1e-6)
    parts = [{name: x[i::2] for name, x in rows.items()} for i in range(2)]
    variables = {"params": params} | maps
    whole = jax.tree.map(lambda *x: sum(x), *[f.of_whole(variables, part) for part in parts])
    cut = [f(variables, part, whole=whole) for part in parts]
    np.testing.assert_allclose(sum(total for total, *_ in cut) / whole["weight"], expected.item(), rtol=1e-5)


def test_metrics_are_plain_and_count_what_is_right(tmp_path):
    _, _, shape, params = make("bert", "sequence", tmp_path)
    rows = batch(np.array([0, 1, 2, 0, 1, 2]), [1, 1, 1, 1, 0, 1])
    logits = np.asarray(classify.logits(Transformer(shape), {"params": params}, jax.tree.map(jnp.asarray, rows)))[:, 0]
    total, weight, metrics = classify.one_class(Transformer(shape), {"params": params}, rows, label_smoothing=0.3)
    right = logits.argmax(-1) == rows["labels"][:, 0]
    assert (float(weight), float(metrics["correct"])) == (5.0, right[[0, 1, 2, 3, 5]].sum())
    assert metrics["loss"] != total


class Given:
    """A model whose logits are what a batch gives as `states`."""

    def apply(self, variables, found, rngs=None, method=None):
        return found


@pytest.mark.parametrize("focal", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("several", [False, True])
def test_the_focal_loss_and_its_gradient_are_those_of_float64_at_any_probability(several, focal):
    import torch

    scale = np.array([0, 1e-3, 1, 10, 17, 30, 90, 104, 200], np.float32)
    values = np.concatenate([scale, -scale])[:, None] * np.array([1.0, -1.0, 0.5], np.float32)
    N = len(values)
    labels = np.tile([1.0, 0.0, 1.0], (N, 1)).astype(np.float32) if several else np.zeros(N, np.int32)
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    if several:
        signed = torch.where(torch.tensor(labels) > 0, exact, -exact)
        loss = -torch.nn.functional.logsigmoid(signed)
        theirs = (loss * (focal * torch.nn.functional.logsigmoid(-signed)).exp()).mean(-1).sum()
    else:
        logs = exact.log_softmax(-1)
        theirs = (-logs[:, 0] * (focal * logs[:, 1:].logsumexp(-1)).exp()).sum()
    theirs.backward()

    def ours(states):
        rows = {"states": states, "labels": labels[:, None], "weights": np.ones((N, 1), np.float32)}
        return (classify.many_classes if several else classify.one_class)(Given(), {}, rows, focal=focal)[0]

    found, gradient = jax.value_and_grad(ours)(values[:, None])
    assert float(found) == pytest.approx(theirs.item(), rel=1e-5)
    np.testing.assert_allclose(gradient[:, 0], exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("several", [False, True])
def test_logits_that_are_no_numbers_are_never_right(several):
    states = np.full((2, 1, 3), np.nan, np.float32)
    states[1] = [[9.0, np.nan, -9.0]]
    labels = np.zeros((2, 1, 3), np.float32) if several else np.array([[0], [1]])
    rows = {"states": states, "labels": labels, "weights": np.ones((2, 1), np.float32)}
    assert (classify.many_classes if several else classify.one_class)(Given(), {}, rows)[2]["correct"] == 0
