"""Parameters that are trained whole beside an adapter, and tables that an adapter replaces: peft's own files in, the
same logits out."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch

from ftjax.hub import peft as peft_files
from ftjax.tuning import adapters

IDS = np.stack(tiny.documents((12, 12), vocab=47))
TABLES = ["embed_tokens", "lm_head"]

# name -> (model, rows of a resized vocabulary or 0, kind of config, its settings)
SAVED = {
    "embeddings and head": ("llama2", 0, "lora", {"modules_to_save": TABLES}),
    "tied, embeddings": ("llama-tied", 0, "lora", {"modules_to_save": ["embed_tokens"]}),
    "tied, head": ("llama-tied", 0, "lora", {"modules_to_save": ["lm_head"]}),
    "tied, both": ("llama-tied", 0, "lora", {"modules_to_save": TABLES}),
    "norms": ("llama2", 0, "lora", {"modules_to_save": ["norm"], "target_modules": "all-linear"}),
    "a block's part": ("llama2", 0, "lora", {"modules_to_save": ["layers.1.mlp"], "target_modules": ["up_proj"]}),
    "all biases": ("gpt2", 0, "lora", {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "their biases": (
        "llama-biases", 0, "lora",
        {"bias": "lora_only", "target_modules": ["q_proj"],
         "rank_pattern": {"0.*q_proj": 3}, "layers_to_transform": [0], "modules_to_save": ["norm"]},
    ),
    "by expression": (
        "llama2", 0, "lora",
        {"target_modules": r".*\.[02]\..*_proj", "exclude_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "dora": ("llama-biases", 0, "lora", {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all"}),
    "ia3": (
        "llama-tied", 0, "ia3", {"target_modules": ["v_proj"], "feedforward_modules": [], "modules_to_save": TABLES}
    ),
}  # fmt: skip
REPLACED = {
    "tied, by wish": ("llama-tied", 0, "lora", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "resized": ("llama2", 53, "lora", {}),
    "resized, tied": ("llama-tied", 53, "lora", {}),
    "resized, tied and saved": ("llama-tied", 53, "lora", {"modules_to_save": ["embed_tokens"]}),
    "resized, both saved": ("llama2", 53, "lora", {"modules_to_save": TABLES}),
    "smaller, tied and adapted": ("llama-tied", 47, "lora", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": ("llama2", 0, "lora", {"trainable_token_indices": [3, 7]}),
    "tokens, tied": ("llama-tied", 0, "lora", {"trainable_token_indices": [3, 7]}),
    "tokens of both": ("llama2", 0, "lora", {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [4]}}),
    "tokens, resized and tied": ("llama-tied", 53, "lora", {"trainable_token_indices": [50, 51]}),
}  # fmt: skip
CASES = SAVED | REPLACED


def resized(pair, rows):
    model = copy.deepcopy(pair.torch)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture
def made(tmp_path):
    """name of a case -> (Pair of its base, folder of peft's adapter, logits of the two together)."""

    def make(name):
        model, rows, kind, settings = CASES[name]
        pair = tiny.pair(model)
        pair.torch.save_pretrained(tmp_path / "base")  # whose vocabulary peft compares with
        kinds = {"lora": (peft.LoraConfig, {"r": 2, "target_modules": ["q_proj"]}), "ia3": (peft.IA3Config, {})}
        config, usual = kinds[kind]
        torch.manual_seed(1)
        made = peft.get_peft_model(resized(pair, rows), config(task_type="CAUSAL_LM", **usual | settings)).eval()
        made.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_pretrained(tmp_path / "adapter")
        want = tiny.torch_logits(made, IDS)
        assert np.abs(want[..., :47] - tiny.torch_logits(pair.torch, IDS)[..., :47]).max() > 1e-1
        return pair, tmp_path / "adapter", want

    return make


def logits(pair, variables):
    model = pair.model.clone(config=dataclasses.replace(
        pair.model.config, vocab_size=len(variables["params"]["embed"]["embedding"])
    ))  # fmt: skip
    return np.asarray(tiny.jit(lambda variables: model.apply(variables, IDS))(variables))


@pytest.mark.parametrize("name", CASES)
def test_adapters_made_by_peft_have_its_logits(made, name):
    pair, folder, want = made(name)
    before = [np.array(x) for x in jax.tree.leaves(pair.params)]
    variables = adapters.variables(adapters.read(folder), pair.params, pair.spec)
    np.testing.assert_allclose(logits(pair, variables), want, rtol=0, atol=1e-4)
    for x, old in zip(jax.tree.leaves(pair.params), before, strict=True):
        np.testing.assert_array_equal(x, old)  # the base stays as it is, for the other adapters beside it


@pytest.mark.parametrize("name", SAVED)
def test_what_a_run_starts_from_and_writes_again(made, name, tmp_path):
    """As a run does it: fields from the files, the adapter as trained; exported it is peft's, merged it is the same."""
    pair, folder, want = made(name)
    method, adapter_config, tensors = adapters.read(folder)
    trained, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    pair = tiny.tuned(pair, **fields)
    start, frozen = method.init(jax.random.key(0), pair.params, pair.spec)
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, trained)
    trained = jax.tree.map(jnp.asarray, trained)
    merged = method.merge(trained, frozen, pair.spec)
    np.testing.assert_allclose(logits(pair, {"params": merged}), want, rtol=0, atol=1e-4)

    again, out = method.to_peft(trained, frozen, pair.spec)
    copies = {tensor for tensor in tensors if ".base_layer.weight" in tensor}
    assert out.keys() == tensors.keys() - copies
    peft_files.write_adapter(tmp_path / "again", out, again, None, "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "again").eval()
    np.testing.assert_allclose(tiny.torch_logits(model, IDS), want, rtol=0, atol=1e-4)
