"""One decoder for GPT-2 and the LLaMA family: a block, scanned over layers.

B batch, T tokens, n virtual tokens, S cache slots, D width, H heads, K KV heads, d head size, F hidden, V vocabulary,
L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.attention import attend, key_layout
from ftjax.models.axes import constrain
from ftjax.models.config import ModelConfig
from ftjax.models.layers import Embedding, Linear, Norm, dropout, neftune, rotary_frequencies, rotary_tables, rotate

ACTIVATIONS = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}

STACKS = ("layers", "top_layers")  # where parameters of blocks lie, on a leading layer axis
BEHIND = ("final_norm", "lm_head")  # where those lie that stand behind the blocks

# The end of a parameter's path -> its logical axes (ftjax.models.axes). Stacked parameters have a layer axis before
# these.
PARAMETER_AXES = {
    "embed/embedding": ("vocab", "embed"),
    "pos_embed/embedding": (None, "embed"),
    "lm_head/kernel": ("vocab", "embed"),
    "q_proj/kernel": ("heads", "embed"),
    "k_proj/kernel": ("kv_heads", "embed"),
    "v_proj/kernel": ("kv_heads", "embed"),
    "c_attn/kernel": (None, "embed"),  # q, k and v lie one after another: cutting across them would tear heads apart
    "o_proj/kernel": ("embed", "heads"),
    "gate_proj/kernel": ("hidden", "embed"),
    "up_proj/kernel": ("hidden", "embed"),
    "down_proj/kernel": ("embed", "hidden"),
    "q_proj/bias": ("heads",),
    "k_proj/bias": ("kv_heads",),
    "v_proj/bias": ("kv_heads",),
    "gate_proj/bias": ("hidden",),
    "up_proj/bias": ("hidden",),
    "bias": (None,),
    "scale": (None,),
}


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with a residual's worth of projections around it."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x, layer, shared, cache):
        """x (B, T, D) -> (B, T, D) and the cache with this layer's keys and values written."""
        c, (B, T, _) = self.config, x.shape
        H, K, d = c.heads, c.kv_heads, c.head_dim

        def linear(name, features, bias):
            return Linear(features, bias, self.dtype, c.initializer_range, name=name)

        if c.fused_qkv:
            q, k, v = jnp.split(linear("c_attn", (H + 2 * K) * d, c.qkv_bias)(x), (H * d, (H + K) * d), axis=-1)
        else:
            q = linear("q_proj", H * d, c.qkv_bias)(x)
            k = linear("k_proj", K * d, c.qkv_bias)(x)
            v = linear("v_proj", K * d, c.qkv_bias)(x)
        q, k, v = q.reshape(B, T, H, d), k.reshape(B, T, K, d), v.reshape(B, T, K, d)
        if c.qk_norm:
            q = Norm("rms", c.norm_eps, self.dtype, name="q_norm")(q)
            k = Norm("rms", c.norm_eps, self.dtype, name="k_norm")(k)
        if c.positions == "rotary":
            q, k = rotate(q, shared["rotary"]), rotate(k, shared["rotary"])
        k, v = key_layout(k, v)
        offset, k_segments = 0, shared["segments"]
        if cache is not None:
            offset, k_segments = cache["length"], cache["segments"]
            starts = {"k": (layer["index"], 0, 0, 0, offset), "v": (layer["index"], 0, 0, offset, 0)}
            cache = cache | {
                name: jax.lax.dynamic_update_slice(cache[name], new[None].astype(cache[name].dtype), starts[name])
                for name, new in (("k", k), ("v", v))
            }
            k, v = (jax.lax.dynamic_index_in_dim(cache[n], layer["index"], keepdims=False) for n in ("k", "v"))
        y = attend(
            q, k, v, shared["segments"], k_segments, offset=offset, window=layer["window"],
            prefix=layer.get("prefix"), positions=shared["positions"],
        )  # fmt: skip
        y = linear("o_proj", c.width, c.out_bias)(y.reshape(B, T, H * d))
        return dropout(self, y, self.dropout), cache


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), or down(act(up(x)))."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x):
        """x (B, T, D) -> (B, T, D)."""
        c, act = self.config, ACTIVATIONS[self.config.activation]

        def linear(name, features):
            return Linear(features, c.mlp_bias, self.dtype, c.initializer_range, name=name)

        up = linear("up_proj", c.hidden)(x)
        h = act(linear("gate_proj", c.hidden)(x)) * up if c.gated else act(up)
        return dropout(self, linear("down_proj", c.width)(h), self.dropout)


