"""Frozen kernels in 8 or 4 bits: int8 by blocks, and NF4 (Dettmers et al. 2023, QLoRA). And kernels rounded to
bfloat16, in which products are computed while everything else stays in float32.

This is own code because qwix (0.1.8) does not quantise scales, needs blocks that divide an axis, and lets autodiff
decide what is kept for the backward pass: it keeps a dequantised kernel of every layer. Kernels are (..., out, in), and
each row has n blocks. Blocks lie within rows, as in bitsandbytes if `in` is a multiple of the block; otherwise the last
block of a row is shorter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.config import TABLES
from ftjax.tree import map_paths

# QLoRA's appendix E: quantiles of the normal distribution, each half scaled to end at 1, and zero itself.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

# Values that share a scale. NF4: QLoRA's. int8: its steps are fine enough for twice that, and float32 scales cost 3 %.
BLOCK = {"nf4": 64, "int8": 128}
SCALES = 256  # scales that share a second one (QLoRA, section 3)
TINY = np.finfo(np.float32).tiny  # a block of zeros is divided by this; smaller numbers are zero to XLA


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of signed dynamic 8-bit quantisation, ascending (Dettmers et al. 2022, 8-bit optimizers).

    For each of seven powers of ten, the middles of twice as many equal steps from 0.1 to 1 as for the power below.
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = np.linspace(0.1, 1, 2**power + 1, dtype=np.float32)
        middles = np.float32(10.0 ** (power - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


def _node(*data):
    """A dataclass as a pytree whose leaves are the fields `data`; its other fields are static."""

    def register(cls):
        static = [f.name for f in dataclasses.fields(cls) if f.name not in data]
        return jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=static)

    return register


@_node("codes", "scale", "mean")
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of blocks that are quantised too: `dynamic_map[codes] * scale + mean`."""

    codes: jax.Array  # (..., out, n) uint8
    scale: jax.Array  # (..., m) float32: m = ceil(out * n / SCALES)
    mean: jax.Array  # (...) float32

    def decode(self):
        """(..., out, n) float32."""
        values = jnp.asarray(dynamic_map())[self.codes]
        *_, out, n = self.codes.shape
        scale = jnp.repeat(self.scale, SCALES, axis=-1)[..., : out * n].reshape(values.shape)
        return values * scale + self.mean[..., None, None]


