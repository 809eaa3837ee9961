"""Losses of preferences and their gradients, against PyTorch and published values."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from ftjax import config as configs
from ftjax.data.batches import Batches
from ftjax.data.tokenise import Example
from ftjax.hub.peft import write_adapter
from ftjax.objectives import preference
from ftjax.training.sharding import make_mesh, place_batch
from ftjax.tuning import METHODS

BETA = 0.3
OPTIONS = {
    "sigmoid": {}, "conservative": {"loss": "sigmoid", "label_smoothing": 0.1}, "hinge": {}, "ipo": {},
    "robust": {"label_smoothing": 0.1}, "sigmoid_norm": {}, "orpo": {}, "simpo": {"margin": 0.5},
    "cpo": {"nll_weight": 1.0}, "with nll": {"loss": "sigmoid", "nll_weight": 0.5},
    "kto": {"weights": (1.5, 0.5), "nll_weight": 0.2},
}  # fmt: skip


def pairs(seed: int, count: int = 5, labelled: bool = False) -> list[Example]:
    """Random prompts with two random answers each. labelled: the first ones are desirable and not, by turns."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(1, 50, rng.integers(2, 5))
        sides = [np.append(prompt, rng.integers(1, 50, rng.integers(1, 6))).astype(np.int32) for _ in range(2)]
        trained = [np.arange(len(ids)) >= len(prompt) for ids in sides]
        trained = np.concatenate(trained)
        labels = np.full(trained.sum(), len(out) % 2, np.int32) if labelled else None
        out.append(Example(np.concatenate(sides), trained, labels, len(sides[0])))
    return out


