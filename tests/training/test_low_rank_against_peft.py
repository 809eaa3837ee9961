"""LoRA's kin and IA3 against peft: files both ways, and 30 steps of training from the same tensors.

B rows, T tokens.
"""

from __future__ import annotations

import copy
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import test_against_torch as against
import tiny
import torch

from ftjax.hub import peft as peft_files
from ftjax.tree import flatten, unflatten
from ftjax.tuning import METHODS, lora, of_peft

SHAPES = {"rank": 4, "alpha": 6.0}

# name -> (model, tuning); GPT-2 has square and other kernels, all of them Conv1D
CASES = {
    "rslora": ("llama-biases", {"method": "lora", "rslora": True}),
    "rslora of gpt2": ("gpt2", {"method": "lora", "rslora": True, "rank_pattern": (("c_fc", 2),)}),
    "embeddings": ("llama2", {"method": "lora", "targets": ("embed_tokens", "q_proj", "lm_head")}),
    "tied embeddings": ("llama-tied", {"method": "lora", "targets": ("embed_tokens", "q_proj")}),
    "orthogonal, embeddings of gpt2": ("gpt2", {"method": "lora", "init": "orthogonal",
                                                "targets": ("wte", "wpe", "c_attn")}),
    "pissa": ("llama-biases", {"method": "lora", "init": "pissa", "rank_pattern": ((r"layers\.1\..*", 2),)}),
    "pissa of gpt2": ("gpt2", {"method": "lora", "init": "pissa", "rslora": True}),
    "olora": ("llama2", {"method": "lora", "init": "olora", "targets": ("all-linear", "lm_head", "embed_tokens")}),
    "dora": ("llama-biases", {"method": "dora"}),
    "dora of gpt2": ("gpt2", {"method": "dora", "rslora": True}),
    "dora of some": ("llama2", {"method": "dora", "targets": ("lm_head", r"re:.*layers\.[02]\..*(q|up)_proj", "v_proj"),
                                "rank_pattern": (("v_proj", 2),)}),
    "lora and modules": ("llama-biases", {"method": "lora", "modules_to_save": ("lm_head", "layers.1.mlp", "bias")}),
    "lora and tied table": ("llama-tied", {"method": "lora", "modules_to_save": ("embed_tokens", "norm")}),
    "dora and a tied head": ("llama-tied", {"method": "dora", "modules_to_save": ("lm_head",)}),
    "ia3": ("llama-biases", {"method": "ia3"}),
    "ia3 and biases": ("llama-biases", {"method": "ia3", "modules_to_save": ("bias", "embed_tokens")}),
    "ia3 of gpt2": ("gpt2", {"method": "ia3"}),
    "ia3 of some": ("llama2", {"method": "ia3", "targets": ("lm_head", r"re:.*layers\.[02]\..*q_proj", "up_proj"),
                               "feedforward": ("up_proj",)}),
    "ia3 of outputs": ("llama2", {"method": "ia3", "targets": ("down_proj", "up_proj"), "feedforward": ("none",)}),
}  # fmt: skip


def ids():
    return np.stack(tiny.documents((12, 12)))


@functools.cache
def applied(model):
    return tiny.jit(lambda variables: model.apply(variables, ids()))


def logits(pair, variables):
    return np.asarray(applied(pair.model)(variables))


def noise(path, x, spec, seed):
    """Random numbers where a leaf has an effect: not beyond a layer's rank."""
    x = 0.2 * np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32)
    if path.rsplit("/", 1)[-1] in ("a", "b"):
        rank = lora.ranks(spec)[path.rsplit("/", 2)[0]][0].reshape(-1, *(1,) * (x.ndim - 1))
        axis = x.ndim - 2 if path.endswith("a") else x.ndim - 1
        used = np.expand_dims(np.arange(x.shape[axis]), [i for i in range(x.ndim) if i != axis]) < rank
        x = x * used.reshape(used.shape[-x.ndim :])
    return x


@functools.cache
def moved(case):
    """(pair, method, trained, frozen): adapters as they start, which change nothing, then moved by noise."""
    name, tuning = CASES[case]
    pair = tiny.tuned(tiny.pair(name), **SHAPES, **tuning)
    method, trained, frozen = tiny.start(pair)
    start = logits(pair, method.variables(trained, frozen, pair.spec))
    np.testing.assert_allclose(start, logits(pair, {"params": pair.params}), rtol=0, atol=1e-5)
    leaves = flatten(trained).items()
    leaves = {path: np.asarray(x) + noise(path, x, pair.spec, n) for n, (path, x) in enumerate(leaves)}
    return pair, method, unflatten(leaves), frozen


