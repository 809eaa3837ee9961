"""Losses of answers, masked tokens and pairs of texts, with their gradients, against torch's; packed rows too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import jit
from tiny_encoders import make

from ftjax.data.batches import Batches
from ftjax.data.masks import Masking
from ftjax.data.tokenise import Example
from ftjax.hub.families import tensor_names
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal, classify, contrast, span
from ftjax.tree import flatten

LENGTHS = (9, 14, 5, 12, 7, 9)


def texts(seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 50, n).astype(np.int32) for n in LENGTHS]


def tagged(ids, rng) -> Example:
    trained = rng.random(len(ids)) < 0.6
    trained[1] = True
    return Example(ids, trained, rng.integers(0, 3, trained.sum()).astype(np.int32))


def answered(ids, rng) -> Example:
    trained = np.arange(len(ids)) == 0
    return Example(ids, trained, np.sort(rng.integers(0, len(ids), (1, 2))).astype(np.int32), second=4)


def paired(ids, rng) -> Example:
    half = len(ids) // 2
    trained = np.isin(np.arange(len(ids)), (0, half))
    return Example(ids, trained, np.zeros(2, np.int32), second=half)


def hidden(ids, rng) -> Example:
    trained = (np.arange(len(ids)) > 0) & (np.arange(len(ids)) < len(ids) - 1)
    return Example(ids, trained, np.cumsum(rng.random(trained.sum()) < 0.7).astype(np.int32))


MASKING = Masking(0.3, True, 4, 50)
KINDS = {  # name -> (head, one example, sums, how batches lie)
    "tag": ("token", tagged, classify.one_class, {}),
    "span": ("span", answered, span.sums, {}),
    "masked": ("masked", hidden, functools.partial(causal.sums, head_chunk=8), {"masking": MASKING}),
    "embed mean": ("none", paired, functools.partial(contrast.sums, pool="mean"), {"apart": True}),
    "embed cls": ("none", paired, functools.partial(contrast.sums, pool="cls", temperature=0.1), {"apart": True}),
}


def torchs(kind, model, examples, batches):
    """torch's mean loss of the same examples."""
    import torch
    from torch.nn import functional as F

    def padded(rows, fill=0):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(r).long() for r in rows], True, fill)

    ids = [e.ids for e in examples]
    if kind == "masked":  # the tokens as a batch shows them
        labels = []
        batch, order = batches[0], [int(m[0]) for m in batches.rows(0) if len(m)]
        shown = {i: batch["tokens"][b, : len(ids[i])] for b, i in enumerate(order)}
        for b, i in enumerate(order):
            label = np.full(len(ids[i]), -100)
            own = batch["weights"][b] > 0
            label[batch["loss_index"][b, own]] = batch["labels"][b, own]
            labels.append((i, label))
        ids = [shown[i] for i in range(len(ids))]
        labels = padded([label for _, label in sorted(labels, key=lambda x: x[0])], -100)
    if kind.startswith("embed"):
        halves = [(e.ids[: e.second], e.ids[e.second :]) for e in examples]
        vectors = []
        for side in range(2):
            rows = [half[side] for half in halves]
            mask = padded([np.ones(len(r)) for r in rows])
            states = model(padded(rows), attention_mask=mask).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors.append(F.normalize(states[:, 0] if kind == "embed cls" else mean, dim=1))
        scale = 10 if kind == "embed cls" else 20
        return F.cross_entropy(vectors[0] @ vectors[1].T * scale, torch.arange(len(examples)))
    types = {}
    if kind == "span":
        types = {"token_type_ids": padded([np.arange(len(e.ids)) >= e.second for e in examples])}
    mask = padded([np.ones(len(r)) for r in ids])
    out = model(padded(ids), attention_mask=mask, **types)
    if kind == "span":
        total = 0
        for side, scores in enumerate((out.start_logits, out.end_logits)):
            scores = scores.masked_fill(mask == 0, -torch.inf)  # transformers' own loss counts padding in
            total = total + F.cross_entropy(scores, torch.tensor([int(e.targets[0, side]) for e in examples]))
        return total / 2
    if kind == "tag":
        labels = []
        for e in examples:
            label = np.full(len(e.ids), -100)
            label[e.trained] = e.targets
            labels.append(label)
        labels = padded(labels, -100)
    return F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_torchs_on_padded_and_on_packed_rows(kind, tmp_path):
    head, example, sums, layout = KINDS[kind]
    model, family, shape, params = make("bert", head, tmp_path)
    rng = np.random.default_rng(0)
    examples = [example(ids, rng) for ids in texts()]
    rows = Batches(examples, 8, 32, shuffle=False, buckets=1, **layout)  # two rows of eight are empty
    expected = torchs(kind, model, examples, rows)
    expected.backward()
    named = dict(model.named_parameters())

    for batches in (rows, Batches(examples, 4, 32, shuffle=False, packing=True, **layout)):
        assert len(batches) == 1

        def loss(params, batch):
            total, weight, metrics = sums(Transformer(shape), {"params": params}, batch)
            return total / weight, metrics["loss"] / weight

        (found, plain), gradient = jit(jax.value_and_grad(loss, has_aux=True))(params, batches[0])
        np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
        assert plain == found
        leaves = flatten(gradient)
        for path, (stored, *_) in tensor_names(family, shape).items():
            for layer, name in enumerate(stored):
                ours = leaves[path][layer] if path.startswith("layers/") else leaves[path]
                name = name if name in named else name.removeprefix(family.prefix)
                np.testing.assert_allclose(ours, named[name].grad, atol=5e-6, err_msg=name)


def test_an_answer_is_right_where_both_its_ends_are(tmp_path):
    _, _, shape, params = make("bert", "span", tmp_path)
    examples = [answered(ids, np.random.default_rng(0)) for ids in texts()]
    batch = Batches(examples, 6, 32, shuffle=False, buckets=1)[0]
    found = np.array(span.logits(Transformer(shape), {"params": params}, batch))
    best = np.where(batch["segment_ids"][..., None] > 0, found, -np.inf).argmax(1)
    batch["labels"][:, 0] = best
    _, _, metrics = span.sums(Transformer(shape), {"params": params}, batch)
    assert metrics["correct"] == 6
    batch["labels"][:3, 0, 1] = (best[:3, 1] + 1) % 5
    _, _, metrics = span.sums(Transformer(shape), {"params": params}, batch)
    assert metrics["correct"] == 3


def test_negatives_come_from_all_devices(tmp_path):
    """The loss on a mesh of four devices is that of one."""

    from ftjax.training.sharding import make_mesh, place_batch

    _, _, shape, params = make("bert", "none", tmp_path)
    examples = [paired(ids, np.random.default_rng(0)) for ids in texts() + texts(1)[:2]]
    batch = Batches(examples, 8, 32, shuffle=False, buckets=1, apart=True)[0]
    sums = jax.jit(lambda params, batch: contrast.sums(Transformer(shape), {"params": params}, batch))
    expected = sums(params, jax.tree.map(jnp.asarray, batch))
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = sums(params, place_batch(batch, mesh, 8, slice(0, 8)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[2]["correct"] == expected[2]["correct"]
