"""Preferences between two answers to one prompt.

B rows, T tokens, M trained tokens of a row at most, P pairs of a row at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.errors import FtjaxError
from ftjax.objectives import causal, classify

WITH_REFERENCE = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "kto")  # losses that compare with a reference
LOSSES = (*WITH_REFERENCE, "orpo", "simpo", "cpo")
AVERAGED = ("ipo", "sigmoid_norm", "orpo", "simpo")  # losses of log-probabilities that are averaged over an answer
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "simpo", "cpo")  # losses with label smoothing


def log_probs(model, variables, batch, *, loss: str, rngs=None, head_chunk: int = 0):
    """Log-probabilities of the tokens of the answers of a batch, (B, M) float32; see `sums` for the arguments."""
    if loss == "kto":  # the labels of these batches are not tokens, see `sums`
        tokens = jnp.take_along_axis(batch["tokens"], batch["loss_index"], axis=1)
        batch = batch | {"labels": tokens, "loss_index": jnp.maximum(batch["loss_index"] - 1, 0)}
    return causal.log_probs(model, variables, batch, rngs=rngs, head_chunk=head_chunk)


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
    weights: tuple[float, float] = (1.0, 1.0),
    stored: bool = False,
    head_chunk: int = 0,
):
    """Sums over the pairs of a batch.

    The reference is the model without the `adapter` collection of its variables: the base, in the same parameters. With
    `stored`, it is the model whose log-probabilities the batch holds.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: As in `causal.sums`. The segments of a row are, by turns, a prompt with the chosen answer and the same
            prompt with the rejected one; the labels are the tokens of the answers. For `kto`, they are by turns a
            prompt with its answer and the same prompt with an answer to another one; loss_index are the places of the
            answers' tokens, and the labels are 1 for a desirable answer and 0 for another. With `stored` also
            `reference` (B, M) float32, the reference's `log_probs`.
        rngs: Random keys of dropout and noise; None: no dropout. The reference has no dropout.
        loss: One of LOSSES, see `pair_loss` and `kto_loss`.
        beta: See `pair_loss`.
        label_smoothing: See `pair_loss`.
        margin: See `pair_loss`.
        nll_weight: Weight of the mean negative log-probability of the tokens of the chosen answer. For `orpo` it is 1.
        weights: Of a desirable and of an undesirable answer in `kto_loss`.
        stored: Whether the batch holds the reference's log-probabilities.
        head_chunk: See `causal.tokens_at_once`.

    Raises:
        FtjaxError: If the model has no adapter that a reference could be without.

    Returns:
        (loss sum, number of pairs, {"loss", "correct", and sums of "reward_chosen", "reward_rejected", "margin",
        "logp_chosen" and "logp_rejected"}). A reward is beta times what the loss compares. A pair is correct if the
        chosen answer has the greater reward. For `kto` the sums are those of "kl", the reference point, of "margin",
        by which a reward is on the right side of beta times the reference point, and of "logp"; an answer is correct
        if its margin is above 0. All float32.
    """
    there = batch["weights"].astype(jnp.float32)
    places = batch["loss_index"]
    segment = jnp.take_along_axis(batch["segment_ids"], places, axis=1) - 1
    P = (there.shape[1] + 1) // 2  # each answer has a token at least
    segment = jnp.where(there > 0, segment, 2 * P)

    def by_answer(x):
        """(B, M) -> sums over the tokens of each answer, (B, P, 2)."""
        add = lambda row, at: jnp.zeros(2 * P, jnp.float32).at[at].add(row, mode="drop")  # noqa: E731
        return jax.vmap(add)(x * there, segment).reshape(len(x), P, 2)

    length = by_answer(jnp.ones_like(there))
    pair = (length[..., 0] > 0).astype(jnp.float32)  # (B, P), 1 for pairs
    add = lambda x: jnp.sum(jnp.where(pair > 0, x, 0.0))  # noqa: E731
    total = by_answer(log_probs(model, variables, batch, loss=loss, rngs=rngs, head_chunk=head_chunk))
    mean = total / jnp.maximum(length, 1)
    compared = mean if loss in AVERAGED else total
    if loss in WITH_REFERENCE and not stored and "adapter" not in variables:
        raise FtjaxError(
            f"task.loss={loss}: compares a model with the same model without its adapter, and this one has none, so it "
            "would be compared with itself; use the run or its adapter, or name the reference in task.reference"
        )
    if loss in WITH_REFERENCE:
        base = {name: tree for name, tree in variables.items() if name != "adapter"}
        known = batch["reference"] if stored else log_probs(model, base, batch, loss=loss, head_chunk=head_chunk)
        known = by_answer(jax.lax.stop_gradient(known))
        compared = compared - (known / jnp.maximum(length, 1) if loss in AVERAGED else known)
    if loss == "kto":
        good = by_answer(batch["labels"].astype(jnp.float32))[..., 0] > 0
        kl = jax.lax.stop_gradient(jnp.maximum(add(compared[..., 1]) / jnp.maximum(jnp.sum(pair), 1), 0))
        each, inside = kto_loss(compared[..., 0], good, kl, beta, weights)
        each = each - nll_weight * jnp.where(good, mean[..., 0], 0)
        figures = {
            "loss": add(each), "correct": add(inside > 0), "margin": add(inside), "logp": add(total[..., 0]),
            "kl": add(jnp.broadcast_to(kl, pair.shape)),
        }  # fmt: skip
        return figures["loss"], jnp.sum(pair), figures
    each = pair_loss(compared[..., 0], compared[..., 1], loss, beta, label_smoothing, margin)
    each = each - (1.0 if loss == "orpo" else nll_weight) * mean[..., 0]
    reward = beta * compared
    figures = {
        "loss": add(each), "correct": add(compared[..., 0] > compared[..., 1]),
        "reward_chosen": add(reward[..., 0]), "reward_rejected": add(reward[..., 1]),
        "margin": add(reward[..., 0] - reward[..., 1]),
        "logp_chosen": add(total[..., 0]), "logp_rejected": add(total[..., 1]),
    }  # fmt: skip
    return figures["loss"], jnp.sum(pair), figures


def kto_loss(ratio, good, kl, beta: float, weights: tuple[float, float] = (1.0, 1.0)):
    """The loss of single answers (Ethayarajh et al. 2024, equation 7).

    It is w (1 - σ(β (ratio - kl))) for a desirable answer and w (1 - σ(β (kl - ratio))) for another.

    Args:
        ratio: Log-probabilities of the answers less the reference's; any shape.
        good: Whether an answer is desirable; the same shape.
        kl: The reference point, (): the mean of the same ratio over answers to other prompts, at least 0. It has no
            gradient.
        beta: β.
        weights: w of desirable and of other answers.

    Returns:
        (the losses, what is inside σ), both in the same shape.
    """
    inside = jnp.where(good, 1, -1) * beta * (ratio - kl)
    return jnp.where(good, *weights) * jax.nn.sigmoid(-inside), inside


def bradley_terry(model, variables, batch, *, rngs=None):
    """Negative log-likelihood of the choices (Bradley & Terry 1952), summed over the pairs of a batch.

    It is -log σ(chosen - rejected - margin), of the scores that a head with one label gives to both texts of a pair.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: As in `classify.one_class`, with the chosen and the rejected text of a pair by turns at loss_index;
            labels (B, M) float, the margin of each text's pair.
        rngs: Random keys of dropout; None: no dropout.

    Returns:
        (loss sum, number of pairs, {"loss", "correct", and sums of "reward_chosen", "reward_rejected" and "margin",
        the difference of both}). A pair is correct if the chosen text has the greater score. All float32.
    """
    scores = classify.logits(model, variables, batch, rngs=rngs)[..., 0]
    B, even = len(scores), scores.shape[1] // 2 * 2
    chosen, rejected, margin, there = (
        x[:, :even].reshape(B, -1, 2)[..., side]
        for x, side in ((scores, 0), (scores, 1), (batch["labels"], 0), (batch["weights"].astype(jnp.float32), 1))
    )
    add = lambda x: jnp.sum(jnp.where(there > 0, x, 0.0))  # noqa: E731
    total = add(-jax.nn.log_sigmoid(chosen - rejected - margin))
    figures = {
        "loss": total, "correct": add(chosen > rejected), "reward_chosen": add(chosen),
        "reward_rejected": add(rejected), "margin": add(chosen - rejected),
    }  # fmt: skip
    return total, jnp.sum(there), figures


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
