"""Attention of rows that are long enough to be taken in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax.models import attention
from ftjax.models.attention import attend_in_row, key_layout

B, T, H, K, D, N = 2, 523, 4, 2, 16, 5
SEGMENTS = np.array([[1] * 200 + [2] * 301 + [0] * 22, [1] * T], np.int32)
POSITIONS = np.array([[*range(200), *range(301), *range(22)], range(T)], np.int32)


def arrays():
    shapes = {"q": (B, T, H, D), "k": (B, T, K, D), "v": (B, T, K, D), "g": (B, T, H, D)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes.values(), strict=True)]


def value_and_gradients(attend):
    q, k, v, g = arrays()

    @tiny.jit
    def run(q, k, v, g):
        out, back = jax.vjp(lambda *x: jnp.where((SEGMENTS > 0)[..., None, None], attend(*x), 0), q, k, v)
        return out, *back(g)

    return run(q, k, v, g)


@pytest.mark.parametrize("window", [0, 150])
def test_pieces_are_the_attention_of_jax(window):
    def masked(q, k, v):
        behind = np.arange(T)[:, None] - np.arange(T)
        seen = (behind >= 0) & (behind < (window or T)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="xla")

    ours = value_and_gradients(lambda q, k, v: attend_in_row(q, *key_layout(k, v), SEGMENTS, window=window))
    for a, b in zip(ours, value_and_gradients(masked), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_pieces_see_the_prefix(monkeypatch):
    keys = jax.random.split(jax.random.key(1))
    prefix = {"k": jax.random.normal(keys[0], (K, D, N)), "v": jax.random.normal(keys[1], (K, N, D))}
    how = {"prefix": prefix, "positions": jnp.asarray(POSITIONS) + N, "window": 150}

    def run(q, k, v):
        return attend_in_row(q, *key_layout(k, v), SEGMENTS, **how)

    pieces = value_and_gradients(run)
    monkeypatch.setattr(attention, "PIECES", 1)
    for a, b in zip(pieces, value_and_gradients(run), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_pieces_drop_each_its_own_share_of_the_softmax():
    q, k, v, _ = arrays()
    k, v = key_layout(k, jnp.ones_like(v))
    run = jax.jit(lambda key: attend_in_row(q, k, v, jnp.ones((B, T), int), rate=0.5, key=key))
    out = run(jax.random.key(0))
    np.testing.assert_array_equal(out, run(jax.random.key(0)))
    assert np.abs(out - run(jax.random.key(1))).max() > 0.1
    # What is kept of a softmax over many keys, scaled up, is 1 in the mean.
    assert abs(float(out[:, 100:].mean()) - 1) < 0.02


def test_pieces_leave_out_most_of_what_is_masked(monkeypatch):
    q, k, v, _ = arrays()

    def flops():
        run = jax.jit(lambda q, k, v: attend_in_row(q, *key_layout(k, v), jnp.ones((B, T), int)))
        return run.lower(q, k, v).compile().cost_analysis()["flops"]

    pieces = flops()
    monkeypatch.setattr(attention, "PIECES", 1)
    assert 0.6 < pieces / flops() < 0.66  # (1 + 2 + 3 + 4) / 16
