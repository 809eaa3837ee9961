"""Schedules and optimizers against transformers' and torch's."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
import transformers

from ftjax import config as configs
from ftjax.data.batches import Batches
from ftjax.data.tokenise import Example
from ftjax.objectives import causal
from ftjax.training import fisher
from ftjax.training.optimizer import multipliers, optimizer, schedule
from ftjax.tree import flatten, unflatten

NAMES = configs.FIELDS["optim.name"].choices


def optim(**fields):
    config = configs.default().optim
    config.update(fields)
    return config


def values(steps, **fields):
    rate = schedule(optim(**fields), steps, 1e-3)
    return [float(rate(step)) for step in range(steps)]


def theirs(name, steps, warmup, **options):
    """A schedule of transformers, whose warm-up starts at 0 where ours starts at the first value above."""
    adam = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    made = transformers.get_scheduler(name, adam, warmup, steps, scheduler_specific_kwargs=options)
    rate = made.lr_lambdas[0]
    return [1e-3 * rate(step + 1 if step < warmup else step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize(
    ("name", "ours", "their_name", "options"),
    [
        ("constant", {}, "constant_with_warmup", {}),
        ("linear", {}, "linear", {}),
        ("cosine", {}, "cosine", {}),
        ("cosine", {"final_lr": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("wsd", {"decay": 0.25}, "warmup_stable_decay", {"num_decay_steps": 25, "decay_type": "linear"}),
    ],
)
def test_schedules_equal_transformers(name, ours, their_name, options, warmup):
    got = values(100, schedule=name, warmup=warmup, **ours)
    np.testing.assert_allclose(got, theirs(their_name, 100, warmup, **options), rtol=1e-5, atol=1e-9)
    assert max(got) == pytest.approx(1e-3) and min(got) > 0


def test_schedule_landmarks():
    got = values(200, schedule="linear", warmup=0.1, final_lr=0.2)
    assert got[0] == pytest.approx(1e-3 / 20, rel=1e-5)
    assert got[19:21] == pytest.approx([1e-3, 1e-3], rel=1e-5)  # warm-up is a share of all steps
    assert got[110] == pytest.approx(0.6e-3, rel=1e-5)  # half way down to a fifth
    assert float(schedule(optim(schedule="linear", warmup=0.1, final_lr=0.2), 200, 1e-3)(200)) == pytest.approx(2e-4)
    steep = optim(schedule="wsd", warmup=0.5, decay=0.8, final_lr=0.1)  # the warm-up leaves fewer steps than its decay
    assert [float(schedule(steep, 10, 1e-3)(step)) for step in (5, 10)] == pytest.approx([1e-3, 1e-4])
    alone = values(3, schedule="cosine", warmup=10)
    assert alone == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3], rel=1e-5)  # nothing but warm-up
    assert values(1, schedule="cosine", warmup=0.03) == [pytest.approx(1e-3)]


def tree(seed=0):
    """A tree with every kind of leaf, and its like with random values."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": {"embedding": (11, 6)},
        "layers": {
            "attn_norm": {"scale": (2, 6)},
            "attn": {"q_proj": {"kernel": (2, 8, 6), "bias": (2, 8)}},
            "mlp": {"up_proj": {"lora": {"a": (2, 4, 6), "b": (2, 10, 4)}}},
        },
    }
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(transformation, params, gradients):
    """The parameters after each of the updates."""

    @tiny.jit
    def update(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state, out = transformation.init(params), []
    for gradient in gradients:
        params, state = update(params, state, gradient)
        out.append(params)
    return out


def test_adamw_with_decay_and_clipping_equals_torch():
    config = optim(name="adamw", weight_decay=0.3, clip_norm=2.0, b1=0.8, b2=0.95, schedule="cosine", warmup=3)
    rate, params = schedule(config, 20, 1e-2), tree()
    # Half of the gradients are longer than the clip, half are shorter.
    gradients = [jax.tree.map(lambda g, s=s: g * (1.0 if s % 2 else 0.02), tree(s + 1)) for s in range(20)]
    ours = run(optimizer(config, rate), params, gradients)

    tensors = {path: torch.nn.Parameter(torch.tensor(np.asarray(x))) for path, x in flatten(params).items()}
    spared = [p for path, p in tensors.items() if path.endswith(("scale", "bias"))]
    decayed = [p for path, p in tensors.items() if not path.endswith(("scale", "bias"))]
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.3}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-8)
    for step, gradient in enumerate(gradients):
        for path, g in flatten(gradient).items():
            tensors[path].grad = torch.tensor(np.asarray(g))
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 2.0)
        assert (norm > 2.0) == bool(step % 2)
        for group in adam.param_groups:
            group["lr"] = float(rate(step))
        adam.step()
        for path, x in flatten(ours[step]).items():
            np.testing.assert_allclose(x, tensors[path].detach(), rtol=1e-5, atol=1e-6, err_msg=f"step {step} {path}")


