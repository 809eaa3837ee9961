"""P-tuning: its encoders against torch's layers, and where they start. n virtual tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
import torch

from ftjax.tree import flatten
from ftjax.tuning import ptuning
from ftjax.tuning.encoders import lstm, lstm_init

n = 6


def test_lstm_is_that_of_torch():
    leaves = lstm_init(jax.random.key(0), 8, 5, 2)
    model = torch.nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
    tensors = {}
    for layer in range(2):
        for name, tail in (("forward", ""), ("backward", "_reverse")):
            for part, short in (("input", "ih"), ("hidden", "hh")):
                own = leaves[f"{name}_{layer}"][part]
                tensors[f"weight_{short}_l{layer}{tail}"] = torch.tensor(np.asarray(own["weight"]))
                tensors[f"bias_{short}_l{layer}{tail}"] = torch.tensor(np.asarray(own["bias"]))
    model.load_state_dict(tensors)
    x = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.tensor(x)[None])[0][0].numpy()
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(tiny.jit(lstm)(leaves, x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("encoder", "count"), [("mlp", 3), ("lstm", 2)])
def test_it_starts_as_torch_would(encoder, count):
    """Standard normal embeddings; weights and biases uniform in ±1/sqrt(in), an LSTM's in ±1/sqrt(h)."""
    h = 32
    pair = tiny.tuned(tiny.pair("llama-tied"), method="ptuning", virtual_tokens=n, encoder=encoder, encoder_hidden=h)
    _, trained, _ = tiny.start(pair)
    leaves = {path: np.asarray(x) for path, x in flatten(trained).items()}
    assert np.std(leaves.pop("embedding")) == pytest.approx(1, abs=0.2)
    assert sum(path.startswith("dense_") and path.endswith("weight") for path in leaves) == count
    for path, x in leaves.items():
        fan = h if path.startswith("lstm/") else leaves[f"{path.rsplit('/', 1)[0]}/weight"].shape[1]
        assert 0.6 * fan**-0.5 < np.abs(x).max() <= fan**-0.5, path
    assert len({x.tobytes() for x in leaves.values()}) == len(leaves)
    assert ptuning.encode(trained).shape == (n, 16)


def test_exported_as_a_plain_prompt():
    pair = tiny.tuned(tiny.pair("gpt2"), method="ptuning", virtual_tokens=n)
    method, trained, frozen = tiny.start(pair)
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    assert adapter_config["peft_type"] == "PROMPT_TUNING" and tensors.keys() == {"prompt_embeddings"}
    np.testing.assert_array_equal(tensors["prompt_embeddings"], ptuning.encode(trained))
    assert tensors["prompt_embeddings"].shape == (n, 16)
