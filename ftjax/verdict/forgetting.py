"""How far a tuned model has moved from its base, by KL divergence.

B rows, M scored tokens of a row at most, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ftjax import xla
from ftjax.data.batches import by_example
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError
from ftjax.objectives import causal, distil

Pair = tuple[list[int], list[int]]  # (given ids, at least one; scored ids)
REVERSE = distil.Teacher(beta=1.0)  # the divergence of the first model from the second, which is its reference


class Divergence(NamedTuple):
    """Divergences of N rows, (N,) each. The mean per token is kl.sum() / tokens.sum()."""

    kl: np.ndarray  # sum over the row's scored tokens, nats
    tokens: np.ndarray


def divergence(p, q, pairs: Sequence[Pair], batch_size: int = 16, head_chunk: int = 0) -> Divergence:
    """KL(p || q) of the next-token distributions of two LMs, at each scored token.

    It is exact over the vocabulary, not the estimate log p - log q of the given tokens. If p is the tuned model and the
    rows are its own samples at temperature 1, the mean of the rows' sums estimates the KL divergence of its answers
    from those of q, the quantity that RLHF limits.

    Args:
        p, q: LMs with vocabularies of the same size.
        pairs: (given ids, scored ids) of N rows. If a pair exceeds the positions of the model that has fewer, tokens at
            the beginning of its first part are left out.
        batch_size: Rows per batch.
        head_chunk: See ftjax.objectives.causal.tokens_at_once.

    Returns:
        The Divergence.

    Raises:
        FtjaxError: If the vocabularies differ in size, if one part of a pair is empty, or if its scored part is longer
            than the positions.
    """
    sizes = [lm.model.config.vocab_size for lm in (p, q)]
    if sizes[0] != sizes[1]:
        raise FtjaxError(
            f"divergence: the two models' vocabularies have {sizes[0]} and {sizes[1]} tokens; expected equal sizes"
        )
    limit, examples = min(p.max_tokens, q.max_tokens), []
    for number, (given, scored) in enumerate(pairs, 1):
        if not len(given) or not 0 < len(scored) <= limit:
            raise FtjaxError(
                f"text {number}: {len(given)} context tokens and {len(scored)} tokens to score; expected at least one "
                f"of each, and at most {limit} (the model's positions) to score"
            )
        ids = np.array([*given, *scored][-(limit + 1) :], np.int32)
        examples.append(Example(ids, np.arange(len(ids)) >= len(ids) - len(scored)))

    def kl(batch):
        # The last token of the longest rows is scored but not read.
        read = {name: batch[name][:, :limit] for name in ("tokens", "positions", "segment_ids")}
        return _kl(p.model, q.model, p.variables, q.variables, batch | read, head_chunk=head_chunk)

    found = by_example(kl, examples, batch_size, limit + 1) if examples else []
    return Divergence(np.array([x.sum(dtype=np.float64) for x in found]), np.array([len(x) for x in found], int))


@functools.partial(xla.jit, static_argnums=(0, 1), static_argnames="head_chunk")
def _kl(p_model, q_model, p_variables, q_variables, batch, head_chunk):
    """(B, M) float32, at least 0."""

    def kl(logits, states):
        reference = distil.known(q_model.apply(q_variables, states, method="logits"), REVERSE)
        return jnp.maximum(distil.divergence(logits, reference, REVERSE), 0)  # rounding may make it negative

    states = causal.states(q_model, q_variables, batch)
    return causal.of_logits(kl, p_model, p_variables, batch, states, head_chunk=head_chunk)
