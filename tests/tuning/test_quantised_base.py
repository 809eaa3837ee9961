"""Methods and whole runs on a quantised base: the logits of the dequantised one, on every mesh, resumed and merged.

B rows, T tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

import ftjax
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.models.quantised import Quantised, dequantised, is_quantised, kind_of, quantise
from ftjax.objectives import causal
from ftjax.training import sharding
from ftjax.training.report import Progress, read_metrics
from ftjax.tree import flatten, map_paths
from ftjax.tuning import METHODS

IDS = np.arange(3, 43)[None]


def small(params, kind="nf4", tables=False):
    def one(path, x):
        kept_as = kind_of(path, kind, tables)
        return x if kept_as == "none" else quantise(x, kept_as, double=True)

    return map_paths(one, params)


@functools.cache
def base(name, tables):
    return tiny.jit(functools.partial(small, tables=tables))(tiny.pair(name).params)


METHODS_ON = {  # name -> method, whether tables are quantised, fields of config.tuning
    "dora": ("dora", False, {}),
    "ia3": ("ia3", False, {}),
    "bitfit": ("bitfit", False, {}),
    "prefix": ("prefix", False, {"virtual_tokens": 3}),
    "prompt, tables": ("prompt", True, {"virtual_tokens": 3}),
    "lora of all, tables": ("lora", True, {"targets": ("all-linear", "embed_tokens", "lm_head"), "rank": 4}),
}


@pytest.mark.parametrize("name", METHODS_ON)
def test_methods(name):
    """Loss, gradients and merged model are those of the method on the dequantised base."""
    method, tables, fields = METHODS_ON[name]
    pair = tiny.tuned(tiny.pair("llama-biases"), method=method, **fields)
    row = METHODS[method]
    trained, frozen = tiny.jit(lambda base: row.init(jax.random.key(0), base, pair.spec))(base("llama-biases", tables))
    assert sum(map(is_quantised, jax.tree.leaves(frozen, is_leaf=is_quantised))) == 7 + 2 * tables
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9))], [[0], [3]], 12)

    @functools.partial(tiny.jit, static_argnums=2)
    def step(trained, frozen, whole):
        def loss(trained):
            variables = row.variables(trained, dequantised(frozen) if whole else frozen, pair.spec)
            return causal.sums(pair.model, variables, batch)[0]

        return jax.value_and_grad(loss)(trained)

    (ours, gradient), (whole, expected) = step(trained, frozen, False), step(trained, frozen, True)
    np.testing.assert_allclose(ours, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    if row.merge:
        merged = {"params": dequantised(row.merge(trained, frozen, pair.spec))}
        got = tiny.jit(lambda variables: causal.sums(pair.model, variables, batch)[0])(merged)
        np.testing.assert_allclose(got, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "tables"), [("llama2", "int8", False), ("llama2", "nf4", True), ("gpt2", "nf4", True)]
)
def test_a_quantised_base_on_a_mesh(name, kind, tables):
    """Codes and scales are split where the kernel is, and the loss is that of one device; tables too, tied or not."""
    pair, row = tiny.tuned(tiny.pair(name), rank=4), METHODS["lora"]
    trained, frozen = tiny.jit(lambda p: row.init(jax.random.key(0), small(p, kind, tables), pair.spec))(
        tiny.pair(name).params
    )
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9, 7, 12))], [[0], [3], [1], [2]], 12)
    loss = lambda t, f, b: causal.sums(pair.model, row.variables(t, f, pair.spec), b)[0]  # noqa: E731
    alone = tiny.jit(loss)(trained, frozen, batch)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        shape = pair.model.config
        places = sharding.parameter_shardings(frozen, shape, mesh)
        placed = jax.device_put(frozen, places)
        adapter = jax.device_put(trained, sharding.parameter_shardings(trained, shape, mesh, row.axes))
        rows = sharding.place_batch(batch, mesh, 4, sharding.local_rows(mesh, 4))
        np.testing.assert_allclose(tiny.jit(loss)(adapter, placed, rows), alone, rtol=1e-5)
    path = "layers/mlp/up_proj/kernel"
    kernel = flatten(places)[path]
    assert isinstance(kernel, Quantised) and isinstance(kernel.codes, NamedSharding)
    codes = flatten(placed)[path].codes
    assert {shard.data.size for shard in codes.addressable_shards} == {codes.size // 4}


# -- whole runs


def settings(run_dir, kind, **model):
    c = configs.default()
    c.run_dir = str(run_dir)
    c.model.update(quantise=kind, **model)
    c.tuning.update(rank=4)
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", end="<s>", limit=64, buckets=1)
    c.optim.update(lr=1e-2, warmup=0.0)
    c.train.update(steps=4, batch_size=8, eval_every=2, save_every=2, log_every=1)
    c.evaluate.rows = 8
    c.export.formats = ("adapter", "merged")
    c.log.update(tensorboard=False, compilation_cache=False)
    return c


def losses(run):
    return np.array([row["loss"] for row in read_metrics(run) if "loss" in row])


@pytest.mark.slow
def test_a_run_on_nf4_resumes_loads_and_merges(tmp_path, monkeypatch):
    """Quantised anew at each start, to the same model; what it exports is what it trained, or the adapter alone."""
    ftjax.train(settings(tmp_path / "run", "nf4"), say=lambda line: None)
    count = Progress.count

    def interrupted(self, tokens):
        count(self, tokens)
        if len(losses(tmp_path / "stopped")) >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ftjax.train(settings(tmp_path / "stopped", "nf4"), say=lambda line: None)
    result = ftjax.train(settings(tmp_path / "stopped", "nf4"), say=lambda line: None)
    assert result.resumed_from == 2 and result.steps == 4
    np.testing.assert_array_equal(losses(tmp_path / "stopped"), losses(tmp_path / "run"))

    trained = ftjax.load(tmp_path / "run").logits(IDS)
    assert is_quantised(ftjax.load(tmp_path / "run").params["layers"]["attn"]["q_proj"]["kernel"])
    np.testing.assert_allclose(ftjax.load(tmp_path / "run" / "merged").logits(IDS), trained, atol=1e-4)
    whole = ftjax.load(tmp_path / "run", quantise="none").logits(IDS)
    assert np.abs(whole - trained).max() > 1e-2
    np.testing.assert_allclose(ftjax.load(tmp_path / "run" / "adapter").logits(IDS), whole, atol=1e-4)
    again = ftjax.load(tmp_path / "run" / "adapter", quantise="nf4")
    np.testing.assert_allclose(again.logits(IDS), trained, atol=1e-4)
    # Generation from a cache computes with the same kernels.
    with_cache = again.generate(["Words: dog run\nSentence:"], max_new_tokens=8)
    merged = ftjax.load(tmp_path / "run" / "merged")
    assert with_cache == merged.generate(["Words: dog run\nSentence:"], max_new_tokens=8)


def test_a_run_with_quantised_tables_loads_and_merges(tmp_path):
    said = []
    ftjax.train(settings(tmp_path / "run", "nf4", quantise_tables=True), say=said.append)
    assert any(line.startswith("adapter: trained on a base in nf4; on the base as its files hold it") for line in said)
    lm = ftjax.load(tmp_path / "run")
    table = lm.params["embed"]["embedding"]
    assert is_quantised(table) and table.kind == "int8"
    trained = lm.logits(IDS)
    np.testing.assert_allclose(ftjax.load(tmp_path / "run" / "merged").logits(IDS), trained, atol=1e-4)
    assert np.abs(ftjax.load(tmp_path / "run" / "adapter", quantise="nf4").logits(IDS) - trained).max() > 1e-3


@pytest.mark.parametrize(("method", "tables"), [("full", False), ("last_layers", False), ("head", True)])
def test_kernels_that_are_trained_are_not_quantised(method, tables, tmp_path):
    config = settings(tmp_path / "run", "int8", quantise_tables=tables)
    config.tuning.method = method
    config.export.formats = ("auto",)
    with pytest.raises(FtjaxError, match=f"model.quantise: int8 .* tuning.method {method} .* to none"):
        ftjax.train(config, say=lambda line: None)


def test_a_base_is_the_same_whatever_it_computes_in():
    """Quantised from float32: codes and scales do not depend on the dtype of a run, or on who loads it."""
    half, full = (ftjax.load("builtin:stories260K", dtype=d, quantise="nf4").params for d in ("bfloat16", "float32"))
    ours, theirs = (p["layers"]["mlp"]["down_proj"]["kernel"] for p in (half, full))
    jax.tree.map(np.testing.assert_array_equal, (ours.codes, ours.scale), (theirs.codes, theirs.scale))
    assert (str(ours.dtype), str(theirs.dtype)) == ("bfloat16", "float32")


@pytest.mark.slow
def test_lora_on_a_quantised_base_ends_near_the_unquantised_one(tmp_path):
    """In 60 steps of the quick start training takes back most of what NF4 costs the untuned starter."""
    ends, untuned = {}, {}
    for kind in ("none", "int8", "nf4"):
        c = configs.load(Path(__file__).parents[2] / "configs" / "quickstart.py")
        c.run_dir = str(tmp_path / kind)
        c.model.quantise = kind
        c.data.update(test="", cache="", limit=2400)
        c.train.update(steps=60, eval_every=60)
        c.evaluate.update(compare=False)
        c.export.formats = ()
        c.log.tensorboard = False
        ends[kind] = ftjax.train(c, say=lambda line: None).val_loss
        if kind != "int8":
            c.data.update(test=c.data.validation, limit=16)
            untuned[kind] = ftjax.evaluate(ftjax.load(c.model.path, quantise=kind), None, c)["loss"]
    assert untuned["nf4"] - untuned["none"] > 0.08  # that there is something to take back
    assert ends["none"] < untuned["none"] - 0.1
    assert ends["nf4"] - ends["none"] < 0.03 and abs(ends["int8"] - ends["none"]) < 0.05
