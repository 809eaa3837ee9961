"""LoRA against peft: which maps are adapted, at what rank and scale; what adapters compute; what they leave alone."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from peft.tuners.lora import LoraLayer

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import peft as peft_files
from ftjax.models.layers import ADAPTERS, Adapter
from ftjax.objectives import causal
from ftjax.training.optimizer import optimizer
from ftjax.training.step import compile_step, init_state
from ftjax.tree import flatten
from ftjax.tuning import lora
from ftjax.tuning.targets import EMBEDDINGS, module_names

# model, our targets, peft's target_modules, ranks by pattern, alphas by pattern
CASES = {
    "names": ("llama2", ("q_proj", "v_proj"), ["q_proj", "v_proj"], (), ()),
    "all-linear": ("llama-biases", ("all-linear",), "all-linear", (), ()),
    "all-linear of gpt2": ("gpt2", ("all-linear",), "all-linear", (), ()),
    "a tail of two parts": ("llama2", ("mlp.up_proj", "self_attn.o_proj"), ["mlp.up_proj", "self_attn.o_proj"], (), ()),
    "both maps of one name": ("gpt2", ("c_proj",), ["c_proj"], (), ()),
    "one of two of a name": ("gpt2", ("attn.c_proj", "c_attn"), ["attn.c_proj", "c_attn"], (), ()),
    "one layer's module": ("llama2", ("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"], (), ()),
    "some layers": ("qwen3", (r"re:.*layers\.[02]\..*(q|k)_proj",), r".*layers\.[02]\..*(q|k)_proj", (), ()),
    "a whole name or nothing": ("llama2", (r"re:model\.layers\.\d\.mlp\.(up|gate)_proj",),
                                r"model\.layers\.\d\.mlp\.(up|gate)_proj", (), ()),
    "the head": ("llama2", ("lm_head", "q_proj"), ["lm_head", "q_proj"], (), ()),
    "ranks of a name": ("llama2", ("all-linear",), "all-linear", (("q_proj", 2), ("mlp.up_proj", 8)), ()),
    "ranks of a layer": ("llama2", ("q_proj", "v_proj"), ["q_proj", "v_proj"], ((r"layers\.1\..*", 6),), ()),
    "first pattern wins": ("llama2", ("q_proj", "v_proj"), ["q_proj", "v_proj"],
                           ((r"layers\.1\.self_attn\.q_proj", 3), ("q_proj", 5)), ()),
    "embeddings": ("llama2", ("embed_tokens", "q_proj"), ["embed_tokens", "q_proj"], (("embed_tokens", 2),), ()),
    "tied embeddings": ("gpt2", ("wte", "wpe", "c_attn"), ["wte", "wpe", "c_attn"], (), ()),
    "rslora": ("llama2", ("all-linear",), "all-linear", (("q_proj", 2),), (("k_proj", 6),)),
    "alphas": ("llama2", ("all-linear",), "all-linear", (("k_proj", 2),), (("k_proj", 6), (r".*\.2\.mlp\..*", 1))),
}  # fmt: skip


def adapted(pair):
    """Module name -> (rank, scale), as we have it."""
    out = {}
    for path, (rank, scale) in lora.ranks(pair.spec).items():
        modules = module_names(path, pair.spec.names[path], pair.model.config)
        out |= {module: (int(r), float(s)) for module, r, s in zip(modules, rank, scale, strict=True) if r}
    return out


@pytest.mark.parametrize("case", CASES)
def test_targets_ranks_and_scales_are_those_of_peft(case):
    name, targets, modules, ranks, alphas = CASES[case]
    tuning = {"rank_pattern": ranks, "alpha_pattern": alphas, "rslora": case == "rslora"}
    pair = tiny.tuned(tiny.pair(name), rank=4, alpha=10.0, targets=targets, **tuning)
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=modules, rank_pattern=dict(ranks), alpha_pattern=dict(alphas),
        use_rslora=case == "rslora", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config).get_base_model()
    theirs = {
        module: (layer.r["default"], layer.scaling["default"])
        for module, layer in model.named_modules() if isinstance(layer, LoraLayer)
    }  # fmt: skip
    ours = adapted(pair)
    assert ours.keys() == theirs.keys()
    for module, (r, scale) in theirs.items():
        assert ours[module] == (r, pytest.approx(scale, rel=1e-6)), module
    # The shapes too: a rank below the stack's largest leaves zeros.
    _, trained, _ = tiny.start(pair)
    for path, (rank, _) in lora.ranks(pair.spec).items():
        a, b = (np.asarray(flatten(trained)[f"{path}/lora/{leaf}"]) for leaf in "ab")
        a, b = (x if x.ndim == 3 else x[None] for x in (a, b))
        assert a.shape[1] == b.shape[2] == rank.max()
        drawn, zero = (b.swapaxes(1, 2), a) if path in EMBEDDINGS else (a, b)
        assert not zero.any() and (np.abs(drawn).max(-1) > 0).sum(-1).tolist() == rank.tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("q_porj",)}, r"'q_porj' matches no linear map .*did you mean \"q_proj\""),
        ({"targets": ("q_proj", "c_attn")}, "'c_attn' matches no linear map"),
        ({"targets": ("roj",)}, "'roj' matches no linear map"),  # no part of a word, as peft
        ({"targets": (r"re:layers\.0\..*",)}, "matches no linear map"),  # a whole name, as peft
        ({"targets": (r"re:model\.layers\.7\..*",)}, "matches no linear map"),
        ({"targets": ("re:(q_proj",)}, "tuning.targets: .* is not a regular expression"),
        ({"targets": ("re:[[q]_proj",)}, "tuning.targets: .* is not a regular expression: Possible nested set"),
        ({"rank_pattern": (("q_(", 2),)}, "tuning.rank_pattern: .* is not a regular expression"),
        ({"rank_pattern": (("porj", 2),)}, r"tuning.rank_pattern: 'porj' matches no module"),  # no part of a word
        ({"alpha_pattern": (("k_porj", 2),)}, r"tuning.alpha_pattern: 'k_porj' .*did you mean \"k_proj\""),
        ({"init": "orthogonal", "rank": 3}, "tuning.init: orthogonal needs even ranks; found 3"),
        ({"init": "pissa", "rank": 17}, "tuning.rank: layers/attn/q_proj is 16 x 16 and has no 17 singular vectors"),
    ],
)
def test_targets_that_cannot_be_used(fields, message):
    with pytest.raises(FtjaxError, match=message):
        tiny.start(tiny.tuned(tiny.pair("llama2"), **fields))


def test_tied_head_is_no_target():
    with pytest.raises(FtjaxError, match="'lm_head' matches no linear map .* its head is tied"):
        tiny.start(tiny.tuned(tiny.pair("llama-tied"), targets=("lm_head",)))


def test_initial_a_is_drawn_as_peft_draws_it():
    pair = tiny.tuned(tiny.pair("llama2"), rank=64)
    _, trained, _ = tiny.start(pair)
    model = peft.get_peft_model(copy.deepcopy(pair.torch), peft.LoraConfig(r=64, target_modules="all-linear"))
    theirs = model.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight.detach().numpy()
    ours = np.asarray(trained["layers"]["mlp"]["down_proj"]["lora"]["a"][0])
    assert ours.shape == theirs.shape
    bound = ours.shape[1] ** -0.5
    for a in (ours, theirs):
        assert 0.99 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.06) and abs(a.mean()) < 0.06 * bound
    layers = np.asarray(trained["layers"]["mlp"]["down_proj"]["lora"]["a"])
    assert np.abs(layers[0] - layers[1]).max() > 0.1 * bound  # each layer has its own


@pytest.mark.parametrize("name", ["gaussian", "orthogonal", "embedding"])
def test_other_random_starts_are_drawn_as_peft_draws_them(name):
    """The same spread of A and of B, and BA = 0."""
    target = "embed_tokens" if name == "embedding" else "down_proj"
    drawn = "default" if name == "embedding" else name
    pair = tiny.tuned(tiny.pair("llama2"), rank=16, targets=(target,), init=drawn)
    _, trained, _ = tiny.start(pair)
    a, b = (np.asarray(trained["embed"]["lora"][leaf] if name == "embedding" else
                       trained["layers"]["mlp"]["down_proj"]["lora"][leaf]) for leaf in "ab")  # fmt: skip
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, target_modules=[target], init_lora_weights=True if drawn == "default" else drawn)
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    theirs = {}
    for path, p in model.named_parameters():
        if "lora_" in path:
            theirs.setdefault("a" if "_A" in path else "b", []).append(p.detach().numpy())
    for leaf, x in (("a", a), ("b", b)):
        want = np.stack(theirs[leaf])
        assert x.shape == want.shape[-x.ndim :]
        assert x.std() == pytest.approx(want.std(), rel=0.15) and abs(x.mean()) < 0.1 * (x.std() or 1)
    np.testing.assert_allclose(b @ a, 0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_starts_from_the_base_are_those_of_peft(name):
    """Their products; singular vectors have no sign of their own. The base's own weights stay as they are."""
    pair = tiny.tuned(tiny.pair("llama2"), rank=4, alpha=6.0, targets=("up_proj",), init=name)
    _, trained, frozen = tiny.start(pair)
    params, initial = lora.split(frozen)
    jax.tree.map(np.testing.assert_array_equal, params, flatten(pair.params))
    leaves, start = flatten(trained), initial
    assert start.keys() == {path.replace("/lora/", "/lora_initial/") for path in leaves}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], init_lora_weights=name)
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config).get_base_model().model
    for layer, block in enumerate(model.layers):
        weights = block.mlp.up_proj
        want = (weights.lora_B["default"].weight @ weights.lora_A["default"].weight).detach().numpy()
        for tree, scope in ((leaves, "lora"), (start, "lora_initial")):
            a, b = (np.asarray(tree[f"layers/mlp/up_proj/{scope}/{leaf}"])[layer] for leaf in "ab")
            np.testing.assert_allclose(b @ a, want, rtol=0, atol=1e-5)


