"""The decoder against transformers: every family, in rows that are plain, padded, packed or continued from a cache.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import linen as nn

from ftjax.models import attention, layers, transformer
from ftjax.models.config import layers_with, runs
from ftjax.models.transformer import ACTIVATIONS, Transformer, make_cache, unstacked
from ftjax.tree import flatten, unflatten

T = 20  # more than the windows of the tiny models, fewer than their positions
LENGTHS = (20, 13, 1)
ALL = pytest.mark.parametrize("name", tiny.VARIANTS)
SOME = pytest.mark.parametrize("name", ["gpt2", "llama-biases", "mistral", "qwen2-window", "qwen3"])


@functools.cache
def jitted(model):
    return tiny.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def ours(pair, *inputs):
    """Logits (B, T, V) of tokens, positions and segments (B, T), computed as len(LENGTHS) rows: one compilation."""
    rows = len(inputs[0])
    inputs = (jnp.asarray(np.pad(x, [(0, len(LENGTHS) - rows), (0, 0)]), jnp.int32) for x in inputs)
    return np.asarray(jitted(pair.model)(pair.params, *inputs))[:rows]


def assert_same(got, want):
    """Both (N, V), at real tokens."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def padded(side):
    """Rows of LENGTHS padded on one side: ids and mask, (B, T)."""
    ids, mask = np.zeros((len(LENGTHS), T), int), np.zeros((len(LENGTHS), T), int)
    for row, (doc, n) in enumerate(zip(tiny.documents(LENGTHS), LENGTHS, strict=True)):
        place = slice(0, n) if side == "right" else slice(T - n, T)
        ids[row, place], mask[row, place] = doc, 1
    return ids, mask


def packed(docs):
    """One row (1, T) of several documents and padding: ids, positions, segments."""
    ids, positions, segments = (np.zeros((1, T), int) for _ in range(3))
    at = 0
    for segment, doc in enumerate(docs):
        place = slice(at, at + len(doc))
        ids[0, place], positions[0, place], segments[0, place] = doc, np.arange(len(doc)), segment + 1
        at += len(doc)
    return ids, positions, segments


def plain():
    return np.stack(tiny.documents((T, T)))


@ALL
def test_plain_rows(name):
    pair = tiny.pair(name)
    got = ours(pair, plain(), np.tile(np.arange(T), (2, 1)), np.ones((2, T), int))
    assert got.shape == (2, T, pair.model.config.vocab_size) and got.dtype == np.float32
    want = tiny.torch_logits(pair.torch, plain())
    for row in range(2):
        assert_same(got[row], want[row])


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_positions_and_segments_may_be_left_out(name):
    pair = tiny.pair(name)
    got = np.asarray(tiny.jit(lambda params: pair.model.apply({"params": params}, jnp.asarray(plain())))(pair.params))
    np.testing.assert_allclose(got, tiny.torch_logits(pair.torch, plain()), rtol=0, atol=1e-4)


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(name, side):
    pair = tiny.pair(name)
    ids, mask = padded(side)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    # What transformers' own `generate` makes of a mask.
    theirs = np.where(mask == 0, 1, mask.cumsum(1) - 1)
    want = tiny.torch_logits(pair.torch, ids, attention_mask=mask, position_ids=theirs)
    got = ours(pair, ids, positions, mask)
    assert np.isfinite(got).all()  # padding too: it must not poison a gradient
    assert_same(got[mask == 1], want[mask == 1])


@ALL
@pytest.mark.parametrize("lengths", [(9, 8), (4, 7, 9)])
def test_packed_documents_are_as_if_alone(name, lengths):
    pair = tiny.pair(name)
    docs = tiny.documents(lengths)
    got = ours(pair, *packed(docs))[0]
    for segment, doc in enumerate(docs):
        at = sum(lengths[:segment])
        assert_same(got[at : at + len(doc)], tiny.torch_logits(pair.torch, doc[None])[0])


