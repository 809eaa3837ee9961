"""Initial values of LoRA's A and B: rows of INITS. r rank, W the kernel (out, in), s the scale of the update."""

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

    Attributes:
        draw: draw(key, kernel, r, scale) -> A (r, in), B (out, r), for a kernel (out, in) in float32.
        residual: Whether s·BA is a part of W itself, so that the model starts from W - s·B₀A₀ + s·BA, with the drawn
            B₀, A₀.
    """

    draw: Callable
    residual: bool = False


def uniform(key, kernel, r, scale):
    """A uniform in ±1/sqrt(in), which equals PEFT's kaiming_uniform with a = sqrt(5); B zero."""
    out, in_ = kernel.shape
    return jax.random.uniform(key, (r, in_), minval=-1.0) * in_**-0.5, jnp.zeros((out, r))


def gaussian(key, kernel, r, scale):
    """A normal with deviation 1/r, as PEFT's `gaussian`; B zero."""
    out, in_ = kernel.shape
    return jax.random.normal(key, (r, in_)) / r, jnp.zeros((out, r))


def orthogonal(key, kernel, r, scale):
    """A and B both random with BA = 0: they use the even and the odd rows of one orthogonal matrix.

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
    """The r principal singular vectors of W, each side times the root of the singular values: s·BA = U_r S_r V_rᵀ (Meng
    et al. 2024)."""
    u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(values[:r] / scale)
    return root[:, None] * v[:r], u[:, :r] * root


def olora(key, kernel, r, scale):
    """The first r columns and rows of W = QR (Büyükakyüz 2024)."""
    q, upper = jnp.linalg.qr(kernel)
    return upper[:r], q[:, :r]


def embedding(key, kernel, r, scale):
    """A zero and B normal, as PEFT initialises every LoRA on embeddings."""
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


def draw_experts(key, path: str, shape: tuple[int, ...], rank: np.ndarray, scale: np.ndarray, init: Init):
    """As `draw`, for experts of the shape (L, E, out, in): A (L, E, R, in) and B (L, E, out, R)."""
    if init.residual:
        raise FtjaxError("tuning.init: adapters of experts start with BA = 0; use default, gaussian or orthogonal")
    (L, E, *size), R = shape, int(rank.max())
    like, key = jax.ShapeDtypeStruct(tuple(size), jnp.float32), jax.random.fold_in(key, zlib.crc32(path.encode()))
    a, b = jnp.zeros((L, E, R, size[1])), jnp.zeros((L, E, size[0], R))
    for layer in np.flatnonzero(rank):
        r, keys = int(rank[layer]), jax.random.split(jax.random.fold_in(key, layer), E)
        drawn = jax.vmap(functools.partial(init.draw, kernel=like, r=r, scale=float(scale[layer])))(keys)
        a, b = a.at[layer, :, :r].set(drawn[0]), b.at[layer, :, :, :r].set(drawn[1])
    return a, b


def draw(key, path: str, kernels, rank: np.ndarray, scale: np.ndarray, init: Init):
    """Initial A and B of stacked kernels.

    Args:
        key: Random key. Each path and layer gets its own, so that the choice of other targets does not change this one.
        path: Path of the map.
        kernels: (L, out, in).
        rank: (L,) int; R is the largest.
        scale: (L,) scales of the update.
        init: The row of INITS.

    Returns:
        A (L, R, in) and B (L, out, R), zero beyond the rank of each layer.
    """
    L, out, in_ = kernels.shape
    key, R = jax.random.fold_in(key, zlib.crc32(path.encode())), int(rank.max())
    if init.residual and R > min(out, in_):
        raise FtjaxError(f"tuning.rank: {path} is {out} x {in_} and has no {R} singular vectors to start from")
    a, b = jnp.zeros((L, R, in_)), jnp.zeros((L, out, R))
    for r in sorted(set(rank.tolist()) - {0}):
        layers = np.flatnonzero(rank == r)
        drawn = _layers(init.draw, r, key, kernels, jnp.asarray(scale), jnp.asarray(layers))
        if len(layers) == L:  # a scatter takes longer to compile
            return drawn
        a, b = a.at[layers, :r].set(drawn[0]), b.at[layers, :, :r].set(drawn[1])
    return a, b
