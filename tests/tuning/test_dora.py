"""DoRA: its norms, what its gradients are, what it leaves alone, and how fast its leaves learn."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from peft.optimizers import create_loraplus_optimizer

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.objectives import causal
from ftjax.training.optimizer import decayed
from ftjax.tree import flatten
from ftjax.tuning import METHODS, dora, lora


def test_norms_are_those_of_the_sum():
    rng = np.random.default_rng(0)
    w, a, b = rng.normal(size=(40, 24)), rng.normal(size=(3, 24)), rng.normal(size=(40, 3))
    want = np.linalg.norm(w + 0.7 * b @ a, axis=1)
    got = dora.row_norms(*(jnp.asarray(x, jnp.float32) for x in (w, a, b)), 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_no_sum_of_the_size_of_a_kernel_is_built():
    """Beside x and y nothing of the kernel's size is computed: W + sBA would be (out, in)."""
    out, in_, rank, tokens = 512, 384, 4, 8
    leaves = {
        "a": jnp.ones((rank, in_)),
        "b": jnp.ones((out, rank)),
        "scale": jnp.float32(1),
        "magnitude": jnp.ones(out),
    }
    x, y, kernel = jnp.ones((1, tokens, in_)), jnp.ones((1, tokens, out)), jnp.ones((out, in_))
    compiled = jax.jit(lambda *args: dora.apply(*args, None, leaves, None)).lower(x, y, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.nbytes / 4


def test_gradient_does_not_flow_through_the_norm():
    """As in the paper, section 4.3: with g = m / ‖W + sBA‖ held constant, dy/dB = g · dy/dB of LoRA."""
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32), jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=7), jnp.float32)
    leaves = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in (("a", (2, 6)), ("b", (7, 2)), ("magnitude", 7))
    }
    leaves["scale"] = jnp.float32(0.5)
    g = leaves["magnitude"] / dora.row_norms(kernel, leaves["a"], leaves["b"], 0.5)
    y = x @ kernel.T + bias

    def ours(leaves):
        return jnp.sum(jnp.sin(dora.apply(x, y, kernel, bias, leaves, None)))

    def constant(leaves):
        return jnp.sum(jnp.sin(g * (y - bias + lora.update(x, leaves, None)) + bias))

    for leaf in ("a", "b"):
        np.testing.assert_allclose(jax.grad(ours)(leaves)[leaf], jax.grad(constant)(leaves)[leaf], rtol=1e-4, atol=1e-5)


def test_layers_that_are_no_target_are_not_trained():
    pair = tiny.tuned(tiny.pair("llama-biases"), method="dora", rank=2, targets=(r"re:.*layers\.[02]\..*q_proj",))
    method, trained, frozen = tiny.start(pair)
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9))], [[0], [3]], 12)
    loss = lambda t: causal.sums(pair.model, method.variables(t, frozen, pair.spec), batch)[0]  # noqa: E731
    gradient = flatten(tiny.jit(jax.grad(loss))(trained))["layers/attn/q_proj/lora/magnitude"]
    assert not np.any(gradient[1]) and np.abs(gradient[0]).min() > 0 and np.abs(gradient[2]).min() > 0
    kernels = np.asarray(pair.params["layers"]["attn"]["q_proj"]["kernel"])
    magnitude = np.asarray(trained["layers"]["attn"]["q_proj"]["lora"]["magnitude"])
    np.testing.assert_allclose(magnitude[[0, 2]], np.linalg.norm(kernels, axis=-1)[[0, 2]], rtol=1e-6)
    assert not magnitude[1].any()


def test_rates_by_leaf_are_those_of_peft():
    """LoRA+: B and magnitudes learn `optim.lora_plus` times as fast as A."""
    pair = tiny.tuned(tiny.pair("llama2"), method="dora", targets=("q_proj",))
    config = configs.default().optim
    config.lora_plus = 16.0
    lora_config = peft.LoraConfig(use_dora=True, target_modules=["q_proj"])
    model = peft.get_peft_model(copy.deepcopy(pair.torch), lora_config)
    groups = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    theirs = {name: round(rates[id(p)] / 1e-3) for name, p in model.named_parameters() if p.requires_grad}
    theirs = {leaf: {rate for name, rate in theirs.items() if part in name}
              for leaf, part in (("a", "lora_A"), ("b", "lora_B"), ("magnitude", "magnitude"))}  # fmt: skip
    path = "layers/attn/q_proj/lora/"
    assert {leaf: {METHODS["dora"].lr_scale(path + leaf, config)} for leaf in theirs} == theirs


def test_weight_decay_spares_magnitudes():
    _, trained, _ = tiny.start(tiny.tuned(tiny.pair("llama2"), method="dora", targets=("q_proj", "lm_head")))
    for path, on in flatten(decayed(trained)).items():
        assert on == (not path.endswith("magnitude")), path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "pissa"}, "tuning.init: pissa changes W, .* one of default, gaussian, orthogonal"),
        ({"targets": ("embed_tokens",)}, "tuning.targets: dora cannot adapt embedding tables"),
    ],
)
def test_what_dora_cannot_be_on(fields, message):
    with pytest.raises(FtjaxError, match=message):
        tiny.start(tiny.tuned(tiny.pair("llama2"), method="dora", **fields))


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("change", "alpha", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != Q}, 1, f"adapter tensor {Q} is missing"),
        (lambda t: t | {Q: t[Q][1:]}, 1, f"adapter tensor {Q} has shape .15,., expected .16,."),
        (lambda t: t, 0, "lora_alpha and alpha_pattern: dora needs numbers above 0"),
        (lambda t: t, -1, "lora_alpha and alpha_pattern: dora needs numbers above 0"),
    ],
)
def test_adapters_that_do_not_fit(change, alpha, message):
    pair = tiny.tuned(tiny.pair("llama2"), method="dora", targets=("q_proj",))
    method, trained, frozen = tiny.start(pair)
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    assert adapter_config["use_dora"] and Q in tensors
    with pytest.raises(FtjaxError, match=message):
        method.from_peft(adapter_config | {"lora_alpha": alpha}, change(tensors), pair.params, pair.spec)