def theirs(model, examples, loss="sigmoid", label_smoothing=0.0, margin=0.0, nll_weight=0.0, weights=()):
    """The mean loss over pairs, written from the papers. model: a PeftModel; the reference is its base."""

    def scores(model, example):
        out = []
        for part in (slice(0, example.second), slice(example.second, None)):
            ids, trained = torch.tensor(example.ids[part])[None].long(), torch.tensor(example.trained[part])
            found = F.log_softmax(model(ids).logits[0, :-1].double(), -1)
            out.append(found.gather(-1, ids[0, 1:, None])[:, 0][trained[1:]])
        return out

    losses, ratios = [], []
    for example in examples:
        own = scores(model, example)
        (pc, pr), (mc, mr) = ([f(x) for x in own] for f in (torch.sum, torch.mean))
        with torch.no_grad(), model.disable_adapter():
            known = scores(model, example)
            (rc, rr), (nc, nr) = ([f(x) for x in known] for f in (torch.sum, torch.mean))
        h = (pc - rc) - (pr - rr)
        log = F.logsigmoid
        match loss:
            case "sigmoid":
                one = -(1 - label_smoothing) * log(BETA * h) - label_smoothing * log(-BETA * h)
            case "sigmoid_norm":
                one = -log(BETA * ((mc - nc) - (mr - nr)))
            case "robust":
                one = -(1 - label_smoothing) * log(BETA * h) + label_smoothing * log(-BETA * h)
                one = one / (1 - 2 * label_smoothing)
            case "hinge":
                one = torch.relu(1 - BETA * h)
            case "ipo":
                one = ((mc - nc) - (mr - nr) - 1 / (2 * BETA)) ** 2
            case "orpo":
                odds = [x - torch.log1p(-torch.exp(x)) for x in (mc, mr)]
                one = -mc - BETA * log(odds[0] - odds[1])
            case "simpo":
                one = -log(BETA * (mc - mr) - margin)
            case "cpo":
                one = -log(BETA * (pc - pr))
            case "kto":
                ratios.append((pc - rc, pr - rr, mc, bool(example.targets[0])))
                continue
        losses.append(one - nll_weight * mc)
    if loss == "kto":
        kl = torch.stack([other for _, other, _, _ in ratios]).mean().detach().clamp(min=0)
        for ratio, _, mean, good in ratios:
            one = 1 - torch.sigmoid(BETA * (ratio - kl) * (1 if good else -1))
            losses.append(weights[0 if good else 1] * one - (nll_weight * mean if good else 0))
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A LoRA that has moved away from its base: (Pair, trained, frozen, the same in PEFT)."""
    import peft

    pair = tiny.pair("llama2")
    method, trained, frozen = tiny.start(pair)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trained)
    folder = tmp_path_factory.mktemp("adapter")
    config, tensors = method.to_peft(trained, frozen, pair.spec)
    write_adapter(folder / "adapter", tensors, config, None, "base")
    base = copy.deepcopy(pair.torch).double().eval()
    return pair, trained, frozen, peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).double()


def batches_of(examples, packing: bool, rows: int):
    found = Batches(examples, rows, 40 if packing else 24, packing=packing, shuffle=False, apart=True)
    return [jax.tree.map(jnp.asarray, found[i]) for i in range(len(found))]


def mean_loss(trained, frozen, batches, pair, **options):
    variables = METHODS["lora"].variables(trained, frozen, pair.spec)
    parts = [preference.sums(pair.model, variables, b, beta=BETA, head_chunk=16, **options) for b in batches]
    return sum(p[0] for p in parts) / sum(p[1] for p in parts)


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_are_those_of_pytorch(models, name):
    pair, trained, frozen, tuned = models
    options, examples = {"loss": name} | OPTIONS[name], pairs(3 * (name == "kto"), labelled=name == "kto")
    tuned.zero_grad()
    expected = theirs(tuned, examples, **options)
    expected.backward()
    known = {n.replace(".default", ""): p.grad.numpy() for n, p in tuned.named_parameters() if p.grad is not None}
    value = tiny.jit(jax.value_and_grad(functools.partial(mean_loss, pair=pair, **options)))
    for packing, rows in ((False, 5), (True, 2)):
        loss, gradient = value(trained, frozen, batches_of(examples, packing, rows))
        np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-5)
        found = METHODS["lora"].to_peft(gradient, frozen, pair.spec)[1]
        assert found.keys() == known.keys()
        for tensor, x in found.items():
            np.testing.assert_allclose(x, known[tensor], rtol=1e-3, atol=1e-5, err_msg=tensor)


def test_the_loss_before_training_is_the_log_of_two(models):
    pair = models[0]
    _, trained, frozen = tiny.start(pair)
    variables = METHODS["lora"].variables(trained, frozen, pair.spec)
    (batch,) = batches_of(pairs(1), False, 5)
    total, weight, told = tiny.jit(functools.partial(preference.sums, pair.model))(variables, batch)
    assert weight == 5
    np.testing.assert_allclose(total / weight, np.log(2), atol=1e-6)
    assert told["reward_chosen"] == told["reward_rejected"] == told["correct"] == 0


def test_the_config_knows_every_loss():
    assert set(configs.FIELDS["task.loss"].choices) == set(preference.LOSSES)


@pytest.mark.parametrize(
    "loss, expected", [("sigmoid", (0.6931, 0.3133, 0.1269)), ("hinge", (1, 0, 0)), ("ipo", (25, 25, 225))]
)
def test_published_values(loss, expected):
    """The values of TRL's own tests, for beta 0.1."""
    found = preference.pair_loss(jnp.array([0.0, 10.0, 20.0]), jnp.zeros(3), loss, 0.1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_denominators_are_of_all_pairs_on_every_mesh(models):
    """Uneven pairs, rows without any, and one step over 8 devices: the loss and gradient of one device."""
    pair, trained, frozen, _ = models
    found = Batches(pairs(2, 11), 8, 40, packing=True, shuffle=False, apart=True)
    assert len(found) == 1
    f = tiny.jit(jax.value_and_grad(functools.partial(mean_loss, pair=pair)))
    expected = f(trained, frozen, [found[0]])
    for shape in ({"data": 8}, {"data": 2, "fsdp": 2, "sequence": 2}):
        mesh = make_mesh(shape)
        batch = place_batch(found[0], mesh, 8, slice(0, 8))
        with jax.set_mesh(mesh):
            again = f(trained, frozen, [batch])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), again, expected)
