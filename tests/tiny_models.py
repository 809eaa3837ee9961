"""Tiny random models made by transformers: the referee's own files."""

from __future__ import annotations

from importlib import metadata

import pytest

# Version 4 says of rotary embeddings in two keys what version 5 says in one.
TRANSFORMERS_5 = int(metadata.version("transformers").split(".")[0]) >= 5


def rotary(theta: float, **scaling) -> dict:
    """What config.json says of rotary embeddings, for the installed version of transformers."""
    if TRANSFORMERS_5:
        return {"rope_parameters": scaling | {"rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": scaling}


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# name -> (model_type, what config.json says)
VARIANTS = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 20, "activation_function": "relu"}),
    "llama2": ("llama", SIZES | {"num_key_value_heads": None}),
    "llama-tied": ("llama", SIZES | {"tie_word_embeddings": True, "head_dim": 6, "rms_norm_eps": 1e-5}),
    "llama-biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", SIZES | rotary(500.0, rope_type="linear", factor=2.0)),
    "llama3": ("llama", SIZES | rotary(500000.0, **LLAMA3, original_max_position_embeddings=16)),
    "mistral": ("mistral", SIZES | {"sliding_window": 5}),
    "mistral-full": ("mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 8}),
    "qwen3-biases": ("qwen3", SIZES | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}),
}


def make(kind: str, settings: dict):
    """A random model whose every parameter, norms and biases too, differs from its initial value."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def logits(model):
    """Float32 logits (2, 12, V) of fixed rows."""
    import torch

    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) * 7 % 50).logits.float().numpy()


def load(folder):
    """What a colleague's transformers makes of a folder."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """name of a variant -> (folder as transformers saves it, the torch model in memory)."""

    def save(name, folder="source", **options):
        model = make(*VARIANTS[name])
        model.save_pretrained(tmp_path / folder, **options)
        return tmp_path / folder, model

    return save
