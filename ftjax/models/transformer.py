"""One transformer for all families: a block that its ModelConfig composes, scanned over layers.

B batch, T tokens, M positions that are read, n virtual tokens, S cache slots, D width, H heads, K KV heads, d head
size, F hidden, V vocabulary, C labels, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax.models.attention import attend, key_layout
from ftjax.models.attention_backends import Kernels, attend_rows
from ftjax.models.axes import PARAMETER_AXES, constrain
from ftjax.models.by_device import gather, map_rows, take_tokens
from ftjax.models.config import READS, SUBLAYERS, VOCABULARY, ModelConfig, RopeScaling, layers_with, of_sublayer, runs
from ftjax.models.delta import Delta
from ftjax.models.layers import (
    ADAPTERS,
    Embedding,
    Linear,
    Norm,
    dropout,
    neftune,
    normalised,
    parameter,
    project,
    project_groups,
    rotary_frequencies,
    rotary_tables,
    rotate,
)
from ftjax.models.remat import named, rematerialised
from ftjax.tree import flatten


def gelu_tanh(x):
    """x / 2 · (1 + tanh(z)). In float32 it is x · sigmoid(2 z), because 1 + tanh(z) loses all digits far below 0."""
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=True)
    return x * nn.sigmoid((8 / np.pi) ** 0.5 * (x + 0.044715 * x**3))


ACTIVATIONS = {
    "silu": nn.silu,
    "relu": nn.relu,
    "tanh": nn.tanh,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": gelu_tanh,
}

STACKS = ("layers", "top_layers")  # subtrees with the parameters of blocks, on a leading layer axis
MAPS = "distil"  # subtree of maps from the states of a student to those of its teacher, see objectives.hidden
BEHIND = ("final_norm", "lm_head", "head", MAPS)  # subtrees with the parameters after the blocks
# sublayer -> its arrays in a cache, a row for each layer that has it
CACHED = {"attn": ("k", "v"), "global": ("global_k", "global_v"), "delta": ("state", "conv")}


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with its four projections.

    A sublayer whose name ends in `_read` has no keys and values of its own. It reads those of the last layer before it
    whose sublayer has the name without this end.
    """

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float
    kernels: Kernels

    @nn.compact
    def __call__(self, x, layer, shared, cache):
        """x (B, T, D) -> (B, T, D), and the cache with this layer's keys and values added; without a cache, these keys
        and values (B, T, K, d)."""
        c, (B, T, _) = self.config, x.shape
        H, K, d = c.heads, c.kv_heads, c.head_dim
        source, reads = self.name.removesuffix(READS), self.name.endswith(READS)
        norm = functools.partial(Norm, c.norm, c.norm_eps, self.dtype)

        def linear(name, features, bias):
            return Linear(features, bias, self.dtype, c.initializer_range, name=name)

        if c.fused_qkv == "heads":
            fused = linear("c_attn", 3 * H * d, c.qkv_bias)(x).reshape(B, T, H, 3, d)
            q, k, v = (fused[:, :, :, i].reshape(B, T, H * d) for i in range(3))
        elif c.fused_qkv:
            q, k, v = jnp.split(linear("c_attn", (H + 2 * K) * d, c.qkv_bias)(x), (H * d, (H + K) * d), axis=-1)
        else:
            q = linear("q_proj", (1 + c.attn_gate) * H * d, c.qkv_bias)(x)
            k = None if reads else linear("k_proj", K * d, c.qkv_bias)(x)
            v = k if reads or c.values_from_keys and source == "global" else linear("v_proj", K * d, c.qkv_bias)(x)
        q, k, v = (x if x is None else named(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        if c.attn_gate:
            q, gates = (each.reshape(B, T, H * d) for each in jnp.split(q.reshape(B, T, H, 2 * d), 2, axis=-1))
        if c.qk_norm == "all":
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        if c.qkv_clip:
            q, k, v = (jnp.clip(x, -c.qkv_clip, c.qkv_clip) for x in (q, k, v))
        q = q.reshape(B, T, H, d)
        if not reads:
            k, v = k.reshape(B, T, K, d), v.reshape(B, T, K, d)
        if c.qk_norm == "head":
            q, k = norm(name="q_norm")(q), k if reads else norm(name="k_norm")(k)
        if c.v_norm and not reads:
            v = normalised(v.astype(jnp.float32), c.norm_eps).astype(v.dtype)
        if c.positions == "rotary":
            tables = shared["rotary"]
            if c.local_theta and any(c.windows):
                of_layer = lambda own, all: jnp.where(layer["window"] > 0, own, all)  # noqa: E731
                tables = shared["local"] if all(c.windows) else jax.tree.map(of_layer, shared["local"], tables)
            if c.rotary:
                tables = tuple(jnp.where(layer["rotary"], x, still) for x, still in zip(tables, (1.0, 0.0)))
            q, k = (x if x is None else rotate(x, tables, c.rotary_pairs) for x in (q, k))
        if c.score_scale is not None:  # kernels divide by sqrt(d)
            q = (q.astype(jnp.float32) * (c.score_scale * d**0.5)).astype(q.dtype)
        how = {"window": layer["window"], "prefix": layer.get("prefix"), "positions": shared["positions"]}
        how["sinks"] = parameter(self, "sinks", nn.initializers.normal(c.initializer_range), (H,)) if c.sinks else None
        if cache is None:
            how["key"] = self.make_rng("dropout") if self.dropout and self.has_rng("dropout") else None
            k, v = shared["handed"][source] if reads else (k, v)
            y = attend_rows(q, k, v, shared["segments"], **how, kernels=self.kernels, shape=c, rate=self.dropout)
        else:
            offset = cache["length"]
            cache, k, v = remember(cache, CACHED[source], () if reads else key_layout(k, v), layer["row"])
            how |= {"offset": offset, "causal": c.causal, "cap": c.score_cap}
            y = attend(q, k, v, shared["segments"], cache["segments"], **how)
        y = y.reshape(B, T, H * d)
        if c.attn_gate:
            y = y * nn.sigmoid(gates)
        y = named(linear("o_proj", c.width, c.out_bias)(y), "o")
        return dropout(self, y, self.dropout), (k, v) if cache is None else cache


class Inputs(nn.Module):
    """What a layer makes of a vector that it gets for each token, beside the residual stream: out(act(gate(x)) *
    inputs), as in Gemma 4."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, inputs):
        """x (B, T, D), inputs (B, T, P) -> (B, T, D)."""
        c = self.config
        linear = lambda name, size: Linear(size, False, self.dtype, c.initializer_range, name=name)  # noqa: E731
        return linear("out", c.width)(ACTIVATIONS[c.activation](linear("gate", c.input_width)(x)) * inputs)


def halves(c: ModelConfig, x):
    """The outputs x (..., 2 F) of a gate_up_proj as gate and up, (..., F) each."""
    return (x[..., ::2], x[..., 1::2]) if c.fused_gate == "neighbours" else jnp.split(x, 2, axis=-1)


def gated(c: ModelConfig, gate, up):
    """act(gate) * up; with a limit, (up + 1) * gate * sigmoid(slope * gate) of bounded values, as in gpt-oss."""
    if c.gate_limit is None:
        return ACTIVATIONS[c.activation](gate) * up
    gate, up = jnp.minimum(gate, c.gate_limit), jnp.clip(up, -c.gate_limit, c.gate_limit)
    return (up + 1) * gate * nn.sigmoid(c.gate_slope * gate)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), or down(act(up(x)))."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x):
        """x (B, T, D) -> (B, T, D)."""
        c = self.config

        def linear(name, features):
            return Linear(features, c.mlp_bias, self.dtype, c.initializer_range, name=name)

        if c.fused_gate:
            gate, up = halves(c, linear("gate_up_proj", 2 * c.hidden)(x))
        else:
            up = linear("up_proj", c.hidden)(x)
            gate = linear("gate_proj", c.hidden)(x) if c.gated else None
        up, gate = named(up, "up"), named(gate, "gate") if c.gated else None
        h = gated(c, gate, up) if c.gated else ACTIVATIONS[c.activation](up)
        return dropout(self, named(linear("down_proj", c.width)(h), "down"), self.dropout)


class Experts(nn.Module):
    """A mixture of experts (Shazeer et al. 2017), each gated as MLP is: every token goes to its `experts_used`, however
    many tokens an expert gets. E experts, k experts of a token, N tokens of a device.

    A mixture of tokens (Antoniak et al. 2023) if ModelConfig.mixing is g > 0. In training, the tokens at position t of
    g successive rows are a group. Expert e gives token i of the group the weight w_ei, the softmax over the group of
    the router's logits divided by the temperature. It computes y_e = expert_e(sum_i w_ei x_i), and token i gets sum_e
    w_ei y_e. Elsewhere each token is a group of its own: its weights are 1, and it gets sum_e expert_e(x). Padding is
    in no group, and gets 0.

    Experts that are dealt over the mesh axis `expert` get the tokens of all devices of this axis by an all-gather, and
    what they compute is summed by a reduce-scatter. An all-to-all of exactly the tokens that an expert needs has no
    static shape: XLA's CPU has no ragged one, and a padded one must provide for all tokens going to one device, which
    sends min(k, E / devices) times as much.

    If the collection `router` is mutable, it gets sums over the tokens that are no padding, see objectives.routed:
    `load` (E,), the number of tokens of each expert; `probability` (E,), their router probabilities; `z` (), the
    squared normalisers of the router's logits; `entropy` (), of the probabilities, in nats.
    """

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x, segments, temperature=None):
        """x (B, T, D), segments (B, T) int, 0: padding -> (B, T, D). temperature: () if rows are mixed, else None."""
        c, start = self.config, nn.initializers.normal(self.config.initializer_range)
        E, D, F = c.experts, c.width, c.hidden
        shapes = {"gate_up_proj": (E, 2 * F, D)} if c.fused_gate else {"gate_proj": (E, F, D), "up_proj": (E, F, D)}
        shapes["down_proj"] = (E, D, F)
        bias, biases = ("bias", "biases") if c.mlp_bias else ("", "")
        params = {name: Leaf("experts", shape, start, biases, name=name)() for name, shape in shapes.items()}
        gate = Leaf("router", (E, D), start, bias, name="gate")()
        logits = project(x, gate["router"].astype(self.dtype), PARAMETER_AXES["router"])
        logits = (logits + gate["bias"].astype(self.dtype) if bias else logits).astype(jnp.float32)
        variables = {"params": params, "adapter": self.get_variable("adapter", "experts", {})}
        if c.mixing:
            y = mixed(c, variables, x, logits, segments, temperature)
        else:
            p = jax.nn.softmax(logits)
            weights, chosen = jax.lax.top_k(p, c.experts_used)  # (B, T, k)
            if c.experts_normed:
                weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
            if self.is_mutable_collection("router"):
                self.count(logits, p, chosen, segments)
            y = routed(c, variables, x, weights, chosen)
        if c.shared_hidden:  # weighted by a gate of its own
            shared = MLP(dataclasses.replace(c, hidden=c.shared_hidden), self.dtype, 0.0, name="shared")(x)
            y = y + nn.sigmoid(Linear(1, False, self.dtype, c.initializer_range, name="shared_gate")(x)) * shared
        return dropout(self, named(y, "down"), self.dropout)

    def count(self, logits, p, chosen, segments):
        """Put the sums over the tokens that are no padding into the collection `router`."""
        real = (segments > 0).astype(jnp.float32)
        counts = jnp.sum(jax.nn.one_hot(chosen, self.config.experts), axis=2)  # (B, T, E)
        z, entropy = jax.nn.logsumexp(logits, axis=-1) ** 2, jnp.sum(jax.scipy.special.entr(p), axis=-1)
        for name, each in {"load": counts, "probability": p, "z": z, "entropy": entropy}.items():
            total = jnp.tensordot(real, each, 2, precision="highest")
            self.sow("router", name, total, lambda _, new: new, lambda: None)


def feed(c: ModelConfig, variables, rows, sizes, expert):
    """Rows through their experts.

    Args:
        c: The ModelConfig.
        variables: {"params": {name: leaves of a projection}, "adapter": {name: its adapters}}.
        rows: (N, D), those of one expert after another.
        sizes: (E,), number of rows of each expert.
        expert: (N,), that of each row.

    Returns:
        (N, D).
    """
    mlp, adapters = variables["params"], variables["adapter"]

    def change(name, rows):
        found = adapters.get(name, {}).items()
        return sum((ADAPTERS[kind].grouped(rows, leaves, sizes) for kind, leaves in found), 0)

    def product(name, rows):
        y = project_groups(rows, mlp[name]["experts"], sizes)
        if not c.mlp_bias:
            return y
        return y + jnp.take(mlp[name]["biases"].astype(y.dtype), expert, axis=0, mode="clip")

    if c.fused_gate:
        gate, up = halves(c, product("gate_up_proj", rows))
    else:
        gate, up = product("gate_proj", rows), product("up_proj", rows)
    if "gate_up_proj" in adapters:
        gate, up = (y + dy for y, dy in zip((gate, up), halves(c, change("gate_up_proj", rows))))
    rows = gated(c, named(gate, "gate"), named(up, "up"))
    return product("down_proj", rows) + change("down_proj", rows)


def mixed(c: ModelConfig, variables, x, logits, segments, temperature):
    """A mixture of tokens, see Experts: x (B, T, D), logits (B, T, E), segments (B, T) -> (B, T, D). temperature: None
    if each token is a group of its own."""
    g, divisor = (1, 1.0) if temperature is None else (c.mixing, temperature)

    def by_group(variables, arrays, rngs):
        x, logits, real = (each.reshape(-1, g, *each.shape[1:]) for each in arrays)
        logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)  # finite, so that gradients are
        weights = jnp.where(real, jax.nn.softmax(logits, axis=1), 0).astype(x.dtype)
        rows = jnp.einsum("ngte,ngtd->entd", weights, x)
        sizes = jnp.full(c.experts, rows[0, ..., 0].size, jnp.int32)
        expert = jnp.repeat(jnp.arange(c.experts), rows[0, ..., 0].size)
        y = feed(c, variables, rows.reshape(-1, c.width), sizes, expert).reshape(rows.shape)
        return jnp.einsum("ngte,entd->ngtd", weights, y).reshape(arrays[0].shape)

    return map_rows(by_group, variables, (x, logits / divisor, (segments > 0)[..., None]), None)


def routed(c: ModelConfig, variables, x, weights, chosen):
    """Each token through the experts that are chosen for it: x (B, T, D), their weights and indices (B, T, k) -> (B, T,
    D)."""
    k = c.experts_used

    def of_device(variables, arrays, rngs):
        tokens, weights, chosen = (x.reshape(-1, x.shape[-1]) for x in arrays)
        own = variables["params"]["down_proj"]["experts"].shape[0]
        if own < c.experts:  # the others are on other devices: see the tokens of all, and keep what is for its own
            tokens, weights = (gather(x, "expert", 0, x.dtype) for x in (tokens, weights))
            chosen = jax.lax.all_gather(chosen, "expert", tiled=True) - jax.lax.axis_index("expert") * own
            chosen = jnp.where((chosen >= 0) & (chosen < own), chosen, own)
        chosen = chosen.reshape(-1)
        # Pairs of a token and its expert, by expert. A token has at most `own` experts of this device.
        order = jnp.argsort(chosen)[: len(tokens) * min(k, own)]
        sizes = jnp.zeros(own, jnp.int32).at[chosen].add(1, mode="drop")
        keep = lambda x: jnp.where((chosen[order] < own)[:, None], x, 0) if own < c.experts else x  # noqa: E731
        y = keep(feed(c, variables, keep(jnp.repeat(tokens, k, axis=0)[order]), sizes, chosen[order]))
        y = jnp.zeros((len(chosen), c.width), y.dtype).at[order].set(y, unique_indices=True).reshape(-1, k, c.width)
        y = jnp.einsum("nkd,nk->nd", y, weights.astype(y.dtype))
        if own < c.experts:
            y = jax.lax.psum_scatter(y.astype(jnp.float32), "expert", tiled=True).astype(y.dtype)
        return y.reshape(arrays[0].shape)

    return map_rows(of_device, variables, (x, weights, chosen), None)


class Leaf(nn.Module):
    """One parameter in a scope of its own, with its bias if that has a name."""

    leaf: str
    shape: tuple[int, ...]
    start: nn.initializers.Initializer
    bias: str = ""

    @nn.compact
    def __call__(self):
        """{name: parameter}."""
        out = {self.leaf: parameter(self, self.leaf, self.start, self.shape)}
        if self.bias:
            out[self.bias] = parameter(self, self.bias, nn.initializers.zeros, self.shape[:-1])
        return out


class Block(nn.Module):
    """A transformer block: sublayers, the names of which are its `parts`, each with norms where ModelConfig.norms has
    them, and perhaps a factor `scalar` of what the block gives, which is not trained."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float
    kernels: Kernels
    parts: tuple[str, ...] = SUBLAYERS

    @nn.compact
    def __call__(self, carry, layer, shared):
        """carry: x (B, T, D), the cache, and without a cache {sublayer: keys and values that later layers read}. layer:
        its `window`, `index`, `prefix`, `inputs` (B, T, P), and `row`, see `cached_rows`. shared: values of all
        layers."""
        x, cache, handed = carry
        x, c = named(x, "input"), self.config

        def norm(name, x, *where):
            if c.norms not in where:
                return x
            return Norm(c.norm, c.norm_eps, self.dtype, c.norm_bias, name=name)(x)

        def add(x, h, name):
            h = norm(f"{name}_out_norm", h, "output", "both")
            x = x + h if c.residual_scale == 1.0 else x + c.residual_scale * h
            return norm(f"{name}_norm", x, "sum")

        h = norm("attn_norm", x, "input", "both")
        if not c.first_norm:
            h = jnp.where(layer["index"] == 0, x, h)
        kind, name, *more = self.parts
        mixer = Delta if kind == "delta" else functools.partial(Attention, kernels=self.kernels)
        y, kept = mixer(of_sublayer(c, kind), self.dtype, self.dropout, name=kind)(h, layer, shared, cache)
        if cache is not None:
            cache = kept
        elif kind in handed:
            handed = handed | {kind: kept}
        given, x = x, constrain(add(x, y, "attn"), "batch", "tokens", None)
        if not c.one_norm:
            h = norm("mlp_norm", given if c.parallel else x, "input", "both")
        routed = c.experts > 0 and name != "dense"
        mlp = (Experts if routed else MLP)(of_sublayer(c, name), self.dtype, self.dropout, name=name)
        x = add(x, mlp(h, shared["segments"], shared.get("temperature")) if routed else mlp(h), "mlp")
        if "inputs" in more:
            x = add(x, Inputs(c, self.dtype, name="inputs")(x, layer["inputs"]), "inputs")
        if "scalar" in more:
            scale = Leaf("scale", (1,), nn.initializers.ones, name="scalar")()["scale"]
            x = x * jax.lax.stop_gradient(scale).astype(x.dtype)
        self.sow("intermediates", "state", x)
        return (constrain(x, "batch", "tokens", None), cache, handed), None


class Blocks(nn.Module):
    """Blocks of several kinds. Each stack of parameters has a row for each layer whose block has them.

    The layers are scanned run by run, see `config.runs`: each step of a scan computes one repetition of the pattern.

    Attributes:
        config: The ModelConfig of the whole model.
        first: The first layer.
        last: The layer after the last.
        block: The class of the blocks, which may be rematerialised.
        unroll: Repetitions per scan iteration; 0: all.
        fields: The other fields of Block.
    """

    config: ModelConfig
    first: int
    last: int
    block: type[nn.Module]
    unroll: int
    fields: tuple

    @nn.compact
    def __call__(self, carry, layer, shared):
        """As of Block, with the layers of this stack in the leaves of `layer`."""
        sown: dict[str, list] = {}
        parts = self.config.parts[self.first : self.last]
        own = sum(not names[0].endswith(READS) for names in parts)  # layers that read from others come last
        for first, kinds in ((0, parts[:own]), (own, parts[own:])):
            if first == own:
                shared = shared | {"handed": carry[2]}  # no part of the carry, of which each step would keep a copy
            for start, *run in runs(kinds):
                carry, found = self.scan(carry, layer, shared, first + start, *run)
                for part, tree in found.items():
                    sown.setdefault(part, []).append(tree)
        for part, trees in sown.items():
            self.put_variable("router", part, jax.tree.map(lambda *x: jnp.concatenate(x), *trees))
        return carry, None

    def scan(self, carry, layer, shared, start, period, repeats):
        """The layers of one run, see `config.runs`. Returns the carry, and the collection `router` of these layers."""
        c, begin = self.config, self.first + start
        mutable = ["router"] if self.is_mutable_collection("router") else []
        # Layers of the pattern that have a sublayer, counted from the first of the pattern.
        having = lambda part: [i for i in range(period) if begin + i in layers_with(c, part)]  # noqa: E731

        def repeated(x, at, each):
            return x[at : at + each * repeats].reshape(repeats, each, *x.shape[1:])

        def of_run(part, tree):
            at, each = sum(self.first <= i < begin for i in layers_with(c, part)), len(having(part))
            return jax.tree.map(lambda x: repeated(x, at, each), tree)

        def of_block(i, part, tree):
            return jax.tree.map(operator.itemgetter(having(part).index(i)), tree)

        def body(carry, xs):
            trees, layers, keys = xs
            found: dict[str, list] = {}
            for i in range(period):
                own = {
                    kind: {part: of_block(i, part, tree) for part, tree in parts.items() if i in having(part)}
                    for kind, parts in trees.items()
                }
                rngs = {} if keys is None else {"dropout": keys[i]}
                block = self.block(c, *self.fields, c.parts[begin + i], parent=None)
                of_layer = jax.tree.map(operator.itemgetter(i), layers)
                (carry, _), sown = block.apply(own, carry, of_layer, shared, rngs=rngs, mutable=mutable)
                for part, tree in sown.get("router", {}).items():
                    found.setdefault(part, []).append(tree)
            return carry, {part: jax.tree.map(lambda *x: jnp.stack(x), *trees) for part, trees in found.items()}

        stacks = {
            kind: {part: of_run(part, tree) for part, tree in parts.items()} for kind, parts in self.variables.items()
        }
        layers = jax.tree.map(lambda x: repeated(x, start, period), layer)
        keys = jax.random.split(self.make_rng("dropout"), (repeats, period)) if self.has_rng("dropout") else None
        carry, found = jax.lax.scan(body, carry, (stacks, layers, keys), unroll=self.unroll or repeats)
        return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


class Classifier(nn.Module):
    """The head that ModelConfig.head describes, without the embedding table at the end of masked models."""

    config: ModelConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x, attend=None):
        """x (B, M, D) -> (B, M, C); with `attend`, which maps (B, M, D) to the vocabulary: (B, M, V)."""
        c, head = self.config, self.config.head
        if head.activation:
            x = Linear(c.width, head.dense_bias, self.dtype, c.initializer_range, name="dense")(x)
            x = ACTIVATIONS[head.activation](x)
        if head.norm:
            x = Norm(c.norm, c.norm_eps, self.dtype, c.norm_bias, name="norm")(x)
        if attend is None:
            x = dropout(self, x, self.dropout)
            return Linear(head.labels, head.bias, self.dtype, c.initializer_range, name="out")(x)
        y = attend(x).astype(jnp.float32)
        if not head.bias:
            return y
        return y + parameter(self, "bias", nn.initializers.zeros, (c.vocab_size,)).astype(jnp.float32)


class Transformer(nn.Module):
    """A transformer: `apply({"params": ..., "adapter": ...}, tokens, ...)` returns the logits of the head that its
    config names.

    Parameters may be in two stacks, `layers` of the lower blocks and `top_layers` of the others, so that no backward
    pass enters frozen lower blocks. The parameters of a tied model may have an `lm_head`, which is then its head.

    Attributes:
        config: The ModelConfig.
        dtype: Dtype of computation.
        remat: `none` or a row of `remat.PRESETS`.
        unroll: Layers per scan iteration; 0: all.
        dropout: Rate on embeddings, on attention, on the output of each sublayer and before a head over labels, active
            if `rngs={"dropout": key}` is given.
        neftune: Strength of noise on embeddings, active with a key `noise`.
        kernels: Kernels of attention without a cache.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: int = 1
    dropout: float = 0.0
    neftune: float = 0.0
    kernels: Kernels = Kernels()

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, "vocab", self.dtype, c.initializer_range)
        if c.positions == "learned":
            rows = c.position_offset + c.max_positions
            self.pos_embed = Embedding(rows, c.width, None, self.dtype, c.initializer_range)
        if c.types:
            self.type_embed = Embedding(c.types, c.width, None, self.dtype, c.initializer_range)
        if c.embed_norm:
            self.embed_norm = Norm(c.norm, c.norm_eps, self.dtype, c.norm_bias)
        if size := c.layers * c.input_width:
            self.inputs_embed = Embedding(c.vocab_size, size, "vocab", self.dtype, c.initializer_range)
            self.inputs_proj = Linear(size, False, self.dtype, c.initializer_range)
            self.inputs_norm = Norm(c.norm, c.norm_eps, self.dtype)
        block = rematerialised(Block, self.remat)

        def stack(first, last):
            fields = self.dtype, self.dropout, self.kernels
            if c.parts:
                return Blocks(c, first, last, block, self.unroll, fields)
            return nn.scan(
                block,
                variable_axes={"params": 0, "adapter": 0, "router": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=last - first,
                unroll=self.unroll or last - first,
                check_constancy_invariants=False,  # a block would be traced once more
            )(c, *fields)

        top = jax.tree.leaves(self.get_variable("params", "top_layers", {}))
        self.lower = c.layers - max((x.shape[0] for x in top), default=0)  # blocks in `layers`
        self.layers = stack(0, self.lower)
        if top:
            self.top_layers = stack(self.lower, c.layers)
        if c.final_norm:
            self.final_norm = Norm(c.norm, c.norm_eps, self.dtype, c.norm_bias)
        self.tied = c.tied and not self.has_variable("params", "lm_head")
        if c.head.task in VOCABULARY and not self.tied:
            self.lm_head = Linear(c.vocab_size, False, self.dtype, c.initializer_range)
        if c.head.task not in ("causal", "none"):
            self.head = Classifier(c, self.dtype, self.dropout)

    def __call__(self, tokens, positions=None, segment_ids=None, cache=None, types=None):
        """tokens (B, T) int -> logits float32 of every token, (B, T, V) or (B, T, C); with a cache: (logits, cache).

        See `hidden`.
        """
        if cache is None:
            return self.logits(self.hidden(tokens, positions, segment_ids, types=types))
        x, cache = self.hidden(tokens, positions, segment_ids, cache)
        return self.logits(x), cache

    def read(self, tokens, positions, segment_ids, index, types=None):
        """The states that a head reads, (B, M, D): those at positions `index` (B, M), or means over their segments."""
        x = self.hidden(tokens, positions, segment_ids, types=types)
        if self.config.head.pool != "mean":
            return take_tokens(x, index)
        segments = jnp.take_along_axis(segment_ids, index, axis=1)
        mine = (segments[..., None] == segment_ids[:, None, :]).astype(jnp.float32)  # (B, M, T)
        mean = jnp.einsum("bmt,btd->bmd", mine, x.astype(jnp.float32)) / mine.sum(-1, keepdims=True)
        return mean.astype(x.dtype)

    def hidden(self, tokens, positions=None, segment_ids=None, cache=None, types=None):
        """Hidden states after the last norm, (B, T, D); with a cache: (states, cache).

        A soft prompt or prefix of n virtual tokens comes before every segment: `positions` count from after it, and the
        model uses the position n later.

        Args:
            tokens: (B, T) int.
            positions: (B, T) int, position in the token's own document, from 0; default: 0..T-1.
            segment_ids: (B, T) int. Tokens see only tokens of their own id; 0 is padding by convention; default: one
                segment.
            cache: From `make_cache`. The T tokens are appended at `cache["length"]`, padding included.
            types: (B, T) int, token types, if the model has them; default: 0.
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
        x = neftune(self, _scaled(self.embed(tokens), self.config.embed_scale), self.neftune, segment_ids)
        inputs = self.inputs(tokens, x) if self.config.input_width else None
        x, new_cache = self.blocks(x, positions, segment_ids, cache, prefix, types, inputs)
        x = self.leave(x)
        return x if cache is None else (x, new_cache)

    def leave(self, x):
        """States after the blocks (B, T, D), with the last norm if there is one."""
        return self.final_norm(x) if self.config.final_norm else x

    def around_blocks(self, tokens):
        """All modules but the blocks, which get what they are applied to, see `shapes`."""
        places = jnp.zeros_like(tokens)
        embedded = self.embed(tokens)
        inputs = self.inputs(tokens, embedded) if self.config.input_width else None
        x, shared = self.enter(embedded, places, places)
        self.logits(self.leave(x))
        return x, shared, inputs

    def inputs(self, tokens, x):
        """What each layer gets for tokens (B, T), beside the residual stream, of their embeddings x (B, T, D):
        (L, B, T, P)."""
        c = self.config
        known = _scaled(self.inputs_embed(tokens), c.input_width**0.5)
        read = _scaled(self.inputs_proj(x), c.width**-0.5)
        known, read = (y.reshape(*tokens.shape, c.layers, c.input_width) for y in (known, read))
        return jnp.moveaxis(_scaled(self.inputs_norm(read) + known, 2**-0.5), 2, 0)

    def prefix(self):
        """Keys k (L, K, d, n) and values v (L, K, n, d) of the virtual tokens, which every token sees; None without
        any.

        The collection `adapter` holds them as `prefix`, or holds embeddings `prompt` (n, D) from which they are
        computed. Nothing comes before a soft prompt, so its keys and values are the same for every row and every
        segment.
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

    def blocks(self, x, positions, segment_ids, cache, prefix=None, types=None, inputs=None):
        """Embeddings x (B, T, D) -> states before the last norm (B, T, D), and the cache with their keys and values
        added."""
        c, (B, T, _) = self.config, x.shape
        x, shared = self.enter(x, positions, segment_ids, types)
        if cache is None and self.has_variable("mixing", "temperature"):
            shared["temperature"] = self.get_variable("mixing", "temperature")
        self.sow("intermediates", "embedded", x)
        layer = {"window": jnp.array(c.windows or (0,) * c.layers, jnp.int32), "index": jnp.arange(c.layers)}
        layer["row"] = jnp.array(cached_rows(c), jnp.int32)
        if c.rotary:
            layer["rotary"] = jnp.array(c.rotary)
        if prefix is not None:
            layer["prefix"] = prefix
        if inputs is not None:
            layer["inputs"] = inputs
        if cache is not None:
            segments = jax.lax.dynamic_update_slice(cache["segments"], segment_ids, (0, cache["length"]))
            cache = cache | {"segments": segments}
        if cache is not None and isinstance(cache["k"], tuple):
            return self.apart(x, cache, layer, shared)
        sources = {} if cache is not None else {name[0].removesuffix(READS) for name in c.parts if READS in name[0]}
        heads = {name: (own.kv_heads, own.head_dim) for name in sources for own in [of_sublayer(c, name)]}
        carry = x, cache, {name: (jnp.zeros((B, T, *size), self.dtype),) * 2 for name, size in heads.items()}
        carry, _ = self.layers(carry, jax.tree.map(lambda a: a[: self.lower], layer), shared)
        if self.lower < c.layers:
            carry, _ = self.top_layers(carry, jax.tree.map(lambda a: a[self.lower :], layer), shared)
        x, cache, _ = carry
        return x, None if cache is None else cache | {"length": cache["length"] + T}

    def enter(self, x, positions, segment_ids, types=None):
        """Embeddings x (B, T, D) -> what enters the blocks (B, T, D), and the values that all layers use."""
        c = self.config
        shared = {"segments": segment_ids, "positions": positions}
        x = _scaled(x, c.input_scale)
        if c.types:
            x = x + self.type_embed(jnp.zeros_like(positions) if types is None else types)
        if c.positions == "learned":
            x = x + self.pos_embed(positions + c.position_offset)
        else:
            size = c.global_head_dim or c.head_dim
            shared["rotary"] = self.rotary(positions, segment_ids, c.rope_theta, c.rope_scaling, size)
        if c.local_theta:
            shared["local"] = self.rotary(positions, segment_ids, c.local_theta, RopeScaling(), c.head_dim)
        if c.embed_norm:
            x = self.embed_norm(x)
        return constrain(dropout(self, x, self.dropout), "batch", "tokens", None), shared

    def rotary(self, positions, segment_ids, theta, scaling, size):
        """See `rotary_tables`. size: of the heads."""
        c, original = self.config, scaling.original_max_positions
        frequencies, factor = rotary_frequencies(int(size * c.rotary_share), theta, scaling)
        return rotary_tables(positions, segment_ids, frequencies, factor, c.rotary_pairs, original)

    def apart(self, x, cache, layer, shared):
        """The blocks one after another, with variables and a cache as `unstacked` and `make_cache` return them."""
        c, written = self.config, {name: list(x) for name, x in cache.items() if isinstance(x, tuple)}
        for i, row in enumerate(cached_rows(c)):
            parts = c.parts[i] if c.parts else SUBLAYERS
            block = Block(c, self.dtype, self.dropout, self.kernels, parts, parent=None)
            own = {kind: tree["layers"][i] for kind, tree in self.variables.items() if "layers" in tree}
            names = CACHED[parts[0].removesuffix(READS)]
            kept = cache | {name: written[name][row] for name in names}
            of_layer = jax.tree.map(operator.itemgetter(i), layer)
            (x, kept, _), _ = _traced_once(block, own, (x, kept, {}), of_layer, shared)
            for name in names:
                written[name][row] = kept[name]
        kept = {name: tuple(arrays) for name, arrays in written.items()}
        return x, cache | kept | {"length": cache["length"] + x.shape[1]}

    def logits(self, x):
        """States (B, T, D) -> float32 logits (B, T, V), or (B, T, C) of a head over labels; without a head, x
        itself."""
        task = self.config.head.task
        if task == "none":
            return x.astype(jnp.float32)
        if task not in VOCABULARY:
            return self.head(x).astype(jnp.float32)
        attend = self.embed.attend if self.tied else self.lm_head
        y = attend(x) if task == "causal" else self.head(x, attend)
        y = _scaled(y.astype(jnp.float32), self.config.logit_scale)
        if cap := self.config.logit_cap:
            y = cap * jnp.tanh(y / cap)
        return constrain(y, "batch", "tokens", "vocab")


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _traced_once(block: nn.Module, *arguments):
    """`block.apply`, whose operations are added to the program that is traced; blocks alike are traced once."""
    return block.apply(*arguments)


def _scaled(x, factor: float):
    """factor · x, with the factor rounded to x's dtype, as transformers rounds it."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


def make_cache(config: ModelConfig, batch: int, slots: int, dtype=jnp.float32, apart: bool = False) -> dict:
    """An empty KV cache for `batch` rows of up to `slots` tokens.

    It holds k (L, B, K, d, S) and v (L, B, K, S, d) of the L layers with attention, in its layout (`apart`: tuples with
    one array per layer), segments (B, S), and length (), the number of slots in use. Layers `global` have arrays of
    their own, global_k and global_v. Of layers with the delta rule it holds state (L, B, H, d, e) float32 and conv (L,
    B, 1, W - 1, C), see `models.delta`.
    """
    c, S = config, slots

    def empty(part, *shape, dtype=dtype):
        layers = len(layers_with(c, part))
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers)) if apart else jnp.zeros((layers, *shape), dtype)

    cache = {
        # Segment -1: no token sees a slot that was not written.
        "segments": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }
    for part in ("attn", "global") if c.global_head_dim else ("attn",):
        (k, v), own = CACHED[part], of_sublayer(c, part)
        cache[k] = empty(part, batch, own.kv_heads, own.head_dim, S)
        cache[v] = empty(part, batch, own.kv_heads, S, own.head_dim)
    if c.delta_value_heads:
        H, d, e = c.delta_value_heads, c.delta_key_dim, c.delta_value_dim
        cache["state"] = empty("delta", batch, H, d, e, dtype=jnp.float32)
        cache["conv"] = empty("delta", batch, 1, c.delta_width - 1, 2 * c.delta_key_heads * d + H * e)
    return cache