def in_peft(pair, folder, trainable=False):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")  # a wrong name is only a warning to peft
        return peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), folder, is_trainable=trainable).eval()


@pytest.mark.parametrize("case", CASES)
def test_exported_and_merged_adapters_have_our_logits(case, tmp_path):
    pair, method, trained, frozen = moved(case)
    ours = logits(pair, method.variables(trained, frozen, pair.spec))
    assert np.abs(ours - logits(pair, {"params": pair.params})).max() > 0.1
    merged = tiny.jit(lambda trained, frozen: method.merge(trained, frozen, pair.spec))(trained, frozen)
    np.testing.assert_allclose(logits(pair, {"params": merged}), ours, rtol=0, atol=1e-4)
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    peft_files.write_adapter(tmp_path / "adapter", tensors, adapter_config, None, "base")
    model = in_peft(pair, tmp_path / "adapter")
    np.testing.assert_allclose(tiny.torch_logits(model, ids()), ours, rtol=0, atol=1e-4)
    if not (pair.model.config.tied and "embed" in trained):  # peft merges into the table that the head reads too
        np.testing.assert_allclose(tiny.torch_logits(model.merge_and_unload(), ids()), ours, rtol=0, atol=1e-4)
    # And back: what was written says all that there is.
    assert of_peft(adapter_config) is method
    again, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    spec = tiny.tuned(pair, method=pair.spec.tuning.method, **fields).spec
    variables = method.variables(
        jax.tree.map(jnp.asarray, again), method.init(jax.random.key(0), pair.params, spec)[1], spec
    )
    np.testing.assert_allclose(logits(pair, variables), ours, rtol=0, atol=1e-5)


# name -> (model, peft's config)
MADE = {
    "rslora": ("llama2", peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"])),
    "dora": ("llama-biases", peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, rank_pattern={"q_proj": 2},
                                             target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2])),
    "dora of gpt2": ("gpt2", peft.LoraConfig(r=3, use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"],
                                             fan_in_fan_out=True)),
    "ia3": ("llama2", peft.IA3Config()),
    "ia3 of qwen2": ("qwen2", peft.IA3Config()),
    "ia3 of gpt2": ("gpt2", peft.IA3Config(fan_in_fan_out=True)),
    "ia3 of outputs": ("llama2", peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[])),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_adapters_made_by_peft_have_its_logits(case, tmp_path):
    name, config = MADE[case]
    pair = tiny.pair(name)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    want = tiny.torch_logits(model, ids())
    assert np.abs(want - tiny.torch_logits(pair.torch, ids())).max() > 0.1
    adapter_config, tensors = peft_files.read_adapter(tmp_path)
    method = of_peft(adapter_config)
    assert method is METHODS[case.split(" ")[0].removeprefix("rs")]
    trained, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    spec = tiny.tuned(pair, **fields).spec
    variables = method.variables(jax.tree.map(jnp.asarray, trained), pair.params, spec)
    np.testing.assert_allclose(logits(pair, variables), want, rtol=0, atol=1e-4)


@pytest.fixture
def thirty(monkeypatch):
    monkeypatch.setattr(against, "STEPS", 30)
    return against.random_rows(50, 16)


@pytest.mark.parametrize(
    "case",
    ["rslora", "dora", "dora of gpt2", "ia3", "ia3 of gpt2", "embeddings", "lora and modules", "lora and tied table"],
)
def test_thirty_steps_equal_peft(case, thirty, tmp_path):
    name, tuning = CASES[case]
    pair = tiny.tuned(tiny.pair(name), **SHAPES, **tuning)
    ours, before, after = against.our_losses(pair, thirty, 16)
    method, _, frozen = tiny.start(pair)
    model = against.with_our_adapter(pair, before, frozen, tmp_path, method.to_peft)
    theirs = against.their_losses(model.double(), thirty, against.LR[tuning["method"]])
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-4, err_msg="loss")
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-3, err_msg="gradient norm")
    variables = method.variables(after, frozen, pair.spec)
    base, end = tiny.torch_logits(pair.torch, ids()), tiny.torch_logits(model, ids())
    assert np.abs(end - base).max() > 0.05
    np.testing.assert_allclose(logits(pair, variables), end, rtol=0, atol=2e-3 * np.abs(end - base).max())


def test_thirty_steps_of_pissa_equal_peft(thirty):
    """peft's own start, on the residual that it leaves of the base: the same singular vectors but for their signs."""
    pair = tiny.tuned(tiny.pair("llama-biases"), **SHAPES, method="lora", init="pissa")
    ours, _, _ = against.our_losses(pair, thirty, 16)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config)
    theirs = against.their_losses(model.double(), thirty, against.LR["lora"])
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-3)
