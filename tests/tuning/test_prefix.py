"""Prefix tuning: where it starts, how its files are laid out, and who sees it. n virtual tokens, T tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax.tuning import prefix

n = 4


def apply(pair, variables, ids):
    return np.asarray(tiny.jit(pair.model.apply)(variables, jnp.asarray(ids)))


@pytest.mark.parametrize("base", ["llama-tied", "gpt2"])
def test_it_starts_as_the_keys_and_values_of_real_tokens(base):
    pair = tiny.tuned(
        tiny.pair(base), method="prefix", virtual_tokens=n, prompt_init="text", prompt_text="x", prompt_ids=(7, 8, 9)
    )
    method, trained, frozen = tiny.start(pair)
    ids = np.stack(tiny.documents((9, 9)))
    want = apply(pair, {"params": pair.params}, np.concatenate([np.tile([7, 8, 9, 7], (2, 1)), ids], 1))[:, n:]
    np.testing.assert_allclose(apply(pair, method.variables(trained, frozen, pair.spec), ids), want, rtol=0, atol=2e-6)


def test_files_hold_keys_before_values_layer_by_layer():
    model = tiny.pair("llama-tied").model.config
    L, K, d = model.layers, model.kv_heads, model.head_dim
    flat = np.arange(n * L * 2 * K * d, dtype=np.float32).reshape(n, -1)
    parts = prefix.from_flat(flat, model)
    assert parts["k"].shape == (L, K, d, n) and parts["v"].shape == (L, K, n, d)
    by_layer = flat.reshape(n, 2 * L, K, d)  # as peft views it
    for layer in range(L):
        np.testing.assert_array_equal(parts["k"][layer], by_layer[:, 2 * layer].transpose(1, 2, 0))
        np.testing.assert_array_equal(parts["v"][layer], by_layer[:, 2 * layer + 1].transpose(1, 0, 2))
    np.testing.assert_array_equal(prefix.to_flat(parts), flat)


def test_a_window_passes_the_prefix_as_it_passes_tokens():
    """Mistral's windows of 5: through three layers the prefix reaches the token 5 · 3 - 3 places behind its last."""
    pair = tiny.tuned(tiny.pair("mistral"), method="prefix", virtual_tokens=n, prompt_init="random")
    method, trained, frozen = tiny.start(pair)
    other = jax.tree.map(lambda x: x + 1, trained)
    ids = np.stack(tiny.documents((20,)))
    got, moved = (apply(pair, method.variables(t, frozen, pair.spec), ids)[0] for t in (trained, other))
    reached = np.flatnonzero(np.abs(got - moved).max(-1) > 1e-6)
    # The last virtual token is at n - 1; the first layer's keys are seen 4 places on, and each later layer carries on.
    np.testing.assert_array_equal(reached, np.arange(12))


def test_a_projection_makes_the_prefix_of_its_embeddings():
    pair = tiny.tuned(tiny.pair("gpt2"), method="prefix", virtual_tokens=n, prefix_projection=True, encoder_hidden=5)
    method, trained, frozen = tiny.start(pair)
    trained = jax.tree.map(np.asarray, trained)
    first, second = trained["dense_0"], trained["dense_1"]
    hidden = np.tanh(trained["embedding"] @ first["weight"].T + first["bias"])
    assert hidden.shape == (n, 5)
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    want = hidden @ second["weight"].T + second["bias"]
    np.testing.assert_allclose(tensors["prompt_embeddings"], want, rtol=0, atol=1e-5)
    assert adapter_config["prefix_projection"] is False and want.shape == (n, 3 * 2 * 16)