def virtual_tokens(variables: dict) -> int:
    """Number of virtual tokens before every segment: the length of the soft prompt or prefix in `variables`."""
    adapter = variables.get("adapter", {})
    if "prompt" in adapter:
        return adapter["prompt"].shape[0]
    return adapter["prefix"]["v"].shape[-2] if "prefix" in adapter else 0


def max_tokens(config: ModelConfig, variables: dict) -> int:
    """Most tokens of a row: the number of the model's positions less the number of virtual tokens."""
    return config.max_positions - virtual_tokens(variables)


def cached_rows(config: ModelConfig) -> list[int]:
    """Of each layer, its row in the arrays of a cache: its index among those with the same first sublayer, or that of
    the layer whose keys and values it reads."""
    firsts = [parts[0] for parts in config.parts or (SUBLAYERS,) * config.layers]
    return [firsts[: i + 1].count(name.removesuffix(READS)) - 1 for i, name in enumerate(firsts)]


def remember(cache: dict, names: tuple[str, str], new, index):
    """Add keys and values to a cache.

    Args:
        cache: The cache.
        names: Those of its arrays for this kind of sublayer, see CACHED.
        new: k (B, K, d, T) and v (B, K, T, d). Empty: nothing is added.
        index: The row.

    Returns:
        The cache, and all keys and values of that row.
    """
    start, stacked = cache["length"], cache[names[0]].ndim == 5

    def written(old, new, *places):
        new = new.astype(old.dtype)
        if stacked:
            return jax.lax.dynamic_update_slice(old, new[None], (index, 0, 0, *places))
        return jax.lax.dynamic_update_slice(old, new, (0, 0, *places))

    for name, x, places in zip(names, new, ((0, start), (start, 0))):
        cache = cache | {name: written(cache[name], x, *places)}
    arrays = (cache[name] for name in names)
    return cache, *(jax.lax.dynamic_index_in_dim(x, index, keepdims=False) if stacked else x for x in arrays)


