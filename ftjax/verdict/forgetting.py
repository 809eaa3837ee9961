"""How far a tuned model has moved from its base.

B rows, M scored tokens of a row at most, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.objectives.causal import states
from ftjax.verdict.choices import Pair, batched, in_chunks


class Divergence(NamedTuple):
    """Of N rows, (N,) each; the mean by token is kl.sum() / tokens.sum()."""

    kl: np.ndarray  # summed over the row's scored tokens, nats
    tokens: np.ndarray


def divergence(p, q, pairs: Sequence[Pair], batch_size: int = 16) -> Divergence:
    """KL(p || q) of what two LMs say of the next token, at each scored token of `pairs`: (ids given, ids scored).

    Exact over the vocabulary, not the estimate log p - log q of the tokens at hand. With p the tuned model and rows
    that it drew itself at temperature 1, the mean of the rows' sums estimates the KL of its answers from those of q,
    the figure that RLHF holds down. Rows are cut to the fewer of the models' positions. Raises FtjaxError for
    vocabularies that differ in size.
    """
    sizes = [lm.model.config.vocab_size for lm in (p, q)]
    if sizes[0] != sizes[1]:
        raise FtjaxError(
            f"divergence: the models' vocabularies have {sizes[0]} and {sizes[1]} tokens; expected the same"
        )
    kl, tokens = np.zeros(len(pairs)), np.zeros(len(pairs), int)
    for batch, rows in batched(pairs, min(p.max_tokens, q.max_tokens), batch_size):
        told = np.asarray(_kl(p.model, q.model, p.variables, q.variables, batch))
        for row, i, n in rows:
            kl[i], tokens[i] = told[row, :n].sum(dtype=np.float64), n
    return Divergence(kl, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kl(p_model, q_model, p_variables, q_variables, batch):
    """(B, M) float32, no less than 0."""

    def kl(p_states, q_states):
        p = jax.nn.log_softmax(p_model.apply(p_variables, p_states, method="logits"), axis=-1)
        q = jax.nn.log_softmax(q_model.apply(q_variables, q_states, method="logits"), axis=-1)
        return jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0)  # rounding may leave a little less

    return in_chunks(kl, states(p_model, p_variables, batch), states(q_model, q_variables, batch))
