"""Attention among the tokens of rows, by the kernel that suits the machine: a table of implementations.

Each computes `attention.attend_in_row` for padded or packed rows, grouped heads and windows. Outputs at padding
positions are undefined. XLA computes what a kernel cannot. B rows, T tokens, H heads, K KV heads, d head size.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ftjax.errors import FtjaxError
from ftjax.models.attention import attend_in_row, key_layout
from ftjax.models.axes import BY_ROWS, by_rows, ways
from ftjax.models.by_device import by_device

HALF = ("bfloat16", "float16")
SPLASH_LANES = 128  # a TPU's vectors: rows are cut into blocks of multiples
SPLASH_BLOCKS = (512, 384, 256, 128)  # tokens of a block, the largest that divides a row
HOPPER = (9, 0)


class Kernels(NamedTuple):
    """The attention that a model runs: the name in BACKENDS, and the platform and rows that it will run on."""

    name: str = "xla"
    platform: str = "cpu"  # cpu | gpu | tpu
    capability: tuple[int, ...] = ()  # of a GPU: (9, 0) is Hopper
    packed: bool = True  # rows may hold several documents; False: one document each, and padding after it


class Case(NamedTuple):
    """The properties of one attention that are known when it is traced."""

    kernels: Kernels
    dtype: str
    rows: int  # B
    length: int  # T
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # d
    causal: bool
    cap: float | None  # see `attend`
    sinks: bool  # see `attend`
    windows: tuple[int, ...]  # all that its layers have; 0: none
    prefix: bool  # further keys come before every document
    dropout: bool  # part of the softmax is dropped
    mesh: dict[str, int]  # sizes of its axes


class Backend(NamedTuple):
    """One implementation.

    Attributes:
        platform: The platform that it runs on.
        lacks: lacks(case) -> pairs (whether it rules the kernel out, the reason).
        attend: attend(q, k, v, segments, *, window, causal, cap, packed): q (B, T, H, d), k and v (B, T, K, d),
            segments (B, T) -> (B, T, H, d); window int; cap: see `attend`; packed: see Kernels.
    """

    platform: str
    lacks: Callable[[Case], list[tuple[bool, str]]]
    attend: Callable[..., jax.Array]


# ---- cuDNN -----------------------------------------------------------------------------------------------------------
def cudnn(q, k, v, segments, *, window, causal, cap=None, packed=True, implementation="cudnn"):
    """cuDNN's flash attention, by JAX's own call.

    cuDNN has no segments, so packed rows need a mask (B, 1, T, T), one for all heads. Rows of one document each need no
    mask, which is faster. If a row is promised to be one document but has several, its output is NaN, so that no
    document attends to another.
    """
    call = functools.partial(jax.nn.dot_product_attention, q, k, v, is_causal=causal, implementation=implementation)
    if packed or (window and not causal):  # cuDNN's windows look back only
        places = jnp.arange(q.shape[1])
        mask = segments[:, :, None] == segments[:, None, :]
        if window:
            mask &= jnp.abs(places[:, None] - places) < window
        return call(mask=mask[:, None])
    mine = segments == segments[:, :1]
    length = jnp.sum(mine, axis=1, dtype=jnp.int32)
    alone = jnp.all(mine == (jnp.arange(q.shape[1]) < length[:, None])) & jnp.all(mine | (segments == 0))
    # A causal query never attends to the padding after it.
    lengths = {} if causal else {"query_seq_lengths": length, "key_value_seq_lengths": length}
    out = call(local_window_size=(window - 1, 0) if window else None, **lengths)
    return jnp.where(alone, out, jnp.nan)


def _cudnn_lacks(case: Case) -> list[tuple[bool, str]]:
    most = 256 if case.kernels.capability >= HOPPER else 128
    return [
        (not case.kernels.capability, "it is for GPUs of NVIDIA's"),
        (case.cap is not None, "the model bounds its attention scores"),
        (case.dtype not in HALF, f"it computes in bfloat16, not in {case.dtype}"),
        (case.head_dim % 8 != 0, f"heads of size {case.head_dim}, which is no multiple of 8"),
        (case.head_dim > most, f"heads of size {case.head_dim}; at most {most} on this GPU"),
        (case.length % 2 != 0, f"rows of {case.length} tokens, an odd number"),
    ]


# ---- splash attention ------------------------------------------------------------------------------------------------
def splash(q, k, v, segments, *, window, causal, cap=None, packed=True, interpret=False):
    """JAX's Pallas kernel for TPUs, which skips blocks that no query sees; segments are part of its mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _splash_kernel(q.shape[1], q.shape[2], window, causal, cap, interpret)
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v, SegmentIds(segments, segments)).transpose(0, 2, 1, 3)


