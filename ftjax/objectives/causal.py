"""Predict tokens from hidden states: the next token, or the one that is masked.

B rows, T tokens, M trained tokens a row at most, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ftjax.models.by_device import map_rows
from ftjax.objectives.distil import Teacher, divergence

AT_ONCE = {"cpu": 1 << 26}  # platform -> bytes of logits that are held at once; on a CPU they should fit its caches
AT_ONCE_ELSEWHERE = 1 << 30
EXCLUDED = -1e30  # the logit of a token with the probability 0; it is finite, so that gradients are


def smoothing(config) -> dict:
    """The options of `sums` in training only."""
    return {"label_smoothing": config.train.label_smoothing}


def chunk(config) -> dict:
    """The options of `sums` in training and evaluation."""
    return {"head_chunk": config.model.head_chunk}


def totals(weights, loss, correct, plain=None):
    """What the sums of an objective return.

    Args:
        weights: Weight of each position or pair, of any shape.
        loss: Its loss, in the same shape.
        correct: Whether it is correct.
        plain: The loss that is reported, such as that without smoothing; None: `loss`.

    Returns:
        (loss sum, weight sum, {"loss", "correct"}); all float32.
    """
    weights = weights.astype(jnp.float32)
    total, reported, right = (jnp.sum(x * weights) for x in (loss, loss if plain is None else plain, correct))
    return total, jnp.sum(weights), {"loss": reported, "correct": right}


def states(model, variables, batch, *, rngs=None):
    """Hidden states (B, M, D) from which the trained tokens of a batch are predicted; see `sums`."""
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids", "loss_index"))
    return model.apply(variables, *rows, batch.get("types"), rngs=rngs, method="read")


def sums(
    model,
    variables,
    batch,
    *,
    rngs=None,
    label_smoothing: float = 0.0,
    head_chunk: int = 0,
    teacher: Teacher | None = None,
):
    """Sums over the trained tokens of a batch. The caller divides once, after adding the sums of all batches and
    devices.

    Hidden states are gathered before the head, so that no logits are computed for tokens that are not trained. A device
    holds the logits of about `head_chunk` tokens at once, see `tokens_at_once`.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: tokens, positions, segment_ids (B, T) int; loss_index (B, M) int, the positions of the states that
            predict; labels (B, M) int; weights (B, M) float, 0 if a row has fewer than M; and `states` (B, M, D) if
            they are known. With a teacher `reference` (B, M, ...), see `distil.known`; and, if only some labels are
            answers of rows, `given` (B, M) float, 1 for those and 0 for others.
        rngs: Random keys of dropout and noise; None: no dropout.
        label_smoothing: Share of the target's probability that is spread over all tokens (Szegedy et al. 2016).
        head_chunk: See `tokens_at_once`.
        teacher: How the distance to a teacher's distribution enters the loss. A batch without `reference` has none, and
            its loss is that of the labels.

    Returns:
        (loss sum with label smoothing and teacher, weight sum, {"loss" of the labels without both, "correct", and with
        a teacher "divergence"}); all float32.
    """
    found = batch["states"] if "states" in batch else states(model, variables, batch, rngs=rngs)

    def piece_sums(variables, rngs, states, labels, weights, *known):
        logits = model.apply(variables, states, rngs=rngs, method="logits")
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        loss = normaliser - of_label[..., 0]
        smooth = loss
        if label_smoothing:
            uniform = normaliser - jnp.mean(logits, axis=-1)
            smooth = (1 - label_smoothing) * loss + label_smoothing * uniform
        # Whether argmax (the first of equal maxima) is the label; plain reductions are ten times as fast on a CPU.
        before = jnp.arange(logits.shape[-1]) < labels[..., None]
        correct = ~jnp.any((logits > of_label) | (before & (logits == of_label)), axis=-1)
        correct &= jnp.isfinite(loss)  # nothing is larger than NaN
        if not known:
            return jnp.stack([jnp.sum(x * weights) for x in (smooth, loss, correct)])
        share, reference = known
        far = divergence(logits, reference, teacher)
        smooth = share * smooth + (1 - share) * far
        return jnp.stack([jnp.sum(jnp.where(weights > 0, x, 0) * weights) for x in (smooth, loss, correct, far)])

    weights, known = batch["weights"].astype(jnp.float32), ()
    if teacher and "reference" in batch:
        share = teacher.labels * batch.get("given", jnp.ones_like(weights))
        known = share, batch["reference"]
    tokens = tokens_at_once(head_chunk, model.config.vocab_size, model.kernels.platform)
    all_sums = functools.partial(_sum_pieces, piece_sums, tokens)
    arrays = found, batch["labels"], weights, *known
    total = map_rows(all_sums, head_variables(variables), arrays, rngs, summed=True)
    figures = {"loss": total[1], "correct": total[2]} | ({"divergence": total[3]} if known else {})
    return total[0], jnp.sum(weights), figures


def log_probs(model, variables, batch, *, rngs=None, head_chunk: int = 0, temperature: float = 1.0):
    """Log-probabilities of the labels of a batch, for losses that are not their weighted sum.

    The logits of about `head_chunk` tokens are held at once, and computed again in the backward pass.

    Args:
        model: The Flax module.
        variables: The Flax variables that it is applied to.
        batch: See `sums`; its weights are not used. It may have `kept` (B, M, n) uint8: the tokens that can be drawn
            as bits, see `numpy.packbits`; the others have the probability 0.
        rngs: Random keys of dropout and noise; None: no dropout.
        head_chunk: See `tokens_at_once`.
        temperature: Divisor of the logits.

    Returns:
        (B, M) float32.
    """

    def piece(logits, labels, *kept):
        logits, V = logits / temperature, logits.shape[-1]
        for bits in kept:
            inside = jnp.unpackbits(bits, axis=-1)[..., :V].astype(bool)
            inside = jnp.pad(inside, ((0, 0), (0, 0), (0, V - inside.shape[-1])))
            logits = jnp.where(inside, logits, EXCLUDED)
        of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return of_label - jax.nn.logsumexp(logits, axis=-1)

    kept = [batch["kept"]] if "kept" in batch else []
    return of_logits(piece, model, variables, batch, batch["labels"], *kept, rngs=rngs, head_chunk=head_chunk)


def of_logits(f, model, variables, batch, *arrays, rngs=None, head_chunk: int = 0):
    """f(logits (B, m, V), *pieces of `arrays` (B, M, ...)) of the trained tokens of a batch, (B, M, ...).

    The logits of about `head_chunk` tokens are held at once, and computed again in the backward pass; see `log_probs`
    for the other arguments.
    """
    found = batch["states"] if "states" in batch else states(model, variables, batch, rngs=rngs)
    tokens = tokens_at_once(head_chunk, model.config.vocab_size, model.kernels.platform)

    def of_pieces(variables, arrays, rngs):
        @jax.checkpoint
        def piece(variables, states, *rest):
            return f(model.apply(variables, states, rngs=rngs, method="logits"), *rest)

        return _over_pieces(lambda carry, part: (carry, piece(variables, *part)), None, arrays, tokens)[1]

    return map_rows(of_pieces, head_variables(variables), (found, *arrays), rngs)


def tokens_at_once(head_chunk: int, vocab_size: int, platform: str) -> int:
    """Number of tokens whose logits a device holds at once, at least one of each of its rows.

    It is `model.head_chunk`, or as many tokens as fill a fixed number of bytes for the platform (cpu, gpu, tpu), so
    that a larger vocabulary takes no more memory.
    """
    return head_chunk or max(1, AT_ONCE.get(platform, AT_ONCE_ELSEWHERE) // (4 * vocab_size))


def head_variables(variables: dict) -> dict:
    """The part of a model's variables that its logits are computed from."""
    tied = "lm_head" not in variables["params"]
    names = ("embed" if tied else "lm_head", "head")
    return {kind: {name: tree[name] for name in names if name in tree} for kind, tree in variables.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_pieces(f, tokens, variables, arrays, rngs):
    """The sum of f(variables, rngs, *pieces) (n,) over pieces of about `tokens` tokens of `arrays` (B, M, ...).

    Only f's first sum has a gradient. It is computed piece by piece in the forward pass, so that no logits are kept for
    the backward pass or computed twice (Hsu et al. 2024).
    """
    add = lambda total, piece: (total + f(variables, rngs, *piece), None)  # noqa: E731
    return _over_pieces(add, _no_sums(arrays), arrays, tokens)[0]


def _no_sums(arrays) -> jax.Array:
    """Sums of nothing, as many as `sums` takes: with a teacher there are more arrays and one sum more."""
    return jnp.zeros(3 if len(arrays) == 3 else 4)


def _sum_pieces_fwd(f, tokens, variables, arrays, rngs):
    # No product is computed for inputs without a gradient, such as a frozen head or known states.
    leaves, tree = jax.tree.flatten((variables, arrays[0]), is_leaf=_is_primal)
    *learned, of_states = (leaf.perturbed for leaf in leaves)
    *values, states = (leaf.value for leaf in leaves)
    *labels_and_weights, rngs = jax.tree.map(lambda leaf: leaf.value, (*arrays[1:], rngs), is_leaf=_is_primal)
    params = [x for x, wanted in zip(values, learned, strict=True) if wanted]

    def add(carry, piece):
        total, grads = carry
        states, *rest = piece

        def sums(params, read):
            given = iter(params)
            merged = [next(given) if wanted else x for x, wanted in zip(values, learned, strict=True)]
            variables, states_read = jax.tree.unflatten(tree, [*merged, *(read or [states])])
            return f(variables, rngs, states_read, *rest)

        value, back = jax.vjp(sums, params, [states] if of_states else [])
        of_params, of_read = back(jnp.zeros_like(value).at[0].set(1.0))
        grads = [g + d.astype(jnp.float32) for g, d in zip(grads, of_params, strict=True)]
        return (total + value, grads), of_read

    start = _no_sums(arrays), [jnp.zeros(x.shape, jnp.float32) for x in params]
    (total, grads), of_read = _over_pieces(add, start, (states, *labels_and_weights), tokens)
    found = iter([g.astype(x.dtype) for g, x in zip(grads, params, strict=True)])
    of_values = [next(found) if wanted else None for wanted in learned]
    return total, (jax.tree.unflatten(tree, [*of_values, *(of_read or [None])]), (None,) * len(labels_and_weights))


def _sum_pieces_bwd(f, tokens, saved, g):
    (variables, states), rest = jax.tree.map(lambda x: (g[0] * x.astype(jnp.float32)).astype(x.dtype), saved)
    return variables, (states, *rest), None


_sum_pieces.defvjp(_sum_pieces_fwd, _sum_pieces_bwd, symbolic_zeros=True)


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _over_pieces(f, carry, arrays, tokens):
    """jax.lax.scan of f over pieces of axis 1 of `arrays` (B, M, ...), the last piece padded with zeros.

    f's outputs for the pieces are joined to one array (B, M, ...), or are None.
    """
    B, M = arrays[0].shape[:2]
    size = max(1, tokens // B)
    if M <= size:
        return f(carry, arrays)
    pieces = -(-M // size)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * size - M)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], pieces * size, *x.shape[3:])[:, :M]

    carry, found = jax.lax.scan(f, carry, tuple(map(cut, arrays)))
    return carry, jax.tree.map(join, found)
