"""Preferences between two answers to one prompt.

B rows, T tokens, M trained tokens of a row at most, P pairs of a row at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.objectives import causal

WITH_REFERENCE = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm")  # losses that compare with the base model
LOSSES = (*WITH_REFERENCE, "orpo", "simpo", "cpo")
AVERAGED = ("ipo", "sigmoid_norm", "orpo", "simpo")  # losses of log-probabilities that are averaged over an answer


def sums(
    model,
    variables,
    batch,
    *,
    rngs=None,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    nll_weight: float = 0.0,
    head_chunk: int = 0,
):
    """Sums over the pairs of a batch.

    The reference is the model without the `adapter` collection of its variables: the base, in the same parameters.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: As in `causal.sums`. The segments of a row are, by turns, a prompt with the chosen answer and the same
            prompt with the rejected one; the labels are the tokens of the answers.
        rngs: Random keys of dropout and noise; None: no dropout. The reference has no dropout.
        loss: One of LOSSES, see `pair_loss`.
        beta: See `pair_loss`.
        label_smoothing: See `pair_loss`.
        margin: See `pair_loss`.
        nll_weight: Weight of the mean negative log-probability of the tokens of the chosen answer. For `orpo` it is 1.
        head_chunk: See `causal.tokens_at_once`.

    Returns:
        (loss sum, number of pairs, {"loss", "correct", and sums of "reward_chosen", "reward_rejected", "margin",
        "logp_chosen" and "logp_rejected"}). A reward is beta times what the loss compares. A pair is correct if the
        chosen answer has the greater reward. All float32.
    """
    weights = batch["weights"].astype(jnp.float32)
    segment = jnp.take_along_axis(batch["segment_ids"], batch["loss_index"], axis=1) - 1
    P = (weights.shape[1] + 1) // 2  # each answer has a token at least
    segment = jnp.where(weights > 0, segment, 2 * P)

    def by_answer(x):
        """(B, M) -> sums over the tokens of each answer, (B, P, 2)."""
        add = lambda row, at: jnp.zeros(2 * P, jnp.float32).at[at].add(row, mode="drop")  # noqa: E731
        return jax.vmap(add)(x, segment).reshape(len(x), P, 2)

    def scores(variables, rngs):
        found = causal.log_probs(model, variables, batch, rngs=rngs, head_chunk=head_chunk)
        total = by_answer(found * weights)
        return total, total / jnp.maximum(length, 1)

    length = by_answer(weights)
    pair = (length[..., 0] > 0).astype(jnp.float32)  # (B, P), 1 for pairs
    total, mean = scores(variables, rngs)
    compared = mean if loss in AVERAGED else total
    if loss in WITH_REFERENCE:
        reference = {name: tree for name, tree in variables.items() if name != "adapter"}
        known = jax.lax.stop_gradient(scores(reference, None))
        compared = compared - known[loss in AVERAGED]
    each = pair_loss(compared[..., 0], compared[..., 1], loss, beta, label_smoothing, margin)
    each = each - (1.0 if loss == "orpo" else nll_weight) * mean[..., 0]
    add = lambda x: jnp.sum(jnp.where(pair > 0, x, 0.0))  # noqa: E731
    reward = beta * compared
    figures = {
        "loss": add(each), "correct": add(compared[..., 0] > compared[..., 1]),
        "reward_chosen": add(reward[..., 0]), "reward_rejected": add(reward[..., 1]),
        "margin": add(reward[..., 0] - reward[..., 1]),
        "logp_chosen": add(total[..., 0]), "logp_rejected": add(total[..., 1]),
    }  # fmt: skip
    return figures["loss"], jnp.sum(pair), figures


def pair_loss(chosen, rejected, loss: str, beta: float, label_smoothing: float = 0.0, margin: float = 0.0):
    """The loss of pairs.

    With h = chosen - rejected, where log-probabilities are sums over an answer, or means for AVERAGED:

        sigmoid       -log σ(β h), with label_smoothing ε: -(1 - ε) log σ(β h) - ε log σ(-β h); DPO (Rafailov et al.
                      2023), conservative DPO (Mitchell 2023)
        sigmoid_norm  the same of means, length-normalised DPO (Lambert et al. 2024)
        robust        (-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2 ε) (Chowdhury et al. 2024)
        hinge         max(0, 1 - β h) (Zhao et al. 2023)
        ipo           (h - 1 / (2 β))² (Azar et al. 2023)
        orpo          -β log σ(log odds(chosen) - log odds(rejected)) (Hong et al. 2024)
        simpo         -log σ(β h - margin), smoothed as sigmoid (Meng et al. 2024)
        cpo           as sigmoid (Xu et al. 2024)

    Args:
        chosen: Log-probabilities of the chosen answers, less the reference's for WITH_REFERENCE; any shape.
        rejected: The same of the rejected answers.
        loss: One of LOSSES.
        beta: β.
        label_smoothing: ε, the share of pairs whose labels are taken to be wrong; below 0.5.
        margin: For simpo, by how much the reward of the chosen answer should be greater.

    Returns:
        The losses, in the same shape.
    """
    h = chosen - rejected
    if loss == "hinge":
        return jax.nn.relu(1 - beta * h)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss == "orpo":
        return -beta * jax.nn.log_sigmoid(h - (_log1mexp(chosen) - _log1mexp(rejected)))
    right, wrong = (jax.nn.log_sigmoid(sign * (beta * h - margin * (loss == "simpo"))) for sign in (1, -1))
    if loss == "robust":
        return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _log1mexp(x):
    """log(1 - exp(x)) of x <= 0 (Mächler 2012), finite at 0 as its gradient is."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
