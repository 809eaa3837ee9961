"""Where LoRA's A and B start: rows of INITS. r rank, W the kernel (out, in), s the scale of the update."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError


class Init(NamedTuple):
    """A row of INITS.

    draw(key, kernel, r, scale) -> A (r, in), B (out, r), for kernel (out, in) float32; residual: whether s·BA is a part
    of W itself, so that the model starts from W - s·B₀A₀ + s·BA with B₀, A₀ as drawn.
    """

    draw: Callable
    residual: bool = False


def uniform(key, kernel, r, scale):
    """A uniform in ±1/sqrt(in), which is what PEFT's kaiming_uniform with a = sqrt(5) comes to; B zero."""
    out, in_ = kernel.shape
    return jax.random.uniform(key, (r, in_), minval=-1.0) * in_**-0.5, jnp.zeros((out, r))


def gaussian(key, kernel, r, scale):
    """A normal with deviation 1/r, as PEFT's `gaussian`; B zero."""
    out, in_ = kernel.shape
    return jax.random.normal(key, (r, in_)) / r, jnp.zeros((out, r))


def orthogonal(key, kernel, r, scale):
    """A and B both random and BA = 0: they go through the odd and the even rows of one orthogonal matrix.

    As PEFT's `orthogonal`, which takes it from https://datta0.github.io/posts/rethink-lora-init.
    """
    if r % 2:
        raise FtjaxError(f"tuning.init: orthogonal needs even ranks; found {r}")
    out, in_ = kernel.shape
    keys = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(keys[0], (r, r)))[0]
    a = q[0::2].T @ jax.random.normal(keys[1], (r // 2, in_)) / 10
    b = jax.random.normal(keys[2], (out, r // 2)) @ q[1::2] / 10
    return a, b


def pissa(key, kernel, r, scale):
    """The r principal singular vectors of W, each side with the root of the values: s·BA = U_r S_r V_rᵀ (Meng et al.
    2024)."""
    u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(values[:r] / scale)
    return root[:, None] * v[:r], u[:, :r] * root


def olora(key, kernel, r, scale):
    """The first r columns and rows of W = QR (Büyükakyüz 2024)."""
    q, upper = jnp.linalg.qr(kernel)
    return upper[:r], q[:, :r]


def embedding(key, kernel, r, scale):
    """A zero and B normal, as PEFT starts every LoRA on embeddings."""
    out, in_ = kernel.shape
    return jnp.zeros((r, in_)), jax.random.normal(key, (out, r))


INITS = {
    "default": Init(uniform),
    "gaussian": Init(gaussian),
    "orthogonal": Init(orthogonal),
    "pissa": Init(pissa, residual=True),
    "olora": Init(olora, residual=True),
}
EMBEDDING = Init(embedding)


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled once for all kernels of one shape
def _layers(draw, r, key, kernels, scale, layers):
    """A and B of some layers, one after another: no more than one kernel in float32 at a time."""

    def one(layer):
        return draw(jax.random.fold_in(key, layer), kernels[layer].astype(jnp.float32), r, scale[layer])

    return jax.lax.map(one, layers)


def draw(key, path: str, kernels, rank: np.ndarray, scale: np.ndarray, init: Init):
    """A (L, R, in) and B (L, out, R) for stacked kernels (L, out, in), R the largest of the layers' ranks.

    rank (L,) int and scale (L,): what lies beyond a layer's rank is zero. The key depends on path and layer alone:
    choosing other targets leaves this one's start as it was.
    """
    L, out, in_ = kernels.shape
    key, R = jax.random.fold_in(key, zlib.crc32(path.encode())), int(rank.max())
    if init.residual and R > min(out, in_):
        raise FtjaxError(f"tuning.rank: {path} is {out} x {in_} and has no {R} singular vectors to start from")
    a, b = jnp.zeros((L, R, in_)), jnp.zeros((L, out, R))
    for r in sorted(set(rank.tolist()) - {0}):
        layers = np.flatnonzero(rank == r)
        drawn = _layers(init.draw, r, key, kernels, jnp.asarray(scale), jnp.asarray(layers))
        a, b = a.at[layers, :r].set(drawn[0]), b.at[layers, :, :r].set(drawn[1])
    return a, b
