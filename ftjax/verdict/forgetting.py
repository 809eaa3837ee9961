"""How far a tuned model has moved from its base, by KL divergence.

B rows, M scored tokens of a row at most, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import xla
from ftjax.errors import FtjaxError
from ftjax.objectives.causal import states
from ftjax.verdict.choices import Pair, batched, in_chunks


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
