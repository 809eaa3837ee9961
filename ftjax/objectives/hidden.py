"""The distance of the hidden states of a student from those of its teacher.

B rows, T tokens, n pairs of layers, D width of the student, E width of the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.axes import constrain
from ftjax.models.transformer import MAPS, STACKS
from ftjax.objectives.routed import Watched, real_tokens


def states(model, variables, batch, *, layers: tuple[int, ...]):
    """Hidden states of some layers, (B, T, n, width) float32; see `_taken` for the layers.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: tokens, positions, segment_ids (B, T), and types if the model has token types.
        layers: n numbers of layers.
    """
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    how = {"types": batch.get("types"), "method": "hidden", "mutable": ["intermediates"]}
    found = _taken(model.apply(variables, *rows, **how)[1]["intermediates"], layers)
    return constrain(found, "batch", None, None, None)


def _taken(found: dict, layers):
    """The states after the embeddings (layer 0) and after the n-th block (layer n), before any norm of the last."""
    stacks = [found[name]["state"][0] for name in STACKS if name in found]
    every = jnp.concatenate([found["embedded"][0][None], *stacks])
    return jnp.moveaxis(every[np.array(layers)], 0, 2).astype(jnp.float32)


def maps(key, config, width: int) -> dict:
    """The maps before training, which keep the scale of the states: {MAPS: {"kernel": (n, D, E)}}; empty if a run needs
    none.

    Args:
        key: Random key of the run's start.
        config: config.distil.
        width: D.
    """
    if not config.hidden or config.width == width:
        return {}
    shape = len(config.layers), width, config.width
    return {MAPS: {"kernel": jax.random.normal(jax.random.fold_in(key, len(MAPS)), shape) / width**0.5}}


def divided(trained: dict) -> tuple[dict, dict]:
    """(the parameters of the model or its adapter, the maps) of a tree of trained parameters."""
    own = dict(trained)
    return own, {name: own.pop(name) for name in {MAPS} & trained.keys()}


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """The `sums` of an objective, with the distance of hidden states from a teacher's.

    The distance is the mean squared error of TinyBERT (Jiao et al. 2020, equations 8 and 9), summed over pairs of
    layers: the mean over the tokens that are no padding, and over the width, of (h W - g)², where h are the student's
    states and g the teacher's. W is a trained linear map of each pair where widths differ, and the identity elsewhere.
    The mean is that of the whole batch, so that neither microbatches nor devices nor padding change it.

    Attributes:
        sums: The objective's sums, see tasks.Task.sums.
        model: The Flax module.
        weight: Weight of the distance in the loss.
        layers: Layers of the student, see `_taken`; batch["reference"] (B, T, n, E) has those of the teacher.
    """

    sums: Callable
    model: Any
    weight: float
    layers: tuple[int, ...]

    def __call__(self, variables, batch, *, rngs=None, whole: dict | None = None):
        """As an objective's sums, with the sum of "hidden", the distance without its weight.

        Args:
            variables: The Flax variables, with the maps as the collection MAPS.
            batch: The batch, or one of its microbatches.
            rngs: Random keys of dropout and noise.
            whole: `of_whole` of the whole batch; None: `batch` is the whole one.
        """
        seen: list[dict] = []
        watched = Watched(self.model, variables, seen, "intermediates")
        total, weight, figures = self.sums(watched, variables, batch, rngs=rngs)
        whole = whole or {"tokens": real_tokens(batch), "weight": weight}
        ours, theirs = _taken(seen[0], self.layers), batch["reference"]
        if MAPS in variables:
            ours = jnp.einsum("btnd,nde->btne", ours, variables[MAPS]["kernel"], precision="highest")
        far = jnp.sum(jnp.mean((ours - theirs) ** 2, axis=-1), axis=-1)  # (B, T)
        far = jnp.sum(jnp.where(batch["segment_ids"] > 0, far, 0)) / jnp.maximum(whole["tokens"], 1)
        far = far * whole["weight"]  # the caller divides by the weight of the whole batch
        return total + self.weight * far, weight, figures | {"hidden": far}

    def of_whole(self, variables, batch, *, rngs=None) -> dict:
        """What each microbatch must know of the whole batch, whose sum over the microbatches it is."""
        return {"tokens": real_tokens(batch), "weight": self.sums(self.model, variables, batch, rngs=rngs)[1]}
