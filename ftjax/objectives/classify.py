"""Labels of texts and of tokens: one label, several, or numbers, computed from hidden states at given positions.

B rows, T tokens, M positions a row at most, D width, C labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.objectives.causal import states, totals


def options(config) -> dict:
    """The options of `one_class` in training."""
    return {"label_smoothing": config.train.label_smoothing, "focal": config.task.focal}


def logits(model, variables, batch, *, rngs=None):
    """The head's output at each position of a batch, (B, M, C) float32; see `one_class`."""
    found = batch["states"] if "states" in batch else states(model, variables, batch, rngs=rngs)
    return model.apply(variables, found, rngs=rngs, method="logits")


def one_class(model, variables, batch, *, rngs=None, label_smoothing: float = 0.0, focal: float = 0.0):
    """Weighted cross-entropy, summed over the positions of a batch.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: tokens, positions, segment_ids (B, T), and types if the model has token types; loss_index (B, M) int, the
            positions; labels (B, M) int, label ids; weights (B, M) float, 0 if a row has fewer positions.
        rngs: Random keys of dropout; None: no dropout.
        label_smoothing: Share of the target's probability that is spread over all labels (Szegedy et al. 2016).
        focal: γ of the factor (1 - p)^γ on the loss at each position (Lin et al. 2017).

    Returns:
        (loss sum, weight sum, {"loss" without smoothing and focal factor, "correct"}); all float32.
    """
    scores = jax.nn.log_softmax(logits(model, variables, batch, rngs=rngs), axis=-1)
    right = jnp.take_along_axis(scores, batch["labels"][..., None], axis=-1)[..., 0]
    loss = -right
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * jnp.mean(scores, axis=-1)
    if focal:
        # log(1 - p) as the sum of all other classes: finite, and so its gradient, where p rounds to 1.
        is_label = batch["labels"][..., None] == jnp.arange(scores.shape[-1])
        loss = loss * jnp.exp(focal * jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, scores), axis=-1))
    correct = (jnp.argmax(scores, axis=-1) == batch["labels"]) & jnp.isfinite(right)
    return totals(batch["weights"], loss, correct, -right)


def many_classes(model, variables, batch, *, rngs=None, focal: float = 0.0):
    """Binary cross-entropy, averaged over labels (B, M, C) of 0 and 1. A position is correct if all C labels are, at
    0.5."""
    found = logits(model, variables, batch, rngs=rngs)
    signed = jnp.where(batch["labels"] > 0, found, -found)
    plain = -jax.nn.log_sigmoid(signed)
    # As an exponential: a power below 1 of a sigmoid that underflows to 0 has no gradient.
    loss = plain * jnp.exp(focal * jax.nn.log_sigmoid(-signed)) if focal else plain
    return totals(batch["weights"], jnp.mean(loss, -1), jnp.all(signed > 0, axis=-1), jnp.mean(plain, -1))


def numbers(model, variables, batch, *, rngs=None):
    """Squared error, averaged over labels (B, M, C) float. No position counts as correct."""
    found = logits(model, variables, batch, rngs=rngs)
    loss = jnp.mean((found - batch["labels"]) ** 2, axis=-1)
    return totals(batch["weights"], loss, jnp.zeros_like(loss))
