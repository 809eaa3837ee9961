"""Small networks that compute virtual tokens during training, with torch's formulas and initialisation.

n virtual tokens in a row, h hidden width; weights are (out, in).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

DIRECTIONS = ("forward", "backward")


def dense_init(key, out: int, in_: int) -> dict:
    """Weight and bias uniform in ±1/sqrt(in)."""
    return _uniform(key, out, in_, in_)


def dense(leaves, x):
    """x (..., in) -> (..., out)."""
    return x @ leaves["weight"].T + leaves["bias"]


def lstm_init(key, in_: int, h: int, layers: int) -> dict:
    """The leaves of `lstm`, uniform in ±1/sqrt(h)."""
    out = {}
    for layer in range(layers):
        for name in DIRECTIONS:
            key, *own = jax.random.split(key, 3)
            out[f"{name}_{layer}"] = {"input": _uniform(own[0], 4 * h, in_, h), "hidden": _uniform(own[1], 4 * h, h, h)}
        in_ = 2 * h
    return out


def lstm(leaves, x):
    """A bidirectional LSTM (Hochreiter & Schmidhuber 1997), gates in torch's order: x (n, in) -> (n, 2 h)."""

    def run(own, x, reverse):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(dense(own["input"], x) + dense(own["hidden"], h), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(own["hidden"]["weight"].shape[1], x.dtype)
        return jax.lax.scan(step, (zero, zero), x, reverse=reverse)[1]

    for layer in range(len(leaves) // len(DIRECTIONS)):
        runs = [run(leaves[f"{name}_{layer}"], x, name == "backward") for name in DIRECTIONS]
        x = jnp.concatenate(runs, axis=-1)
    return x


def encoder_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of a leaf of an encoder, or of the embeddings that it reads."""
    return (None,) if path.endswith("bias") else (None, "embed")


def _uniform(key, out: int, in_: int, fan: int) -> dict:
    weight, bias = jax.random.split(key)
    draw = functools.partial(jax.random.uniform, minval=-(fan**-0.5), maxval=fan**-0.5)
    return {"weight": draw(weight, (out, in_)), "bias": draw(bias, (out,))}