@ALL
def test_packed_documents_do_not_leak(name):
    pair = tiny.pair(name)
    ids, positions, segments = packed(tiny.documents((4, 7, 8)))
    before = ours(pair, ids, positions, segments)[0]
    for segment in range(4):  # 0: the padding
        changed = np.where(segments == segment, (ids + 1) % 50, ids)
        after = ours(pair, changed, positions, segments)[0]
        same = segments[0] != segment
        np.testing.assert_array_equal(after[same], before[same])
        assert np.abs(after - before)[~same].max() > 1e-3


@pytest.mark.parametrize("apart", [False, True])
@SOME
def test_cache_token_by_token(name, apart):
    """A left-padded prompt in one piece, then one token after another, equals transformers' whole rows; also block by
    block."""
    pair = tiny.pair(name)
    ids, mask = padded("left")
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    want = tiny.torch_logits(
        pair.torch, ids, attention_mask=mask, position_ids=np.where(mask == 0, 1, mask.cumsum(1) - 1)
    )

    @tiny.jit
    def forward(cache, *inputs):
        return pair.model.apply(variables, *inputs, cache)

    variables = {"params": pair.params}
    variables = unstacked(variables, pair.model.config) if apart else variables
    cache, got = make_cache(pair.model.config, len(ids), T + 3, apart=apart), []
    for start, stop in [(0, 6)] + [(t, t + 1) for t in range(6, T)]:
        piece = (jnp.asarray(x[:, start:stop], jnp.int32) for x in (ids, positions, mask))
        logits, cache = forward(cache, *piece)
        got.append(np.asarray(logits))
    assert int(cache["length"]) == T
    assert_same(np.concatenate(got, axis=1)[mask == 1], want[mask == 1])


def loss_and_gradient(model, params):
    @tiny.jit
    def run(params):
        def loss(params):
            return jnp.mean(jax.nn.logsumexp(model.apply({"params": params}, jnp.asarray(plain())), axis=-1) ** 2)

        return jax.value_and_grad(loss)(params)

    value, gradient = run(params)
    return float(value), flatten(gradient)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("gpt2", [{"remat": "full"}]),
        ("mistral", [{"unroll": 0}, {"remat": "full", "unroll": 2}]),
    ],
)
def test_unrolled_and_rematerialised_layers_change_nothing(name, choices):
    pair = tiny.pair(name)
    value, gradient = loss_and_gradient(pair.model, pair.params)
    for options in choices:
        other_value, other = loss_and_gradient(Transformer(pair.model.config, **options), pair.params)
        assert other_value == pytest.approx(value, rel=1e-6)
        for path, g in gradient.items():
            np.testing.assert_allclose(other[path], g, rtol=0, atol=1e-5 * np.abs(g).max(), err_msg=f"{options} {path}")


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_bfloat16_compute_is_close(name):
    pair = tiny.pair(name)
    ids = jnp.asarray(plain())
    want = tiny.torch_logits(pair.torch, plain())
    half = Transformer(pair.model.config, jnp.bfloat16)
    got = np.asarray(tiny.jit(lambda params: half.apply({"params": params}, ids))(pair.params))
    assert got.dtype == np.float32
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 1e-5 < error < 0.03  # eight bits of mantissa: really computed in bfloat16, and no worse than that


def test_dropout_needs_a_key():
    pair = tiny.pair("gpt2")
    ids = jnp.asarray(plain())
    model = Transformer(pair.model.config, dropout=0.3)

    @tiny.jit
    def run(rngs):
        return model.apply({"params": pair.params}, ids, rngs=rngs)

    base = np.asarray(tiny.jit(lambda: pair.model.apply({"params": pair.params}, ids))())
    first, again, other = (np.asarray(run({"dropout": jax.random.key(seed)})) for seed in (0, 0, 1))
    np.testing.assert_array_equal(run({}), base)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - base).max() > 0.1 and np.abs(first - other).max() > 0.1


