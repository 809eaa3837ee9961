"""The distance between the distributions of a student and of its teacher over the next token.

B rows, M trained tokens of a row at most, V vocabulary, k tokens that are kept of a teacher's distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAST = -100.0  # least log-probability of the tokens that are not kept together, so that it is finite without any


class Teacher(NamedTuple):
    """How a teacher enters the loss.

    Attributes:
        beta: See `divergence`.
        temperature: Divisor of the logits of both models.
        top_k: Number of tokens whose probabilities are kept; 0: all.
        labels: Share of the loss of the labels in the loss; the rest is the distance to the teacher.
    """

    beta: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    labels: float = 0.0


def known(logits, teacher: Teacher):
    """What is kept of a teacher's distribution.

    Args:
        logits: (B, M, V) of the teacher.
        teacher: See Teacher.

    Returns:
        (B, M, V) float32, the log-probabilities of all tokens. With top_k (B, M, 2, k + 1): the greatest k of them and
        the log-probability of all others together, then the ids of the k tokens, which float32 holds exactly, and a 0.
    """
    found = jax.nn.log_softmax(logits.astype(jnp.float32) / teacher.temperature, axis=-1)
    if not teacher.top_k:
        return found
    _, ids = jax.lax.top_k(found, min(teacher.top_k, found.shape[-1]))
    no_id = jnp.zeros((*ids.shape[:-1], 1))
    return jnp.stack([_outcomes(found, ids), jnp.concatenate([ids.astype(jnp.float32), no_id], axis=-1)], axis=-2)


def per_token(teacher: Teacher, vocab_size: int) -> tuple[int, ...]:
    """Shape of what is kept of a teacher's distribution for each token."""
    return (2, min(teacher.top_k, vocab_size) + 1) if teacher.top_k else (vocab_size,)


def divergence(logits, reference, teacher: Teacher):
    """The generalised Jensen-Shannon divergence of student q and teacher p (Agarwal et al. 2024, equation 1).

    It is KL(p | q) for beta = 0, KL(q | p) for beta = 1, and between beta KL(p | m) + (1 - beta) KL(q | m), where
    m = beta p + (1 - beta) q. If only k tokens of p are kept, all other tokens count as one outcome of both models. The
    result is then at most the divergence over the whole vocabulary.

    Args:
        logits: (B, M, V) of the student.
        reference: See `known`.
        teacher: See Teacher.

    Returns:
        (B, M) float32.
    """
    q = jax.nn.log_softmax(logits.astype(jnp.float32) / teacher.temperature, axis=-1)
    p = reference
    if teacher.top_k:
        p, q = reference[..., 0, :], _outcomes(q, reference[..., 1, :-1].astype(jnp.int32))
    kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)  # noqa: E731
    if teacher.beta in (0.0, 1.0):
        return kl(p, q) if teacher.beta == 0 else kl(q, p)
    m = jnp.logaddexp(p + jnp.log(teacher.beta), q + jnp.log1p(-teacher.beta))
    return teacher.beta * kl(p, m) + (1 - teacher.beta) * kl(q, m)


def _outcomes(log_probs, ids):
    """Of (B, M, V): those of the tokens `ids` (B, M, k), and that of all other tokens together, (B, M, k + 1)."""
    without = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(LEAST)))(log_probs, ids)
    rest = jnp.maximum(jax.nn.logsumexp(without, axis=-1, keepdims=True), LEAST)
    return jnp.concatenate([jnp.take_along_axis(log_probs, ids, axis=-1), rest], axis=-1)
