"""PEFT adapters read and written: peft's own files in, the same logits out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from tiny_models import load, logits

from ftjax.errors import FtjaxError
from ftjax.hub.families import linear_names, read_config
from ftjax.hub.peft import read_adapter, write_adapter
from ftjax.hub.weights import read_params
from ftjax.lm import quantiser
from ftjax.tree import flatten
from ftjax.tuning.lora_peft import lora_from_peft, lora_to_peft

LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]

# name -> (variant of the base, settings of peft's LoraConfig)
ADAPTERS = {
    "llama": ("llama2", {"target_modules": LLAMA_TARGETS}),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "grouped": ("mistral", {"target_modules": ["k_proj", "o_proj", "gate_proj"], "lora_alpha": 5}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj", "c_fc"], "fan_in_fan_out": True}),
    "rslora": ("llama2", {"target_modules": LLAMA_TARGETS, "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "llama2",
        {
            "target_modules": LLAMA_TARGETS,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
            "alpha_pattern": {r"model.layers.\d+.self_attn.v_proj": 7, r"layers\.0\.self_attn\.q_proj": 1},
        },
    ),
    "some-layers": ("llama2", {"target_modules": LLAMA_TARGETS, "layers_to_transform": [0, 2]}),
    "one-module": ("llama2", {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"]}),
    "head": ("llama2", {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings": ("llama2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-embeddings": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2-embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    "gaussian": ("qwen2", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.fixture
def adapter(saved, tmp_path):
    """name of an adapter -> (base folder, adapter folder, logits of the two together)."""

    def make(name, **more):
        import torch
        from peft import LoraConfig, get_peft_model

        variant, settings = ADAPTERS[name]
        folder, base = saved(variant)
        plain = logits(base)
        settings = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings | more
        model = get_peft_model(base, LoraConfig(**settings)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n or "lora_embedding_A" in n:
                    p.normal_(std=0.5)
        model.save_pretrained(tmp_path / "adapter")
        trained = logits(model)
        assert np.abs(trained - plain).max() > 1e-2
        return folder, tmp_path / "adapter", trained

    return make


def names_of(folder):
    family, config = read_config(folder)
    return linear_names(family, config), config, read_params(folder, family, config)


def peft_logits(base, folder):
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")  # a wrong name is only a warning to peft
        model = PeftModel.from_pretrained(load(base), folder).eval()
    adapted = logits(model)
    return adapted, model


@pytest.mark.parametrize("name", ADAPTERS)
def test_there_and_back(adapter, tmp_path, name):
    base, folder, trained = adapter(name)
    names, config, params = names_of(base)
    adapter_config, tensors = read_adapter(folder)
    tree, ranks = lora_from_peft(adapter_config, tensors, names, config, params)
    assert {str(x.dtype) for x in flatten(tree).values()} == {"float32"}
    again, back = lora_to_peft(tree, ranks, names, config)
    assert back.keys() == {tensor for tensor in tensors if ".lora_" in tensor}
    for tensor in back:
        np.testing.assert_array_equal(back[tensor], tensors[tensor])
    write_adapter(tmp_path / "out", back, again, base, "some/base")
    adapted, model = peft_logits(base, tmp_path / "out")
    np.testing.assert_allclose(adapted, trained, atol=1e-5)
    if name not in ("tied-embeddings", "gpt2-embeddings"):  # peft itself merges into the table that the tied head reads
        np.testing.assert_allclose(logits(model.merge_and_unload()), trained, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "patterns", "rslora", "some-layers", "head"])
def test_the_tree_means_w_plus_s_b_a(adapter, name):
    """Our tree merged by hand, W + s B A in (out, in) order, gives peft's logits through plain torch."""
    import torch

    base, folder, trained = adapter(name)
    names, config, params = names_of(base)
    tree, ranks = lora_from_peft(*read_adapter(folder), names, config, params)
    leaves, model = flatten(tree), load(base)
    for path, (rank, scale) in ranks.items():
        a, b = leaves[f"{path}/lora/a"], leaves[f"{path}/lora/b"]
        if not path.startswith("layers/"):
            a, b = a[None], b[None]
        assert a.shape[:2] == (len(rank), max(rank)) and b.shape[::2] == (len(rank), max(rank))
        for layer in range(len(rank)):
            assert not a[layer, rank[layer] :].any() and not b[layer, :, rank[layer] :].any()
            module = model.get_submodule(names[path].format(l=layer))
            update = torch.from_numpy(scale[layer] * b[layer] @ a[layer])
            with torch.no_grad():
                module.weight += update.T if "transformer.h" in names[path] else update
    np.testing.assert_allclose(logits(model), trained, atol=1e-5)


def test_written_config_says_all_that_readers_need(adapter, tmp_path):
    base, folder, _ = adapter("gpt2")
    (base / "tokenizer.json").write_text("{ }")
    (base / "chat_template.jinja").write_text("t")
    names, config, _ = names_of(base)
    said, tensors = lora_to_peft(*lora_from_peft(*read_adapter(folder), names, config), names, config)
    write_adapter(tmp_path / "out", tensors, said, base, "openai-community/gpt2")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        written
        | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "openai-community/gpt2",
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["attn.c_proj", "c_attn", "c_fc"],
            "fan_in_fan_out": True,
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
            "modules_to_save": None,
            "inference_mode": True,
        }
        == written
    )
    assert isinstance(written["lora_alpha"], int)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{ }"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "t"


