"""config.json <-> ModelConfig, against transformers' own reading of the same file."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from tiny_models import TRANSFORMERS_5

from ftjax.errors import FtjaxError
from ftjax.hub.families import (
    ACTIVATIONS,
    FAMILIES,
    LAYER_TYPES,
    from_hf,
    linear_names,
    module_name,
    read_config,
    shapes,
    to_hf,
    with_head,
)
from ftjax.models.config import RopeScaling

SMALL = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2}


def transformers_config(kind, settings):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **settings)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if not kind.startswith("ftjax_")])
def test_missing_keys_mean_what_transformers_assumes(kind):
    family, ours = from_hf({"model_type": kind})
    theirs = transformers_config(kind, {}).get_text_config()
    if ours.global_head_dim:
        full = theirs.per_layer_config["full_attention"]
        assert (ours.global_head_dim, ours.global_kv_heads) == (full.head_dim, full.num_key_value_heads)
        theirs.allow_global_per_layer_attribute_access = True  # of the other layers
    for field, key in family.keys.items():
        value = getattr(theirs, key, None)
        if key in ("head_dim", "num_key_value_heads", "num_attention_heads", "n_inner"):  # computed from others
            heads, D = ours.heads, ours.width
            value = value or {"head_dim": D // heads, "num_key_value_heads": heads, "n_inner": 4 * D}[key]
        if field == "activation":
            value = ACTIVATIONS[value]
        if field == "max_positions":
            value -= ours.position_offset
        if field in family.converted:
            value = family.converted[field][0](value)
        assert getattr(ours, field) == value, field
    if ours.local_theta and TRANSFORMERS_5:
        assert ours.rope_theta == theirs.rope_parameters["full_attention"]["rope_theta"]
        assert ours.local_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
        told = {"rope_parameters": {each: {"rope_type": "default"} for each in LAYER_TYPES}}
        again = from_hf({"model_type": kind} | ({"text_config": told} if family.text else told))[1]
        assert (again.rope_theta, again.local_theta) == (ours.rope_theta, ours.local_theta)
    elif ours.local_theta and kind == "modernbert":
        assert (ours.rope_theta, ours.local_theta) == (theirs.global_rope_theta, theirs.local_rope_theta)
    elif ours.positions == "rotary":
        rope = theirs.rope_parameters if TRANSFORMERS_5 else {"rope_theta": theirs.rope_theta}
        assert (ours.rope_theta, ours.rotary_share) == (rope["rope_theta"], rope.get("partial_rotary_factor", 1.0))
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if kind == "modernbert":
        window, types = 65, types or ["sliding_attention" if i % 3 else "full_attention" for i in range(22)]
    if kind == "qwen3_moe" or not getattr(theirs, "use_sliding_window", True):
        window = None
    windows = [window if t == "sliding_attention" else 0 for t in types or ["sliding_attention"] * ours.layers]
    assert ours.windows == (tuple(windows) if window and any(windows) else ())
    if kind == "smollm3":
        assert ours.rotary == tuple(map(bool, theirs.no_rope_layers))


def test_reads_what_transformers_writes_and_writes_what_it_reads(variant):
    folder, model = variant
    family, config = read_config(folder)
    hf = to_hf(family, config)
    assert from_hf(hf) == (family, config)
    again = transformers_config(hf.pop("model_type"), {k: v for k, v in hf.items() if k != "architectures"})
    rotary = {"rope_parameters"} if TRANSFORMERS_5 else {"rope_theta", "rope_scaling"}
    for key in set(family.keys.values()) | rotary | {"sliding_window", "layer_types"}:
        theirs, meant = getattr(again, key, None), getattr(model.config, key, None)
        if meant is None and key in ("n_inner", "head_dim"):
            meant = {"n_inner": 64, "head_dim": 4}[key]
        assert theirs == meant, key


def test_every_parameter_of_the_referee_has_a_row_and_a_shape(variant):
    folder, model = variant
    count = sum(p.numel() for p in model.parameters())  # tied tables count once
    assert sum(math.prod(shape) for shape in shapes(read_config(folder)[1]).values()) == count


def test_module_names_are_the_referees(variant):
    import torch
    from transformers.pytorch_utils import Conv1D

    folder, model = variant
    family, config = read_config(folder)
    theirs = {name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding, Conv1D))}
    ours = {name.format(l=i) for name in linear_names(family, config).values() for i in range(config.layers)}
    assert ours == (theirs - {"lm_head"} if config.tied else theirs)
    path = "layers/attn/c_attn" if family.model_type == "gpt2" else "layers/attn/q_proj"
    assert module_name(path, family, config) == linear_names(family, config)[path]


def model(kind, *sizes, **more):
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
    return {"model_type": kind} | dict(zip(keys, sizes, strict=True)) | more


@pytest.mark.parametrize(
    ("hf", "count"),
    [
        ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),  # GPT-2 XL
        (model("llama", 4096, 14336, 32, 32, 8, 128256), 8_030_261_248),  # Llama 3.1 8B
        (model("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),  # Llama 3.1 70B
        (model("mixtral", 4096, 14336, 32, 32, 8, 32000), 46_702_792_704),  # Mixtral 8x7B
        (
            model("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, norm_topk_prob=True),
            30_532_122_624,  # Qwen3-30B-A3B
        ),
        (model("gpt_oss", 2880, 2880, 24, 64, 8, 201088, num_local_experts=32), 20_914_757_184),  # gpt-oss-20b
        (model("gemma2", 3584, 14336, 42, 16, 8, 256000), 9_241_705_984),  # Gemma 2 9B
        (model("smollm3", 2048, 11008, 36, 16, 4, 128256), 3_075_098_624),  # SmolLM3 3B
        (
            model("phi3", 3072, 8192, 32, 24, 8, 200064, tie_word_embeddings=True, partial_rotary_factor=0.75),
            3_836_021_760,  # Phi-4-mini
        ),
    ],
)
def test_public_models_have_their_published_number_of_parameters(hf, count):
    assert sum(math.prod(shape) for shape in shapes(from_hf(hf)[1]).values()) == count


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no Gemma 4")
def test_gemma_4_has_the_number_of_parameters_of_the_referee():
    """With the sizes of E2B: layers that share keys and values, and inputs of each layer."""
    import torch
    from transformers import Gemma4ForCausalLM

    said = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1}
    said |= {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
    with torch.device("meta"):
        model = Gemma4ForCausalLM(transformers_config("gemma4_text", said))
    counted = {p: math.prod(shape) for p, shape in shapes(from_hf({"model_type": "gemma4_text"} | said)[1]).items()}
    assert counted.pop("layers/scalar/scale") == 35  # no parameters there, but in the files
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(not TRANSFORMERS_5, reason="the defaults are those of Transformers 5")
def test_the_text_part_of_gemma3_27b_has_its_published_number_of_parameters():
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(zip(["hidden_size", "intermediate_size", "num_hidden_layers"], (5376, 21504, 62), strict=True))
    text |= {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
    hf = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    whole = sum(p.numel() for p in model.parameters())
    other = sum(p.numel() for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n)
    assert whole == 27_432_406_640
    assert sum(math.prod(shape) for shape in shapes(from_hf(hf)[1]).values()) == whole - other


SCALED = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
LINEAR = {"rope_type": "linear", "factor": 2.0}
L3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("said", "theta", "scaling"),
    [
        ({}, 10000.0, RopeScaling()),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, RopeScaling()),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, 5e5, RopeScaling("linear", 4)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | L3}, 5e5, SCALED),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | L3}, 5e5, SCALED),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | L3}, 5e5, SCALED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, RopeScaling()),
    ],
)
def test_rotary_of_both_versions(said, theta, scaling):
    _, config = from_hf({"model_type": "llama"} | said)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "said",
    [
        *({}, {"rope_parameters": {}}, {"rope_parameters": None, "rope_scaling": {}}, {"rope_theta": 1e4}),
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
@pytest.mark.skipif(not TRANSFORMERS_5, reason="the defaults are those of Transformers 5")
def test_the_rotary_of_gpt_oss_without_rope_parameters_is_that_of_transformers(said):
    theirs = transformers_config("gpt_oss", said).rope_parameters
    _, ours = from_hf({"model_type": "gpt_oss"} | said)
    assert ours.rope_theta == theirs["rope_theta"] and ours.rope_scaling.kind == theirs["rope_type"]
    assert ours.rope_scaling.factor == theirs.get("factor", 1.0) and ours.rope_scaling.truncate == theirs.get(
        "truncate", True
    )


def test_rotary_is_written_for_both_versions():
    family, config = from_hf({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | L3})
    hf = to_hf(family, config)
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 5e5
    assert hf["rope_scaling"] == {"rope_type": "llama3"} | L3
    assert hf["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 5e5} | L3


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 7}, (7, 7, 7)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "qwen2", "sliding_window": 7}, ()),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 7)),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, ()),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (7, 0, 7),
        ),
        ({"model_type": "llama", "sliding_window": 7}, ()),
        # Keys that are read in other families, but not by transformers in these.
        ({"model_type": "mistral", "sliding_window": 7, "use_sliding_window": False}, (7, 7, 7)),
        (
            {"model_type": "qwen3_moe", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 48},
            (7, 7, 7),
        ),
        (
            {
                "model_type": "smollm3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 28,
                "no_rope_layers": [1, 0, 1],
            },
            (0, 7, 0),
        ),
    ],
)
def test_windows(said, windows):
    family, config = from_hf(SMALL | said)
    assert config.windows == windows
    assert from_hf(to_hf(family, config))[1].windows == windows


def test_gpt2_answers_to_the_names_of_others():
    _, config = from_hf({"model_type": "gpt2", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1})
    assert (config.width, config.heads, config.kv_heads, config.layers, config.hidden) == (16, 2, 2, 1, 64)


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        ({"model_type": "lama"}, ["unknown model_type 'lama'", '"llama"', "gpt2, llama, mistral, qwen2, qwen3"]),
        ({}, ["unknown model_type None"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, ["type = 'mrope'", "llama3"]),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, ["'dynamic' needs 'factor'"]),
        ({"model_type": "llama", "rope_scaling": {"type": "longrope"}}, ["'longrope' needs 'short_factor'"]),
        ({"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "twice"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}, ["needs 'factor'"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": "2"}}, ["factor = '2'"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, ["mrope_section"]),
        ({"model_type": "llama", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention"]),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "llama", "is_causal": False}, ["is_causal"]),
        ({"model_type": "llama", "hidden_act": "mish"}, ["hidden_act = 'mish'"]),
        ({"model_type": "llama", "hidden_size": "64"}, ["hidden_size = '64'", "whole number"]),
        ({"model_type": "llama", "hidden_size": None}, ["hidden_size = None"]),
        ({"model_type": "llama", "num_hidden_layers": 0}, ["num_hidden_layers = 0"]),
        ({"model_type": "llama", "tie_word_embeddings": "yes"}, ["tie_word_embeddings = 'yes'", "true or false"]),
        (
            {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
            ["hidden_size = 30 is not a multiple of num_attention_heads = 4"],
        ),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, ["n_embd = 30 is not a multiple of n_head = 4"]),
        (
            {"model_type": "distilbert", "hidden_size": 30, "n_heads": 4},
            ["json: hidden_size = 30 is not a multiple of n_heads = 4"],
        ),
        (
            {"model_type": "llama", "num_key_value_heads": 5},
            ["num_key_value_heads = 5 does not divide num_attention_heads = 32"],
        ),
        ({"model_type": "llama", "architectures": ["YiForCausalLM"]}, ["'YiForCausalLM'", "LlamaForCausalLM"]),
        (
            {"model_type": "llama", "logits_scaling": 8.0},
            ["logits_scaling = 8.0", "not supported for llama models, because it changes the logits"],
        ),
        ({"model_type": "llama", "qk_layernorm": True}, ["qk_layernorm = True"]),
        ({"model_type": "qwen2", "num_experts": 60}, ["num_experts = 60"]),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ({"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}}, ["quantization_config"]),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma"}},
            ["text_config", "'gemma'; the text part of this family is a gemma3_text"],
        ),
        (
            {"model_type": "gemma3", "text_config": {"final_logit_softcapping": 30.0}},
            ["final_logit_softcapping = 30.0"],
        ),
        ({"model_type": "gemma4_text", "enable_moe_block": True}, ["enable_moe_block = True"]),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "all"}, ["use_bidirectional_attention = 'all'"]),
        (
            {"model_type": "gemma4_text", "vocab_size_per_layer_input": 9},
            ["input: expected that of vocab_size, 262144"],
        ),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 26}, ["num_kv_shared_layers = 26 leaves a type"]),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 30}, ["num_kv_shared_layers = 30 leaves a type"]),
        ({"model_type": "gemma4_text", "per_layer_config": {"0": {"head_dim": 8}}}, ["per_layer_config: expected the"]),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"29": {"head_dim": "8"}}},
            ["per_layer_config = ", "an object in which '29' is an object in which 'head_dim' is a whole number"],
        ),
        ({"model_type": "gemma4_text", "per_layer_config": {"29": None}}, ["in which '29' is an object"]),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"29": {"head_dim": 8}}},
            ["per_layer_config: expected the"],
        ),
        (
            {"model_type": "gemma4_text", "global_head_dim": 7},
            ["num_attention_heads = 8, 4 KV heads", "heads of 7 dimensions (global_head_dim", "an even number"],
        ),
        ({"model_type": "llama", "per_layer_config": {"0": {"head_dim": 8}}}, ["per_layer_config"]),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            ["num_experts_per_tok = 9 is more than num_local_experts = 8"],
        ),
        ({"model_type": "olmoe", "sliding_window": 8}, ["sliding_window = 8 is not supported for olmoe models"]),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 30}, ["leave no layer with experts"]),
        (
            {"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}},
            ["but not in text_config; make them"],
        ),
        ({"model_type": "gemma3", "text_config": [1]}, ["text_config = [1]"]),
        ({"model_type": "gemma3", "text_config": {"architectures": 1}}, ["text_config: architectures = 1"]),
        ({"model_type": "gemma3", "text_config": {"id2label": 1}}, ["text_config: id2label = 1"]),
        ({"model_type": "gemma2", "query_pre_attn_scalar": None}, ["query_pre_attn_scalar = None", "above 0"]),
        ({"model_type": "qwen3_5_text", "full_attention_interval": 0}, ["full_attention_interval = 0"]),
        ({"model_type": "granite", "logits_scaling": 0}, ["logits_scaling = 0", "above 0"]),
        ({"model_type": "granite", "attention_multiplier": None}, ["attention_multiplier = None", "above 0"]),
        ({"model_type": "gpt_oss", "swiglu_limit": None}, ["swiglu_limit = None", "above 0"]),
        ({"model_type": "qwen3_5_text", "hidden_act": "gelu"}, ["hidden_act = 'gelu' is not supported"]),
        ({"model_type": "phi3", "default_theta": 1}, ["default_theta = 1 is not", "or where it is None"]),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, ["factor = 0.5 is not", "where it is None or 1.0"]),
        (
            {
                "model_type": "phi3",
                "original_max_position_embeddings": None,
                "rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [1.0]},
            },
            ["rope_type 'longrope' needs 'original_max_position_embeddings', which is missing"],
        ),
        ({"model_type": "gemma3", "text_config": {"hidden_act": "x", "hidden_size": "1"}}, ["hidden_size = '1'"]),
        ({"model_type": "gemma3", "quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "gpt_oss", "quantization_config": 4}, ["quantization_config = 4"]),
        ({"model_type": "gpt_oss", "hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        ({"model_type": "gpt_neox", "rope_theta": 77.0}, ["rope_theta = 77.0, which", "expected rotary_emb_base"]),
        (
            {"model_type": "gpt_neox", "partial_rotary_factor": 0.5},
            ["which transformers 5 does not read", "expected rotary_pct"],
        ),
        ({"model_type": "olmo3", "rope_theta": 77.0}, ["rope_theta = 77.0, which transformers 4 reads for all layers"]),
        (
            {"model_type": "gpt_neox", "rotary_pct": 0.5, "partial_rotary_factor": 0.25},
            ["rotary_pct = 0.5, but partial_rotary_factor = 0.25, and both are one field"],
        ),
        (
            {"model_type": "glm4", "partial_rotary_factor": None},
            ["partial_rotary_factor is null, which may mean 1 or the"],
        ),
        (
            {"model_type": "glm4", "partial_rotary_factor": 1.5},
            ["heads have 128", "192 of them", "partial_rotary_factor = 1.5"],
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, ["no_rope_layers: expected 36 entries; found 2"]),
        ({"model_type": "olmo3", "rope_parameters": {"rope_theta": 1e4}}, ["expected full_attention", "rope_theta"]),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn"]),
        ({"model_type": "gpt2", "scale_attn_weights": False}, ["scale_attn_weights"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window = 0; expected 1 or more, or null"]),
        ({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["chunked"]}, ["expected 1 of full_attention"]),
        ({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, ["window is off"]),
        ({"model_type": "qwen2_moe", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, ["window is off"]),
        (
            {"model_type": "llama", "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 5e5}},
            ["rope_parameters: rope_theta: transformers reads nothing here beside rope_scaling; write it there too"],
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}},
            ["rope_scaling: type = 'linear'; expected it under the name rope_type"],
        ),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {"full_attention": {"truncate": False, "rope_type": "yarn"} | L3},
            },
            ["expected rope_type = 'default' in sliding", "and neither 'longrope' nor truncate = false in full"],
        ),
        (
            {"model_type": "glm4", "rope_parameters": {"rope_type": "proportional"}},
            ["rope_type = 'proportional'; expected one of default"],
        ),
        ({"model_type": "gpt_neox", "original_max_position_embeddings": 1}, ["original_max_position_embeddings = 1"]),
        ({"model_type": "modernbert", "rope_scaling": LINEAR}, ["rope_scaling = {"]),
        ({"model_type": "modernbert", "sliding_window": 5}, ["sliding_window = 5 is not supported"]),
        ({"model_type": "gemma4_text", "rope_theta": 77.0}, ["rope_theta = 77.0 is not supported"]),
    ],
)
def test_what_would_change_the_logits_is_refused_by_name(hf, words):
    with pytest.raises(FtjaxError) as error:
        from_hf(hf, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no Gemma 4")
def test_layers_of_gemma_4_with_heads_of_one_size():
    """transformers then writes an empty per_layer_config, and reads no other key for these sizes."""
    told = SMALL | {"num_hidden_layers": 6, "head_dim": 4, "global_head_dim": 4, "num_global_key_value_heads": 1}
    said = transformers_config("gemma4_text", told).to_dict()
    assert said["per_layer_config"] == {} and said["layer_types"][-1] == "full_attention"
    family, shape = from_hf(said | {"global_head_dim": 8, "vocab_size_per_layer_input": said["vocab_size"]})
    assert (shape.global_head_dim, shape.global_kv_heads) == (4, 2)
    assert from_hf(to_hf(family, shape))[1] == shape


def test_two_bases_of_wavelengths_that_transformers_4_has_one_key_for():
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4 * i} for i, kind in enumerate(LAYER_TYPES, 1)}
    family, shape = from_hf({"model_type": "olmo3", "rope_parameters": rope} | SMALL)
    assert (shape.rope_theta, shape.local_theta) == (1e4, 2e4)
    assert from_hf(to_hf(family, shape))[1] == shape and "rope_theta" not in to_hf(family, shape)


def test_a_family_refuses_to_be_what_it_cannot_be():
    family, config = from_hf({"model_type": "mistral"} | SMALL)
    with pytest.raises(FtjaxError, match="mistral model cannot have qkv_bias = True"):
        to_hf(family, dataclasses.replace(config, qkv_bias=True))


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_5_text"])
def test_a_family_without_vectors_of_texts_names_those_that_have_them(kind, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FtjaxError) as error:
        with_head(*from_hf({"model_type": kind}), "none", 0, tmp_path)
    assert str(error.value).startswith(f"task.kind: a {kind} model has no form for embed; it has those for causal, ")
    assert str(error.value).endswith(" are bert, roberta, distilbert, modernbert")


def test_broken_config_file(tmp_path):
    with pytest.raises(FtjaxError, match="config.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(FtjaxError, match="invalid JSON: .*line 1"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(["llama"]))
    with pytest.raises(FtjaxError, match="expected a JSON object, found list"):
        read_config(tmp_path)
