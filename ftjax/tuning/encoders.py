"""Small networks that make virtual tokens while they are trained, computed and initialised as torch does.

n virtual tokens in a row, h hidden width; kernels lie (out, in).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

DIRECTIONS = ("forward", "backward")


def dense_init(key, out: int, in_: int) -> dict:
    """Kernel and bias uniform in ±1/sqrt(in)."""
    return _uniform(key, in_, {"kernel": (out, in_), "bias": (out,)})


def dense(leaves, x):
    """x (n, in) -> (n, out)."""
    return x @ leaves["kernel"].T + leaves["bias"]


def lstm_init(key, in_: int, h: int, layers: int) -> dict:
    """The leaves of `lstm`, uniform in ±1/sqrt(h)."""
    out = {}
    for layer in range(layers):
        for name in DIRECTIONS:
            key, own = jax.random.split(key)
            shapes = {"input": (4 * h, in_), "hidden": (4 * h, h), "input_bias": (4 * h,), "hidden_bias": (4 * h,)}
            out[f"{name}_{layer}"] = _uniform(own, h, shapes)
        in_ = 2 * h
    return out


def lstm(leaves, x):
    """A bidirectional LSTM (Hochreiter & Schmidhuber 1997), gates in torch's order: x (n, in) -> (n, 2 h)."""

    def run(own, x, reverse):
        def step(state, x):
            h, c = state
            gates = own["input"] @ x + own["input_bias"] + own["hidden"] @ h + own["hidden_bias"]
            i, f, g, o = jnp.split(gates, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(own["hidden"].shape[1], x.dtype)
        return jax.lax.scan(step, (zero, zero), x, reverse=reverse)[1]

    for layer in range(len(leaves) // len(DIRECTIONS)):
        runs = [run(leaves[f"{name}_{layer}"], x, name == "backward") for name in DIRECTIONS]
        x = jnp.concatenate(runs, axis=-1)
    return x


def encoder_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of a leaf of an encoder, or of the embeddings that it reads."""
    return (None,) if path.endswith("bias") else (None, "embed")


def _uniform(key, fan: int, shapes: dict) -> dict:
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(own, shape, minval=-1.0) * fan**-0.5
        for own, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