@functools.lru_cache(maxsize=64)
def _splash_kernel(T: int, heads: int, window: int, causal: bool, cap: float | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as sp

    if window:
        mask = sp.LocalMask((T, T), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = sp.CausalMask((T, T)) if causal else sp.FullMask((T, T))
    block = next(n for n in SPLASH_BLOCKS if T % n == 0)
    sizes = sp.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    make = functools.partial(
        sp.make_splash_mha, sp.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        interpret=interpret, residual_checkpoint_name="attention", attn_logits_soft_cap=cap,
    )  # fmt: skip
    # The kernel is cached for other traces and must hold no tracer. In another thread nothing is being traced.
    with ThreadPoolExecutor(1) as aside:
        return jax.tree.map(np.asarray, aside.submit(make).result())


def _splash_lacks(case: Case) -> list[tuple[bool, str]]:
    rest = case.length % SPLASH_LANES
    return [
        (case.dtype not in ("bfloat16", "float32"), f"it computes in bfloat16 and float32, not in {case.dtype}"),
        (rest != 0, f"rows of {case.length} tokens, which is no multiple of {SPLASH_LANES}"),
    ]


# ---- tokamax ---------------------------------------------------------------------------------------------------------
def tokamax(q, k, v, segments, *, window, causal, cap=None, packed=True, implementation="mosaic_gpu"):
    """The kernel of openxla/tokamax for Hopper and Blackwell. Each query has a first and a last key; there is no
    mask."""
    from absl import flags
    from tokamax._src.ops.attention import api, base

    if not flags.FLAGS.is_parsed():  # it would read its settings from our command line
        flags.FLAGS.mark_as_parsed()
    T = q.shape[1]
    places, edge = jnp.arange(T), segments[:, 1:] != segments[:, :-1]
    ends = jnp.ones((q.shape[0], 1), bool)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([ends, edge], axis=1), places, 0), axis=1)
    end = jax.lax.cummin(jnp.where(jnp.concatenate([edge, ends], axis=1), places + 1, T), axis=1, reverse=True)
    if window:
        start, end = jnp.maximum(start, places - window + 1), jnp.minimum(end, places + window)
    mask = base.Mask(k_start=start[:, None], k_end=None if causal else end[:, None], is_causal=causal)
    return api.IMPLEMENTATIONS[implementation](q, k, v, mask=mask)


def _tokamax_lacks(case: Case) -> list[tuple[bool, str]]:
    return [
        (importlib.util.find_spec("tokamax") is None, "it is not installed: pip install tokamax"),
        (case.cap is not None, "the model bounds its attention scores"),
        (case.kernels.capability < HOPPER, "its kernels need a Hopper GPU or a later one"),
        (case.dtype not in HALF, f"it computes in bfloat16, not in {case.dtype}"),
        (case.head_dim % 64 != 0, f"heads of size {case.head_dim}, which is no multiple of 64"),
    ]


# ---- the table -------------------------------------------------------------------------------------------------------
BACKENDS = {
    "cudnn": Backend("gpu", _cudnn_lacks, cudnn),
    "splash": Backend("tpu", _splash_lacks, splash),
    "tokamax": Backend("gpu", _tokamax_lacks, tokamax),
}
CHOICES = ("auto", "xla", *BACKENDS)
AUTO = {"gpu": "cudnn", "tpu": "splash"}  # platform -> backend; elsewhere xla


def choose(name: str, platform: str, capability: str = "", packed: bool = True) -> Kernels:
    """The Kernels that `model.attention = name` means on a platform. capability: of an NVIDIA GPU, such as 9.0."""
    name = AUTO.get(platform, "xla") if name == "auto" else name
    numbers = tuple(map(int, capability.split("."))) if re.fullmatch(r"\d+\.\d+", capability) else ()
    return Kernels(name, platform, numbers, packed)


