"""Attention over rows that may be padded, packed, windowed or continued from a cache.

B batch, T queries, S keys, n keys of a prefix, H heads, K KV heads, G = H / K query heads per KV head, d head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ftjax.models.axes import ways
from ftjax.models.by_device import by_device, gather, mesh_that_cuts, wide
from ftjax.models.products import contract, fenced
from ftjax.models.remat import named

PIECE = 128  # least number of queries that are computed together
PIECES = 4  # most pieces of a row; each is compiled
MASKED = -1e30  # finite: a row of padding, which sees nothing, must not become NaN


def attend(
    q, k, v, q_segments, k_segments, *, offset=0, window=0, prefix=None, positions=None, causal=True, cap=None,
    sinks=None, rate=0.0, key=None,
):  # fmt: skip
    """Softmax attention within segments: `softmax(q kᵀ / sqrt(d)) v`, with the softmax in float32.

    Args:
        q: (B, T, H, d).
        k: (B, K, d, S), as `key_layout` returns it.
        v: (B, K, S, d), as `key_layout` returns it.
        q_segments: (B, T) int. A query sees only the keys of its own segment.
        k_segments: (B, S) int.
        offset: Index of the first query among the keys.
        window: Most tokens that a query sees, itself included; 0: all. If not causal, the window is symmetric.
        prefix: Further keys (K, d, n) and values (K, n, d) at positions 0..n-1 of every segment.
        positions: (B, T) positions of the queries, from n on; needed with a prefix.
        causal: Whether a query sees only itself and the keys before it.
        cap: Scores s become cap · tanh(s / cap) before the softmax; None: they stay.
        sinks: (H,) a further score of each head, which takes part in the softmax and has no value; None: there is none.
        rate: Share of the softmax that is dropped; the rest is scaled up.
        key: Random key of dropout; None: no dropout.

    Returns:
        (B, T, H, d) in q's dtype.
    """
    T, S = q.shape[1], v.shape[2]
    how = {"window": window, "prefix": prefix, "causal": causal, "cap": cap, "sinks": sinks, "rate": rate}
    pieces = min(T // PIECE, PIECES) if causal and T == S and isinstance(offset, int) and not offset else 1
    if pieces <= 1:
        return _attend(q, k, v, q_segments, k_segments, offset=offset, positions=positions, key=key, **how)
    # Each piece of queries is computed with the keys up to its own end, so most masked scores are not computed.
    size, out = -(-T // pieces), []
    ends = (*range(size, T, size), T)
    queries, keys, values = jnp.split(q, ends[:-1], 1), _starts(k, ends, 3), _starts(v, ends, 2)
    for end, q, k, v in zip(ends, queries, keys, values, strict=True):
        own = slice(end - q.shape[1], end)
        how["positions"] = None if positions is None else positions[:, own]
        how["key"] = None if key is None else jax.random.fold_in(key, end)
        out.append(_attend(q, k, v, q_segments[:, own], k_segments[:, :end], offset=own.start, **how))
    return jnp.concatenate(out, axis=1)


def _attend(q, k, v, q_segments, k_segments, *, offset, window, prefix, positions, causal, cap, sinks, rate, key):
    """`attend` with all queries and all keys at once."""
    B, T, H, d = q.shape
    K, S = v.shape[1], v.shape[2]
    G = H // K
    rows = jnp.arange(T)[:, None] + offset
    columns = jnp.arange(S)[None, :]
    seen = (window == 0) | (jnp.abs(rows - columns) < window)
    if causal:
        seen &= columns <= rows
    seen = seen[None] & (q_segments[:, :, None] == k_segments[:, None, :])  # (B, T, S)
    if prefix is not None:
        n = prefix["v"].shape[1]
        near = (window == 0) | (positions[..., None] - jnp.arange(n) < window)  # (B, T, n)
        seen = jnp.concatenate([near, seen], axis=-1)
        k = jnp.concatenate([jnp.broadcast_to(prefix["k"].astype(k.dtype), (B, K, d, n)), k], axis=3)
        v = jnp.concatenate([jnp.broadcast_to(prefix["v"].astype(v.dtype), (B, K, n, d)), v], axis=2)
    # The query heads of one KV head are folded into its rows: two plain batched products per KV head, no repeated keys.
    q = q.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    kept = None
    if key is not None and rate:
        kept = jax.random.bernoulli(key, 1.0 - rate, (*q.shape[:3], k.shape[3])).astype(q.dtype) / (1.0 - rate)
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(K, G, 1), T, axis=1)  # of each row of the folded queries
    out = _softmax_product(q, k, v, seen, kept, sinks, d**-0.5, cap)
    return out.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _starts(x, ends, axis):
    """The parts of x before each of `ends` along an axis; the last of these parts is all of x."""
    return tuple(jax.lax.slice_in_dim(x, 0, end, axis=axis) for end in ends)


def _starts_bwd(ends, axis, _, gradients):
    # Added in place, because XLA would pad each piece with zeros and read all of them for every element.
    total = gradients[-1]
    for end, g in zip(ends, gradients[:-1]):
        g = jax.lax.slice_in_dim(total, 0, end, axis=axis) + g
        total = jax.lax.dynamic_update_slice_in_dim(total, g, 0, axis)
    return (total,)


_starts.defvjp(lambda x, ends, axis: (_starts(x, ends, axis), None), _starts_bwd)


def attend_in_row(q, k, v, segments, *, window=0, prefix=None, positions=None, sinks=None, key=None, **how):
    """`attend` among the tokens of the same rows, segments (B, T). If the mesh splits rows between devices, each device
    has its own queries, and gathers keys and values. how: `causal`, `cap` and `rate` of `attend`."""
    mesh, T = mesh_that_cuts("sequence"), q.shape[1]
    if not mesh or T % ways(mesh, "sequence"):
        arrays = {"window": window, "prefix": prefix, "positions": positions, "sinks": sinks, "key": key}
        return attend(q, k, v, segments, segments, **arrays, **how)

    def local(q, k, v, segments, window, prefix, positions, sinks, key):
        keys, values = gather(k, "sequence", 3, k.dtype), gather(v, "sequence", 2, v.dtype)
        owners = jax.lax.all_gather(segments, "sequence", axis=1, tiled=True)
        own = jax.lax.axis_index("sequence")
        arrays = {"window": window, "prefix": prefix, "positions": positions, "sinks": sinks}
        arrays["key"] = None if key is None else jax.random.fold_in(key, own)
        return attend(q, keys, values, segments, owners, offset=own * q.shape[1], **arrays, **how)

    tokens, everywhere = PartitionSpec(None, "sequence"), PartitionSpec()
    keys, values = PartitionSpec(None, None, None, "sequence"), PartitionSpec(None, None, "sequence")
    places = tokens, keys, values, tokens, everywhere, everywhere, tokens, everywhere, everywhere
    arrays = q, k, v, segments, window, wide(prefix), positions, wide(sinks), key
    return by_device(local, mesh, ("sequence",), places, tokens)(*arrays)


def key_layout(k, v):
    """k, v (B, S, K, d) -> (B, K, d, S) and (B, K, S, d). Both products of attention contract over these axes, so a
    cache in this layout is never transposed again."""
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


def _dot(a, b, axes):
    """Product over one axis each, batched over (B, K), summed in float32."""
    return contract(a, b, (axes[:1], axes[1:]), ((0, 1), (0, 1)))


def _scores(q, k, scale, cap):
    """Scores (B, K, G*T, S) float32, and their derivative by the products q kᵀ, an array or a number."""
    scores = _dot(q, k, (3, 2)) * scale
    if cap is None:
        return scores, scale
    bound = jnp.tanh(scores / cap)
    return cap * bound, scale * (1 - bound * bound)


def _exponentials(q, k, seen, sinks, scale, cap):
    """The undivided softmax (B, K, G*T, S) in float32, its divisor (B, K, G*T, 1), and the sinks' part of this
    divisor."""
    B, K, GT, _ = q.shape
    T, S = seen.shape[1:]
    scores = _scores(q, k, scale, cap)[0].reshape(B, K, GT // T, T, S)
    scores = jnp.where(seen[:, None, None], scores, MASKED).reshape(B, K, GT, S)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is None:
        e = jnp.exp(scores - top)
        return e, jnp.sum(e, axis=-1, keepdims=True), None
    top = jnp.maximum(top, sinks)
    e, sunk = jnp.exp(scores - top), jnp.exp(sinks - top)
    return e, jnp.sum(e, axis=-1, keepdims=True) + sunk, sunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _softmax_product(q, k, v, seen, kept, sinks, scale, cap):
    """q (B, K, G*T, d), k (B, K, d, S), v (B, K, S, d), seen (B, T, S) bool -> (B, K, G*T, d).

    kept (B, K, G*T, S): factors of the softmax, those of dropout; None: all 1. sinks (K, G*T, 1) float32: see `attend`.
    """
    return _softmax_product_fwd(q, k, v, seen, kept, sinks, scale, cap)[0]


def _softmax_product_fwd(q, k, v, seen, kept, sinks, scale, cap):
    e, total, sunk = _exponentials(q, k, seen, sinks, scale, cap)
    e = e.astype(q.dtype)
    # Named here, the output is also the residual of the backward pass, so that a preset which keeps it keeps it once.
    out = named((_dot(_times(e, kept), v, (3, 2)) / total).astype(q.dtype), "attention")
    return out, (q, k, v, e, total, sunk, kept, out)


def _times(x, kept):
    return x if kept is None else x * kept


def _softmax_product_bwd(scale, cap, saved, g):
    # Written out so that every product contracts in place: XLA's own transposes cost a CPU a quarter of the step.
    # Arrays as long as the keys are not transposed, nor divided: the division is done on the smaller (..., d) arrays.
    q, k, v, e, total, sunk, kept, out = saved
    share = g.astype(jnp.float32) / total
    dv = fenced(_dot(share.astype(g.dtype), _times(e, kept), (2, 2))).swapaxes(2, 3).astype(v.dtype)
    dp = _times(_dot(g, v, (3, 3)), kept)
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    slope = scale if cap is None else _scores(q, k, scale, cap)[1]
    ds = (e.astype(jnp.float32) * ((dp - inner) * (slope / total))).astype(q.dtype)
    dsinks = None if sunk is None else -jnp.sum(inner * sunk / total, axis=0)
    return _dot(ds, k, (3, 3)).astype(q.dtype), _dot(q, ds, (2, 2)).astype(k.dtype), dv, None, None, dsinks


_softmax_product.defvjp(_softmax_product_fwd, _softmax_product_bwd)
