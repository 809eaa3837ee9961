"""Tokens predicted from hidden states: the next one, or the one that is masked.

B rows, T tokens, M trained tokens a row at most, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ftjax.models.by_device import sum_rows


def states(model, variables, batch, *, rngs=None):
    """Hidden states (B, M, D) that the trained tokens of a batch are predicted from; see `sums`."""
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "loss_index"))
    return model.apply(variables, *rows, batch.get("types"), rngs=rngs, method="read")


def sums(model, variables, batch, *, rngs=None, label_smoothing: float = 0.0, head_chunk: int = 512):
    """Sums over the trained tokens of a batch, never means: whoever calls divides once, by everything it has summed.

    batch: tokens, positions, segment_ids (B, T) int; loss_index (B, M) int, where a state predicts; labels (B, M)
    int; weights (B, M) float, 0 where a row has fewer than M; and `states`, where they are known. Hidden states are
    gathered before the head, so that no logits are computed for tokens that are not trained, and at most (B,
    head_chunk, V) of them are held at once.

    Returns (loss sum, weight sum, {"loss", "correct"}): loss with label smoothing (Szegedy et al. 2016), the metrics'
    `loss` without; all float32.
    """
    found = batch["states"] if "states" in batch else states(model, variables, batch, rngs=rngs)

    def chunk_sums(variables, rngs, states, labels, weights):
        logits = model.apply(variables, states, rngs=rngs, method="logits")
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        loss = normaliser - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        smooth = loss
        if label_smoothing:
            uniform = normaliser - jnp.mean(logits, axis=-1)
            smooth = (1 - label_smoothing) * loss + label_smoothing * uniform
        correct = _argmax(logits) == labels
        return jnp.stack([jnp.sum(x * weights) for x in (smooth, loss, correct)])

    def all_sums(variables, arrays, rngs):
        M = arrays[0].shape[1]
        chunk = functools.partial(chunk_sums, variables, rngs)
        return chunk(*arrays) if M <= head_chunk else _scan_chunks(chunk, arrays, M, head_chunk)

    weights = batch["weights"].astype(jnp.float32)
    total = sum_rows(all_sums, head_variables(variables), (found, batch["labels"], weights), rngs)
    return total[0], jnp.sum(weights), {"loss": total[1], "correct": total[2]}


def head_variables(variables: dict) -> dict:
    """The part of a model's variables that its logits are computed from."""
    tied = "lm_head" not in variables["params"]
    names = ("embed" if tied else "lm_head", "head")
    return {kind: {name: tree[name] for name in names if name in tree} for kind, tree in variables.items()}


def _argmax(x):
    """jnp.argmax over the last axis, as two plain reductions: ten times as fast on a CPU."""
    top = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(top, jnp.arange(x.shape[-1]), x.shape[-1]), axis=-1)


def _scan_chunks(chunk_sums, arrays, M, size):
    """Sum `chunk_sums` over pieces of axis 1, each recomputed in the backward pass; zeros fill the last."""
    pieces = -(-M // size)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * size - M)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    # The checkpoint keeps one piece's logits alive instead of all of them: that is what the chunks are for.
    body = jax.checkpoint(lambda total, piece: (total + chunk_sums(*piece), None), prevent_cse=False)
    return jax.lax.scan(body, jnp.zeros(3), tuple(map(cut, arrays)))[0]