def test_bfloat16_adapters_are_read(adapter):
    import ml_dtypes

    base, folder, _ = adapter("llama")
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    tree, _ = lora_from_peft(*read_adapter(folder), *names_of(base))
    a = flatten(tree)["layers/attn/q_proj/lora/a"]
    expected = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(a[1], expected.astype(np.float32))


# -- bad input, each with its message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is a variant"),
        ({"bias": "all"}, "bias = 'all' is a variant"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is a variant"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["w"]}, "target_parameters has 'w', which names no parameter of this model's experts"),
        ({"use_what_comes_next": {"x": 1}}, "use_what_comes_next"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        (
            {"target_modules": ["q_proj"]},
            r"down_proj.lora_A.weight: target_modules, .* do not select model.layers.0.mlp",
        ),
        ({"target_modules": r".*self_attn\.q_proj"}, "do not select model.layers.0.mlp.down_proj"),
        ({"target_modules": r"(q"}, r"adapter_config.json: target_modules: '\(q' is not a regular expression"),
        ({"exclude_modules": r".*v_proj"}, "do not select model.layers.0.self_attn.v_proj"),
        ({"layers_to_transform": [0]}, "do not select model.layers.1.mlp.down_proj"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "do not select model.layers.0.mlp.down_proj"),
        ({"r": 4}, r"q_proj.lora_A.weight has shape \(3, 16\), expected \(4, 16\)"),
    ],
)
def test_variants_are_refused_by_name(adapter, change, message):
    base, folder, _ = adapter("llama")
    adapter_config, tensors = read_adapter(folder)
    with pytest.raises(FtjaxError, match=message):
        lora_from_peft(adapter_config | change, tensors, *names_of(base))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n.removeprefix("base_model.model."): x for n, x in t.items()}, "expected the prefix 'base_model"),
        (lambda t: {n: x for n, x in t.items() if n != f"{Q}.lora_B.weight"}, f"{Q}.lora_B.weight is missing"),
        (lambda t: t | {f"{Q}.lora_B.weight": np.ones((9, 3), np.float32)}, r"shape \(9, 3\), expected \(16, 3\)"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": np.ones(16, np.float32)}, "magnitude_vector: expected MODULE"),
        (lambda t: {n.replace("layers.0", "layers.7"): x for n, x in t.items()}, "no linear map 'model.layers.7"),
        (lambda t: {n.replace("q_proj", "query_proj"): x for n, x in t.items()}, 'mean "model.layers.0.self_attn'),
        (lambda t: {}, "no LoRA tensors"),
    ],
)
def test_tensors_that_do_not_fit(adapter, change, message):
    base, folder, _ = adapter("llama")
    adapter_config, tensors = read_adapter(folder)
    with pytest.raises(FtjaxError, match=message):
        lora_from_peft(adapter_config, change(tensors), *names_of(base))


def test_a_copy_of_the_base_must_be_of_this_base(adapter):
    base, folder, _ = adapter("head")
    names, config, params = names_of(base)
    adapter_config, tensors = read_adapter(folder)
    copy = "base_model.model.lm_head.base_layer.weight"
    with pytest.raises(FtjaxError, match=f"{copy} differs from the base"):
        lora_from_peft(adapter_config, tensors | {copy: tensors[copy] + 1}, names, config, params)
    with pytest.raises(FtjaxError, match=f"{copy}: a copy of the base's weight, which needs the base"):
        lora_from_peft(adapter_config, tensors, names, config)


@pytest.mark.parametrize(("name", "module"), [("head", "lm_head"), ("embeddings", "model.embed_tokens")])
def test_a_copy_of_the_base_is_compared_with_a_quantised_base(adapter, name, module):
    base, folder, _ = adapter(name)
    names, config, _ = names_of(base)
    small = quantiser("nf4", ConfigDict({"double_quantise": True, "quantise_tables": True}), np.dtype("bfloat16"))
    params = read_params(base, *read_config(base), dtype=lambda path: np.dtype("bfloat16"), quantise=small)
    adapter_config, tensors = read_adapter(folder)
    copy = f"base_model.model.{module}.base_layer.weight"
    lora_from_peft(adapter_config, tensors, names, config, params)
    with pytest.raises(FtjaxError, match=f"{copy} differs from the base"):
        lora_from_peft(adapter_config, tensors | {copy: tensors[copy][::-1]}, names, config, params)


def test_folders_that_are_no_adapter(adapter, tmp_path):
    with pytest.raises(FtjaxError, match="adapter_config.json: no such file"):
        read_adapter(tmp_path)
    _, folder, _ = adapter("llama")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FtjaxError, match="adapter_model.safetensors: not a whole safetensors file"):
        read_adapter(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(FtjaxError, match="adapter_model.bin is a pickle"):
        read_adapter(folder)
