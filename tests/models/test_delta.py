"""The gated delta rule and models with it: against transformers' recurrent form, packed, generated, on meshes."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_labelled
import tiny_models
import torch

from ftjax import config as configs
from ftjax import decoding
from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.models import delta, quantised
from ftjax.models.config import layers_with
from ftjax.plan import flops
from ftjax.training import job
from ftjax.training import program as programs
from ftjax.training.flops import delta_flops
from ftjax.training.sharding import abstract_mesh, make_mesh, parameter_shardings
from ftjax.tree import flatten, map_paths
from ftjax.tuning import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_families  # noqa: E402

needs_5 = pytest.mark.skipif(not tiny_models.TRANSFORMERS_5, reason="the configs are those of Transformers 5")


def inputs(T: int, seed: int = 0):
    """q, k, v, decay, beta of 2 rows and 3 heads, d = 4 and e = 5. Some decays forget nearly all."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, T, 3, size)).astype(np.float32) for size in (4, 4, 5))
    decay = -np.exp(rng.uniform(-4, 3, (2, T, 3))).astype(np.float32)
    return q, k, v, decay, rng.uniform(0, 1, (2, T, 3)).astype(np.float32)


def unit(q, k, *others):
    return delta.unit(q) * q.shape[-1] ** -0.5, delta.unit(k), *others