def test_start_of_one_target_does_not_depend_on_the_others():
    pairs = (tiny.tuned(tiny.pair("llama2"), targets=(target,)) for target in ("q_proj", "all-linear"))
    few, many = (flatten(tiny.start(pair)[1]) for pair in pairs)
    assert len(few) < len(many)
    for path, x in few.items():
        np.testing.assert_array_equal(x, many[path], err_msg=path)


TUNING = {
    "rank": 4,
    "alpha": 6.0,
    "targets": (r"re:.*layers\.[02]\..*(q|up|down)_proj", "v_proj", "lm_head"),
    "rank_pattern": ((r"layers\.2\..*", 2),),
}


@functools.cache
def trained_pair():
    """A llama and its adapters after five steps with weight decay: (pair, method, initial, trained, frozen)."""
    pair = tiny.tuned(tiny.pair("llama-biases"), **TUNING)
    method, initial, frozen = tiny.start(pair)
    initial = jax.tree.map(np.asarray, initial)
    config = configs.default().optim
    config.weight_decay = 0.1
    optim = optimizer(config, lambda step: 3e-2)
    step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(pair.model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=0,
    )  # fmt: skip
    state = init_state(optim, jax.tree.map(jnp.asarray, initial))
    batches = [tiny.batch([[doc] for doc in tiny.documents((12, 12), seed=s)], [[0], [0]], 12) for s in range(5)]
    step = step.lower(state, frozen, batches[0]).compile(tiny.HASTE)
    for batch in batches:
        state, _ = step(state, frozen, batch)
    return pair, method, initial, state.trained, frozen


