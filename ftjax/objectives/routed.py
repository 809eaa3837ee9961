"""What the routers of a mixture of experts do in a batch: two losses on them, and figures.

L layers with experts, E experts, k experts of a token, N tokens that are no padding, W weight sum of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models.config import layers_with


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """A model that appends the collection `kept` to `seen` when it is applied to `variables`."""

    model: Any
    variables: dict
    seen: list[dict]
    kept: str

    def __getattr__(self, name):
        return getattr(self.model, name)

    def clone(self, **fields):
        """As flax.linen.Module.clone."""
        return dataclasses.replace(self, model=self.model.clone(**fields))

    def apply(self, variables, *arguments, **how):
        """As flax.linen.Module.apply. Heads are applied to a part of the variables, and references to others."""
        if variables is not self.variables or how.get("method") == "logits":
            return self.model.apply(variables, *arguments, **how)
        y, found = self.model.apply(variables, *arguments, mutable=[self.kept], **how)
        self.seen.append(found[self.kept])
        return y


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """The `sums` of an objective, with the losses of the routers.

    The load-balance loss is E Σₑ fₑ pₑ (Fedus et al. 2022, equation 4), as transformers computes it: fₑ is the number
    of tokens of expert e, and pₑ the sum of its probabilities, both over all layers and divided by L N. The z-loss is
    the mean over tokens and layers of log² Σ exp(logits) (Zoph et al. 2022, equation 5). Both are those of the whole
    batch, so that neither microbatches nor devices nor padding change them.

    Attributes:
        sums: The objective's sums, see tasks.Task.sums.
        model: The Flax module.
        balance: Weight of the load-balance loss.
        z: Weight of the z-loss.
    """

    sums: Callable
    model: Any
    balance: float
    z: float

    def __call__(self, variables, batch, *, rngs=None, whole: dict | None = None):
        """As an objective's sums.

        Args:
            variables: The Flax variables.
            batch: The batch, or one of its microbatches.
            rngs: Random keys of dropout and noise.
            whole: `of_whole` of the whole batch; None: `batch` is the whole one.

        Returns:
            (loss sum with both losses, weight sum, sums). Beside the objective's sums there are those of "balance" and
            "router_z", both losses without their weights; "router_entropy", the mean entropy of the probabilities in
            nats; "load", the share of each expert in all pairs of a token and its expert; and "dropped", the share of
            such pairs that no expert computed.
        """
        seen: list[dict] = []
        watched = Watched(self.model, variables, seen, "router")
        total, weight, figures = self.sums(watched, variables, batch, rngs=rngs)
        if not seen:  # the states are known, and no router is trained
            return total, weight, figures
        found, c = _over_layers(seen), self.model.config
        if whole is None:
            whole = {"load": found["load"], "tokens": real_tokens(batch), "weight": weight}
        layers = len(layers_with(c, "mlp")) * len(seen)
        each = layers * jnp.maximum(whole["tokens"], 1)  # L N
        share = whole["weight"] / each  # the caller divides by W
        load = jax.lax.stop_gradient(whole["load"])
        balance = c.experts * jnp.sum(load / each * found["probability"]) * share
        missing = real_tokens(batch) * layers * c.experts_used - jnp.sum(found["load"])
        own = {"balance": balance, "router_z": found["z"] * share, "router_entropy": found["entropy"] * share}
        own |= {"load": found["load"] / c.experts_used * share, "dropped": missing / c.experts_used * share}
        return total + self.balance * balance + self.z * own["router_z"], weight, figures | own

    def of_whole(self, variables, batch, *, rngs=None) -> dict:
        """What each microbatch must know of the whole batch, whose sum over the microbatches it is. Only the
        load-balance loss needs a pass through the model for it."""
        seen: list[dict] = []
        _, weight, _ = self.sums(Watched(self.model, variables, seen, "router"), variables, batch, rngs=rngs)
        load = _over_layers(seen)["load"] if self.balance and seen else 0.0
        return {"load": load, "tokens": real_tokens(batch), "weight": weight}


def _over_layers(seen: list[dict]) -> dict:
    """{figure: its sum over layers} of all passes through a model."""
    stacks = [stack["mlp"] for found in seen for stack in found.values()]
    return {name: sum(jnp.sum(stack[name], axis=0) for stack in stacks) for name in stacks[0]}


def real_tokens(batch):
    """Number of tokens of a batch that are no padding, float32."""
    return jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
