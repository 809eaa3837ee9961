"""The gated delta rule (Yang et al. 2024, Gated Delta Networks), which is linear attention with a state that forgets
and that each token corrects, and the causal convolution before it.

For each head, with decay g ≤ 0 and strength β of a token: S ← exp(g) S, then S ← S + k β (v - Sᵀ k)ᵀ, and y = Sᵀ q.
Sums and states are float32, whatever the dtype of computation.

B batch, T tokens, D width, C channels, W width of the convolution, K key heads, H value heads, d key size, e value
size, n chunks of c tokens i and j.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.config import ModelConfig
from ftjax.models.layers import Linear, Norm, dropout, parameter
from ftjax.models.remat import named

CHUNK = 64  # tokens that are computed together
EPSILON = 1e-6  # of the norm of queries and keys

_sum = functools.partial(jnp.einsum, precision="highest")


def documents(segments):
    """Segments (B, T) -> the number (B, T) of each token's document in its row. Neighbours of one id share one."""
    first = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return jnp.cumsum(first, axis=1, dtype=jnp.int32)


def convolve(x, kernel, docs, before=None, padding=None):
    """A causal convolution of each channel within documents.

    Args:
        x: (B, T, C).
        kernel: (C, 1, W), whose last entry is the factor of the token itself.
        docs: (B, T), as `documents` returns it.
        before: (B, W - 1, C), the inputs before the first token; None: there are none.
        padding: (B,) with `before`, the number of first tokens that are padding.

    Returns:
        (B, T, C) float32, and the last W - 1 inputs (B, W - 1, C). Outputs at padding are undefined.
    """
    T, W = x.shape[1], kernel.shape[-1]
    x = jnp.pad(x, ((0, 0), (W - 1, 0), (0, 0)))
    owners = jnp.pad(docs, ((0, 0), (W - 1, 0)), constant_values=-1)
    if before is not None:  # they come right before the first token that is no padding
        x = jax.vmap(lambda x, y, at: jax.lax.dynamic_update_slice(x, y, (at, 0)))(x, before.astype(x.dtype), padding)
        docs = owners = jnp.zeros_like(owners)
    mine = [(owners[:, i : i + T] == docs[:, :T])[..., None] for i in range(W)]
    factors = kernel[:, 0].astype(jnp.float32).T
    return sum(jnp.where(own, x[:, i : i + T] * factors[i], 0) for i, own in enumerate(mine)), x[:, T:]


def recurrent(q, k, v, decay, beta, state):
    """The rule for one token.

    Args:
        q: (B, H, d) float32, as are all others; of length d^-0.5, as `unit` makes it.
        k: (B, H, d), of length 1.
        v: (B, H, e).
        decay: (B, H), logarithms of factors of the state.
        beta: (B, H), from 0 to 1.
        state: (B, H, d, e).

    Returns:
        Outputs (B, H, e), and the new state.
    """
    state = state * jnp.exp(decay)[..., None, None]
    error = v - _sum("bhde,bhd->bhe", state, k)
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return _sum("bhde,bhd->bhe", state, q), state


def chunked(q, k, v, decay, beta, docs, state=None, size: int = CHUNK):
    """The rule for all tokens of rows, chunk by chunk (section 3.3 of the paper). It computes what `recurrent` computes
    token by token, with a state of zeros at the beginning of each document.

    Within a chunk the corrections of all tokens are the solution of a triangular system, whose matrix is 0 between
    documents. So is what a later document reads of the state.

    Args:
        q, k, v, decay, beta: As in `recurrent`, with an axis of tokens after B.
        docs: (B, T), as `documents` returns it.
        state: (B, H, d, e) before the first token, which continues the first document; None: zeros.
        size: c.

    Returns:
        Outputs (B, T, H, e), and the state (B, H, d, e) after the last token.
    """
    B, T, H, d = q.shape
    c = min(size, 1 << max(T - 1, 0).bit_length())
    rest = -T % c  # padding whose β and decay are 0 changes no state

    def pieces(x):
        """(B, T, H, ...) -> (B, H, n, c, ...)."""
        x = jnp.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, c, *x.shape[2:]), 3, 1)

    q, k, v, decay, beta = map(pieces, (q, k, v, decay, beta))
    docs = jnp.pad(docs, ((0, 0), (0, rest)), mode="edge").reshape(B, 1, -1, c)
    before = jnp.concatenate([docs[:, :, :1, 0], docs[:, :, :-1, -1]], axis=2)[..., None]
    reads = (docs == before).astype(jnp.float32)  # (B, 1, n, c): whether a token continues the chunk before
    seen = jnp.tril(docs[..., :, None] == docs[..., None, :])  # (B, 1, n, i, j)
    # Each decay from a token j to a token i is a sum of its own: differences of sums from the chunk's first token on
    # would lose digits, and depend on the documents before.
    later = jnp.where(jnp.tril(seen, -1), decay[..., None], 0)
    between = jnp.where(seen, jnp.exp(jnp.cumsum(later, axis=-2)), 0)
    since = jnp.exp(jnp.cumsum(decay, axis=-1)) * reads  # from the chunk before
    strong = k * beta[..., None]
    system = jnp.tril(_sum("bhnid,bhnjd->bhnij", strong, k) * between, -1)
    right = jnp.concatenate([v * beta[..., None], strong * since[..., None]], axis=-1)
    solved = jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)
    new, known = jnp.split(solved, (v.shape[-1],), axis=-1)
    inside = _sum("bhnid,bhnjd->bhnij", q, k) * between
    asked, kept, factor = q * since[..., None], k * between[..., -1, :, None], since[..., -1]

    def chunk(state, x):
        new, known, inside, asked, kept, factor = x
        new = new - _sum("bhcd,bhde->bhce", known, state)
        y = _sum("bhcd,bhde->bhce", asked, state) + _sum("bhij,bhje->bhie", inside, new)
        return state * factor[..., None, None] + _sum("bhcd,bhce->bhde", kept, new), y

    if state is None:
        state = jnp.zeros((B, H, d, v.shape[-1]), jnp.float32)
    each = [jnp.moveaxis(x, 2, 0) for x in (new, known, inside, asked, kept, factor)]
    state, y = jax.lax.scan(chunk, state, each)
    return y.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, v.shape[-1])[:, :T], state


