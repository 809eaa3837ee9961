"""Which tensors of a block are kept for its backward pass, which of them in the host's memory, and which are
recomputed.

Tensors of a block have names; a preset lists those that are kept. B rows, T tokens, D width, H heads, K KV heads, d
head size, F hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.config import READS, attentions, hidden_per_token, layers_with

HOST = "pinned_host"  # memory of the host that devices read and write by themselves

# Tensors of a block that have a name, which each gets where it is computed, by `checkpoint_name`:
#   input      (B, T, D) what the block gets
#   q, k, v    (B, T, H d), (B, T, K d) twice: outputs of the products, bias and adapters included
#   mixed      (B, T, C) of layers with the delta rule: queries, keys and values before the convolution
#   z          (B, T, H e) their gates
#   attention  (B, T, H d) output of attention, and what its kernel keeps for the backward pass: (B, H, T)
#   o, down    (B, T, D)
#   gate, up   (B, T, F)
ATTENTION = ("q", "k", "v", "mixed", "z", "attention")
PRODUCTS = (*ATTENTION, "o", "gate", "up", "down")
# Attention kernels whose residuals have no names: they are kept if `attention` is.
KERNELS = ("dot_product_attention_fwd_wrapper",)


class Preset(NamedTuple):
    """Names of tensors that are kept on the device, and of those that are kept in the host's memory; all others are
    recomputed."""

    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()


# The fastest comes first. Except for `offload*`, which copy saved tensors to the host, that is also the largest first.
PRESETS = {
    "products": Preset(keep=PRODUCTS),
    "attention": Preset(keep=ATTENTION),
    "offload_products": Preset(offload=("input", *PRODUCTS)),
    "full": Preset(),
    "offload": Preset(offload=("input",)),
}
CHOICES = ("none", *PRESETS)


def rematerialised(block: type[nn.Module], preset: str) -> type[nn.Module]:
    """A block that keeps for its backward pass what `preset` says. `none` keeps everything that the backward pass
    uses, and so does `auto` where nothing has chosen a preset."""
    if preset in ("none", "auto"):
        return block
    return nn.remat(block, prevent_cse=False, policy=policy(PRESETS[preset]))


def kept_values(shape, names: tuple[str, ...]) -> float:
    """Number of values per token in the tensors of these names of one block, on average. shape: the ModelConfig."""
    share = lambda part: len(layers_with(shape, part)) / shape.layers  # noqa: E731
    heads = sum(own.heads * own.head_dim * share(name) for name, (own, _) in attentions(shape).items())
    keys = sum(own.kv_heads * own.head_dim * share(n) for n, (own, _) in attentions(shape).items() if READS not in n)
    values, of_delta = shape.delta_value_heads * shape.delta_value_dim, share("delta")
    mixed = 2 * shape.delta_key_heads * shape.delta_key_dim + values
    sizes = {"q": heads * (1 + shape.attn_gate), "k": keys, "v": keys, "attention": heads}
    sizes |= {"input": shape.width, "o": shape.width}
    sizes |= {"mixed": mixed * of_delta, "z": values * of_delta}
    sizes["attention"] += values * of_delta
    hidden = hidden_per_token(shape)
    sizes |= {"gate": hidden * shape.gated, "up": hidden, "down": 0}  # the last one is only added
    return sum(sizes[name] for name in names)


def policy(preset: Preset):
    """The policy of a preset for jax.checkpoint."""
    names = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=preset.keep, names_which_can_be_offloaded=preset.offload, offload_src="device",
        offload_dst=HOST,
    )  # fmt: skip
    if "attention" not in preset.keep:
        return names

    def kernels_too(primitive, *operands, **parameters):
        return primitive.name in KERNELS or names(primitive, *operands, **parameters)

    return kernels_too


def named(x: jax.Array, name: str) -> jax.Array:
    """Tag x with the name that presets use to save it."""
    return checkpoint_name(x, name)


def kept_bytes(function, *arguments) -> list[tuple[tuple[int, ...], int]]:
    """(shape, bytes) of each array in the device's memory that the backward pass of function(*arguments) needs.

    arguments: trees of shapes; the gradient is taken with respect to the first.
    """

    def residuals(first, *others):
        return jax.vjp(lambda x: function(x, *others), first)[1]

    kept = jax.make_jaxpr(residuals)(*arguments).jaxpr.outvars
    unique = {id(v): v.aval for v in kept}.values()
    return [(x.shape, x.size * x.dtype.itemsize) for x in unique if x.memory_space != jax.memory.Space.Host]
