"""Where an answer begins and ends among the tokens of its segment.

B rows, T tokens, M places a row at most, one a segment.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(model, variables, batch, *, rngs=None):
    """How likely an answer is to begin, and to end, at each token: (B, T, 2) float32; see `sums`."""
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    return model.apply(variables, *rows, types=batch.get("types"), rngs=rngs)


def sums(model, variables, batch, *, rngs=None):
    """Cross-entropy over the tokens of each place's own segment, its mean over beginning and end, summed over places.

    batch: tokens, positions, segment_ids (B, T), and types where the model has such; loss_index (B, M) int, the first
    token of a segment; labels (B, M, 2) int, first and last token of its answer, counted from there; weights (B, M).

    Returns (loss sum, weight sum, {"loss", "correct"}), correct where both are right; all float32.
    """
    found, first = logits(model, variables, batch, rngs=rngs), batch["loss_index"]
    segments = batch["segment_ids"]
    own = jnp.take_along_axis(segments, first, axis=1)[..., None] == segments[:, None, :]  # (B, M, T)
    scores = jnp.where(own[..., None], found[:, None], -jnp.inf)  # (B, M, T, 2)
    at = first[..., None] + batch["labels"]
    right = jnp.take_along_axis(found, at, axis=1)  # (B, M, 2)
    loss = jnp.mean(jax.nn.logsumexp(scores, axis=2) - right, axis=-1)
    correct = jnp.all(jnp.argmax(scores, axis=2) == at, axis=-1) & jnp.isfinite(loss)
    weights = batch["weights"].astype(jnp.float32)
    total = jnp.sum(loss * weights)
    return total, jnp.sum(weights), {"loss": total, "correct": jnp.sum(correct * weights)}