def test_dropout_keeps_the_mean():
    class Drop(nn.Module):
        def __call__(self, x):
            return layers.dropout(self, x, 0.3)

    x = jnp.full((100, 1000), 2.0)
    y = np.asarray(Drop().apply({}, x, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_allclose(y[y != 0], 2.0 / 0.7, rtol=1e-6)
    assert np.mean(y == 0) == pytest.approx(0.3, abs=0.006)  # four standard deviations


def test_without_adapters_the_model_is_the_base():
    pair = tiny.tuned(tiny.pair("llama-biases"), method="lora")
    ids = jnp.asarray(plain())
    apply = tiny.jit(lambda variables: pair.model.apply(variables, ids))
    base = np.asarray(apply({"params": pair.params}))
    np.testing.assert_array_equal(apply({"params": pair.params, "adapter": {}}), base)

    method, trained, frozen = tiny.start(pair)
    np.testing.assert_array_equal(apply(method.variables(trained, frozen, pair.spec)), base)  # B is zero
    moved = jax.tree.map(lambda x: x + 0.05, trained)
    assert np.abs(np.asarray(apply(method.variables(moved, frozen, pair.spec))) - base).max() > 0.1


def test_initial_parameters_have_the_shapes_of_the_files():
    for name in tiny.VARIANTS:
        pair = tiny.pair(name)
        made = jax.eval_shape(pair.model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        shapes = {path: x.shape for path, x in flatten(made).items()}
        assert shapes == {path: x.shape for path, x in flatten(pair.params).items()}, name


@pytest.mark.parametrize("name", ["gpt2", "qwen2-window"])
def test_parameters_in_two_stacks_are_the_same_model(name):
    """With a cache too: keys and values lie where their layers are, whichever stack these come from."""
    pair = tiny.pair(name)
    ids = jnp.asarray(np.stack(tiny.documents((12, 12))))
    apply = tiny.jit(lambda params: pair.model.apply({"params": params}, ids))
    cached = tiny.jit(
        lambda params: pair.model.apply({"params": params}, ids, cache=make_cache(pair.model.config, 2, 16))
    )
    (logits, cache), plain = cached(pair.params), apply(pair.params)
    for lower in (1, 2):
        stacks = {"layers": (0, lower), "top_layers": (lower, 3)}
        split = pair.params | {
            name: jax.tree.map(lambda x, b=bounds: x[slice(*b)], pair.params["layers"])
            for name, bounds in stacks.items()
        }
        np.testing.assert_allclose(apply(split), plain, rtol=0, atol=1e-6)
        for ours, whole in zip(jax.tree.leaves(cached(split)), jax.tree.leaves((logits, cache)), strict=True):
            np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-6)
        blocks, all_blocks = (unstacked({"params": p}, pair.model.config) for p in (split, pair.params))
        jax.tree.map(np.testing.assert_array_equal, blocks, all_blocks)


@pytest.mark.parametrize("kinds", ["aabaab", "abbbaa"])
def test_blocks_of_several_kinds_are_one_model(kinds):
    """The kinds differ in the name of a sublayer alone, so the model is that of one kind, gradients included."""
    pair = tiny.pair("qwen2-window")
    twice = pair.params | {"layers": jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), pair.params["layers"])}
    shape = dataclasses.replace(pair.model.config, layers=6, windows=pair.model.config.windows * 2)
    plain = pair.model.clone(config=shape)
    mixed = plain.clone(
        config=dataclasses.replace(shape, parts=tuple(("attn", {"a": "mlp", "b": "b"}[k]) for k in kinds))
    )
    at = {name: np.array([i for i, k in enumerate(kinds) if k == name]) for name in "ab"}

    def of_kinds(layers):
        rest = {name: x for name, x in layers.items() if name != "mlp"}
        return rest | {
            part: jax.tree.map(lambda x, k=k: x[at[k]], layers["mlp"]) for part, k in (("mlp", "a"), ("b", "b"))
        }

    params = twice | {"layers": of_kinds(twice["layers"])}
    value, want = loss_and_gradient(plain, twice)
    for model in (mixed, mixed.clone(remat="full", unroll=0)):
        same, got = loss_and_gradient(model, params)
        assert same == pytest.approx(value, rel=1e-6)
        for path, g in flatten(unflatten(want) | {"layers": of_kinds(unflatten(want)["layers"])}).items():
            np.testing.assert_allclose(got[path], g, rtol=0, atol=1e-5, err_msg=path)

    def split(part, tree, lower):
        n = sum(layer < lower for layer in layers_with(mixed.config, part))
        return jax.tree.map(lambda x: x[:n], tree), jax.tree.map(lambda x: x[n:], tree)

    halves = {part: split(part, tree, 2) for part, tree in params["layers"].items()}
    names = {"layers": 0, "top_layers": 1}
    stacks = params | {name: {part: tree[i] for part, tree in halves.items()} for name, i in names.items()}
    assert loss_and_gradient(mixed, stacks)[0] == pytest.approx(value, rel=1e-6)

    ids = jnp.asarray(np.stack(tiny.documents((12, 12))))
    cache = make_cache(shape, 2, 16, apart=True)
    logits, _ = mixed.apply(unstacked({"params": stacks}, mixed.config), ids, cache=cache)
    np.testing.assert_allclose(logits, tiny.jit(plain.apply)({"params": twice}, ids), rtol=0, atol=1e-5)