def test_sgd_equals_torch():
    config = optim(name="sgd", clip_norm=0.0, b1=0.9)
    params, gradients = tree(), [tree(s + 1) for s in range(5)]
    ours = run(optimizer(config, lambda step: 0.1), params, gradients)
    tensors = {path: torch.nn.Parameter(torch.tensor(np.asarray(x))) for path, x in flatten(params).items()}
    sgd = torch.optim.SGD(tensors.values(), lr=0.1, momentum=0.9)
    for gradient in gradients:
        for path, g in flatten(gradient).items():
            tensors[path].grad = torch.tensor(np.asarray(g))
        sgd.step()
    for path, x in flatten(ours[-1]).items():
        np.testing.assert_allclose(x, tensors[path].detach(), rtol=1e-5, atol=1e-5, err_msg=path)


def test_lion_equals_its_paper():
    """Algorithm 2 of Chen et al. 2023: sign of an interpolation, then another interpolation as momentum."""
    config = optim(name="lion", clip_norm=0.0, b1=0.9, b2=0.99, weight_decay=0.1)
    params, gradients = tree(), [tree(s + 1) for s in range(5)]
    ours = run(optimizer(config, lambda step: 0.01), params, gradients)
    want = {path: np.asarray(x) for path, x in flatten(params).items()}
    momentum = {path: np.zeros_like(x) for path, x in want.items()}
    for gradient in gradients:
        for path, g in flatten(gradient).items():
            decay = 0.0 if path.endswith(("scale", "bias")) else 0.1
            want[path] = want[path] - 0.01 * (np.sign(0.9 * momentum[path] + 0.1 * g) + decay * want[path])
            momentum[path] = 0.99 * momentum[path] + 0.01 * np.asarray(g)
    for path, x in flatten(ours[-1]).items():
        np.testing.assert_allclose(x, want[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_muon_equals_torch_layer_by_layer():
    """Each layer of a stack is made orthogonal by itself, at the size of an Adam step; the rest is Adam's."""
    config = optim(name="muon", clip_norm=0.0, b1=0.95)
    params, gradient = tree(), tree(1)
    configurations = (config, optim(name="adamw", b1=0.95))
    new, adam = (run(optimizer(c, lambda step: 0.1), params, [gradient])[0] for c in configurations)
    for path, x in flatten(new).items():
        moved = np.asarray(x) - np.asarray(flatten(params)[path])
        if not path.startswith("layers/") or path.endswith(("scale", "bias")):
            np.testing.assert_allclose(x, flatten(adam)[path], rtol=1e-4, atol=1e-5, err_msg=path)
            continue
        for layer in range(2):
            matrix = torch.nn.Parameter(torch.zeros(moved[layer].shape))
            matrix.grad = torch.tensor(np.asarray(flatten(gradient)[path][layer]))
            torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
            want = matrix.detach().numpy()
            # torch iterates in bfloat16.
            assert np.linalg.norm(moved[layer] - want) < 0.03 * np.linalg.norm(want), f"{path} layer {layer}"


def test_adafactor_equals_transformers_layer_by_layer():
    """Matrices of at least 128 rows and columns, of which transformers and Optax factor the second moment alike. Each
    layer of a stack is clipped by itself: the gradient of one layer is much larger at times."""
    rng = np.random.default_rng(0)
    shapes = {"layers/mlp/up/kernel": (2, 128, 160), "layers/mlp/up/bias": (2, 160), "embed/embedding": (130, 128)}

    def drawn(sparse=False):
        spikes = lambda shape: np.where(rng.random(shape) < 0.02, 50, 0.1) if sparse else 1  # noqa: E731
        leaves = {path: rng.normal(size=shape) * spikes(shape) for path, shape in shapes.items()}
        return unflatten({path: jnp.asarray(x, jnp.float32) for path, x in leaves.items()})

    params, gradients = drawn(), [drawn(sparse=True) for _ in range(4)]
    for step, gradient in enumerate(gradients):
        kernel = gradient["layers"]["mlp"]["up"]["kernel"]
        gradient["layers"]["mlp"]["up"]["kernel"] = kernel.at[1].multiply(100.0 ** (step % 3))
    config = optim(name="adafactor", clip_norm=0.0, weight_decay=0.1)
    ours = run(optimizer(config, lambda step: 1e-2), params, gradients)

    def apart(tree):
        """{(path, layer): array}; layer is 0 for what is not stacked."""
        split = {path: x if path.startswith("layers") else x[None] for path, x in flatten(tree).items()}
        return {(path, layer): np.array(x[layer]) for path, x in split.items() for layer in range(len(x))}

    tensors = {key: torch.nn.Parameter(torch.tensor(x)) for key, x in apart(params).items()}
    groups = [{"params": [x for x in tensors.values() if x.ndim == n], "weight_decay": 0.1 * (n - 1)} for n in (1, 2)]
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    adafactor = transformers.optimization.Adafactor(groups, lr=1e-2, **fixed)
    for gradient, new in zip(gradients, ours, strict=True):
        for key, x in apart(gradient).items():
            tensors[key].grad = torch.tensor(x)
        adafactor.step()
        for key, x in apart(new).items():
            np.testing.assert_allclose(x, tensors[key].detach(), rtol=1e-4, atol=1e-5, err_msg=str(key))


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_norms_and_biases(name):
    """Without a gradient, what is decayed shrinks by lr times decay, and the rest stays."""
    params = tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = run(optimizer(optim(name=name, weight_decay=0.5), lambda step: 0.1), params, [zeros])[0]
    for path, x in flatten(moved).items():
        kept = 1.0 if path.endswith(("scale", "bias")) else 0.95
        np.testing.assert_allclose(x, kept * flatten(params)[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_biases_of_experts_are_vectors(name):
    """One for each layer and expert: no weight decay, and Adam's direction."""
    params = {"layers": {"mlp": {"up_proj": {"biases": jnp.ones((2, 4, 6)), "experts": jnp.ones((2, 4, 6, 5))}}}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = flatten(run(optimizer(optim(name=name, weight_decay=0.5), lambda step: 0.1), params, [zeros])[0])
    np.testing.assert_allclose(moved["layers/mlp/up_proj/biases"], 1)
    np.testing.assert_allclose(moved["layers/mlp/up_proj/experts"], 0.95)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    moved = flatten(run(optimizer(optim(name=name), lambda step: 0.1), params, [gradient])[0])
    np.testing.assert_allclose(np.abs(moved["layers/mlp/up_proj/biases"] - 1), 0.1, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_optimizer_moves_every_parameter(name, method):
    """On the real trees of both methods; at the size of its learning rate, so that defaults mean something."""
    pair = tiny.tuned(tiny.pair("llama-biases"), method=method)
    _, trained, _ = tiny.start(pair)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), trained)
    config = optim(name=name, weight_decay=0.01, b1=0.9, b2=0.99)
    new = run(optimizer(config, lambda step: 1e-2), trained, [gradient] * 3)[-1]
    for path, x in flatten(new).items():
        moved = np.asarray(x - flatten(trained)[path])
        assert np.isfinite(moved).all() and (np.abs(moved) > 0).mean() > 0.99, path
        if name in ("adamw", "muon", "lion", "adafactor"):
            assert 2e-3 < np.sqrt(np.mean(moved**2)) < 6e-2, path


def test_clipping_bounds_the_whole_tree():
    config = optim(name="sgd", b1=0.0, clip_norm=0.5)
    params, gradient = tree(), tree(1)
    moved = run(optimizer(config, lambda step: 1.0), params, [gradient])[0]
    norm = np.sqrt(sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params))))
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_lower_layers_learn_slower():
    """Adam's first step has the size of the learning rate: what each leaf moves by is its multiplier."""
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "pos_embed": {"embedding": jnp.ones((3, 4))},
        "layers": {"attn": {"q_proj": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}}},
        "final_norm": {"scale": jnp.ones(4)},
        "lm_head": {"kernel": jnp.ones((5, 4))},
    }
    config = optim(name="adamw", clip_norm=0.0, layer_decay=0.5)
    moved = run(optimizer(config, lambda step: 1e-2, multipliers(config, 3)), params, [params])[0]
    want = {"embed": 0.125, "pos_embed": 0.125, "final_norm": 1.0, "lm_head": 1.0}
    for path, x in flatten(moved).items():
        factor = want.get(path.split("/")[0], np.array([0.25, 0.5, 1.0]).reshape(3, *(1,) * (x.ndim - 1)))
        np.testing.assert_allclose(x, 1 - 1e-2 * factor * np.ones(x.shape), rtol=1e-6, err_msg=path)