def logits(pair, variables):
    ids = jnp.asarray(np.stack(tiny.documents((12, 12))))
    return np.asarray(tiny.jit(lambda variables: pair.model.apply(variables, ids))(variables))


def test_merged_model_has_the_adapted_logits():
    pair, method, _, trained, frozen = trained_pair()
    adapted = logits(pair, method.variables(trained, frozen, pair.spec))
    merged = logits(pair, {"params": method.merge(trained, frozen, pair.spec)})
    base = logits(pair, {"params": frozen})
    assert np.abs(adapted - base).max() > 0.1
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-5)


def test_adapted_logits_are_those_of_peft(tmp_path):
    pair, method, _, trained, frozen = trained_pair()
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    peft_files.write_adapter(tmp_path / "adapter", tensors, adapter_config, None, "base")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "adapter")
    want = tiny.torch_logits(model, np.stack(tiny.documents((12, 12))))
    np.testing.assert_allclose(logits(pair, method.variables(trained, frozen, pair.spec)), want, rtol=0, atol=1e-4)


def test_training_leaves_layers_that_are_no_target_at_zero():
    pair, _, initial, trained, _ = trained_pair()
    ranks = lora.ranks(pair.spec)
    assert ranks["layers/attn/q_proj"][0].tolist() == [4, 0, 2] and ranks["layers/attn/v_proj"][0].tolist() == [4, 4, 2]
    for path, (rank, _) in ranks.items():
        for leaf in "ab":
            x, before = (np.asarray(flatten(t)[f"{path}/lora/{leaf}"]) for t in (trained, initial))
            x, before = (v if v.ndim == 3 else v[None] for v in (x, before))
            for layer, r in enumerate(rank):
                x_layer, before_layer = (v[layer] if leaf == "a" else v[layer].T for v in (x, before))  # (R, in or out)
                assert not x_layer[r:].any(), path
                assert (x_layer[:r] != before_layer[:r]).mean() > 0.99 if r else True, path


