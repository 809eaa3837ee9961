"""Text from a decoder: batches of prompts through one compiled program that fills a KV cache and decodes from it.

B rows, P prompt slots, N new tokens at most, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ftjax import cpus
from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation.loss import WEIGHTS
from ftjax.models.axes import constrain, ways
from ftjax.models.by_device import by_device
from ftjax.models.quantised import rounded
from ftjax.models.transformer import STACKS, as_prefix, make_cache, max_tokens, unstacked

NO_TOKEN = -1  # chosen where logits are not finite
EXCLUDED = -1e30  # finite, as a logit that is never drawn
APART = 64 << 20  # bytes of blocks up to which they are decoded one by one, from a copy: larger ones gain little by it
STAGE = 64  # new tokens that the cache has room for at first; doubled as answers grow


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
    seed: int = 0,
    batch_size: int = 32,
    vocab_size: int | None = None,
    weights: str = "model",
) -> list[list[int]]:
    """Continue each prompt until an end token or `max_new_tokens`; the new tokens only, in the order of `prompts`.

    The end token is left out, so a row of fewer than `max_new_tokens` ended by itself. Temperature 0 is greedy;
    otherwise logits / temperature are cut to the `top_k` highest (0: off), then to the fewest that hold `top_p` of the
    probability (1: off), and drawn from. A draw depends on (seed, place in `prompts`, place in the answer) alone, not
    on `batch_size`. `vocab_size`: ids from there on are never drawn (tables padded beyond the tokenizer). `weights`:
    `model`: as they are; `bfloat16`: float32 kernels are rounded to it, so that a token reads half as many bytes.

    Raises FtjaxError for a setting out of its range, an empty prompt, and a prompt that with its answer exceeds the
    model's positions, less those of virtual tokens; NotFinite for logits that are NaN or infinite.
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
    limit = max_tokens(model.config, variables)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise FtjaxError(f"prompt {number} holds no token; give at least one, such as the model's BOS")
        if len(prompt) + max_new_tokens > limit:
            raise FtjaxError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
                f"model's {limit} positions. Shorten the prompt or lower max_new_tokens"
            )
    answers: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    settings = max_new_tokens, (temperature, top_k, top_p), tuple(end_tokens), vocab_size
    key, pending = jax.random.key(seed), []
    if weights == "bfloat16":
        tied = model.config.tied and "lm_head" not in variables["params"]
        variables = variables | {"params": jax.jit(rounded, static_argnums=1)(variables["params"], tied)}
    with cpus.dealt(variables, _rows(len(prompts), batch_size), model.config.width, cpus.CACHED) as variables:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens, lengths = _left_padded([prompts[i] for i in rows], batch_size)
            index = np.zeros(len(tokens), np.int32)
            index[: len(rows)] = rows
            pending.append((rows, _decode(model, variables, tokens, lengths, index, key, *settings)))
    for rows, arrays in pending:
        for i, row, count in zip(rows, *map(np.asarray, arrays)):
            answers[i] = row[:count].tolist()
            if NO_TOKEN in answers[i]:
                raise NotFinite(
                    f"prompt {i + 1}: the model's logits are not finite (NaN or infinite), so they choose no token. "
                    f"{WEIGHTS}"
                )
    return answers


def _rows(prompts: int, batch_size: int) -> int:
    """Rows of the batch that so many prompts come in."""
    return min(batch_size, 1 << max(prompts - 1, 0).bit_length())


