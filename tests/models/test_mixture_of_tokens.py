"""Mixtures of tokens: values and gradients against a plain loop in PyTorch, generation, runs, meshes and refusals."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_models
import torch

import ftjax
from ftjax import assets, cli, tasks
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.models.transformer import Experts, Transformer
from ftjax.training import program, step
from ftjax.training.flops import flops_per_token
from ftjax.training.report import Progress, read_metrics
from ftjax.training.sharding import abstract_mesh, make_mesh
from ftjax.tree import flatten
from ftjax.upcycle import upcycle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_families  # noqa: E402

SHAPE = families.from_hf(
    {
        "model_type": "ftjax_mixture_of_tokens", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "max_position_embeddings": 32,
        "num_experts": 3, "mixing_group_size": 2, "initializer_range": 0.5,
    }
)[1]  # fmt: skip


def by_loop(params, x, real, temperature, g):
    """The layer by a loop over groups, positions and experts, as its formula says."""
    B, T, _ = x.shape
    rows: list = [[torch.zeros_like(x[b, t]) for t in range(T)] for b in range(B)]
    for first in range(0, B, g):
        for t in range(T):
            group = [b for b in range(first, first + g) if real[b, t]]
            for e in range(len(params["gate"]["router"]) if group else 0):
                logits = torch.stack([params["gate"]["router"][e] @ x[b, t] for b in group])
                w = torch.softmax(logits / temperature, 0)
                mixed = sum(w[i] * x[b, t] for i, b in enumerate(group))
                gate, up, down = (params[f"{name}_proj"]["experts"][e] for name in ("gate", "up", "down"))
                y = down @ (torch.nn.functional.silu(gate @ mixed) * (up @ mixed))
                for i, b in enumerate(group):
                    rows[b][t] = rows[b][t] + w[i] * y
    return torch.stack([torch.stack(row) for row in rows])


@pytest.fixture(scope="module")
def layer():
    """(layer(params, x, real, temperature), params, x (4, 3, D), real (4, 3)), with padding at some positions."""
    module, rng = Experts(SHAPE, jnp.float32, 0.0), np.random.default_rng(0)
    x, real = rng.standard_normal((4, 3, SHAPE.width)).astype(np.float32), np.ones((4, 3), np.int32)
    real[1, 2] = real[2, 1:] = real[3, 2] = 0
    params = module.init(jax.random.key(0), x, real)["params"]
    apply = jax.jit(lambda params, x, real, temperature: module.apply({"params": params}, x, real, temperature))
    return apply, params, x, real


@pytest.mark.parametrize("temperature", [1.0, 0.3, None])
def test_values_and_gradients_are_those_of_a_plain_loop(layer, temperature):
    apply, params, x, real = layer
    theirs = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), params)
    given = torch.tensor(x, requires_grad=True)
    how = (temperature, SHAPE.mixing) if temperature else (1.0, 1)
    want = by_loop(theirs, given, real, *how)
    np.testing.assert_allclose(apply(params, x, real, temperature), want.detach().numpy(), atol=1e-5)
    factor = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    (want * torch.tensor(factor)).sum().backward()
    found = jax.grad(lambda params, x: jnp.sum(factor * apply(params, x, real, temperature)), (0, 1))(params, x)
    np.testing.assert_allclose(found[1], given.grad, atol=1e-5)
    for path, leaf in flatten(theirs).items():
        g = np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()
        assert np.abs(g).max() > 1e-3 or (temperature is None and path == "gate/router"), path
        np.testing.assert_allclose(flatten(found[0])[path], g, atol=1e-4, err_msg=path)


def test_rows_of_a_group_have_no_order_padding_takes_no_part_and_other_groups_are_not_seen(layer):
    apply, params, x, real = layer
    y = np.asarray(apply(params, x, real, 0.7))
    swapped = [1, 0, 2, 3]
    np.testing.assert_allclose(apply(params, x[swapped], real[swapped], 0.7), y[swapped], atol=1e-6)
    assert not y[real == 0].any()
    other = np.where(real[..., None] > 0, x, 1e3).astype(np.float32)
    np.testing.assert_array_equal(apply(params, other, real, 0.7), y)
    changed = x.copy()
    changed[0] += 1
    moved = np.abs(np.asarray(apply(params, changed, real, 0.7)) - y).max(axis=(1, 2))
    assert moved[1] > 1e-3 and not moved[2:].any()


def test_a_low_temperature_gives_each_expert_to_one_token(layer):
    apply, params, x, real = layer
    y, expected = np.asarray(apply(params, x, real, 1e-3)), np.zeros_like(x)
    for first in (0, 2):
        for t in range(3):
            group = [b for b in (first, first + 1) if real[b, t]]
            for e in range(3) if group else ():
                b = max(group, key=lambda b: np.asarray(params["gate"]["router"])[e] @ x[b, t])
                gate, up, down = (np.asarray(params[f"{name}_proj"]["experts"])[e] for name in ("gate", "up", "down"))
                h = gate @ x[b, t]
                expected[b, t] += down @ (h / (1 + np.exp(-h)) * (up @ x[b, t]))
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_a_model_mixes_in_training_alone_and_a_token_pays_for_a_share_of_the_experts():
    model, ids = Transformer(SHAPE), np.stack(tiny.documents((6,) * 4, 50))
    apply = tiny.jit(model.apply)
    variables = {"params": tiny.jit(model.init)(jax.random.key(0), ids)["params"]}
    alone = np.concatenate([apply(variables, ids[b : b + 1]) for b in range(4)])
    np.testing.assert_allclose(apply(variables, ids), alone, atol=1e-5)
    mixed = apply(variables | {"mixing": {"temperature": jnp.float32(1)}}, ids)
    assert np.abs(mixed - alone).max() > 0.1
    base = weights.param_shapes(SHAPE)
    many = flops_per_token(dataclasses.replace(SHAPE, mixing=1), base, base, {}, 6)
    experts = sum(x.size for path, x in flatten(base).items() if path.endswith("experts"))
    assert many - flops_per_token(SHAPE, base, base, {}, 6) == 6 * experts / 2


def test_microbatches_and_devices_hold_whole_groups():
    config = configs.default()
    model, docs = Transformer(SHAPE), tiny.documents((9, 7, 5, 8, 6, 9, 4, 7), 50)
    params = tiny.jit(model.init)(jax.random.key(0), np.ones((2, 4), np.int32))["params"]
    sums, batch = tasks.objective(config, model), tiny.batch([[doc] for doc in docs], [[1]] * 8, 9)
    mixing = {"mixing": {"temperature": jnp.float32(0.5)}}

    def gradient(params, batch, accumulate=1):
        variables = lambda trained, frozen: {"params": trained} | mixing  # noqa: E731
        found, weight, figures = step.gradients(sums, variables, params, {}, batch, jax.random.key(0), accumulate)
        return flatten(found) | {"loss": figures["loss"] / weight}

    want = tiny.jit(gradient)(params, batch)
    order = np.argsort(np.arange(8) % 2, kind="stable")  # the rows of microbatch 0, then those of microbatch 1
    dealt = {name: np.empty_like(x) for name, x in batch.items()}
    for name, x in batch.items():
        dealt[name][order] = x
    for found in (
        tiny.jit(lambda params, batch: gradient(params, batch, 2))(params, dealt),
        on_mesh(gradient, params, batch),
    ):
        for path, g in found.items():
            np.testing.assert_allclose(np.asarray(g), want[path], atol=2e-5, err_msg=path)


def on_mesh(gradient, params, batch):
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        return tiny.jit(gradient)(params, batch)


@pytest.mark.skipif(not tiny_models.TRANSFORMERS_5, reason="the configs are those of Transformers 5")
@pytest.mark.parametrize("name", ["llama, llama3", "qwen3, yarn"])
def test_an_upcycled_model_has_the_logits_of_the_dense_one_and_so_has_the_mixture_of_experts_made_of_it(name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    dense, _ = check_families.draw(name, 4 if name[0] == "l" else 1)
    dense.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config |= {"attention_bias": False} | {key: False for key in ("mlp_bias",) if key in config}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    dense = type(dense).from_pretrained(tmp_path / "dense", attn_implementation="eager").eval()
    dense.save_pretrained(tmp_path / "dense")
    ids = tiny.documents((20,), 50)[0][None]
    want = tiny.torch_logits(dense, ids)
    arguments = ["upcycle", str(tmp_path / "dense"), "--experts", "4", "--mixture-of-tokens", "2", "--out"]
    assert cli.main([*arguments, str(tmp_path / "tokens")]) == 0
    family, shape = families.read_config(tmp_path / "tokens")
    assert (family.model_type, shape.mixing, shape.experts) == ("ftjax_mixture_of_tokens", 2, 4)
    params = weights.read_params(tmp_path / "tokens", family, shape)
    np.testing.assert_allclose(Transformer(shape).apply({"params": params}, ids), want, atol=1e-5 * np.abs(want).max())
    with pytest.raises(ValueError, match="ftjax_mixture_of_tokens"):
        AutoConfig.from_pretrained(tmp_path / "tokens")
    arguments = ["upcycle", str(tmp_path / "tokens"), "--experts", "4", "--top-k", "2", "--out"]
    assert cli.main([*arguments, str(tmp_path / "experts")]) == 0
    experts, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "experts", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()) and experts.config.model_type == ("mixtral" if name[0] == "l" else "qwen3_moe")
    np.testing.assert_allclose(tiny.torch_logits(experts.eval(), ids), want, atol=1e-5 * np.abs(want).max())
    router = experts.state_dict()[next(key for key in experts.state_dict() if key.endswith("mlp.gate.weight"))]
    np.testing.assert_array_equal(router, params["layers"]["mlp"]["gate"]["router"][0])


def settings(model, run_dir):
    c = configs.default()
    c.update(run_dir=str(run_dir))
    c.model.path, c.tuning.method = str(model), "full"
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=32, buckets=1)
    c.optim.update(lr=3e-3, warmup=0.0)
    c.train.update(steps=12, batch_size=8, eval_every=6, save_every=6, log_every=1, mixing_temperature=(1.0, 0.1))
    c.evaluate.rows = 4
    c.log.update(tensorboard=False, compilation_cache=False)
    return c


def test_a_run_trains_resumes_and_exports_and_what_it_writes_generates_without_mixing(
    tmp_path, monkeypatch, small_mesh
):
    dense, base = assets.resolve("builtin:stories260K"), tmp_path / "tokens"
    upcycle(Path(dense), base, 4, 1, group=4)
    prompts = ["Once upon a time", "The dog"]
    both = [ftjax.load(path).generate(prompts, max_new_tokens=12) for path in (dense, base)]
    assert both[0] == both[1] and all(both[0])
    ftjax.train(settings(base, tmp_path / "whole"), say=lambda line: None)
    rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    temperatures = [row["temperature"] for row in rows]
    np.testing.assert_allclose(temperatures, 0.1 ** (np.arange(12) / 11), rtol=1e-5)

    def stop(self, tokens, count=Progress.count):
        count(self, tokens)
        if list((tmp_path / "cut").glob("checkpoints/*6*")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Progress, "count", stop)
        ftjax.train(settings(base, tmp_path / "cut"), say=lambda line: None)
    ftjax.train(settings(base, tmp_path / "cut"), say=lambda line: None)
    files = [tmp_path / run / "full/model.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes() != (base / "model.safetensors").read_bytes()
    lm = ftjax.load(tmp_path / "whole" / "full")
    assert lm.generate(prompts, max_new_tokens=8) == [lm.generate([p], max_new_tokens=8)[0] for p in prompts]


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"task.kind": "preference"}, "task.kind: preference is not for a mixture of tokens, which mixes 2 rows of a"),
        ({"task.kind": "policy"}, "other tasks compare or label single rows"),
        ({"task.kind": "classify"}, "other tasks compare or label single rows"),
        ({"data.packing": True}, "packed rows have other documents at a position"),
        ({"privacy.epsilon": 1.0}, "the loss of an example depends on the others"),
        ({"mesh.expert": 3}, "every device computes all experts of its own groups"),
        ({"tuning.method": "lora"}, "PEFT has no such model; set it to full"),
    ],
)
def test_what_needs_rows_of_their_own_is_refused(fields, told):
    config = configs.from_dict({"tuning.method": "full"} | fields)
    with pytest.raises(FtjaxError, match=told):
        program.check_method(config, families.FAMILIES["ftjax_mixture_of_tokens"], SHAPE)


def test_groups_that_are_cut_losses_of_routers_and_idle_fields_are_refused(tmp_path):
    config = configs.from_dict({"tuning.method": "full", "train.batch_size": 12, "train.accumulate": 2})
    program.check_rows(config, abstract_mesh({"data": 3}), SHAPE)
    with pytest.raises(FtjaxError, match=r"over 2 parts of the mesh, in groups of 2 rows; a multiple of 8 can"):
        program.check_rows(config, abstract_mesh({"data": 2}), SHAPE)
    config.train.balance = 0.1
    with pytest.raises(FtjaxError, match="every expert of a mixture of tokens has the same load; set it to 0"):
        tasks.objective(config, Transformer(SHAPE))
    config = configs.from_dict({"train.mixing_temperature": (1.0, 0.1)})
    with pytest.raises(FtjaxError, match="train.mixing_temperature: this model is no mixture of tokens"):
        program.check_method(config, families.FAMILIES["llama"], dataclasses.replace(SHAPE, mixing=0))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ftjax_mixture_of_tokens", "num_experts": 4}))
    for more in ({"experts": 8}, {"experts": 4, "group": 2}, {"experts": 4, "noise": 0.1}):
        with pytest.raises(FtjaxError, match="for a mixture of tokens no group, no noise and its own number"):
            upcycle(tmp_path, tmp_path / "out", used=1, **more)