class Block(nn.Module):
    """A pre-norm transformer block."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, carry, layer, shared):
        """carry: x (B, T, D) and the cache; layer: its `window`, `index`, `prefix`; shared: the same for all."""
        x, cache = carry
        c = self.config
        h = Norm(c.norm, c.norm_eps, self.dtype, name="attn_norm")(x)
        h, cache = Attention(c, self.dtype, self.dropout, name="attn")(h, layer, shared, cache)
        x = constrain(x + h, "batch", None, None)
        h = Norm(c.norm, c.norm_eps, self.dtype, name="mlp_norm")(x)
        x = constrain(x + MLP(c, self.dtype, self.dropout, name="mlp")(h), "batch", None, None)
        return (x, cache), None


class Transformer(nn.Module):
    """A causal language model: `apply({"params": ..., "adapter": ...}, tokens, ...)` gives logits.

    dtype: compute; remat: `none` or `full`; unroll: layers a scan iteration, 0 for all; dropout: rate on embeddings and
    on what each sublayer adds, active when `rngs={"dropout": key}` is given; neftune: strength of noise on embeddings,
    active with a key `noise`.

    Parameters may come in two stacks, `layers` of the lower blocks and `top_layers` of the others, so that autodiff
    never enters a frozen lower one; and a tied model's with an `lm_head`, which then is its head.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: int = 1
    dropout: float = 0.0
    neftune: float = 0.0

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, "vocab", self.dtype, c.initializer_range)
        if c.positions == "learned":
            self.pos_embed = Embedding(c.max_positions, c.width, None, self.dtype, c.initializer_range)
        block = nn.remat(Block, prevent_cse=False) if self.remat == "full" else Block

        def stack(layers):
            return nn.scan(
                block,
                variable_axes={"params": 0, "adapter": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=layers,
                unroll=self.unroll or layers,
            )(c, self.dtype, self.dropout)

        top = jax.tree.leaves(self.get_variable("params", "top_layers", {}))
        self.lower = c.layers - (top[0].shape[0] if top else 0)  # blocks in `layers`
        self.layers = stack(self.lower)
        if top:
            self.top_layers = stack(c.layers - self.lower)
        self.final_norm = Norm(c.norm, c.norm_eps, self.dtype)
        self.tied = c.tied and not self.has_variable("params", "lm_head")
        if not self.tied:
            self.lm_head = Linear(c.vocab_size, False, self.dtype, c.initializer_range)

    def __call__(self, tokens, positions=None, segment_ids=None, cache=None):
        """tokens (B, T) int -> logits (B, T, V) float32; with a cache: (logits, cache). See `hidden`."""
        if cache is None:
            return self.head(self.hidden(tokens, positions, segment_ids))
        x, cache = self.hidden(tokens, positions, segment_ids, cache)
        return self.head(x), cache

    def hidden(self, tokens, positions=None, segment_ids=None, cache=None):
        """Hidden states after the last norm, (B, T, D); with a cache: (states, cache).

        positions (B, T) int: place in its own document, 0 first; default: 0..T-1.
        segment_ids (B, T) int: tokens see only tokens of their own id; 0 is padding by convention; default: one
        segment. cache: from `make_cache`; the T tokens are appended at `cache["length"]`, padding included.

        A soft prompt or prefix of n virtual tokens stands before every segment: places count from behind it, and a
        token is given the position n later.
        """
        B, T = tokens.shape
        start = 0 if cache is None else cache["length"]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T) + start, (B, T))
        if segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        prefix = self.prefix()
        if prefix is not None:
            positions = positions + prefix["v"].shape[-2]
        x = neftune(self, self.embed(tokens), self.neftune, segment_ids)
        x, new_cache = self.blocks(x, positions, segment_ids, cache, prefix)
        x = self.final_norm(x)
        return x if cache is None else (x, new_cache)

    def prefix(self):
        """Keys k (L, K, d, n) and values v (L, K, n, d) of the virtual tokens that every token sees; None without any.

        Either the collection `adapter` holds them as `prefix`, or embeddings `prompt` (n, D) that have them: nothing
        stands before a soft prompt, so that its keys and values are the same for every row and every segment.
        """
        if self.has_variable("adapter", "prefix"):
            return self.get_variable("adapter", "prefix")
        if not self.has_variable("adapter", "prompt"):
            return None
        x = self.get_variable("adapter", "prompt").astype(self.dtype)[None]
        n = x.shape[1]
        cache = make_cache(self.config, 1, n, self.dtype)
        _, cache = self.blocks(x, jnp.arange(n)[None], jnp.ones((1, n), jnp.int32), cache)
        return {"k": cache["k"][:, 0], "v": cache["v"][:, 0]}

    def blocks(self, x, positions, segment_ids, cache, prefix=None):
        """Embeddings x (B, T, D) -> states before the last norm (B, T, D), and the cache with theirs written."""
        c, T = self.config, x.shape[1]
        shared = {"segments": segment_ids, "positions": positions}
        if c.positions == "learned":
            x = x + self.pos_embed(positions)
        else:
            shared["rotary"] = rotary_tables(positions, rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        x = constrain(dropout(self, x, self.dropout), "batch", None, None)
        layer = {"window": jnp.array(c.windows or (0,) * c.layers, jnp.int32), "index": jnp.arange(c.layers)}
        if prefix is not None:
            layer["prefix"] = prefix
        if cache is not None:
            segments = jax.lax.dynamic_update_slice(cache["segments"], segment_ids, (0, cache["length"]))
            cache = cache | {"segments": segments}
        (x, cache), _ = self.layers((x, cache), jax.tree.map(lambda a: a[: self.lower], layer), shared)
        if self.lower < c.layers:
            (x, cache), _ = self.top_layers((x, cache), jax.tree.map(lambda a: a[self.lower :], layer), shared)
        return x, None if cache is None else cache | {"length": cache["length"] + T}

    def head(self, x):
        """Hidden states (B, T, D) -> logits (B, T, V) float32."""
        logits = self.embed.attend(x) if self.tied else self.lm_head(x)
        return constrain(logits.astype(jnp.float32), "batch", None, "vocab")


def make_cache(config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> dict:
    """An empty KV cache for `batch` rows of up to `slots` tokens.

    k (L, B, K, d, S) and v (L, B, K, S, d) as attention takes them; segments (B, S); length (), the slots in use.
    """
    lead, S, d = (config.layers, batch, config.kv_heads), slots, config.head_dim
    # Segment -1: a slot that nobody has written is seen by nobody.
    return {
        "k": jnp.zeros((*lead, d, S), dtype),
        "v": jnp.zeros((*lead, S, d), dtype),
        "segments": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def virtual_tokens(variables: dict) -> int:
    """How many virtual tokens `variables` put before every segment: the length of their soft prompt or prefix."""
    adapter = variables.get("adapter", {})
    if "prompt" in adapter:
        return adapter["prompt"].shape[0]
    return adapter["prefix"]["v"].shape[-2] if "prefix" in adapter else 0


def max_tokens(config: ModelConfig, variables: dict) -> int:
    """Tokens that a row may have: the model's positions, less those that virtual tokens take."""
    return config.max_positions - virtual_tokens(variables)


def as_prefix(model: Transformer, variables: dict) -> dict:
    """`variables` with a soft prompt turned into its keys and values, which decoding would compute at every token."""
    if "prompt" not in variables.get("adapter", {}):
        return variables
    others = {name: leaf for name, leaf in variables["adapter"].items() if name != "prompt"}
    return variables | {"adapter": others | {"prefix": model.apply(variables, method="prefix")}}


def parameter_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of the parameter at `path` (`layers/attn/q_proj/kernel`), its layer axis included.

    Raises KeyError for a path that the table does not cover: a new parameter must say how it lies on the mesh.
    """
    parts = path.split("/")
    tail = "/".join(parts[-2:])
    axes = PARAMETER_AXES[tail] if tail in PARAMETER_AXES else PARAMETER_AXES[parts[-1]]
    return (None,) * (parts[0] in STACKS) + axes
