"""The first and last token of an answer in its segment.

B rows, T tokens, M positions a row at most, one for each segment.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.objectives.causal import totals


def logits(model, variables, batch, *, rngs=None):
    """Logits of the beginning and the end of an answer at each token: (B, T, 2) float32; see `sums`."""
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    return model.apply(variables, *rows, types=batch.get("types"), rngs=rngs)


def sums(model, variables, batch, *, rngs=None):
    """Cross-entropy over the tokens of each position's own segment, averaged over beginning and end, summed over
    positions.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: tokens, positions, segment_ids (B, T), and types if the model has token types; loss_index (B, M) int, the
            first token of a segment; labels (B, M, 2) int, the first and last token of its answer, counted from there;
            weights (B, M).
        rngs: Random keys of dropout; None: no dropout.

    Returns:
        (loss sum, weight sum, {"loss", "correct"}), correct if beginning and end are both right; all float32.
    """
    found, first = logits(model, variables, batch, rngs=rngs), batch["loss_index"]
    segments = batch["segment_ids"]
    own = jnp.take_along_axis(segments, first, axis=1)[..., None] == segments[:, None, :]  # (B, M, T)
    scores = jnp.where(own[..., None], found[:, None], -jnp.inf)  # (B, M, T, 2)
    at = first[..., None] + batch["labels"]
    right = jnp.take_along_axis(found, at, axis=1)  # (B, M, 2)
    loss = jnp.mean(jax.nn.logsumexp(scores, axis=2) - right, axis=-1)
    correct = jnp.all(jnp.argmax(scores, axis=2) == at, axis=-1) & jnp.isfinite(loss)
    return totals(batch["weights"], loss, correct)
