"""Contrastive learning of text vectors: a text must be closer to its own partner than to all other texts of a batch.

B rows, T tokens, M texts a row at most, D width, P pairs of a batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ftjax import xla
from ftjax.models.config import Head
from ftjax.objectives.causal import states, totals

POOLS = {"auto": "mean", "mean": "mean", "cls": "first"}  # config.task.pool -> ModelConfig.head.pool


def embeddings(model, variables, batch, *, pool: str, rngs=None):
    """Vectors of length 1, (B, M, D) float32, of the texts that begin at batch["loss_index"] (B, M). Each text is a
    segment."""
    shape = dataclasses.replace(model.config, head=Head("none", pool=POOLS[pool]))
    x = states(model.clone(config=shape), variables, batch, rngs=rngs).astype(jnp.float32)
    # As in torch.nn.functional.normalize.
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


embed = xla.jit(embeddings, static_argnums=0, static_argnames="pool")


def sums(model, variables, batch, *, pool: str = "mean", temperature: float = 0.05, rngs=None):
    """InfoNCE (van den Oord et al. 2018), summed over the pairs of a batch.

    It is the cross-entropy of finding, for each first text, its own second text among all second texts of the batch, by
    cosines divided by the temperature. sentence-transformers calls it multiple negatives ranking loss, and 1 /
    temperature its scale.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: As in `ftjax.objectives.causal.sums`. Each text is a segment of its own, with first and second texts
            alternating at loss_index; weights are 0 if a row has fewer texts. The rows of all devices are one batch.
        pool: `mean` or `cls`.
        temperature: Divisor of the cosines.
        rngs: Random keys of dropout; None: no dropout.

    Returns:
        (loss sum, weight sum, {"loss", "correct"}), correct if the own text is the most similar; all float32.
    """
    x = embeddings(model, variables, batch, pool=pool, rngs=rngs)
    first, second = x.reshape(-1, 2, x.shape[-1]).swapaxes(0, 1)  # (P, D)
    weights = batch["weights"].reshape(-1, 2)[:, 0]
    cosines = jnp.einsum("pd,qd->pq", first, second, precision="highest")
    scores = jnp.where(weights > 0, cosines / temperature, -jnp.inf)
    own = jnp.diagonal(cosines) / temperature
    # A row without a pair would have no score of its own, and a gradient of NaN.
    loss = jnp.where(weights > 0, jax.nn.logsumexp(scores, axis=1) - own, 0.0)
    correct = (jnp.argmax(scores, axis=1) == jnp.arange(len(own))) & jnp.isfinite(loss)
    return totals(weights, loss, correct)
