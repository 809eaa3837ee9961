"""Generate text with a decoder, in two programs: `prefill` fills a KV cache with a batch of prompts, and `decode`
continues all rows by a number of tokens.

Prompts that are equal are computed once, and so are the tokens with which all prompts begin.

B rows, U different prompts among them, T tokens that are computed at once, P prompt slots, N new tokens at most, V
vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ftjax import cpus, xla
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite, check_known
from ftjax.models.axes import constrain, ways
from ftjax.models.by_device import by_device
from ftjax.models.quantised import rounded
from ftjax.models.transformer import STACKS, as_prefix, make_cache, unstacked, virtual_tokens
from ftjax.objectives.causal import EXCLUDED

NO_TOKEN = -1  # the token of a row whose logits are not finite
APART = 64 << 20  # bytes up to which blocks are decoded one by one, from a copy: larger ones gain little
STAGE = 64  # new tokens whose slots attention reads at first; doubled as answers grow
TICK = 0.05  # seconds between two pieces of an answer that is streamed, about
SLOTS = {"k": -1, "v": -2, "global_k": -1, "global_v": -2}  # arrays of a cache with an axis of slots
COLDEST = 1e-30  # least temperature above 0
SHARED = 64  # least number of common first tokens of all prompts that are computed apart from the rest


class Rules(NamedTuple):
    """How tokens are chosen, see `generate`. `sampling` is (temperature, top_k, top_p)."""

    sampling: tuple[float, int, float]
    end_tokens: tuple[int, ...]
    vocab_size: int | None
    scored: bool


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
    stream: bool = False,
) -> list | Iterator[tuple[int, list[int]]]:
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
        stream: Whether to return an iterator over the answers as they grow. Their rows are not dealt to the cores of a
            CPU.

    Returns:
        The new ids of each prompt, in the order of `prompts`, without the end token. An answer of fewer than
        `max_new_tokens` tokens ended by itself. With `scored`: a Drawn for each prompt. With `stream`: an iterator over
        (index of a prompt, the new ids that its answer has so far), for all prompts of a batch after their first token,
        after about every TICK seconds, and when the batch is finished.

    Raises:
        FtjaxError: If a setting is out of range, if a prompt is empty, or if a prompt and its answer exceed the model's
            positions less the virtual tokens.
        NotFinite: If logits are NaN or infinite.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, batch_size)
    check_known(weights, ("model", "bfloat16"), "generate.weights: unknown value")
    check_lengths(model.config, virtual_tokens(variables), prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))  # equal prompts are neighbours
    rules = Rules((temperature, top_k, top_p), tuple(end_tokens), vocab_size, scored)
    if weights == "bfloat16":
        tied = model.config.tied and "lm_head" not in variables["params"]
        variables = variables | {"params": jax.jit(rounded, static_argnums=1)(variables["params"], tied)}
    given = model, rules, prompts, order, seed, max_new_tokens, batch_size
    if stream:
        return _streamed(_batches(variables, *given, streamed=True))
    with cpus.dealt(variables, _rows(len(prompts), batch_size), model.config.width, cpus.CACHED) as variables:
        states = [(rows, (x.new, x.counts, *x.scores)) for rows, x in _batches(variables, *given)]
    answers: list = [[]] * len(prompts)
    for rows, arrays in states:
        for i, row, count, *scores in zip(rows, *map(np.asarray, arrays)):
            answers[i] = _checked(i, row[:count].tolist())
            if scored:
                K = min(count + 1, max_new_tokens)  # the end token was drawn too
                answers[i] = Drawn(row[:K].tolist(), bool(count < K), *(x[:K] for x in scores))
    return answers


def _streamed(states) -> Iterator[tuple[int, list[int]]]:
    """See `stream` of `generate`."""
    for rows, state in states:
        for i, row, count in zip(rows, np.asarray(state.new), np.asarray(state.counts)):
            yield i, _checked(i, row[:count].tolist())


def _batches(
    variables, model, rules: Rules, prompts, order, seed, max_new_tokens: int, batch_size: int, streamed: bool = False
) -> Iterator[tuple[list[int], State]]:
    """The indices of the prompts of each batch with their State when it is finished; if `streamed`, also before.

    order: indices of the prompts, one batch after another. The others: see `generate`.
    """
    first, *more = seed if isinstance(seed, tuple) else (seed,)
    key = functools.reduce(jax.random.fold_in, more, jax.random.key(first))
    # The angles of longrope depend on the length of the whole text, which a shared part does not know.
    common = 0 if model.config.rope_scaling.kind == "longrope" else _common(prompts)
    if "prompt" in variables.get("adapter", {}):
        variables = variables | {"adapter": _virtual(model, variables)}
    stages = [n for n in (STAGE << i for i in range(max_new_tokens.bit_length())) if n < max_new_tokens]
    stages += [max_new_tokens]
    shared, step = None, 1
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens, *arrays = _arranged([prompts[i] for i in rows], rows, batch_size)
        P = tokens.shape[1]
        T = max(16, 1 << max(len(prompts[rows[-1]]) - common - 1, 0).bit_length())
        if common < SHARED or 2 * T > P:
            T = P
        elif shared is None:
            shared = share(model, variables, _left_padded([prompts[0][:common]], 1), np.int32(common))
        given = variables, None if T == P else shared, tokens[:, P - T :], *arrays, key
        head = shared["segments"].shape[1] if T < P and "state" in shared else P - T
        state, n = prefill(model, rules, head, (stages[0], max_new_tokens), *given), 1
        while streamed and n < max_new_tokens and not np.all(state.done):
            yield rows, state
            room, begin = next(room for room in stages if n < room), time.perf_counter()
            until = min(n + step, room)  # so that each stage compiles once
            state, n = decode(model, rules, (room,), variables, state, key, np.int32(n), np.int32(until)), until
            jax.block_until_ready(state.done)
            step = 2 * step if time.perf_counter() - begin < TICK else max(1, step // 2)
        if n < max_new_tokens and not streamed:
            state = decode(model, rules, tuple(stages), variables, state, key, np.int32(n), np.int32(max_new_tokens))
        yield rows, state


def _checked(i: int, ids: list[int]) -> list[int]:
    """The ids of prompt i's answer. Raises NotFinite if logits were not finite."""
    if NO_TOKEN in ids:
        raise NotFinite(
            f"prompt {i + 1}: the model's logits are NaN or infinite, so no next token can be chosen. {WEIGHTS}"
        )
    return ids


