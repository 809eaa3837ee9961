"""Mixtures of experts: gradients of experts and routers against PyTorch, meshes, arithmetic, and warnings."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_models

from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.training.flops import flops_per_token
from ftjax.training.sharding import make_mesh, parameter_shardings
from ftjax.training.start import about_experts
from ftjax.tree import flatten
from ftjax.tuning.whole import saved

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_families  # noqa: E402

needs_5 = pytest.mark.skipif(not tiny_models.TRANSFORMERS_5, reason="the configs are those of Transformers 5")


def loss(pair, params, ids):
    p = jax.nn.log_softmax(pair.model.apply({"params": params}, ids)[:, :-1])
    return -jnp.take_along_axis(p, ids[:, 1:, None], 2).mean()


@needs_5
def test_gradients_are_those_of_torch_and_of_every_mesh():
    model, _ = check_families.draw("qwen3_moe", 1)
    pair, ids = tiny.read(model), np.stack(tiny.documents((20,) * 4, 50))
    step = tiny.jit(jax.value_and_grad(lambda params, ids: loss(pair, params, ids)))
    value, gradient = step(pair.params, jnp.asarray(ids))
    gradient = flatten(gradient)
    tokens = tiny.torch.tensor(ids)
    logits = model(tokens).logits[:, :-1]
    tiny.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs, shape = dict(model.named_parameters()), pair.model.config

    def stacked(name):
        return np.stack([theirs[f"model.layers.{i}.mlp.{name}"].grad.numpy() for i in range(shape.layers)])

    gate, up = np.split(stacked("experts.gate_up_proj"), 2, axis=2)
    want = {"gate_proj/experts": gate, "up_proj/experts": up, "down_proj/experts": stacked("experts.down_proj")}
    for path, g in (want | {"gate/router": stacked("gate.weight")}).items():
        assert np.abs(g).max() > 1e-3
        np.testing.assert_allclose(gradient[f"layers/mlp/{path}"], g, atol=1e-5, err_msg=path)

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(pair.params, parameter_shardings(jax.eval_shape(lambda: pair.params), shape, mesh))
        other, gradients = step(placed, jnp.asarray(ids))
    assert float(other) == pytest.approx(float(value), abs=1e-6)
    for path, g in flatten(gradients).items():
        np.testing.assert_allclose(np.asarray(g), gradient[path], atol=1e-5, err_msg=path)


def test_only_the_experts_used_count_as_arithmetic():
    _, shape = families.from_hf({"model_type": "mixtral"})
    params = {path: jax.ShapeDtypeStruct(size, jnp.bfloat16) for path, size in families.shapes(shape).items()}
    total = sum(x.size for x in params.values())
    assert total == 46_702_792_704  # Mixtral-8x7B
    used = flops_per_token(shape, params, params, {}, 0) / 6
    assert used == 12_879_925_248 - 32000 * 4096 - 65 * 4096  # published active parameters, less embeddings and norms


def test_a_run_says_that_experts_are_left_out():
    _, shape = families.from_hf({"model_type": "mixtral"})
    lora = {"layers": {"attn": {"q_proj": {"lora": {"a": 0}}}}}
    (told,) = about_experts(shape, lora, "none")
    assert told.startswith("warning: the experts, 97% of the model's parameters, and their routers are not trained")
    assert "model.quantise=nf4 leaves the experts" in about_experts(shape, lora, "nf4")[1]
    assert about_experts(shape, {"layers": {"mlp": {"up_proj": {"experts": 0}}}}, "none") == []
    assert about_experts(families.from_hf({"model_type": "llama"})[1], lora, "nf4") == []


def test_experts_that_are_trained_whole_have_no_adapter_file():
    family, shape = families.from_hf({"model_type": "olmoe"})
    parts = {"layers/mlp/up_proj/experts": np.ones(16, bool)}
    with pytest.raises(FtjaxError, match="export the merged model"):
        saved({}, {}, parts, {}, tiny.spec(family, shape))


@pytest.mark.parametrize("told", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_dense_layers_among_layers_of_experts_are_refused(told):
    with pytest.raises(FtjaxError, match=next(iter(told))):
        families.from_hf({"model_type": "qwen3_moe"} | told)