@_node("codes", "scale")
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantised kernel (..., out, in) with the attributes of an array that methods need from a frozen kernel:
    `shape`, `ndim`, `size`, `dtype` (of the kernel that it represents), `astype`, which dequantises, and indexing by
    layer."""

    # int8, bfloat16: (..., out, in) in that dtype; nf4: (..., out, ceil(in / 2)) uint8, the first in the high bits
    codes: jax.Array
    scale: jax.Array | Scales | None  # (..., out, n) float32, or quantised itself; None: bfloat16
    kind: str  # int8 | nf4 | bfloat16
    width: int  # in
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def astype(self, dtype) -> jax.Array:
        """The dequantised kernel, computed in float32 and stored as `dtype`."""
        if self.scale is None:
            return self.codes.astype(dtype)
        scale = self.scale.decode() if isinstance(self.scale, Scales) else self.scale
        scale = jnp.repeat(scale, BLOCK[self.kind], axis=-1)[..., : self.width]
        return (VALUES[self.kind](self.codes)[..., : self.width] * scale).astype(dtype)

    def __getitem__(self, index) -> Quantised:
        """One or some layers of a stack (L, out, in); None adds a leading axis."""
        if self.ndim == 2 and index is not None:
            raise TypeError("a quantised kernel cannot be indexed within: see astype")
        return jax.tree.map(lambda x: x[index], self)

    def rows(self, ids) -> jax.Array:
        """Rows ids (...) of a table (V, in): (..., in), in its own dtype.

        Raises TypeError if the scales are quantised too, because second scales span rows.
        """
        if isinstance(self.scale, Scales):
            raise TypeError("rows of a kernel whose scales are quantised cannot be read alone: see astype")
        taken = jax.tree.map(lambda x: jnp.take(x, ids, axis=0, mode="clip"), self)
        return taken.astype(self.dtype)

    def map(self, f: Callable, axes: tuple) -> Quantised:
        """A Quantised of f(array, its logical axes) for each of its arrays. axes: logical axes of the kernel."""
        scale = self.scale
        if isinstance(scale, Scales):
            stack = axes[:-2]  # second scales run over rows, and are too few to split
            scale = Scales(f(scale.codes, axes), f(scale.scale, (*stack, None)), f(scale.mean, stack))
        elif scale is not None:
            scale = f(scale, axes)
        return dataclasses.replace(self, codes=f(self.codes, axes), scale=scale)


def _nf4_values(codes):
    """(..., in / 2) uint8 -> (..., in) float32 values of the code book."""
    pairs = codes[..., None] >> jnp.array([4, 0], jnp.uint8) & 15  # shifted, not interleaved: no copy
    return jnp.take(jnp.asarray(NF4), pairs.reshape(*codes.shape[:-1], -1), mode="clip")


VALUES = {"int8": lambda codes: codes.astype(jnp.float32), "nf4": _nf4_values}


def quantise(kernel, kind: str, double: bool = False, dtype=None) -> Quantised:
    """Quantise a kernel (..., out, in) to the nearest values in blocks of BLOCK[kind], each scaled by its largest
    magnitude.

    Args:
        kernel: (..., out, in).
        kind: `int8`, with steps of that magnitude / 127, as in LLM.int8() (Dettmers et al. 2022), whose blocks are
            whole rows; or `nf4`.
        double: Quantise the scales too (NF4 only).
        dtype: Dtype of the dequantised kernel; None: the kernel's.
    """
    *stack, out, width = kernel.shape
    block = BLOCK[kind]
    n = -(-width // block)
    x = jnp.pad(kernel.astype(jnp.float32), [(0, 0)] * (kernel.ndim - 1) + [(0, n * block - width)])
    x = x.reshape(*stack, out, n, block)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    if kind == "int8":
        codes = jnp.round(x * (127.0 / jnp.maximum(largest, TINY))).astype(jnp.int8)
        codes = codes.reshape(*stack, out, -1)[..., :width]
        scale = largest[..., 0] / 127.0
    else:
        bounds = (NF4[1:] + NF4[:-1]) / 2
        x = x * (1.0 / jnp.maximum(largest, TINY))
        codes = jnp.sum(x[..., None] > bounds, axis=-1, dtype=jnp.uint8).reshape(*stack, out, n * block // 2, 2)
        codes = (codes[..., 0] << 4 | codes[..., 1])[..., : -(-width // 2)]
        scale = largest[..., 0]
        scale = _quantise_scales(scale) if double else scale
    return Quantised(codes, scale, kind, width, np.dtype(dtype or kernel.dtype))


def holds(kernel, values):
    """Whether an array or a Quantised holds an array: its values in the same dtype, and quantised in the same way.

    Args:
        kernel: (out, in), of any dtype and placement.
        values: (out, in), before it was rounded or quantised.
    """
    if not is_quantised(kernel):
        return jnp.array_equal(kernel, values.astype(kernel.dtype))
    double = isinstance(kernel.scale, Scales)
    same = quantise(values.astype(jnp.float32), kernel.kind, double, kernel.dtype)
    return jnp.all(jnp.array(jax.tree.leaves(jax.tree.map(jnp.array_equal, kernel, same))))


def rounded(params: dict, tied: bool) -> dict:
    """Parameters with the float32 kernels of the blocks and of the head rounded to bfloat16.

    Args:
        params: Of a model.
        tied: Whether the table of embeddings is its head.
    """
    head = "embed/embedding" if tied else "lm_head/kernel"

    def round_one(path, x):
        if isinstance(x, Quantised) or x.dtype != jnp.float32:
            return x
        if path == head or path.startswith(("layers/", "top_layers/")) and path.endswith("/kernel"):
            return Quantised(x.astype(jnp.bfloat16), None, "bfloat16", x.shape[-1], np.dtype(np.float32))
        return x

    return map_paths(round_one, params)


def _quantise_scales(scale) -> Scales:
    """Quantise scales (..., out, n) float32, all at least zero, after subtracting their mean."""
    *stack, out, n = scale.shape
    if not jax.sharding.get_abstract_mesh().empty:  # each device sums all of them, so that no mesh changes the sum
        scale = jax.lax.with_sharding_constraint(scale, jax.sharding.PartitionSpec())
    mean = scale.mean(axis=(-2, -1))
    m = -(-out * n // SCALES)
    x = (scale - mean[..., None, None]).reshape(*stack, out * n)
    x = jnp.pad(x, [(0, 0)] * len(stack) + [(0, m * SCALES - out * n)]).reshape(*stack, m, SCALES)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    values = dynamic_map()
    codes = jnp.searchsorted(jnp.asarray((values[1:] + values[:-1]) / 2), x / jnp.maximum(largest, TINY))
    codes = codes.astype(jnp.uint8).reshape(*stack, -1)[..., : out * n].reshape(scale.shape)
    return Scales(codes, largest[..., 0], mean)


def kind_of(path: str, kind: str, tables: bool = False) -> str:
    """The number format of the parameter at `path`, one of VALUES or `none`.

    Args:
        path: Path of the parameter.
        kind: Number format of the kernels of the blocks.
        tables: Whether the embedding table and the head are stored in int8 too, whatever `kind` is: each of their rows
            stands for one token. QLoRA does not quantise them, but they are a sixth of an 8B model's bytes.
    """
    if path.startswith("layers/") and path.endswith(("/kernel", "/experts")):
        return kind
    return "int8" if tables and kind != "none" and path in TABLES else "none"


def read_rows(table, ids):
    """Rows ids (...) of a table (V, D), an array or a Quantised: (..., D)."""
    return table.rows(ids) if isinstance(table, Quantised) else table[ids]


def is_quantised(x) -> bool:
    """For `is_leaf` of jax.tree."""
    return isinstance(x, Quantised)


def dequantised(tree):
    """A tree with every Quantised replaced by an array of its own dtype."""
    return jax.tree.map(lambda x: x.astype(x.dtype) if is_quantised(x) else x, tree, is_leaf=is_quantised)


def quantised_size(tree) -> int:
    """Number of values in a tree that are stored quantised."""
    return sum(x.size for x in jax.tree.leaves(tree, is_leaf=is_quantised) if is_quantised(x))