# ---------------------------------------------------------------------------------------------- on the host


def check_settings(max_new_tokens: int, temperature: float, top_k: int, top_p: float, batch_size: int) -> None:
    """Raise FtjaxError for a setting of `generate` that is out of range."""
    for name, value, good, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        # Logits that are divided by less can exceed the largest float32, and then all draws are of one token.
        ("temperature", temperature, temperature == 0 or temperature >= COLDEST, f"0 (greedy), or {COLDEST:g} or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
    ):
        if not good:
            raise FtjaxError(f"generate.{name}: expected {wanted}; found {value}")


def check_lengths(shape, virtual: int, prompts: list[list[int]], new: int) -> None:
    """Raise FtjaxError for a prompt without tokens, or one that an answer cannot follow.

    Args:
        shape: The ModelConfig.
        virtual: Number of virtual tokens before a prompt.
        prompts: Ids of the prompts.
        new: Most tokens of an answer.
    """
    limit, stretched = shape.max_positions - virtual, shape.rope_scaling
    turn = stretched.original_max_positions - virtual  # of longrope: the angles change behind it
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise FtjaxError(f"prompt {number} has no tokens; expected at least one, such as the model's BOS")
        lengths = f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={new}"
        if len(prompt) + new > limit:
            raise FtjaxError(
                f"{lengths} that exceeds the model's {limit} positions. Shorten the prompt or lower max_new_tokens"
            )
        if stretched.kind == "longrope" and len(prompt) <= turn < len(prompt) + new:
            raise FtjaxError(
                f"{lengths} the text may pass {stretched.original_max_positions} tokens, from which on the model "
                "(rope_type longrope) reads all of it with other rotary angles; the cache cannot change those. Lower "
                "max_new_tokens"
            )


def _rows(prompts: int, batch_size: int) -> int:
    """Rows of a batch for this number of prompts."""
    return min(batch_size, 1 << max(prompts - 1, 0).bit_length())


def _common(prompts: list[list[int]]) -> int:
    """Number of tokens with which all prompts begin, and which none of them ends with; 0 if all are equal."""
    first, last = min(prompts, default=[]), max(prompts, default=[])
    return next((n for n, (a, b) in enumerate(zip(first[:-1], last)) if a != b), len(first) - 1) if first != last else 0