def test_gradient_of_the_adapter_is_that_of_the_merged_kernel():
    """dL/dB = s · dL/dW Aᵀ and dL/dA = s · Bᵀ dL/dW, at the merged weights."""
    pair, method, _, trained, frozen = trained_pair()
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9))], [[0], [3]], 12)
    loss = lambda variables: causal.sums(pair.model, variables, batch)[0]  # noqa: E731
    ours = flatten(tiny.jit(jax.grad(lambda t: loss(method.variables(t, frozen, pair.spec))))(trained))
    whole = flatten(tiny.jit(jax.grad(lambda p: loss({"params": p})))(method.merge(trained, frozen, pair.spec)))
    for path, (_, scale) in lora.ranks(pair.spec).items():
        a, b = (np.asarray(flatten(trained)[f"{path}/lora/{leaf}"]) for leaf in "ab")
        kernel = np.asarray(whole[f"{path}/kernel"])
        s = scale[:, None, None] if kernel.ndim == 3 else scale[0]
        for leaf, want in (("a", s * (b.swapaxes(-1, -2) @ kernel)), ("b", s * (kernel @ a.swapaxes(-1, -2)))):
            # Of a layer that is no target, and beyond its rank, both are zero.
            np.testing.assert_allclose(ours[f"{path}/lora/{leaf}"], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_dropout_of_rate_zero_is_off():
    pair, method, _, trained, frozen = trained_pair()
    variables = method.variables(trained, frozen, pair.spec)
    assert not any(path.endswith("dropout") for path in flatten(variables["adapter"]))
    tokens = jnp.asarray(np.stack(tiny.documents((12, 12))))
    apply = tiny.jit(lambda v, rngs: pair.model.apply(v, tokens, rngs=rngs))
    np.testing.assert_array_equal(apply(variables, {"dropout": jax.random.key(0)}), apply(variables, {}))
    with_rate = method.variables(trained, frozen, tiny.tuned(pair, **TUNING, dropout=0.4).spec)
    np.testing.assert_array_equal(apply(with_rate, {}), apply(variables, {}))  # no key: evaluation
    assert np.abs(apply(with_rate, {"dropout": jax.random.key(0)}) - apply(variables, {})).max() > 1e-2


def test_dropout_statistics():
    """The adapter's input alone is dropped, independently, and scaled up to keep its mean."""
    rate, n = 0.3, 512
    leaves = {"a": jnp.eye(n), "b": jnp.eye(n), "scale": jnp.float32(2.0), "dropout": jnp.float32(rate)}
    x, y = jnp.ones((2, 100, n)), jnp.full((2, 100, n), 5.0)
    apply = ADAPTERS["lora"].after
    change = np.asarray(apply(x, y, None, None, leaves, jax.random.key(0))) - 5.0
    dropped = np.abs(change) < 1e-6
    np.testing.assert_allclose(change[~dropped], 2.0 / (1 - rate), rtol=1e-5)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(dropped.mean() - rate) < 4 * deviation / dropped.size**0.5
    for axis in range(3):  # no row, place or column is dropped as one
        means = dropped.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(means - rate).max() < 5 * deviation / (dropped.size / len(means)) ** 0.5
    np.testing.assert_allclose(apply(x, y, None, None, leaves, None), 7.0)


def test_every_adapted_map_draws_its_own_dropout(monkeypatch):
    pair, method, _, trained, frozen = trained_pair()
    keys = []

    def record(x, y, kernel, bias, leaves, rng):
        jax.debug.callback(lambda key: keys.append(tuple(key.tolist())), jax.random.key_data(rng))
        return y

    monkeypatch.setitem(ADAPTERS, "lora", Adapter(after=record))
    variables = method.variables(trained, frozen, pair.spec)
    pair.model.apply(variables, jnp.ones((1, 4), jnp.int32), rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    assert len(set(keys)) == len(keys) == 4 * 3 + 1  # four maps in three layers, and the head