def why_not(case: Case) -> str:
    """The reason why a model's kernel cannot compute this case; empty if it can. XLA always can."""
    if case.kernels.name == "xla":
        return ""
    backend, mesh, here = BACKENDS[case.kernels.name], case.mesh, case.kernels.platform
    parts, tensor = by_rows(mesh), mesh.get("tensor", 1)
    pairs = [
        (here != backend.platform, f"it is for a {backend.platform}, and this is a {here}"),
        (case.prefix, "the tuning method puts keys of its own before every document"),
        (case.dropout, "train.dropout drops part of the softmax"),
        (case.sinks, "the model has attention sinks, which are part of each softmax"),
        (mesh.get("sequence", 1) > 1, "mesh.sequence splits rows between devices"),
        (case.rows % parts != 0, f"{case.rows} rows do not divide over {parts} devices"),
        (case.kv_heads % tensor != 0, f"{case.kv_heads} KV heads do not divide over mesh.tensor={tensor}"),
        *backend.lacks(case),
    ]
    return next((why for fails, why in pairs if fails), "")


def case_of(kernels: Kernels, shape, dtype, rows: int, length: int, prefix: bool, dropout: bool, mesh) -> Case:
    """The Case of a model for rows of `length` tokens. shape: its ModelConfig; mesh: sizes of the mesh's axes."""
    windows = tuple(sorted({w if w < length else 0 for w in shape.windows or (0,)}))  # a wide window masks nothing
    return Case(
        kernels, jnp.dtype(dtype).name, rows, length, shape.heads, shape.kv_heads, shape.head_dim, shape.causal,
        shape.score_cap, shape.sinks, windows, prefix, dropout, dict(mesh),
    )  # fmt: skip


def settle(name: str, cases: list[Case]) -> str:
    """The attention that a run of these cases gets, with the reason; empty if there is nothing to report. name:
    model.attention.

    Raises FtjaxError if the kernel that `name` names cannot compute all cases.
    """
    wanted, reasons = cases[0].kernels.name, [why for case in cases if (why := why_not(case))]
    if not reasons:
        return "" if name == wanted == "xla" or cases[0].kernels.platform == "cpu" else f"attention {wanted}"
    if name != "auto":
        raise FtjaxError(f"model.attention: {name} cannot serve this run: {reasons[0]}; auto or xla can")
    which = "xla" if len(reasons) == len(cases) else f"{wanted}, and xla for some lengths"
    return f"attention {which}: {wanted} cannot serve: {reasons[0]}"


def attend_rows(q, k, v, segments, *, kernels: Kernels, shape, window, prefix, rate, key, **how):
    """Attention among the tokens of rows, by the model's kernel, or by XLA if the kernel cannot compute it.

    Args:
        q: (B, T, H, d).
        k: (B, T, K, d).
        v: (B, T, K, d).
        segments: (B, T) int.
        kernels: The model's Kernels.
        shape: The ModelConfig.
        window: The window of this layer, traced, one of shape.windows.
        prefix, rate, key: See `attend`.
        how: `positions` and `sinks` of `attend`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    B, T = q.shape[:2]
    case = case_of(kernels, shape, q.dtype, B, T, prefix is not None, bool(rate) and key is not None, sizes)
    if kernels.name == "xla" or why_not(case):
        how |= {"window": window, "prefix": prefix, "rate": rate, "key": key}
        return attend_in_row(q, *key_layout(k, v), segments, causal=shape.causal, cap=shape.score_cap, **how)

    def kernel(window):
        how = {"window": window, "causal": shape.causal, "cap": shape.score_cap, "packed": kernels.packed}
        return functools.partial(BACKENDS[kernels.name].attend, **how)

    def local(q, k, v, segments, window):
        # A window is part of a kernel: layers that differ in it choose between two.
        if len(case.windows) == 1:
            return kernel(case.windows[0])(q, k, v, segments)
        which = jnp.argmax(jnp.array(case.windows) == jnp.where(window < T, window, 0))
        return jax.lax.switch(which, [kernel(w) for w in case.windows], q, k, v, segments)

    if math.prod(sizes.values()) == 1 or mesh.manual_axes:
        return local(q, k, v, segments, window)
    # No compiler splits such kernels: each device runs its own, over its rows and heads.
    rows = tuple(name for name in BY_ROWS if ways(mesh, name) > 1)
    heads = "tensor" if ways(mesh, "tensor") > 1 else None
    places, everywhere = PartitionSpec(rows or None, None, heads), PartitionSpec()
    into = places, places, places, PartitionSpec(rows or None), everywhere
    return by_device(local, mesh, mesh.axis_names, into, places)(q, k, v, segments, window)
