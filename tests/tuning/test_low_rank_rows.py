"""LoRA's kin and IA3 compute the same however rows are packed and padded, cached, and laid over devices.

B rows, T tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import config as configs
from ftjax.models.transformer import make_cache
from ftjax.objectives import causal
from ftjax.training import sharding
from ftjax.training.optimizer import optimizer
from ftjax.training.step import init_state
from ftjax.tree import flatten, unflatten

CASES = {
    "pissa": {"method": "lora", "init": "pissa", "rslora": True, "targets": ("all-linear", "embed_tokens", "lm_head")},
    "dora": {"method": "dora", "targets": ("all-linear", "lm_head")},
    "ia3": {"method": "ia3", "targets": ("all-linear", "lm_head"), "feedforward": ("up_proj", "down_proj")},
}


@functools.cache
def moved(case):
    """(pair, method, trained, frozen), each leaf of `trained` moved by noise."""
    pair = tiny.tuned(tiny.pair("llama-biases"), rank=4, alpha=6.0, **CASES[case])
    method, trained, frozen = tiny.start(pair)
    rng = np.random.default_rng(0)
    trained = {
        path: np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype("f") for path, x in flatten(trained).items()
    }
    return pair, method, unflatten(trained), frozen


@functools.cache
def loss_of(case):
    """Compiled: loss sum, and gradient of what is trained."""
    pair, method, _, _ = moved(case)
    loss = lambda t, f, batch: causal.sums(pair.model, method.variables(t, f, pair.spec), batch)[0]  # noqa: E731
    return tiny.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("case", CASES)
def test_packed_and_padded_rows_are_plain_ones(case):
    _, _, trained, frozen = moved(case)
    docs = tiny.documents((9, 7, 6, 5))
    plain = tiny.batch([[doc] for doc in docs], [[1]] * 4, 16)
    packed = tiny.batch([docs[:2], docs[2:], [], []], [[1, 1], [1, 1], [], []], 16)
    width = max(b["labels"].shape[1] for b in (plain, packed))
    for batch in (plain, packed):
        missing = [(0, 0), (0, width - batch["labels"].shape[1])]
        batch |= {name: np.pad(batch[name], missing) for name in ("loss_index", "labels", "weights")}
    (want, g_want), (got, g) = (loss_of(case)(trained, frozen, batch) for batch in (plain, packed))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, x in flatten(g_want).items():
        np.testing.assert_allclose(flatten(g)[path], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_cached_tokens_have_the_logits_of_whole_rows(case):
    pair, method, trained, frozen = moved(case)
    ids = jnp.asarray(np.stack(tiny.documents((8, 8))))
    variables = method.variables(trained, frozen, pair.spec)
    apply = tiny.jit(pair.model.apply)
    want = np.asarray(apply(variables, ids))
    cache, got = make_cache(pair.model.config, 2, 8), []
    for start, stop in ((0, 4), (4, 8)):
        logits, cache = apply(variables, ids[:, start:stop], cache=cache)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_compute_what_one_does(case):
    pair, method, trained, frozen = moved(case)
    batch = tiny.batch([[doc] for doc in tiny.documents((9, 7, 6, 5))], [[1]] * 4, 16)
    want, g_want = loss_of(case)(trained, frozen, batch)
    mesh, shape = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), pair.model.config
    with jax.set_mesh(mesh):
        on_host = jax.tree.map(np.asarray, frozen)
        placed = jax.device_put(trained, sharding.parameter_shardings(trained, shape, mesh, method.axes))
        frozen = jax.device_put(on_host, sharding.parameter_shardings(on_host, shape, mesh, method.frozen_axes))
        placed_batch = sharding.place_batch(batch, mesh, 4, sharding.local_rows(mesh, 4))
        got, g = loss_of(case)(placed, frozen, placed_batch)
    parts = {path: len({str(s.index) for s in x.addressable_shards}) for path, x in flatten(placed).items()}
    assert max(parts.values()) > 1
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, x in flatten(g_want).items():
        np.testing.assert_allclose(flatten(g)[path], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_trained_has_optimizer_state(case):
    _, _, trained, _ = moved(case)
    state = jax.eval_shape(lambda t: init_state(optimizer(configs.default().optim, lambda step: 1e-3), t), trained)
    sizes = sorted(x.shape for x in jax.tree.leaves(trained))
    moments = sorted(x.shape for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments == sorted(2 * sizes)
