"""IA3: what it scales by default and by name, and files that do not fit."""

from __future__ import annotations

import copy

import jax
import numpy as np
import peft
import pytest
import tiny

from ftjax.errors import FtjaxError
from ftjax.objectives import causal
from ftjax.tree import flatten
from ftjax.tuning import ia3
from ftjax.tuning.targets import module_names

# model, our targets and feedforward, peft's; empty: both sides' defaults
CASES = {
    "llama": ("llama2", (), (), None, None),
    "mistral": ("mistral", (), (), None, None),
    "gpt2": ("gpt2", (), (), None, None),
    "names": ("qwen3", ("q_proj", "up_proj"), ("up_proj",), ["q_proj", "up_proj"], ["up_proj"]),
    "all-linear": ("llama2", ("all-linear",), ("down_proj",), "all-linear", ["down_proj"]),
    "outputs alone": ("llama2", ("k_proj", "down_proj"), ("none",), ["k_proj", "down_proj"], []),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_and_sides_are_those_of_peft(case):
    name, targets, feedforward, modules, inputs = CASES[case]
    pair = tiny.tuned(tiny.pair(name), method="ia3", targets=targets, feedforward=feedforward)
    config = peft.IA3Config(target_modules=modules, feedforward_modules=inputs, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config).get_base_model()
    theirs = {m: tuple(x.ia3_l["default"].shape) for m, x in model.named_modules() if hasattr(x, "ia3_l")}
    leaves, ours = flatten(tiny.start(pair)[1]), {}
    for leaf, hits in ia3.scaled(pair.spec).items():
        path, _, side = leaf.rsplit("/", 2)
        size = leaves[leaf].shape[-1]
        shape = (1, size) if side == "input" else (size, 1)
        modules = module_names(path, pair.spec.names[path], pair.model.config)
        ours |= {module: shape for module, hit in zip(modules, hits, strict=True) if hit}
    assert ours == theirs and ours


def test_layers_that_are_no_target_are_not_trained():
    pair = tiny.tuned(tiny.pair("llama2"), method="ia3", targets=(r"re:.*layers\.[02]\..*_proj",))
    method, trained, frozen = tiny.start(pair)
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9))], [[0], [3]], 12)
    loss = lambda t: causal.sums(pair.model, method.variables(t, frozen, pair.spec), batch)[0]  # noqa: E731
    for path, g in flatten(tiny.jit(jax.grad(loss))(trained)).items():
        assert not np.any(g[1]) and np.any(g[0]) and np.any(g[2]), path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("k_porj",)}, r"tuning.targets: 'k_porj' matches no linear map .*did you mean \"k_proj\""),
        ({"targets": ("embed_tokens",)}, "tuning.targets: 'embed_tokens' matches no linear map"),
        ({"feedforward": ("up_proj",)}, "tuning.feedforward: 'up_proj' matches no linear map"),  # no target
    ],
)
def test_targets_that_cannot_be_used(fields, message):
    with pytest.raises(FtjaxError, match=message):
        tiny.start(tiny.tuned(tiny.pair("llama2"), method="ia3", **fields))


K = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            lambda t: t,
            "lm_head.weight is missing: .* has .lm_head. in modules_to_save",
        ),
        ({}, lambda t: t | {K: t[K][:-1]}, r"k_proj.ia3_l has shape \(15, 1\), expected \(16, 1\) or \(1, 16\)"),
        (
            {},
            lambda t: {n.replace("k_proj", "key_proj"): x for n, x in t.items()},
            'mean "model.layers.0.self_attn.k_proj',
        ),
        (
            {},
            lambda t: {n.removeprefix("base_model."): x for n, x in t.items()},
            "expected the prefix .base_model.model.",
        ),
        ({}, lambda t: {}, "no IA3 tensors"),
    ],
)
def test_files_that_do_not_fit(config, change, message):
    pair = tiny.tuned(tiny.pair("llama2"), method="ia3")
    method, trained, frozen = tiny.start(pair)
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    with pytest.raises(FtjaxError, match=message):
        method.from_peft(adapter_config | config, change(tensors), pair.params, pair.spec)
