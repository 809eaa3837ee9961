"""Generate text with a decoder: batches of prompts go through one compiled program that fills a KV cache and decodes.

B rows, P prompt slots, N new tokens at most, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ftjax import cpus, xla
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite
from ftjax.models.axes import constrain, ways
from ftjax.models.by_device import by_device
from ftjax.models.quantised import rounded
from ftjax.models.transformer import STACKS, as_prefix, make_cache, max_tokens, unstacked, virtual_tokens
from ftjax.objectives.causal import EXCLUDED

NO_TOKEN = -1  # the token of a row whose logits are not finite
APART = 64 << 20  # bytes up to which blocks are decoded one by one, from a copy: larger ones gain little
STAGE = 64  # new tokens that the cache has room for at first; doubled as answers grow


class Drawn(NamedTuple):
    """An answer of K tokens, with the distribution that each of its tokens was drawn from.

    Attributes:
        ids: The K token ids, with the end token if the answer has one.
        ended: Whether an end token ended it.
        log_probs: (K,) float32, log-probability of each token in the tempered and truncated distribution.
        kept: (K, ceil(V / 8)) uint8, the tokens of that distribution as bits, see `numpy.packbits`; V is
            `vocab_size`. Without truncation (K, 0).
    """

    ids: list[int]
    ended: bool
    log_probs: np.ndarray
    kept: np.ndarray


def generate(
    model,
    variables,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    end_tokens: tuple[int, ...] = (),
    seed: int | tuple[int, ...] = 0,
    batch_size: int = 32,
    vocab_size: int | None = None,
    weights: str = "model",
    scored: bool = False,
) -> list:
    """Continue each prompt until an end token or `max_new_tokens` tokens.

    A draw depends only on (seed, index in `prompts`, index in the answer), not on `batch_size`.

    Args:
        model: The Flax module.
        variables: The Flax variables.
        prompts: Ids of each prompt, at least one.
        max_new_tokens: Most tokens of an answer.
        temperature: 0: take the most probable token. Otherwise logits / temperature are drawn from.
        top_k: Draw from the `top_k` highest logits only; 0: off.
        top_p: Then draw from the fewest tokens that hold `top_p` of the probability only; 1: off.
        end_tokens: Ids that end an answer.
        seed: Seed of the draws, or several numbers that together are one, such as a seed and a step.
        batch_size: Most rows of a batch.
        vocab_size: Ids from this one on are never chosen, for embeddings that are larger than the tokenizer; None: no
            limit.
        weights: `model`: as they are. `bfloat16`: round float32 kernels, so that each token reads half as many bytes.
        scored: Whether to return the log-probabilities of the draws. It needs a temperature above 0.

    Returns:
        The new ids of each prompt, in the order of `prompts`, without the end token. An answer of fewer than
        `max_new_tokens` tokens ended by itself. With `scored`: a Drawn for each prompt.

    Raises:
        FtjaxError: If a setting is out of range, if a prompt is empty, or if a prompt and its answer exceed the model's
            positions less the virtual tokens.
        NotFinite: If logits are NaN or infinite.
    """
    for name, value, good, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
    ):
        if not good:
            raise FtjaxError(f"generate.{name}: expected {wanted}; found {value}")
    limit, virtual = max_tokens(model.config, variables), virtual_tokens(variables)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise FtjaxError(f"prompt {number} has no tokens; expected at least one, such as the model's BOS")
        if len(prompt) + max_new_tokens > limit:
            raise FtjaxError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
                f"model's {limit} positions. Shorten the prompt or lower max_new_tokens"
            )
        stretched = model.config.rope_scaling
        if stretched.kind == "longrope" and len(prompt) <= stretched.original_max_positions - virtual < (
            len(prompt) + max_new_tokens
        ):
            raise FtjaxError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} the text may pass "
                f"{stretched.original_max_positions} tokens, from which on the model (rope_type longrope) reads all of "
                "it with other rotary angles; the cache cannot change those. Lower max_new_tokens"
            )
    answers: list = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    settings = max_new_tokens, (temperature, top_k, top_p), tuple(end_tokens), vocab_size, scored
    first, *more = seed if isinstance(seed, tuple) else (seed,)
    pending = []
    if weights == "bfloat16":
        tied = model.config.tied and "lm_head" not in variables["params"]
        variables = variables | {"params": jax.jit(rounded, static_argnums=1)(variables["params"], tied)}
    with cpus.dealt(variables, _rows(len(prompts), batch_size), model.config.width, cpus.CACHED) as variables:
        key = functools.reduce(jax.random.fold_in, more, jax.random.key(first))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens, lengths = _left_padded([prompts[i] for i in rows], batch_size)
            index = np.zeros(len(tokens), np.int32)
            index[: len(rows)] = rows
            pending.append((rows, _decode(model, variables, tokens, lengths, index, key, *settings)))
    for rows, arrays in pending:
        for i, row, count, *scores in zip(rows, *map(np.asarray, arrays)):
            answers[i] = row[:count].tolist()
            if scored:
                K = min(count + 1, max_new_tokens)  # the end token was drawn too
                answers[i] = Drawn(row[:K].tolist(), bool(count < K), *(x[:K] for x in scores))
            if NO_TOKEN in row[:count]:
                raise NotFinite(
                    f"prompt {i + 1}: the model's logits are NaN or infinite, so no next token can be chosen. {WEIGHTS}"
                )
    return answers


def _rows(prompts: int, batch_size: int) -> int:
    """Rows of a batch for this number of prompts."""
    return min(batch_size, 1 << max(prompts - 1, 0).bit_length())


def _left_padded(prompts, batch_size):
    """Prompts as tokens (B, P) and lengths (B,). Both B and P are rounded up to few sizes, because each shape compiles
    once."""
    longest = max(map(len, prompts))
    step = max(16, (1 << longest.bit_length()) // 8)
    P = -(-longest // step) * step
    B = _rows(len(prompts), batch_size)
    tokens, lengths = np.zeros((B, P), np.int32), np.zeros(B, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, P - len(prompt) :] = prompt
        lengths[i] = len(prompt)
    return tokens, lengths


@functools.partial(xla.jit, static_argnums=(0, 6, 7, 8, 9, 10))
def _decode(model, variables, tokens, lengths, rows, key, *settings):
    """As `_decode_rows`. If the mesh splits only rows, each device runs a loop of its own."""
    mesh, f = jax.sharding.get_abstract_mesh(), functools.partial(_decode_rows, model)
    if mesh.empty or mesh.size == 1 or ways(mesh, "data") < mesh.size or len(tokens) % mesh.size:
        return f(variables, tokens, lengths, rows, key, *settings)
    each, all = PartitionSpec("data"), PartitionSpec()
    local = lambda *arrays: f(*arrays, *settings)  # noqa: E731
    found = (each,) * (4 if settings[-1] else 2)
    return by_device(local, mesh, mesh.axis_names, (all, each, each, each, all), found)(
        variables, tokens, lengths, rows, key
    )


def _decode_rows(model, variables, tokens, lengths, rows, key, N, sampling, end_tokens, vocab_size, scored):
    """Decode one batch.

    Args:
        model: The Flax module.
        variables: The Flax variables.
        tokens: (B, P) int, padded on the left.
        lengths: (B,) tokens of each prompt. A row of length 0 is padding and ends at once.
        rows: (B,) indices of the prompts in the input.
        key: Random key of the seed.
        N: Most new tokens.
        sampling: (temperature, top_k, top_p).
        end_tokens, vocab_size, scored: See `generate`.

    Returns:
        (new tokens (B, N), number of them that count (B,)), with `scored` also Drawn's log_probs (B, N) and kept
        (B, N, ceil(V / 8)).
    """
    B, P = tokens.shape
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    variables, apart = as_prefix(model, variables), _apart(variables)
    variables = unstacked(variables, model.config) if apart else variables

    def step(tokens, positions, segments, cache):
        x, cache = model.apply(variables, tokens, positions, segments, cache, method="hidden")
        return model.apply(variables, x[:, -1:], method="logits")[:, 0, :vocab_size], cache

    def emit(n, logits, new, counts, done, *scores):
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, n), *sampling)
        if scored:
            logits = truncated(logits, *sampling)
            of_token = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
            kept = jnp.packbits(logits > EXCLUDED, axis=-1) if scores[1].size else scores[1][:, 0]
            scores = tuple(x.at[:, n].set(at_n) for x, at_n in zip(scores, (of_token[:, 0], kept), strict=True))
        done = done | jnp.isin(token, jnp.array(end_tokens, jnp.int32))
        return token, new.at[:, n].set(token), counts + ~done, done, *scores

    def body(state):
        n, token, *found, cache = state
        logits, cache = step(token[:, None], (lengths + n - 1)[:, None], jnp.ones((B, 1), jnp.int32), cache)
        return (n + 1, *emit(n, logits, *found), cache)

    places = jnp.arange(P) - (P - lengths)[:, None]
    stages = [n for n in (STAGE << i for i in range(N.bit_length())) if n < N] + [N]
    cache = make_cache(model.config, B, P + stages[0], model.dtype, apart)
    logits, cache = step(tokens, jnp.maximum(places, 0), (places >= 0).astype(jnp.int32), cache)
    new, counts, scores = jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), ()
    if scored:
        cut = 0 < sampling[1] < logits.shape[-1] or sampling[2] < 1
        scores = jnp.zeros((B, N)), jnp.zeros((B, N, -(-logits.shape[-1] // 8) if cut else 0), jnp.uint8)
    # (n, the number of tokens chosen so far; last token; new; counts; done; scores; cache)
    state = (1, *emit(0, logits, new, counts, lengths == 0, *scores), cache)
    # Attention reads every slot of the cache, so the cache grows with the answers: short ones do not pay for N.
    for end in stages:
        larger = make_cache(model.config, B, P + end, model.dtype, apart)
        cache = jax.tree.map(lambda x, old: jax.lax.dynamic_update_slice(x, old, (0,) * x.ndim), larger, state[-1])
        state = jax.lax.while_loop(lambda s, end=end: (s[0] < end) & ~jnp.all(s[4]), body, (*state[:-1], cache))
    return tuple(constrain(x, *[None] * x.ndim) for x in (*state[2:4], *state[5:-1]))


def _apart(variables) -> bool:
    """Whether the stacked blocks are small enough to be decoded one by one, and are on one device."""
    stacks = [tree[name] for tree in variables.values() for name in STACKS if name in tree]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stacks))
    mesh = jax.sharding.get_abstract_mesh()
    return size <= APART and (mesh.size <= 1 or bool(mesh.manual_axes))


def choose(logits, keys, temperature: float, top_k: int, top_p: float):
    """Choose a token for each row: the most probable at temperature 0, else one draw.

    The draw is the argmax of logits plus Gumbel noise. Top-p is from Holtzman et al. 2020.

    Args:
        logits: (B, V) float32.
        keys: (B,) random keys.
        temperature, top_k, top_p: See `generate`.

    Returns:
        (B,) int32. A row whose highest logit is not finite gets NO_TOKEN.
    """
    if temperature == 0.0:
        # The first largest logit by two plain reductions: ten times as fast on a CPU as argmax.
        highest = jnp.max(logits, axis=-1, keepdims=True)
        top = logits == highest
        token = jnp.min(jnp.where(top, jnp.arange(logits.shape[-1]), logits.shape[-1] - 1), axis=-1)
        return jnp.where(jnp.isfinite(highest[:, 0]), token, NO_TOKEN).astype(jnp.int32)
    usable = jnp.isfinite(jnp.max(logits, axis=-1))
    logits = truncated(logits, temperature, top_k, top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    return jnp.where(usable, jnp.argmax(logits + noise, axis=-1), NO_TOKEN).astype(jnp.int32)


def truncated(logits, temperature: float, top_k: int, top_p: float):
    """The logits (B, V) of the distribution that tokens are drawn from: divided by the temperature, above 0, and
    EXCLUDED where top_k and top_p leave a token out; see `generate`."""
    logits = logits.astype(jnp.float32) / temperature
    V = logits.shape[-1]
    if top_k and top_k < V:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], EXCLUDED, logits)
    if top_p < 1.0:
        falling = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < top_p  # probability before the token; the first one always stays
        lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, EXCLUDED, logits)
    return logits
