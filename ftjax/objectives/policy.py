"""Policy gradients: answers that the model wrote become more or less probable by their rewards.

B rows, T tokens, M trained tokens of a row at most, R answers, G answers to a prompt, K tokens of an answer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.objectives import causal

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp")
KL_IN_REWARD = ("rloo", "reinforce_pp")  # losses whose rewards are lowered by the distance from the base
FIGURE = "figure."  # the beginning of the name of a batch's array whose mean is reported
EPS = 1e-4  # added to standard deviations, as TRL does


def sums(
    model,
    variables,
    batch,
    *,
    rngs=None,
    loss: str = "grpo",
    clip: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    head_chunk: int = 0,
):
    """Sums over the answers of a batch.

    A token's loss is -min(ρ A, clip(ρ, 1 - clip, 1 + clip_high) A), where A is its advantage and ρ the ratio of its
    probability to that when the answers were drawn (Schulman et al. 2017). For `gspo` ρ is the geometric mean over an
    answer (Zheng et al. 2025), for `rloo` the product. Unless the loss is of KL_IN_REWARD, beta times
    exp(d) - d - 1 is added, where d is the log-probability of the reference less that of the model.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: As in `causal.sums`, with further arrays (B, M) float32. An answer is a segment. The trained tokens are
            those that the model drew, and their `weights` are 1 / K, so that those of an answer add up to 1. `shares`:
            the weight of each token's loss, see `shares`. `advantages`: A. `sampled`: log-probabilities by the sampler.
            If the answers are used for several updates, `old`: log-probabilities before the first of them, and `fresh`:
            1 in the first update, 0 in the others. With beta: `reference`, log-probabilities of the reference. With
            truncated sampling `kept`, see `causal.log_probs`. Arrays whose name begins with FIGURE hold a number of
            each answer, whose mean is reported.
        rngs: Random keys of dropout and noise; None: no dropout.
        loss: One of LOSSES.
        clip: How far below 1 a ratio still counts.
        clip_high: How far above 1 a ratio still counts.
        beta: Weight of the distance from the reference.
        temperature: Temperature of the draws.
        head_chunk: See `causal.tokens_at_once`.

    Returns:
        (loss sum, number of answers, sums over the answers: "loss"; the means over an answer's tokens of "ratio", ρ,
        "clipped", whether the clipped value counts, "entropy", the negative log-probability, "gap", the difference
        between the log-probabilities of sampler and trainer, and with a reference "kl"; "length" in tokens; figures).
        All float32.
    """
    weights = batch["weights"].astype(jnp.float32)
    drawn = weights > 0
    found = causal.log_probs(model, variables, batch, rngs=rngs, head_chunk=head_chunk, temperature=temperature)
    found = jnp.where(drawn, found, 0.0)
    old = jax.lax.stop_gradient(found)  # in the first update the ratio is 1, and only its gradient counts
    if "old" in batch:
        old = jnp.where(batch["fresh"] > 0, old, batch["old"])
    log_ratio = jnp.where(drawn, found - old, 0.0)
    segment = jnp.where(drawn, jnp.take_along_axis(batch["segment_ids"], batch["loss_index"], axis=1), 0)
    first = drawn & (segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1])
    if loss in ("gspo", "rloo"):
        log_ratio = _over_answers(log_ratio * (weights if loss == "gspo" else 1.0), segment)
    ratio, advantages = jnp.exp(log_ratio), batch["advantages"]
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip_high) * advantages
    each = -jnp.minimum(ratio * advantages, clipped)
    means = {"ratio": ratio - 1, "clipped": clipped < ratio * advantages, "entropy": -found}
    means["gap"] = jnp.abs(old - batch["sampled"])
    if "reference" in batch:
        d = jnp.where(drawn, batch["reference"] - found, 0.0)
        means["kl"] = jnp.exp(d) - d - 1
        if loss not in KL_IN_REWARD:
            each = each + beta * means["kl"]
    total = jnp.sum(jnp.where(drawn, each * batch["shares"], 0.0))
    figures = {name: jnp.sum(x * weights) for name, x in means.items()}
    answers = jnp.sum(first.astype(jnp.float32))  # exact, as the sum of the weights is not
    figures["ratio"] = answers + figures["ratio"]
    figures["length"] = jnp.sum(drawn.astype(jnp.float32))
    for name, x in batch.items():
        figures |= {name.removeprefix(FIGURE): jnp.sum(x * first)} if name.startswith(FIGURE) else {}
    return total, answers, {"loss": total, **figures}


def _over_answers(x, segment):
    """The sum of x (B, M) over the tokens of each segment (B, M), at each of its tokens; segment 0 is padding."""
    M = x.shape[1]  # a segment has a token at least, so that there are M at most
    add = lambda row, at: jnp.zeros(M + 1, jnp.float32).at[at].add(row)[at]  # noqa: E731
    return jax.vmap(add)(x, segment)


def shares(lengths: np.ndarray, loss: str, longest: int) -> np.ndarray:
    """The weight of the loss of each token of an answer (R,), where the sum over a step's tokens is divided by R.

        grpo, gspo, rloo    1 / K: a mean over the tokens of each answer, then over answers
        dr_grpo             1 / longest, so that the tokens of long answers do not weigh less (Liu et al. 2025)
        dapo, reinforce_pp  R / the number of all tokens: a mean over tokens (Yu et al. 2025)

    Args:
        lengths: (R,) K, the drawn tokens of each answer of a step.
        loss: One of LOSSES.
        longest: Most tokens of an answer.
    """
    if loss == "dr_grpo":
        return np.full(len(lengths), 1 / longest)
    if loss in ("dapo", "reinforce_pp"):
        return np.full(len(lengths), len(lengths) / lengths.sum())
    return 1 / lengths


def advantages(rewards: np.ndarray, loss: str, group: int, beta: float = 0.0, distance=None) -> list[np.ndarray]:
    """The advantage of each token of the answers of a step.

        grpo, dapo, gspo  (reward - mean of the group) / (standard deviation of the group + EPS) (Shao et al. 2024)
        dr_grpo           reward - mean of the group
        rloo              reward - mean of the other answers of the group (Ahmadian et al. 2024)
        reinforce_pp      the reward, normalised by mean and standard deviation over all tokens (Hu 2025)

    Where `distance` is given, rloo subtracts beta times its sum over the answer from the reward, and reinforce_pp beta
    times its sum over the token and those after it.

    Args:
        rewards: (R,) those of a group one after another.
        loss: One of LOSSES.
        group: G.
        beta: Weight of the distance from the reference.
        distance: For each answer (K,), the log-probability of its tokens less that by the reference. It also gives the
            number of tokens.

    Returns:
        For each answer (K,) float64.
    """
    R = rewards.astype(np.float64)
    if loss == "reinforce_pp":
        returns = [r - beta * np.cumsum(d[::-1])[::-1] for r, d in zip(R, distance, strict=True)]
        every = np.concatenate(returns)
        spread = every.std(ddof=1) if len(every) > 1 else 0.0
        return [(x - every.mean()) / (spread + EPS) for x in returns]
    if loss == "rloo":
        R = R - beta * np.array([d.sum() for d in distance])
    grouped = R.reshape(-1, group)
    mean = grouped.mean(1, keepdims=True)
    A = grouped - mean
    if loss == "rloo":
        A = A * group / (group - 1)  # the same as less the mean of the others
    elif loss != "dr_grpo":
        A = A / (grouped.std(1, ddof=1, keepdims=True) + EPS)
    return [np.full(len(d), a) for a, d in zip(A.ravel(), distance, strict=True)]
