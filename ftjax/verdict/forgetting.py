"""How far a tuned model has moved from its base, by KL divergence.

B rows, M scored tokens of a row at most, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import xla
from ftjax.data.batches import Batches
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError
from ftjax.objectives.causal import states

BUCKETS = 8  # number of lengths that rows are padded to; each is compiled once
CHUNK = 128  # tokens of a row whose logits are in memory at once
Pair = tuple[list[int], list[int]]  # (given ids, at least one; scored ids)


class Divergence(NamedTuple):
    """Divergences of N rows, (N,) each. The mean per token is kl.sum() / tokens.sum()."""

    kl: np.ndarray  # sum over the row's scored tokens, nats
    tokens: np.ndarray


def divergence(p, q, pairs: Sequence[Pair], batch_size: int = 16) -> Divergence:
    """KL(p || q) of the next-token distributions of two LMs, at each scored token.

    It is exact over the vocabulary, not the estimate log p - log q of the given tokens. If p is the tuned model and the
    rows are its own samples at temperature 1, the mean of the rows' sums estimates the KL divergence of its answers
    from those of q, the quantity that RLHF limits.

    Args:
        p, q: LMs with vocabularies of the same size.
        pairs: (given ids, scored ids) of N rows. They are cut to the positions of the model that has fewer.
        batch_size: Rows per batch.

    Returns:
        The Divergence.

    Raises:
        FtjaxError: If the vocabularies differ in size, or if a pair cannot be scored.
    """
    sizes = [lm.model.config.vocab_size for lm in (p, q)]
    if sizes[0] != sizes[1]:
        raise FtjaxError(
            f"divergence: the two models' vocabularies have {sizes[0]} and {sizes[1]} tokens; expected equal sizes"
        )
    kl, tokens = np.zeros(len(pairs)), np.zeros(len(pairs), int)
    for batch, rows in batched(pairs, min(p.max_tokens, q.max_tokens), batch_size):
        told = np.asarray(_kl(p.model, q.model, p.variables, q.variables, batch))
        for row, i, n in rows:
            kl[i], tokens[i] = told[row, :n].sum(dtype=np.float64), n
    return Divergence(kl, tokens)


@functools.partial(xla.jit, static_argnums=(0, 1))
def _kl(p_model, q_model, p_variables, q_variables, batch):
    """(B, M) float32, at least 0."""

    def kl(p_states, q_states):
        p = jax.nn.log_softmax(p_model.apply(p_variables, p_states, method="logits"), axis=-1)
        q = jax.nn.log_softmax(q_model.apply(q_variables, q_states, method="logits"), axis=-1)
        return jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0)  # rounding may give a small negative value

    return in_chunks(kl, states(p_model, p_variables, batch), states(q_model, q_variables, batch))


def batched(
    pairs: Sequence[Pair], limit: int, batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], list[tuple[int, int, int]]]]:
    """Batches for objectives, sorted by length, whose labels are the scored tokens.

    Args:
        pairs: (given ids, scored ids) of N texts. If a pair exceeds the limit, tokens at the beginning of its first
            part are left out.
        limit: Number of the model's positions.
        batch_size: Rows per batch.

    Yields:
        (batch, [(row of the batch, index of the pair, number of scored tokens)]).

    Raises:
        FtjaxError: If one part of a pair is empty, or if its scored part exceeds the limit.
    """
    examples = []
    for number, (given, scored) in enumerate(pairs, 1):
        if not len(given) or not 0 < len(scored) <= limit:
            raise FtjaxError(
                f"text {number}: {len(given)} context tokens and {len(scored)} tokens to score; expected at least one "
                f"of each, and at most {limit} (the model's positions) to score"
            )
        ids = np.array([*given, *scored][-(limit + 1) :], np.int32)
        examples.append(Example(ids, np.arange(len(ids)) >= len(ids) - len(scored)))
    if not examples:
        return
    batches = Batches(examples, min(batch_size, len(examples)), limit + 1, buckets=BUCKETS, shuffle=False)
    for step in range(len(batches)):
        batch = batches[step]
        for name in ("tokens", "positions", "segment_ids"):
            batch[name] = batch[name][:, :limit]  # the last token of the longest rows is scored but not read
        members = enumerate(batches.rows(step))
        yield batch, [(row, int(i), int(batches.examples.labels[i])) for row, found in members for i in found]


def in_chunks(f: Callable, *arrays):
    """Apply f, which maps arrays (B, M, ...) to arrays (B, M), to CHUNK of the M places at a time."""
    B, M = arrays[0].shape[:2]
    if M <= CHUNK:
        return f(*arrays)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -M % CHUNK)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, CHUNK, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(lambda piece: f(*piece), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :M], pieces)