def test_runs_compile_the_fewest_blocks():
    assert runs(tuple("aaab" * 8)) == ((0, 4, 8),)
    assert runs(tuple("baaaaa")) == ((0, 1, 1), (1, 1, 5))
    assert runs(tuple("aaabaab")) == ((0, 1, 1), (1, 3, 2))
    assert runs(tuple("abc")) == ((0, 3, 1),)


def test_a_head_beside_tied_embeddings_is_the_head():
    pair = tiny.pair("llama-tied")
    ids = jnp.asarray(np.stack(tiny.documents((12, 12))))
    apply = tiny.jit(lambda params: pair.model.apply({"params": params}, ids))
    table = pair.params["embed"]["embedding"]
    np.testing.assert_allclose(
        apply(pair.params | {"lm_head": {"kernel": table}}), apply(pair.params), rtol=0, atol=1e-6
    )
    doubled = apply(pair.params | {"lm_head": {"kernel": 2 * table}})
    np.testing.assert_allclose(doubled, 2 * apply(pair.params), rtol=0, atol=1e-5)


def test_noise_on_embeddings_is_that_of_transformers(monkeypatch):
    """NEFTune through transformers' own hook: the same uniform draws give the same logits."""
    neftune = pytest.importorskip("transformers.integrations.neftune", reason="needs the hook of Transformers 5")
    pair, alpha = tiny.pair("gpt2"), 5.0
    ids = np.stack(tiny.documents((9, 9)))
    u = np.random.default_rng(0).uniform(size=(2, 9, 16)).astype(np.float32)
    monkeypatch.setattr(layers.jax.random, "uniform", lambda key, shape, minval, maxval: minval + (maxval - minval) * u)
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, low, high: self.copy_(torch.tensor(float(low) + float(high - low) * u))
    )
    ours = pair.model.clone(neftune=alpha).apply({"params": pair.params}, ids, rngs={"noise": jax.random.key(0)})
    theirs = copy.deepcopy(pair.torch)
    for dropout in (m for m in theirs.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    table = theirs.train().get_input_embeddings()
    table.neftune_noise_alpha = alpha
    table.register_forward_hook(neftune.neftune_post_forward_hook)
    want = tiny.torch_logits(theirs, ids)
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-4)
    assert np.abs(want - tiny.torch_logits(pair.torch, ids)).max() > 1e-2


