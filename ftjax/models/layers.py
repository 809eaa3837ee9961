"""The layers of transformers, in pure Flax Linen. Parameters are float32 or bfloat16, computation is in `dtype`.

B batch, T tokens, D width, d head size, R rank; kernels are (out, in), as Hugging Face stores them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models import products
from ftjax.models.axes import PARAMETER_AXES, whole
from ftjax.models.by_device import look_up, sum_outer
from ftjax.models.config import RopeScaling
from ftjax.models.quantised import Quantised


class Adapter(NamedTuple):
    """How one kind of adapter changes a linear map.

    Attributes:
        before: before(x, leaves, rng) -> x (B, T, in), to which the map is then applied.
        after: after(x, y, kernel, bias, leaves, rng) -> y, for y = x kernelᵀ + bias (B, T, out), bias (out,) or None.
        grouped: grouped(x, leaves, sizes) -> what is added to the products of rows x (N, in) with experts, see
            `project_groups`. The leaves have an axis of experts in front. None: it cannot change experts.
        lookup: lookup(ids, y, leaves) -> y, for the rows y (B, T, D) of an embedding table at ids (B, T).
        axes: axes(out, in) -> logical axes of the leaves, from those of the kernel. A leaf that is split along an embed
            axis is gathered before use.

    `leaves` is the part of the `adapter` collection under the adapter's name for this layer; `rng` is a random key in
    training, and None otherwise.
    """

    before: Callable = lambda x, leaves, rng: x
    after: Callable = lambda x, y, kernel, bias, leaves, rng: y
    grouped: Callable | None = None
    lookup: Callable = lambda ids, y, leaves: y
    axes: Callable = lambda out, in_: {}


# name in the `adapter` collection -> Adapter; filled by the files of ftjax.tuning
ADAPTERS: dict[str, Adapter] = {}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x, kernel, axes=None):
    """x (..., in) @ kernel (out, in)ᵀ -> (..., out), summed in float32, in x's dtype.

    Args:
        x: (..., in).
        kernel: (out, in), an array or a Quantised.
        axes: The kernel's logical axes, if it may be split along its embed axis. It is gathered again in each pass,
            just as a quantised kernel, which has no gradient, is dequantised again.
    """
    kernel = whole(kernel, axes)
    if isinstance(kernel, Quantised) and kernel.kind == "bfloat16":  # its products are taken in what it is kept in
        return products.by_rows(x.astype(jnp.bfloat16), kernel.codes).astype(x.dtype)
    return products.by_rows(x, kernel.astype(x.dtype)).astype(x.dtype)


def _project_bwd(axes, saved, g):
    # The gradient of a frozen kernel is not used, so the compiler removes it.
    x, kernel = saved
    dx = products.contract(g, whole(kernel, axes).astype(g.dtype), ((g.ndim - 1,), (0,))).astype(g.dtype)
    return dx, None if x is None else sum_outer(g, x, products.outer, axes).astype(kernel.dtype)


def _project_fwd(x, kernel, axes):
    return project(x, kernel, axes), (None if isinstance(kernel, Quantised) else x, kernel)


project.defvjp(_project_fwd, _project_bwd)


@jax.custom_vjp
def project_groups(x, kernels, sizes):
    """Each row of x times the kernel of its group, summed in float32, in x's dtype.

    Args:
        x: (N, in), rows of one group after another.
        kernels: (groups, out, in), an array or a Quantised.
        sizes: (groups,) int32, rows of each group. Rows beyond their sum give 0.

    Returns:
        (N, out).
    """
    kernels = kernels.astype(x.dtype).swapaxes(1, 2)
    return jax.lax.ragged_dot(x, kernels, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _project_groups_bwd(saved, g):
    # As for `project`: a frozen kernel is dequantised again, and its gradient is removed.
    x, kernels, sizes = saved
    dx = jax.lax.ragged_dot(g, kernels.astype(g.dtype), sizes, preferred_element_type=jnp.float32).astype(g.dtype)
    if x is None:
        return dx, None, None
    how = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    dw = jax.lax.ragged_dot_general(g, x, sizes, how, preferred_element_type=jnp.float32)
    return dx, dw.astype(kernels.dtype), None


def _project_groups_fwd(x, kernels, sizes):
    return project_groups(x, kernels, sizes), (None if isinstance(kernels, Quantised) else x, kernels, sizes)


project_groups.defvjp(_project_groups_fwd, _project_groups_bwd)


def parameter(module: nn.Module, name: str, start: nn.initializers.Initializer, shape: tuple[int, ...]):
    """The parameter of a module: an array of this shape, or a Quantised.

    It gives what `module.param` gives. That traces the initialiser of each parameter to learn its shape, which takes a
    fifth of the time in which a model is traced.
    """
    value = module.get_variable("params", name)
    if value is None:
        return module.param(name, start, shape)
    if value.shape != shape:
        raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


class Linear(nn.Module):
    """y = x Wᵀ + b, changed by the adapters in this scope's `adapter` collection."""

    features: int
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x):
        """x (B, T, in) -> (B, T, features)."""
        kernel = parameter(self, "kernel", nn.initializers.normal(self.init_std), (self.features, x.shape[-1]))
        if not isinstance(kernel, Quantised):
            kernel = kernel.astype(self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return adapted_project(self, x, kernel, bias, PARAMETER_AXES.get(f"{self.name}/kernel"))


def adapted_project(module: nn.Module, x, kernel, bias=None, axes=None):
    """x kernelᵀ + bias, changed by the adapters in `module`'s own scope of the `adapter` collection. axes: as for
    `project`."""
    found = []
    for name, adapter in ADAPTERS.items():
        if module.has_variable("adapter", name):
            rng = module.make_rng("dropout") if module.has_rng("dropout") else None
            leaves, known = module.get_variable("adapter", name), adapter.axes(*axes) if axes else {}
            found.append((adapter, {leaf: whole(x, known.get(leaf)) for leaf, x in leaves.items()}, rng))
    for adapter, leaves, rng in found:
        x = adapter.before(x, leaves, rng)
    y = project(x, kernel, axes)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    for adapter, leaves, rng in found:
        y = adapter.after(x, y, kernel.astype(y.dtype), bias, leaves, rng)
    return y


def normalised(x, eps: float):
    """x (..., d) divided by the root of the mean of its squares."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm over the last axis, with sums in float32."""

    kind: str = "rms"  # see ModelConfig.norm
    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True  # of a layer norm

    @nn.compact
    def __call__(self, x):
        """x (..., D) -> (..., D)."""
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = parameter(self, "scale", start, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        if self.kind == "rms_plus_one":
            scale = 1 + scale
        if self.kind != "layer":
            y = normalised(x, self.eps) * scale
        else:
            y = normalised(x - jnp.mean(x, axis=-1, keepdims=True), self.eps) * scale
            if self.use_bias:
                y = y + parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        return y.astype(self.dtype)


class Embedding(nn.Module):
    """A table (V, D) that is read by index, and is the head too if it is tied. axis: logical axis of its rows."""

    size: int
    width: int
    axis: str | None = "vocab"
    dtype: jnp.dtype = jnp.float32
    init_std: float = 0.02

    def setup(self):
        shape = (self.size, self.width)
        self.embedding = parameter(self, "embedding", nn.initializers.normal(self.init_std), shape)

    def __call__(self, ids):
        """ids (B, T) int -> (B, T, D)."""
        y = look_up(self.embedding, ids, self.axis).astype(self.dtype)
        for name, adapter in ADAPTERS.items():
            if self.has_variable("adapter", name):
                y = adapter.lookup(ids, y, self.get_variable("adapter", name))
        return y

    def attend(self, x):
        """x (B, T, D) -> (B, T, V): the product with every row of the table itself. Adapters of the lookup do not
        change it."""
        table = self.embedding if isinstance(self.embedding, Quantised) else self.embedding.astype(self.dtype)
        return project(x, table, (self.axis, "embed"))


def dropout(module: nn.Module, x, rate: float):
    """Set a share `rate` of x to zero and scale the rest up if a `dropout` key is given; otherwise return x."""
    if rate == 0.0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def neftune(module: nn.Module, x, alpha: float, segment_ids):
    """Add uniform noise within ±alpha / sqrt(tokens of its segment · D) to embeddings x (B, T, D) if a `noise` key is
    given; otherwise return x (Jain et al. 2023)."""
    if alpha == 0.0 or not module.has_rng("noise"):
        return x
    tokens = jnp.sum(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1)
    noise = jax.random.uniform(module.make_rng("noise"), x.shape, minval=-alpha, maxval=alpha)
    return x + (noise * jax.lax.rsqrt(1.0 * tokens * x.shape[-1])[..., None]).astype(x.dtype)


def rotary_frequencies(dim: int, theta: float, scaling: RopeScaling) -> tuple[jax.Array, float]:
    """Angles per position of rotary embedding (Su et al. 2021), stretched as transformers stretches them.

    `linear` divides all by the factor. `dynamic` changes nothing up to the model's positions, and longer rows are
    refused. `llama3` divides low frequencies, with a ramp between wavelengths original / high and original / low (Llama
    3.1's reference code). `yarn` has a ramp over dimensions (Peng et al. 2023). `longrope` divides each by its own
    factor (Ding et al. 2024). `proportional` keeps the highest frequencies and sets the others to 0.

    Args:
        dim: Dimensions of a head that are rotated.
        theta: Base of the wavelengths.
        scaling: The RopeScaling.

    Returns:
        Frequencies float32, (dim/2,), or (2, dim/2) for longrope: those of short and of long texts. And the factor of
        cosines and sines.
    """
    inverse = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    s, original = scaling, scaling.original_max_positions
    if s.kind == "linear":
        return inverse / s.factor, 1.0
    if s.kind == "proportional":
        return jnp.where(jnp.arange(len(inverse)) < int(s.share * dim // 2), inverse, 0) / s.factor, 1.0
    if s.kind == "llama3":
        wavelength = 2 * jnp.pi / inverse
        turns = original / wavelength
        ramp = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        ramp = jnp.clip(ramp, 0.0, 1.0)
        return (1 - ramp) * inverse / s.factor + ramp * inverse, 1.0
    if s.kind == "yarn":
        places = [dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                  for turns in (s.beta_fast or 32, s.beta_slow or 1)]  # fmt: skip
        if s.truncate:
            places = [math.floor(places[0]), math.ceil(places[1])]
        low, high = max(places[0], 0), min(places[1], dim - 1)
        ramp = jnp.clip((jnp.arange(len(inverse)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        size = lambda m: 0.1 * m * math.log(s.factor) + 1 if s.factor > 1 else 1.0  # noqa: E731
        ratio = size(s.mscale) / size(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else size(1)
        inverse = ramp * inverse / s.factor + (1 - ramp) * inverse
    elif s.kind == "longrope":
        ratio = math.sqrt(1 + math.log(s.factor) / math.log(original)) if s.factor > 1 else 1.0
        inverse = inverse / jnp.array([s.short_factor, s.long_factor], jnp.float32)
    else:
        return inverse, 1.0
    return inverse, ratio if s.attention_factor is None else s.attention_factor


def rotary_tables(positions, segments, frequencies, factor: float = 1.0, pairs: str = "halves", original: int = 0):
    """Cosines and sines of the angles of tokens, which are computed once for all layers.

    Args:
        positions: (B, T) int.
        segments: (B, T) int.
        frequencies: (n,) or (2, n), as `rotary_frequencies` returns them.
        factor: Factor of cosines and sines.
        pairs: ModelConfig.rotary_pairs.
        original: Most tokens of a text that counts as short, for two rows of frequencies.

    Returns:
        Two arrays (B, T, 1, 2n) float32.
    """
    if frequencies.ndim == 2:
        # By the length of each document, so that it does not matter what it is packed with.
        last = jax.vmap(lambda p, s: jnp.zeros(len(p) + 1, p.dtype).at[s].max(p)[s])(positions, segments)
        frequencies = jnp.where((last < original)[..., None], *frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1) if pairs == "halves" else jnp.repeat(angles, 2, axis=-1)
    angles = angles[:, :, None, :]
    tables = jnp.cos(angles), jnp.sin(angles)
    return tables if factor == 1.0 else tuple(factor * x for x in tables)


def rotate(x, tables, pairs: str = "halves"):
    """Rotate pairs of the first dimensions of x (B, T, H, d) by their position's angle, in float32. pairs:
    ModelConfig.rotary_pairs."""
    cosines, sines = tables
    n = cosines.shape[-1]
    if n < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :n], tables, pairs), x[..., n:]], axis=-1)
    if pairs == "halves":
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    else:
        first, second = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
        turned = jnp.stack([-second, first], axis=-1).reshape(x.shape)
    return (x.astype(jnp.float32) * cosines + turned * sines).astype(x.dtype)