def unstacked(variables: dict, config: ModelConfig) -> dict:
    """`variables` with a tuple of trees, one for each block, instead of the stacks.

    Running block by block with a cache that is `apart` then copies no kernels out of a stack, at the price of a copy of
    all of them.
    """

    def split(tree):
        stacks = [tree[name] for name in STACKS if name in tree]
        if not stacks:
            return tree
        blocks = [{} for _ in range(config.layers)]
        for part in dict.fromkeys(part for stack in stacks for part in stack):
            rows = (
                jax.tree.map(operator.itemgetter(i), stack[part])
                for stack in stacks
                for i in range(jax.tree.leaves(stack[part])[0].shape[0])
            )
            for layer, row in zip(layers_with(config, part), rows, strict=True):
                blocks[layer][part] = row
        return {name: x for name, x in tree.items() if name not in STACKS} | {"layers": tuple(blocks)}

    return {kind: split(tree) for kind, tree in variables.items()}


def keep_layers(params: dict, config: ModelConfig, layers) -> dict:
    """Parameters with only some of the layers, see `config.with_layers`.

    Args:
        params: The parameters, in one stack.
        config: Their ModelConfig.
        layers: The layers that are kept, in rising order.
    """

    def cut(part, tree):
        rows = np.array([row for row, layer in enumerate(layers_with(config, part)) if layer in layers])
        return jax.tree.map(lambda x: x[rows], tree) if len(rows) else None

    if P := config.input_width:  # parts of the columns of these tables belong to single layers
        mine = (np.array(layers)[:, None] * P + np.arange(P)).ravel()
        table, kernel = params["inputs_embed"]["embedding"], params["inputs_proj"]["kernel"]
        params = params | {"inputs_embed": {"embedding": table[:, mine]}, "inputs_proj": {"kernel": kernel[mine]}}
    kept = {part: cut(part, tree) for part, tree in params["layers"].items()}
    return params | {"layers": {part: tree for part, tree in kept.items() if tree is not None}}


