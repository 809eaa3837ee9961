"""Thirty steps of training soft prompts beside peft and torch, from the same initial tensors: the same losses.

As in test_against_torch, whose rows, schedules and referee these are. T tokens, n virtual tokens.
"""

from __future__ import annotations

import copy
import types
import warnings

import numpy as np
import peft
import pytest
import test_against_torch as referee
import tiny
import torch

n, T, LR = 4, 16, 2e-2

# name -> (fields of config.tuning, peft's config)
CASES = {
    "prompt": ({"method": "prompt"}, peft.PromptTuningConfig),
    "prefix": ({"method": "prefix"}, peft.PrefixTuningConfig),
    "prefix-projection": (
        {"method": "prefix", "prefix_projection": True, "encoder_hidden": 6},
        lambda **kw: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=6, **kw),
    ),
    "ptuning-mlp": ({"method": "ptuning"}, peft.PromptEncoderConfig),
    "ptuning-lstm": (
        {"method": "ptuning", "encoder": "lstm", "encoder_hidden": 6},
        lambda **kw: peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM", encoder_hidden_size=6, **kw),
    ),
}


def dense(prefix, leaves):
    return {f"{prefix}.weight": leaves["weight"], f"{prefix}.bias": leaves["bias"]}


def names(name, trained):
    """The tensors of peft's prompt encoder, as our trained tree has them."""
    if name == "prompt":
        return {"embedding.weight": trained["prompt"]}
    if name == "prefix":
        k, v = trained["prefix"]["k"], trained["prefix"]["v"]  # (L, K, d, n), (L, K, n, d)
        both = np.stack([k.transpose(3, 0, 1, 2), v.transpose(2, 0, 1, 3)], 2)  # (n, L, 2, K, d)
        return {"embedding.weight": both.reshape(n, -1)}
    head = "transform" if name == "prefix-projection" else "mlp_head"
    out = {"embedding.weight": trained["embedding"]}
    for i, part in enumerate(sorted(part for part in trained if part.startswith("dense_"))):
        out |= dense(f"{head}.{2 * i}", trained[part])
    for part, leaves in trained.get("lstm", {}).items():
        direction, layer = part.split("_")
        tail = f"l{layer}" + ("_reverse" if direction == "backward" else "")
        for which, own in (("ih", leaves["input"]), ("hh", leaves["hidden"])):
            out |= {f"lstm_head.weight_{which}_{tail}": own["weight"], f"lstm_head.bias_{which}_{tail}": own["bias"]}
    return out


class WithoutVirtual(torch.nn.Module):
    """A peft model whose logits are of real tokens alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, attention_mask=None):
        logits = self.model(ids, attention_mask=attention_mask).logits
        return types.SimpleNamespace(logits=logits[:, -ids.shape[1] :])


def peft_model(name, pair, trained):
    """The torch model with our initial tensors in peft's prompt encoder, in float64."""
    config = CASES[name][1](task_type="CAUSAL_LM", num_virtual_tokens=n)
    model = peft.get_peft_model(copy.deepcopy(pair.torch).double(), config).double()
    tensors = {key: torch.tensor(np.asarray(x)).double() for key, x in names(name, trained).items()}
    model.prompt_encoder["default"].load_state_dict(tensors)
    return WithoutVirtual(model)


@pytest.mark.parametrize(
    ("name", "base"), [("prompt", "llama-biases"), ("prefix", "llama-biases"), *((name, "gpt2") for name in CASES)]
)
def test_thirty_steps_equal_peft(name, base, monkeypatch):
    fields, _ = CASES[name]
    monkeypatch.setattr(referee, "STEPS", 30)
    monkeypatch.setitem(referee.LR, fields["method"], LR)
    pair = tiny.tuned(tiny.pair(base), virtual_tokens=n, **fields)
    rows = referee.random_rows(50, T)
    ours, before, after = referee.our_losses(pair, rows, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(name, pair, before)
        theirs = referee.their_losses(model, rows, LR)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-4, err_msg="loss")
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-3, err_msg="gradient norm")
    ids = rows[0][0][0][None]
    method, _, frozen = tiny.start(pair)
    apply = tiny.jit(lambda trained: pair.model.apply(method.variables(trained, frozen, pair.spec), ids))
    start, end = apply(before), tiny.torch_logits(model, ids)
    assert np.abs(end - start).max() > 0.1
    np.testing.assert_allclose(apply(after), end, rtol=0, atol=2e-3 * np.abs(end - start).max())