@needs_5
@pytest.mark.parametrize(("T", "size"), [(1, 64), (5, 64), (23, 8), (150, 64)])
def test_chunks_are_the_recurrent_form_of_transformers(T, size):
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    arrays = inputs(T)
    start = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
    given = {name: torch.tensor(x) for name, x in zip(("query", "key", "value", "g", "beta"), arrays)}
    want, last = torch_recurrent_gated_delta_rule(
        **given, initial_state=torch.tensor(start), output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    docs = jnp.zeros((2, T), jnp.int32)
    y, state = tiny.jit(lambda *x: delta.chunked(*unit(*x[:-1]), docs, x[-1], size))(*arrays, start)
    np.testing.assert_allclose(y, want.numpy(), atol=1e-5)
    np.testing.assert_allclose(state, last.numpy(), atol=1e-5)
    step, state = jax.jit(delta.recurrent)(*(x[:, 0] for x in unit(*arrays)), start)
    np.testing.assert_allclose(step, want[:, 0].numpy(), atol=1e-6)


def test_documents_of_a_row_are_as_if_alone():
    """Outputs and gradients, of documents that begin and end within and at the ends of chunks of 8."""
    lengths = (3, 5, 13, 1, 16, 2)
    parts = [slice(end - n, end) for end, n in zip(np.cumsum(lengths), lengths)]
    arrays, kernel = inputs(sum(lengths)), np.random.default_rng(2).standard_normal((12, 1, 4)).astype(np.float32)

    def value(arrays, segments):
        """With a loss that weighs a token by its place in its document."""
        docs = delta.documents(segments)
        y, _ = delta.chunked(*unit(*arrays), docs, size=8)
        z, _ = delta.convolve(arrays[0].reshape(*segments.shape, 12), kernel, docs)
        real = (segments > 0)[..., None]
        return jnp.sum(jnp.sin(y) * real[..., None]) + jnp.sum(jnp.sin(z) * real), (y, z)

    def alone(x):
        """A row for each document of both rows, padded on the right."""
        rows = [
            np.pad(row[part], [(0, 16 - part.stop + part.start), *[(0, 0)] * (x.ndim - 2)])
            for row in x
            for part in parts
        ]
        return np.stack(rows)

    f = tiny.jit(jax.grad(value, has_aux=True))
    segments = np.repeat(np.arange(1, 7), lengths)[None].repeat(2, 0)
    gradient, outputs = f(arrays, segments)
    want, own = f(tuple(map(alone, arrays)), (alone(segments) > 0).astype(int))
    for got, each in zip((*outputs, *gradient), (*own, *want)):
        for row, x in enumerate(each):
            part = parts[row % 6]
            np.testing.assert_allclose(got[row // 6, part], x[: part.stop - part.start], atol=1e-5)
    others = tuple(x.copy() for x in arrays)
    for x in others:
        x[:, 3:8] *= 0.7
    changed, outside = f(others, segments)[1], np.r_[0:3, 8 : sum(lengths)]
    for x, y in zip(changed, outputs):
        np.testing.assert_array_equal(x[:, outside], y[:, outside])
        assert np.abs(x - y).max() > 1e-2


@pytest.fixture(scope="module")
def hybrid():
    """A model with runs of layers, and transformers' own."""
    model, _ = check_families.draw("qwen3_5_text", 1)
    return tiny.read(model)


@needs_5
@pytest.mark.parametrize("common", [0, 70])
def test_answers_to_prompts_of_several_lengths_are_those_of_transformers(common, monkeypatch):
    """Padded on the left, with equal prompts, and with a beginning that is computed once and is a prompt itself."""
    settings = check_families.DRAWS["qwen3_5_text"][1](np.random.default_rng(1)) | {"max_position_embeddings": 128}
    monkeypatch.setitem(check_families.DRAWS, "longer", ("qwen3_5_text", lambda rng: settings))
    model, _ = check_families.draw("longer", 1)
    pair = tiny.read(model)
    start, *docs = tiny.documents((common, 3, 11, 1, 7), 50, 5)
    prompts = [[*start.tolist(), *doc.tolist()] for doc in (*docs, docs[1])] + [start.tolist()] * bool(common)
    calls = []
    share = decoding.share
    monkeypatch.setattr(decoding, "share", lambda *x: calls.append(x) or share(*x))
    for apart in (decoding.APART, 0):
        monkeypatch.setattr(decoding, "APART", apart)
        found = decoding.generate(pair.model, {"params": pair.params}, prompts, max_new_tokens=6)
        for prompt, new in zip(prompts, found):
            ids = torch.tensor([prompt])
            want = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
            assert new == want[0, len(prompt) :].tolist()
    assert len(calls) == 2 * bool(common)


@needs_5
def test_the_rule_is_float32_in_bfloat16(hybrid, monkeypatch):
    cache = decoding.make_cache(hybrid.model.config, 1, 8, jnp.bfloat16)
    assert (cache["state"].dtype, cache["conv"].dtype, cache["k"].dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    seen, chunked = [], delta.chunked
    monkeypatch.setattr(delta, "chunked", lambda *x: seen.append({a.dtype.name for a in x[:5]}) or chunked(*x))
    ids = jnp.asarray(tiny.documents((20,), 50)[0][None])
    low = hybrid.model.clone(dtype=jnp.bfloat16)
    got, want = (np.asarray(tiny.jit(m.apply)({"params": hybrid.params}, ids)) for m in (low, hybrid.model))
    assert seen == [{"float32"}] * len(seen) != []
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).max()


@needs_5
def test_gradients_are_those_of_torch_and_of_a_mesh(hybrid):
    """Of all parameters, those of the rule itself included."""
    ids = np.stack(tiny.documents((20,) * 8, 50))

    def loss(params, ids):
        p = jax.nn.log_softmax(hybrid.model.apply({"params": params}, ids)[:, :-1])
        return -jnp.take_along_axis(p, ids[:, 1:, None], 2).mean()

    step = tiny.jit(jax.value_and_grad(loss))
    value, gradient = step(hybrid.params, jnp.asarray(ids))
    gradient, model, tokens = flatten(gradient), hybrid.torch, torch.tensor(ids)
    model.zero_grad()
    logits = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs, seen = dict(model.named_parameters()), 0
    for path, (names, *_) in families.tensor_names(hybrid.family, hybrid.model.config).items():
        if path.startswith("layers/"):
            want = np.stack([theirs[name].grad.numpy() for name in names])
            np.testing.assert_allclose(gradient[path], want, atol=1e-4 * max(np.abs(want).max(), 0.1), err_msg=path)
            seen += len(names)
    assert seen == len([name for name in theirs if ".layers." in name])

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        places = parameter_shardings(jax.eval_shape(lambda: hybrid.params), hybrid.model.config, mesh)
        other, gradients = step(jax.device_put(hybrid.params, places), jnp.asarray(ids))
    assert float(other) == pytest.approx(float(value), abs=1e-5)
    for path, g in flatten(gradients).items():
        np.testing.assert_allclose(np.asarray(g), gradient[path], atol=1e-5, err_msg=path)


@needs_5
def test_what_cannot_be_computed_is_refused(hybrid):
    config = configs.default()
    with pytest.raises(FtjaxError, match=r"mesh\.sequence: 2 devices cannot share the tokens of a row"):
        programs.build(config, hybrid.spec, abstract_mesh({"sequence": 2}), jnp.float32, 1)
    for method in ("prompt", "ptuning", "prefix"):
        pair = tiny.tuned(hybrid, method=method)
        with pytest.raises(FtjaxError, match=r"layers with the delta rule, which have none; use lora"):
            METHODS[method].virtual_tokens(pair.spec)
    pair = tiny.tuned(hybrid, method="last_layers", layers=1)
    method, trained, frozen = tiny.start(pair)
    with pytest.raises(FtjaxError, match=r"rates of the delta rule that are trained whole"):
        method.to_peft(trained, frozen, pair.spec)
    hf = {"model_type": "qwen3_5_text", "num_hidden_layers": 2}
    with pytest.raises(FtjaxError, match=r"layer_types: expected 2 of full_attention, linear_attention; found"):
        families.from_hf(hf | {"layer_types": ["linear_attention", "sliding_attention"]})
    with pytest.raises(FtjaxError, match=r"linear_num_key_heads = 3 does not divide linear_num_value_heads = 32"):
        families.from_hf(hf | {"linear_num_key_heads": 3})


@needs_5
def test_the_last_layers_alone_are_one_model_with_the_others(hybrid):
    """Two stacks, the upper of which has fewer rows of some parameters than layers."""
    apply, ids = tiny.jit(hybrid.model.apply), jnp.asarray(np.stack(tiny.documents((20,), 50)))
    want = apply({"params": hybrid.params}, ids)
    for layers in (1, 2):
        pair = tiny.tuned(hybrid, method="last_layers", layers=layers)
        method, trained, frozen = tiny.start(pair)
        params = method.variables(trained, frozen, pair.spec)["params"]
        assert "top_layers" in params
        np.testing.assert_allclose(apply({"params": params}, ids), want, atol=1e-5)
        merged = method.merge(trained, frozen, pair.spec)
        jax.tree.map(np.testing.assert_array_equal, merged["layers"], hybrid.params["layers"])
        for path in (path for path in flatten(trained) if path.startswith("top_layers/")):
            at = method.layer_ids(path, pair.spec)
            own = layers_with(hybrid.model.config, path)
            assert list(at) == [layer for layer in own if layer >= 3 - layers]


@needs_5
def test_layers_of_modules_that_are_trained_whole(hybrid):
    """Layer-wise decay goes by the layer in a tensor's name, which is not its row."""
    pair = tiny.tuned(hybrid, targets=("q_proj",), modules_to_save=("out_proj", "up_proj", "k_proj"))
    method, trained, _ = tiny.start(pair)
    names = families.tensor_names(pair.family, pair.model.config)
    whole = [path for path in flatten(trained) if path in names]
    assert {path.split("/")[1] for path in whole} == {"attn", "delta", "mlp"}
    for path in whole:
        want = [int(re.search(r"layers\.(\d+)\.", name)[1]) for name in names[path].names]
        assert list(method.layer_ids(path, pair.spec)) == want


@needs_5
@pytest.mark.parametrize("method, format", [("last_layers", "full"), ("lora", "adapter"), ("norms", "adapter")])
def test_what_peft_has_no_form_for_is_written_as_a_model(hybrid, method, format, tmp_path):
    tiny_labelled.make(tmp_path, "llama")
    hybrid.torch.save_pretrained(tmp_path)
    config = configs.from_dict({"model.path": str(tmp_path), "run_dir": str(tmp_path / "run"), "tuning.method": method})
    assert job.opened(job.checked(config, str), str).formats == (format,)


@needs_5
def test_a_quantised_base_computes_what_its_files_hold(hybrid, tmp_path):
    ids = jnp.asarray(np.stack(tiny.documents((20,), 50)))

    def small(path, x):
        kind = quantised.kind_of(path, "int8")
        return quantised.quantise(x, kind) if kind != "none" else x

    params = map_paths(small, hybrid.params)
    assert isinstance(params["layers"]["delta"]["in_proj_qkv"]["kernel"], quantised.Quantised)
    weights.write_model(tmp_path, quantised.dequantised(params), None, hybrid.family, hybrid.model.config)
    written = weights.read_params(tmp_path, hybrid.family, hybrid.model.config)
    got, want = (tiny.jit(hybrid.model.apply)({"params": p}, ids) for p in (params, written))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_its_arithmetic_is_counted():
    """The formula against the operations of the program, and the published shape of Qwen3.5 against itself by depth."""
    _, shape = families.from_hf({"model_type": "qwen3_5_text"})
    H, d, e, T = shape.delta_value_heads, shape.delta_key_dim, shape.delta_value_dim, 256
    arrays = [jax.ShapeDtypeStruct((1, T, H, *size), jnp.float32) for size in ((d,), (d,), (e,), (), ())]
    counted = flops.count(lambda *x: delta.chunked(*x, jnp.zeros((1, T), jnp.int32)), *arrays) / T
    no_filter = dataclasses.replace(shape, delta_width=0)
    assert 1 < counted / delta_flops(no_filter, T) < 1.15
    assert layers_with(shape, "attn") == (3, 7, 11, 15, 19, 23, 27, 31) and len(layers_with(shape, "delta")) == 24