def _left_padded(prompts, rows: int) -> np.ndarray:
    """Prompts as tokens (rows, P). P is rounded up to few sizes, because each shape compiles once."""
    longest = max(map(len, prompts))
    step = max(16, (1 << longest.bit_length()) // 8)
    tokens = np.zeros((rows, -(-longest // step) * step), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[len(row) - len(prompt) :] = prompt
    return tokens


def _arranged(prompts, rows: list[int], batch_size: int):
    """A batch in which each device that gets rows of its own finds their prompts among its own.

    Args:
        prompts: Ids of the prompts.
        rows: Their indices in the input.
        batch_size: Most rows.

    Returns:
        tokens (U, P), padded on the left; lengths (U,) of the prompts; of (B,), the place of each row's prompt among
        these, or None if each row has its own; and rows (B,), -1 for rows of padding. U and B are rounded up to few
        sizes.
    """
    mesh, B = jax.sharding.get_abstract_mesh(), _rows(len(prompts), batch_size)
    parts = 1 if mesh.empty else ways(mesh, "data", "fsdp")
    if _by_rows(mesh):
        B = -(-B // parts) * parts
    own = B // parts if B % parts == 0 else B
    dealt = [[tuple(prompt) for prompt in prompts[at : at + own]] for at in range(0, B, own)]
    unlike = [list(dict.fromkeys(part)) for part in dealt]
    U = min(own, 1 << (max(map(len, unlike)) - 1).bit_length())
    of = None
    if U < own:
        places = [{prompt: j * U + k for k, prompt in enumerate(part)} for j, part in enumerate(unlike)]
        of = np.array([at[prompt] for at, part in zip(places, dealt, strict=True) for prompt in part], np.int32)
        of, dealt = np.pad(of, (0, B - len(of))), unlike
    padded = [prompt for part in dealt for prompt in (*part, *[()] * (U - len(part)))]
    lengths = np.array(list(map(len, padded)), np.int32)
    return _left_padded(padded, len(padded)), lengths, of, np.array([*rows, *[-1] * (B - len(rows))], np.int32)


# ---------------------------------------------------------------------------------------------- on the devices


def _by_rows(mesh) -> bool:
    """Whether the mesh splits only rows, so that each device runs a program of its own."""
    return not mesh.empty and mesh.size > 1 and ways(mesh, "data") == mesh.size


EACH, ALL = PartitionSpec("data"), PartitionSpec()  # each device has its own rows; or all that there is


def _on_each(f, places, out, *arrays):
    """f(*arrays), which each device computes for its own rows if the mesh splits only rows.

    Args:
        f: The function.
        places: PartitionSpecs of the arrays then.
        out: PartitionSpecs of its result.
        arrays: Trees of arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return by_device(f, mesh, mesh.axis_names, places, out)(*arrays) if _by_rows(mesh) else f(*arrays)


class State(NamedTuple):
    """Rows that are being answered, with room for M new tokens.

    Attributes:
        token: (B,) last token of each row.
        new: (B, M) new tokens.
        counts: (B,) the number of them that count.
        done: (B,) whether the answer has ended.
        lengths: (B,) tokens of the prompt.
        rows: (B,) index in the input, which the draws depend on.
        scores: Empty, or with `scored` Drawn's log_probs (B, M) and kept (B, M, ceil(V / 8)).
        cache: As in `make_cache`, for P + M slots, without the length.
    """

    token: jax.Array
    new: jax.Array
    counts: jax.Array
    done: jax.Array
    lengths: jax.Array
    rows: jax.Array
    scores: tuple[jax.Array, ...]
    cache: dict


def _places(model, variables) -> State:
    """PartitionSpecs of a State whose rows are dealt to devices."""
    layers = EACH if _apart(variables) else PartitionSpec(None, "data")
    names = jax.eval_shape(lambda: make_cache(model.config, 1, 1)).keys() - {"segments", "length"}
    return State(*[EACH] * 7, {"segments": EACH} | dict.fromkeys(names, layers))


def _settled(state: State) -> State:
    """A state whose cache is split by rows and heads, and of which every process reads all else."""
    whole = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), state._replace(cache=state.cache["segments"]))

    def split(name, x):
        return constrain(x, *[None] * (x.ndim - 4), "batch", "kv_heads" if name in SLOTS else None, None, None)

    return whole._replace(cache=_layers(split, state.cache) | {"segments": whole.cache})


@functools.partial(xla.jit, static_argnums=0)
def _virtual(model, variables):
    return as_prefix(model, variables)["adapter"]


def _apart(variables) -> bool:
    """Whether blocks are taken out of their stacks: they are small enough, and whole on each device that computes."""
    stacks = [tree[name] for tree in variables.values() for name in STACKS if name in tree]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stacks))
    mesh = jax.sharding.get_abstract_mesh()
    return size <= APART and (mesh.size <= 1 or _by_rows(mesh))


def _laid_out(model, variables) -> dict:
    """Variables as a program reads them fastest. Inside of each program: a program for this alone takes longer than
    the copy."""
    return unstacked(variables, model.config) if _apart(variables) else variables


def _forward(model, variables, tokens, places, cache):
    """The hidden state of the last token of each row (B, 1, D), and the cache with tokens (B, T) at their places (B, T)
    added. A place below 0 is padding."""
    segments = (places >= 0).astype(jnp.int32)
    x, cache = model.apply(variables, tokens, jnp.maximum(places, 0), segments, cache, method="hidden")
    return x[:, -1:], cache


def _empty(model, variables, rows: int, slots: int) -> dict:
    apart = isinstance(variables["params"]["layers"], tuple)
    return make_cache(model.config, rows, slots, model.dtype, apart)


@functools.partial(xla.jit, static_argnums=0)
def share(model, variables, tokens, count) -> dict:
    """The cache of the first `count` tokens of all prompts, which are padded on the left: tokens (1, n)."""

    def local(variables, tokens, count):
        variables = _laid_out(model, variables)
        places = jnp.arange(tokens.shape[1])[None] - (tokens.shape[1] - count)
        return _forward(model, variables, tokens, places, _empty(model, variables, *tokens.shape))[1]

    return _on_each(local, (ALL, ALL, ALL), ALL, variables, tokens, count)


@functools.partial(xla.jit, static_argnums=(0, 1, 2, 3))
def prefill(
    model, rules: Rules, head: int, rooms: tuple[int, int], variables, shared, tokens, lengths, of, rows, key
) -> State:
    """Fill a cache with the prompts of a batch, and choose the first new token of each row.

    Args:
        model: The Flax module.
        rules: How tokens are chosen.
        head: Prompt slots whose keys and values are taken from `shared`: P - T, or all its slots if it has states,
            which are known after its last token alone.
        rooms: New tokens that the prompts are computed with room for, and that the state has room for.
        variables: The Flax variables, with virtual tokens as a prefix, see `as_prefix`.
        shared: From `share`; None if `head` is 0.
        tokens: (U, T) the last T slots of the prompts, which are padded on the left.
        lengths: (U,) tokens of each prompt.
        of: (B,) index of each row's prompt; None: B is U, and each row has its own.
        rows: (B,) index of each row in the input; -1: padding, which ends at once.
        key: Random key of the seed.
    """

    def local(variables, shared, tokens, lengths, of, rows, key):
        (U, T), B = tokens.shape, len(rows)
        variables = _laid_out(model, variables)
        slots = jnp.arange(head + T)
        places = slots - (head + T - lengths)[:, None]
        cache = _empty(model, variables, U, head + T + rooms[0])
        if head:
            count, n = jnp.sum(shared["segments"] > 0), shared["segments"].shape[1]
            if "state" in shared:  # all rows begin with the whole of it, and padding comes behind it
                places = jnp.where(slots < head, slots - (n - count), jnp.where(places < count, -1, places))
            cache = _begun(cache, shared, places[:, :head], n - count)
        x, cache = _forward(model, variables, tokens, places[:, head:], cache)
        logits = model.apply(variables, x, method="logits")[:, 0, : rules.vocab_size]
        del cache["length"]
        if of is not None:
            repeated = lambda x, axis=0: jnp.take(x, of % U, axis)  # noqa: E731  a device counts its own prompts from 0
            layers = _layers(lambda _, x: repeated(x, x.ndim - 4), cache)
            cache = layers | {"segments": repeated(cache["segments"])}
            logits, lengths = repeated(logits), repeated(lengths)
        cache, room, scores = _resized(cache, head + T + rooms[1]), rooms[1], ()
        if rules.scored:
            cut = 0 < rules.sampling[1] < logits.shape[-1] or rules.sampling[2] < 1
            bits = -(-logits.shape[-1] // 8) if cut else 0
            scores = jnp.zeros((B, room)), jnp.zeros((B, room, bits), jnp.uint8)
        zeros = jnp.zeros(B, jnp.int32)
        state = State(zeros, jnp.zeros((B, room), jnp.int32), zeros, rows < 0, lengths, rows, scores, cache)
        return _emit(rules, _keys(key, rows), 0, logits, state)

    places = ALL, ALL, EACH, EACH, EACH, EACH, ALL
    given = variables, shared, tokens, lengths, of, rows, key
    return _settled(_on_each(local, places, _places(model, variables), *given))


def _layers(f, *caches: dict) -> dict:
    """f(name, array of each cache) of the arrays of layers, whose rows are their fourth axis from the end."""
    names = sorted(caches[0].keys() - {"segments", "length"})
    return {name: jax.tree.map(functools.partial(f, name), *(x[name] for x in caches)) for name in names}


def _resized(cache: dict, slots: int) -> dict:
    """A cache with so many slots: the first ones, or empty ones added behind."""

    def resized(axis, x, value=0):
        more = slots - x.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(x, 0, slots, axis=axis)
        return jnp.pad(x, [(0, more * (i == axis % x.ndim)) for i in range(x.ndim)], constant_values=value)

    layers = _layers(lambda name, x: resized(SLOTS[name], x) if name in SLOTS else x, cache)
    return layers | {"segments": resized(1, cache["segments"], -1)}


def _over(x, part):
    """An array of a cache with its first slots replaced by those of `part`."""
    return jax.lax.dynamic_update_slice(x, part, (0,) * x.ndim)


def _begun(cache: dict, shared: dict, places, padding) -> dict:
    """An empty cache with the tokens of `shared`, which come behind its `padding`, in the first slots of each row, at
    places (U, n) of the prompt."""

    def taken(name, old, x):
        if name not in SLOTS:
            return jnp.broadcast_to(x, old.shape)
        row, rows = x[..., 0, :, :, :], x.ndim - 4
        new = jax.vmap(lambda at: jnp.take(row, at, SLOTS[name], mode="clip"), out_axes=rows)(places + padding)
        return _over(old, new)

    segments = _over(cache["segments"], (places >= 0).astype(cache["segments"].dtype))
    return _layers(taken, cache, shared) | {"segments": segments, "length": jnp.int32(places.shape[1])}


@functools.partial(xla.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(model, rules: Rules, rooms: tuple[int, ...], variables, state: State, key, n, until) -> State:
    """Continue rows from n to `until` new tokens, or until all rows have ended.

    Args:
        model: The Flax module.
        rules: How tokens are chosen.
        rooms: Rising numbers of new tokens. Until there are as many, attention reads only their slots of the cache;
            the last is at least `until`.
        variables: The Flax variables, with virtual tokens as a prefix.
        state: The rows. Its memory is used for the result.
        key: Random key of the seed.
        n: () int, the number of tokens chosen so far, at least 1.
        until: () int, at most the number that the state has room for.
    """

    def local(variables, state, key, n, until):
        variables = _laid_out(model, variables)
        keys, P = _keys(key, state.rows), state.cache["segments"].shape[1] - state.new.shape[1]

        def body(carry):
            n, state = carry
            cache = state.cache | {"length": P + n - 1}
            x, cache = _forward(model, variables, state.token[:, None], (state.lengths + n - 1)[:, None], cache)
            logits = model.apply(variables, x, method="logits")[:, 0, : rules.vocab_size]
            del cache["length"]
            return n + 1, _emit(rules, keys, n, logits, state._replace(cache=cache))

        whole = state.cache
        for room in rooms:
            end = jnp.minimum(until, room)
            more = lambda carry, end=end: (carry[0] < end) & ~jnp.all(carry[1].done)  # noqa: E731
            state = state._replace(cache=_resized(whole, P + room))
            n, state = jax.lax.while_loop(more, body, (n, state))
            whole = jax.tree.map(_over, whole, state.cache)
        return state._replace(cache=whole)

    places = _places(model, variables)
    return _settled(_on_each(local, (ALL, places, ALL, ALL, ALL), places, variables, state, key, n, until))


def _keys(key, rows):
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _emit(rules: Rules, keys, n, logits, state: State) -> State:
    """The state with new token n of each row, chosen by logits (B, V)."""
    token, scores = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, n), *rules.sampling), state.scores
    if rules.scored:
        logits = truncated(logits, *rules.sampling)
        of_token = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
        kept = jnp.packbits(logits > EXCLUDED, axis=-1) if scores[1].size else scores[1][:, 0]
        scores = _put(scores[0], of_token[:, 0], n), _put(scores[1], kept, n)
    done = state.done | jnp.isin(token, jnp.array(rules.end_tokens, jnp.int32))
    return state._replace(
        token=token, new=_put(state.new, token, n), counts=state.counts + ~done, done=done, scores=scores
    )


def _put(x, column, n):
    """x (B, M, ...) with `column` (B, ...) at its place n. A scatter takes longer, to compile too."""
    return jax.lax.dynamic_update_slice_in_dim(x, column[:, None], n, 1)


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