def test_a_method_scales_its_leaves_and_their_decay_with_them():
    """As parameter groups of torch do, whose learning rate acts on weight decay too."""
    config = optim(name="adamw", weight_decay=0.5, clip_norm=0.0, lora_plus=16.0)
    b_faster = lambda path, optim: optim.lora_plus if path.endswith("lora/b") else 1.0  # noqa: E731
    params = {"layers": {"mlp": {"up_proj": {"lora": {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 5, 3))}}}}}
    gradients = [jax.tree.map(lambda x, s=s: x * s, params) for s in (1.0, -3.0, 2.0)]
    ours = flatten(run(optimizer(config, lambda step: 1e-2, multipliers(config, 2, b_faster)), params, gradients)[-1])
    for path, rate in (("a", 1e-2), ("b", 16e-2)):
        tensor = torch.nn.Parameter(torch.ones(()))
        adam = torch.optim.AdamW([tensor], lr=rate, weight_decay=0.5)
        for g in (1.0, -3.0, 2.0):
            tensor.grad = torch.tensor(g)
            adam.step()
        np.testing.assert_allclose(ours[f"layers/mlp/up_proj/lora/{path}"], float(tensor.detach()), rtol=1e-5)


@pytest.mark.parametrize("by_importance", [False, True])
def test_the_pull_to_the_start_is_the_gradient_of_its_loss(by_importance):
    """Against PyTorch: two steps of SGD on a loss with weight · Σ importance · (x - start)²."""
    rng = np.random.default_rng(0)
    start, importance, slope = (rng.random((3, 4)).astype(np.float32) for _ in range(3))
    x = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.SGD([x], lr=0.1)
    weight = {"ewc": 1.4} if by_importance else {"start_l2": 0.7}
    ours = optimizer(optim(name="sgd", b1=0.0, clip_norm=0.0, **weight), lambda step: 0.1)
    params = {"x": jnp.array(start)}
    state = ours.init(params)
    if by_importance:
        state = (state[0]._replace(importance={"x": jnp.array(importance)}), *state[1:])
    for _ in range(2):
        theirs.zero_grad()
        pull = (torch.tensor(importance) if by_importance else 1.0) * (x - torch.tensor(start)) ** 2
        ((torch.tensor(slope) * x).sum() + 0.7 * pull.sum()).backward()
        theirs.step()
        updates, state = ours.update({"x": jnp.array(slope)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["x"], x.detach(), rtol=1e-6)


def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_rows():
    pair = tiny.pair("llama-tied")
    docs = tiny.documents([5, 9, 7, 6, 8])
    examples = [Example(doc.astype(np.int32), np.arange(len(doc)) > 2) for doc in docs]
    batches = Batches(examples, 2, 12, buckets=1, shuffle=False)
    sums = functools.partial(causal.sums, pair.model)
    found = flatten(fisher.diagonal(sums, lambda trained, frozen: {"params": trained}, pair.params, {}, batches))
    model, expected = copy.deepcopy(pair.torch).double(), None
    for doc in docs:
        model.zero_grad()
        tiny.torch_loss(model, [doc], [3])[0].backward()
        squared = {path: g**2 / len(docs) for path, g in tiny.torch_gradients(pair, model).items()}
        expected = squared if expected is None else {path: expected[path] + g for path, g in squared.items()}
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-3, atol=1e-6 * expected[path].max(), err_msg=path)