def test_noise_goes_by_the_tokens_of_each_segment_and_needs_a_key():
    """Within alpha / sqrt(tokens of its own document · D), however rows are packed and padded; never in evaluation."""
    pair, alpha = tiny.pair("llama2"), 8.0
    docs = tiny.documents((3, 9, 12))
    batch = tiny.batch([docs[:2], docs[2:]], [[1, 1], [1]], 16)
    model, D = pair.model.clone(neftune=alpha), 16

    @tiny.jit
    def noise(key):
        x = jnp.zeros((2, 16, D))
        return model.apply({}, x, batch["segment_ids"], method=add, rngs={"noise": key})

    add = lambda module, x, segments: layers.neftune(module, x, alpha, segments)  # noqa: E731
    drawn = np.abs(np.stack([noise(jax.random.key(seed)) for seed in range(20)]))
    for row, start, T in ((0, 0, 3), (0, 3, 9), (1, 0, 12)):
        part, bound = drawn[:, row, start : start + T], alpha / (T * D) ** 0.5
        assert 0.98 * bound < part.max() <= bound and abs(part.mean() - bound / 2) < 0.05 * bound
    apply = tiny.jit(lambda rngs: model.apply({"params": pair.params}, batch["tokens"], rngs=rngs))
    plain = tiny.jit(lambda: pair.model.apply({"params": pair.params}, batch["tokens"]))()
    np.testing.assert_array_equal(apply({}), plain)
    np.testing.assert_array_equal(apply({"dropout": jax.random.key(0)}), plain)
    assert np.abs(apply({"noise": jax.random.key(0)}) - plain).max() > 1e-2


def test_dropout_of_attention_has_the_gradients_of_its_definition():
    B, T, H, K, d, rate, key = 2, 7, 4, 2, 8, 0.4, jax.random.key(3)
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, d)) for i, n in enumerate((H, K, K)))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2]])
    seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))

    def ours(q, k, v):
        return attention.attend_in_row(q, *attention.key_layout(k, v), segments, rate=rate, key=key)

    def definition(q, k, v):
        scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, d), k) / d**0.5
        p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
        kept = jax.random.bernoulli(key, 1 - rate, (B, K, H // K * T, T)).reshape(p.shape)
        return jnp.einsum("bkgts,bskd->btkgd", p * kept / (1 - rate), v).reshape(B, T, H, d)

    target = jax.random.normal(jax.random.key(9), (B, T, H, d))
    got, want = jax.jit(lambda *qkv: jax.vjp(ours, *qkv)[1](target))(q, k, v), jax.vjp(definition, q, k, v)[1](target)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    np.testing.assert_allclose(ours(q, k, v), definition(q, k, v), atol=2e-5)
    assert np.abs(ours(q, k, v) - attention.attend_in_row(q, *attention.key_layout(k, v), segments)).max() > 0.1


def test_the_tail_of_gelu_keeps_its_digits():
    """In float32, beside torch's in float64; 1 + tanh loses them all there."""
    x = np.linspace(-4, -2, 101, dtype=np.float32)
    wide = torch.tensor(x, dtype=torch.float64)
    want = torch.nn.functional.gelu(wide, approximate="tanh").numpy()
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](jnp.asarray(x)), want, rtol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_blocks_alike_are_traced_once(name, apart, monkeypatch):
    pair, calls, call = tiny.pair(name), [], transformer.Block.__call__
    monkeypatch.setattr(transformer.Block, "__call__", lambda *args: (calls.append(args), call(*args))[1])
    variables, ids, cache = {"params": pair.params}, jnp.asarray(plain()), None
    if apart:
        variables = unstacked(variables, pair.model.config)
        cache = make_cache(pair.model.config, *ids.shape, apart=True)
    jax.eval_shape(lambda: pair.model.apply(variables, ids, cache=cache))
    assert len(calls) == 1 < pair.model.config.layers