def _left_padded(prompts, batch_size):
    """Prompts -> tokens (B, P), lengths (B,), both padded up to one of few sizes, since each shape compiles once."""
    longest = max(map(len, prompts))
    step = max(16, (1 << longest.bit_length()) // 8)
    P = -(-longest // step) * step
    B = _rows(len(prompts), batch_size)
    tokens, lengths = np.zeros((B, P), np.int32), np.zeros(B, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, P - len(prompt) :] = prompt
        lengths[i] = len(prompt)
    return tokens, lengths


@functools.partial(cpus.jit, static_argnums=(0, 6, 7, 8, 9))
def _decode(model, variables, tokens, lengths, rows, key, *settings):
    """As `_decode_rows`; where a mesh splits nothing but rows, each device has a loop of its own."""
    mesh, f = jax.sharding.get_abstract_mesh(), functools.partial(_decode_rows, model)
    if mesh.empty or mesh.size == 1 or ways(mesh, "data") < mesh.size or len(tokens) % mesh.size:
        return f(variables, tokens, lengths, rows, key, *settings)
    each, all = PartitionSpec("data"), PartitionSpec()
    local = lambda *arrays: f(*arrays, *settings)  # noqa: E731
    return by_device(local, mesh, mesh.axis_names, (all, each, each, each, all), (each, each))(
        variables, tokens, lengths, rows, key
    )


def _decode_rows(model, variables, tokens, lengths, rows, key, N, sampling, end_tokens, vocab_size):
    """tokens (B, P) int left-padded, lengths (B,), rows (B,) their places in the input, key of the seed.

    Returns new tokens (B, N) and how many of them count (B,). A row of length 0 is filling, and ended from the start.
    """
    B, P = tokens.shape
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    variables, apart = as_prefix(model, variables), _apart(variables)
    variables = unstacked(variables, model.config) if apart else variables

    def step(tokens, positions, segments, cache):
        x, cache = model.apply(variables, tokens, positions, segments, cache, method="hidden")
        return model.apply(variables, x[:, -1:], method="logits")[:, 0, :vocab_size], cache

    def emit(n, logits, new, counts, done):
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, n), *sampling)
        done = done | jnp.isin(token, jnp.array(end_tokens, jnp.int32))
        return token, new.at[:, n].set(token), counts + ~done, done

    def body(state):
        n, token, new, counts, done, cache = state
        logits, cache = step(token[:, None], (lengths + n - 1)[:, None], jnp.ones((B, 1), jnp.int32), cache)
        return (n + 1, *emit(n, logits, new, counts, done), cache)

    places = jnp.arange(P) - (P - lengths)[:, None]
    stages = [n for n in (STAGE << i for i in range(N.bit_length())) if n < N] + [N]
    cache = make_cache(model.config, B, P + stages[0], model.dtype, apart)
    logits, cache = step(tokens, jnp.maximum(places, 0), (places >= 0).astype(jnp.int32), cache)
    # n the tokens chosen so far, the last token, new, counts, done, cache
    state = (1, *emit(0, logits, jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), lengths == 0), cache)
    # Attention reads every slot of the cache: it grows with the answers, so that short ones do not pay for N.
    for end in stages:
        larger = make_cache(model.config, B, P + end, model.dtype, apart)
        cache = jax.tree.map(lambda x, old: jax.lax.dynamic_update_slice(x, old, (0,) * x.ndim), larger, state[-1])
        state = jax.lax.while_loop(lambda s, end=end: (s[0] < end) & ~jnp.all(s[4]), body, (*state[:-1], cache))
    return constrain(state[2], None, None), constrain(state[3], None)


def _apart(variables) -> bool:
    """Whether blocks are small enough to be taken out of their stacks, and lie on one device."""
    stacks = [tree[name] for tree in variables.values() for name in STACKS if name in tree]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stacks))
    mesh = jax.sharding.get_abstract_mesh()
    return size <= APART and (mesh.size <= 1 or bool(mesh.manual_axes))


def choose(logits, keys, temperature: float, top_k: int, top_p: float):
    """logits (B, V) float32, keys (B,) -> token (B,) int32: greedy at temperature 0, else one draw a row.

    A row whose highest logit is not finite has NO_TOKEN.

    The draw is the argmax of logits plus Gumbel noise. Top-p: Holtzman et al. 2020.
    """
    if temperature == 0.0:
        # The first of the largest by two plain reductions: ten times as fast on a CPU as argmax.
        highest = jnp.max(logits, axis=-1, keepdims=True)
        top = logits == highest
        token = jnp.min(jnp.where(top, jnp.arange(logits.shape[-1]), logits.shape[-1] - 1), axis=-1)
        return jnp.where(jnp.isfinite(highest[:, 0]), token, NO_TOKEN).astype(jnp.int32)
    usable = jnp.isfinite(jnp.max(logits, axis=-1))
    logits = logits.astype(jnp.float32) / temperature
    V = logits.shape[-1]
    if top_k and top_k < V:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], EXCLUDED, logits)
    if top_p < 1.0:
        falling = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < top_p  # those before it hold less than top_p; the first always stays
        lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, EXCLUDED, logits)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys)
    return jnp.where(usable, jnp.argmax(logits + noise, axis=-1), NO_TOKEN).astype(jnp.int32)