def unit(x):
    """x (..., d) of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


class Delta(nn.Module):
    """A sublayer with the gated delta rule, in place of attention."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x, layer, shared, cache):
        """x (B, T, D) -> (B, T, D), and the cache with this layer's state and last inputs of the convolution.

        With a cache, a token of segment 0 is padding that comes before all others, and these continue the document of
        the cache.
        """
        c, (B, T, _) = self.config, x.shape
        K, H, d, e = c.delta_key_heads, c.delta_value_heads, c.delta_key_dim, c.delta_value_dim
        channels = 2 * K * d + H * e
        linear = lambda name, size: Linear(size, False, self.dtype, c.initializer_range, name=name)  # noqa: E731
        real = shared["segments"] > 0 if cache is not None else jnp.ones((B, T), bool)
        x = jnp.where(real[..., None], x, 0)
        mixed = named(linear("in_proj_qkv", channels)(x), "mixed")
        z = named(linear("in_proj_z", H * e)(x), "z").reshape(B, T, H, e)
        strength, step = (linear(f"in_proj_{name}", H)(x).astype(jnp.float32) for name in "ba")
        kernel = parameter(self, "conv", nn.initializers.normal(c.initializer_range), (channels, 1, c.delta_width))
        rate = parameter(self, "A_log", nn.initializers.zeros, (H,)).astype(jnp.float32)
        bias = parameter(self, "dt_bias", nn.initializers.ones, (H,)).astype(jnp.float32)

        row = lambda name: cache[name] if cache[name].ndim == 4 else cache[name][layer["row"]]  # noqa: E731
        before = () if cache is None else (row("conv")[:, 0], jnp.sum(~real, axis=1))
        docs = documents(shared["segments"]) if cache is None else jnp.zeros((B, T), jnp.int32)
        y, inputs = convolve(mixed, kernel, docs, *before)
        y = nn.silu(y).astype(self.dtype).astype(jnp.float32)
        q, k, v = jnp.split(y, (K * d, 2 * K * d), axis=-1)
        q, k = (jnp.repeat(unit(x.reshape(B, T, K, d)), H // K, axis=2) for x in (q, k))
        beta = jnp.where(real[..., None], nn.sigmoid(strength), 0)
        decay = jnp.where(real[..., None], -jnp.exp(rate) * nn.softplus(step + bias), 0)
        arrays = q * d**-0.5, k, v.reshape(B, T, H, e), decay, beta
        if cache is not None and T == 1:
            y, state = recurrent(*(x[:, 0] for x in arrays), row("state"))
            y = y[:, None]
        else:
            y, state = chunked(*arrays, docs, None if cache is None else row("state"))
        if cache is not None:
            new = {"state": state, "conv": inputs[:, None]}
            stacked = cache["state"].ndim == 5
            put = lambda old, x: old.at[layer["row"]].set(x) if stacked else x  # noqa: E731
            cache = cache | {name: put(cache[name], x.astype(cache[name].dtype)) for name, x in new.items()}
        y = named(y.astype(self.dtype), "attention")
        y = Norm("rms", c.norm_eps, self.dtype, name="norm")(y) * nn.silu(z.astype(jnp.float32))
        y = linear("out_proj", c.width)(y.astype(self.dtype).reshape(B, T, H * e))
        return dropout(self, named(y, "o"), self.dropout), cache