def as_prefix(model: Transformer, variables: dict) -> dict:
    """`variables` with the keys and values of a soft prompt instead of the prompt, which decoding would compute at
    every token."""
    if "prompt" not in variables.get("adapter", {}):
        return variables
    others = {name: leaf for name, leaf in variables["adapter"].items() if name != "prompt"}
    return variables | {"adapter": others | {"prefix": model.apply(variables, method="prefix")}}


@functools.cache
def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter, as the modules declare them. Those of the blocks are stacked along a leading
    axis of the layers that have them."""

    def declared():
        model, key = Transformer(config), jax.random.key(0)
        (x, shared, inputs), found = model.init_with_output(key, jnp.zeros((1, 1), jnp.int32), method="around_blocks")
        layer, sublayers = {"window": 0, "index": 0, "row": 0, "rotary": True}, {}
        layer |= {} if inputs is None else {"inputs": inputs[0]}
        for parts in dict.fromkeys(config.parts or (SUBLAYERS,)):
            block = Block(config, model.dtype, model.dropout, model.kernels, parts)
            source = of_sublayer(config, parts[0].removesuffix(READS))
            handed = {parts[0].removesuffix(READS): (jnp.zeros((1, 1, source.kv_heads, source.head_dim)),) * 2}
            sublayers |= block.init(key, (x, None, {}), layer, shared | {"handed": handed})["params"]
        return found["params"] | {"layers": sublayers}

    found = {path: x.shape for path, x in flatten(jax.eval_shape(declared)).items()}
    stacked = {path: len(layers_with(config, path)) for path in found if path.startswith("layers/")}
    return {path: (stacked[path], *shape) if path in stacked else shape for path, shape in found.items()}


def parameter_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of the parameter at `path` (`layers/attn/q_proj/kernel`), its layer axis included.

    Raises KeyError for a path that the table does not cover: a new parameter must have a row in it.
    """
    parts = path.split("/")
    tail = "/".join(parts[-2:])
    axes = PARAMETER_AXES[tail] if tail in PARAMETER_AXES else PARAMETER_AXES[parts[-1]]
    return (None,) * (parts[0] in STACKS) + axes
