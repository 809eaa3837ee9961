"""Presets of what the backward pass finds kept: one gradient from all, and memory and arithmetic in their order."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.models import remat
from ftjax.models.config import ModelConfig
from ftjax.models.transformer import Transformer
from ftjax.plan import flops
from ftjax.training import auto_mesh
from ftjax.training import program as programs
from ftjax.tree import flatten
from ftjax.tuning import Spec

SHAPE = ModelConfig(
    vocab_size=64, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, hidden=256, max_positions=64, tied=True
)
B, T = 2, 64


@functools.cache
def measured(preset: str):
    """(loss, gradient, bytes kept as traced, temporary bytes as compiled, FLOPs) of random weights."""
    model, key = Transformer(SHAPE, remat=preset), jax.random.key(0)
    shapes, ids = weights.param_shapes(SHAPE), jax.random.randint(key, (B, T), 0, SHAPE.vocab_size)
    segments = jnp.where(jnp.arange(T) < 24, 1, 2) * (jnp.arange(T) < 56) * jnp.ones((B, 1), jnp.int32)
    params = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)

    def loss(params, ids):
        return jnp.sum(model.apply({"params": params}, ids, None, segments, method="hidden") ** 2) / 1e3

    kept = sum(size for _, size in remat.kept_bytes(loss, shapes, ids))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, ids).compile(tiny.MEASURED)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return *compiled(params, ids), kept, temporary, flops.count(jax.grad(loss), shapes, ids)


@pytest.mark.parametrize("preset", remat.PRESETS)
def test_every_preset_gives_the_same_numbers(preset):
    value, gradient, *_ = measured("none")
    ours, found, *_ = measured(preset)
    assert float(ours) == pytest.approx(float(value), rel=1e-6)
    expected = flatten(gradient)
    for path, g in flatten(found).items():
        np.testing.assert_allclose(g, expected[path], rtol=0, atol=1e-6 * np.abs(expected[path]).max(), err_msg=path)


def test_memory_falls_and_arithmetic_grows_in_the_order_of_the_table():
    order = ("none", "products", "attention", "full")
    kept, temporary, work = (np.array(column) for column in zip(*(measured(p)[2:] for p in order), strict=True))
    assert (np.diff(kept) < 0).all() and (np.diff(temporary) < 0).all() and (np.diff(work) > 0).all()
    # Between passes a block keeps what the table says, its input included, and no more.
    rest = kept[-1] - 4 * B * T * SHAPE.layers * SHAPE.width
    for preset, bytes_kept in zip(order[1:], kept[1:], strict=True):
        names = ("input", *remat.PRESETS[preset].keep)
        assert bytes_kept - rest == 4 * B * T * SHAPE.layers * remat.kept_values(SHAPE, names), preset


def test_what_is_offloaded_is_not_on_the_device():
    on_device = {preset: measured(preset)[2] for preset in ("full", "offload", "offload_products")}
    inputs = 4 * B * T * SHAPE.layers * SHAPE.width
    assert on_device["offload"] == on_device["offload_products"] == on_device["full"] - inputs
    assert measured("offload_products")[4] == measured("products")[4]


def test_a_device_without_such_memory_is_told():
    config = configs.default()
    device = SimpleNamespace(addressable_memories=lambda: [SimpleNamespace(kind="device")], device_kind="Abacus")
    programs.check_remat(config, device)
    config.model.remat = "offload"
    programs.check_remat(config, jax.devices()[0])
    with pytest.raises(FtjaxError, match="model.remat: offload .*pinned_host.* Abacus; full or attention"):
        programs.check_remat(config, device)


def test_choices_of_the_config_are_the_table():
    assert set(configs.FIELDS["model.remat"].choices) == {"auto", *remat.CHOICES}


def test_auto_takes_the_fastest_that_fits():
    config = configs.default()
    configs.override(config, ["model.remat=auto", "train.batch_size=4", "data.max_length=2048"])
    programs.fill_defaults(config)
    family, shape = families.read_config(Path(__file__).resolve().parents[2] / "configs/llama-3.1-8b")
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    sizes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}

    def chosen(memory, offloads=False, platform="tpu"):
        new, machine = configs.copy(config), auto_mesh.Machine(1, memory * 2**30, 1, platform, offloads=offloads)
        said = auto_mesh.settle_remat(new, spec, machine, sizes, 2048, jnp.bfloat16)
        print(said)
        assert said.startswith(f"remat {new.model.remat}: about ")
        assert ("see `ftjax plan`" in said) == (memory < 25 and not offloads)
        return new.model.remat

    assert [chosen(memory) for memory in (1000, 55, 36, 24)] == ["none", "products", "attention", "full"]
    assert chosen(24, offloads=True) == "offload"
    assert chosen(1000, platform="gpu") == "products"  # which is faster there than reading what `none` keeps


def test_what_a_config_says_stays():
    config = configs.default()
    config.model.remat = "full"
    assert auto_mesh.settle_remat(config, None, auto_mesh.here(), {}, 64, None) == ""
