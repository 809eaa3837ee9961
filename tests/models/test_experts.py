"""Mixtures of experts: gradients of experts and routers against PyTorch, meshes, arithmetic, and warnings."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import sys
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_models

import ftjax
from ftjax import assets, cli, tasks, tree
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.hub.peft import write_adapter
from ftjax.models import quantised
from ftjax.models.transformer import Transformer
from ftjax.training import program as programs
from ftjax.training import step
from ftjax.training.flops import flops_per_token
from ftjax.training.job import prepared
from ftjax.training.sharding import abstract_mesh, make_mesh, parameter_shardings, place_batch
from ftjax.training.start import about_experts, about_noise
from ftjax.tree import flatten
from ftjax.tuning import METHODS
from ftjax.tuning.lora_peft import lora_config
from ftjax.tuning.whole import saved
from ftjax.upcycle import upcycle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_families  # noqa: E402

needs_5 = pytest.mark.skipif(not tiny_models.TRANSFORMERS_5, reason="the configs are those of Transformers 5")


def loss(pair, params, ids):
    p = jax.nn.log_softmax(pair.model.apply({"params": params}, ids)[:, :-1])
    return -jnp.take_along_axis(p, ids[:, 1:, None], 2).mean()


@needs_5
def test_gradients_are_those_of_torch_and_of_every_mesh():
    model, settings = check_families.draw("qwen3_moe", 3)
    assert settings["num_experts"] == 8 and settings["num_experts_per_tok"] > 1
    pair, ids = tiny.read(model), np.stack(tiny.documents((20,) * 8, 50))
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

    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 8}, {"data": 2, "expert": 4}):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(pair.params, parameter_shardings(jax.eval_shape(lambda: pair.params), shape, mesh))
            other, gradients = step(placed, jnp.asarray(ids))
        experts = placed["layers"]["mlp"]["up_proj"]["experts"]
        assert experts.sharding.shard_shape(experts.shape)[1] == 8 // sizes.get("expert", 1)
        assert float(other) == pytest.approx(float(value), abs=1e-6)
        for path, g in flatten(gradients).items():
            np.testing.assert_allclose(np.asarray(g), gradient[path], atol=1e-5, err_msg=f"{sizes} {path}")


def router_losses(pair, config, batch, accumulate=1):
    """(gradient, report sums) of full training with the losses of routers."""
    sums = tasks.objective(config, pair.model)

    def gradient(params, batch):
        variables = lambda trained, frozen: {"params": trained}  # noqa: E731
        return step.gradients(sums, variables, params, {}, batch, jax.random.key(0), accumulate)

    found, weight, figures = tiny.jit(gradient)(pair.params, batch)
    return flatten(found), {name: np.asarray(x / weight) for name, x in figures.items()}


@needs_5
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe, dense layers", "gpt_oss"])
def test_losses_of_routers_are_those_of_transformers_however_the_batch_is_cut(name):
    model, _ = check_families.draw(name, 2)
    model.config.output_router_logits = True
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.3
    pair, docs = tiny.read(model), tiny.documents((20, 13, 9, 5), 50, 3)
    config = configs.default()
    assert config.train.balance is None  # as config.json says
    batch = tiny.batch([[doc] for doc in docs], [[1]] * 4, 20)
    gradient, figures = router_losses(pair, config, batch)

    ids, mask = tiny.torch.tensor(batch["tokens"]).long(), tiny.torch.tensor(batch["segment_ids"])
    labels = tiny.torch.where(mask > 0, ids, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    theirs, shape = dict(model.named_parameters()), pair.model.config
    assert figures["balance"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert figures["loss"] + 0.3 * figures["balance"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert (figures["load"].sum(), figures["dropped"]) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    for path in ("mlp/gate/router", "attn/q_proj/kernel"):
        names = families.tensor_names(pair.family, shape)[f"layers/{path}"].names
        want = np.stack([theirs[name].grad.numpy() for name in names])
        np.testing.assert_allclose(gradient[f"layers/{path}"], want, atol=1e-5, err_msg=path)

    if name != "mixtral":
        return
    # Microbatches, remat, packed rows with other padding, and devices change nothing. The z-loss has no referee but its
    # formula.
    config.train.router_z = 0.2
    want, figures = router_losses(pair, config, batch)
    z = np.stack([np.logaddexp.reduce(x.detach().numpy().reshape(4, 20, -1), axis=-1) ** 2 for x in out.router_logits])
    assert figures["router_z"] == pytest.approx(z[:, mask.numpy() > 0].mean(), rel=1e-4)
    packed = tiny.batch([[docs[0]], [docs[1], docs[2]], [docs[3]], []], [[1], [1, 1], [1], []], 24)
    mesh = make_mesh({"data": 2, "fsdp": 2, "sequence": 2})
    remat = pair._replace(model=pair.model.clone(remat="full"))
    cuts = {"microbatches": (pair, batch, 2), "packed, remat": (remat, packed, 1)}
    with jax.set_mesh(mesh):
        places = parameter_shardings(jax.eval_shape(lambda: pair.params), shape, mesh)
        cuts["devices, packed"] = pair._replace(params=jax.device_put(pair.params, places)), packed, 1
    for cut, (other, rows, accumulate) in cuts.items():
        with jax.set_mesh(mesh) if "devices" in cut else contextlib.nullcontext():
            found, same = router_losses(other, config, rows, accumulate)
        for path, g in want.items():
            np.testing.assert_allclose(np.asarray(found[path]), g, atol=1e-5, err_msg=f"{cut} {path}")
        assert same.keys() == figures.keys()
        for name, x in figures.items():
            np.testing.assert_allclose(same[name], x, atol=1e-5, err_msg=f"{cut} {name}")


@needs_5
def test_every_gradient_of_gpt_oss_is_that_of_torch_on_every_mesh():
    """Also those of sinks and of the biases of routers and experts, which only full training has."""
    model, settings = check_families.draw("gpt_oss", 3)
    assert settings["num_local_experts"] == 8 and settings["num_experts_per_tok"] > 1
    pair, ids = tiny.read(model), np.stack(tiny.documents((20,) * 8, 50))
    remat = pair._replace(model=pair.model.clone(remat="products"))
    step = tiny.jit(jax.value_and_grad(lambda params, ids: loss(remat, params, ids)))
    value, gradient = step(pair.params, jnp.asarray(ids))
    gradient = flatten(gradient)
    tokens = tiny.torch.tensor(ids)
    logits = model(tokens).logits[:, :-1]
    tiny.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs, shape, names = dict(model.named_parameters()), pair.model.config, set()
    for path, (tensors, transposed, _) in families.tensor_names(pair.family, shape).items():
        want = np.stack([theirs[name].grad.numpy() for name in tensors])
        want = want.swapaxes(-1, -2) if transposed else want
        assert np.abs(want).max() > 1e-4, path
        got = gradient[path] if path.startswith("layers/") else gradient[path][None]
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=path)
        names |= set(tensors)
    assert names == theirs.keys() - ({"lm_head.weight"} if shape.tied else set())

    for sizes in ({"data": 2, "sequence": 2, "tensor": 2}, {"fsdp": 2, "expert": 4}):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(pair.params, parameter_shardings(jax.eval_shape(lambda: pair.params), shape, mesh))
            other, gradients = step(placed, jnp.asarray(ids))
        biases = placed["layers"]["mlp"]["down_proj"]["biases"]
        assert biases.sharding.shard_shape(biases.shape)[1] == 8 // sizes.get("expert", 1)
        assert float(other) == pytest.approx(float(value), abs=1e-6)
        for path, g in flatten(gradients).items():
            np.testing.assert_allclose(np.asarray(g), gradient[path], atol=1e-5, err_msg=f"{sizes} {path}")


@pytest.fixture
def mxfp4(tmp_path):
    """A gpt-oss directory as OpenAI publishes them: bfloat16, its experts in random MXFP4."""
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    torch = tiny.torch
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
    config = GptOssConfig(**sizes, **heads, vocab_size=50, max_position_embeddings=64, sliding_window=6)
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 125, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    said = json.loads((tmp_path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    return tmp_path, tensors


@needs_5
def test_mxfp4_is_read_as_transformers_reads_it_and_written_as_bfloat16(mxfp4, tmp_path):
    from transformers import GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, tensors = mxfp4
    family, shape = families.read_config(folder)
    assert weights.stored_dtype(folder) == "bfloat16"
    params = weights.read_params(folder, family, shape)
    for name, rows in (("gate_up_proj", 64), ("down_proj", 64)):
        found = params["layers"]["mlp"][name]["experts"]
        assert found.dtype == jnp.bfloat16 and found.shape[2] == rows
        for layer in range(2):
            start = f"model.layers.{layer}.mlp.experts.{name}"
            want = convert_moe_packed_tensors(tensors[f"{start}_blocks"], tensors[f"{start}_scales"])
            assert np.array_equal(np.asarray(found[layer], np.float32), want.float().numpy().swapaxes(1, 2))
    mesh = make_mesh({"fsdp": 4, "expert": 2})  # a device reads 16 columns of blocks of 32
    with jax.set_mesh(mesh):
        places = parameter_shardings(jax.eval_shape(lambda: params), shape, mesh)
        split = weights.read_params(folder, family, shape, places)
    for path, x in flatten(split).items():
        assert np.array_equal(np.asarray(x), np.asarray(flatten(params)[path])), path

    ids = tiny.documents((20,), 50)[0][None]
    whole = weights.read_params(folder, family, shape, dtype=lambda path: np.dtype(np.float32))
    with tiny.torch.no_grad():
        theirs = GptOssForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    want = tiny.torch_logits(theirs, ids)
    np.testing.assert_allclose(Transformer(shape).apply({"params": whole}, ids), want, atol=1e-4)
    weights.write_model(tmp_path / "out", params, folder, family, shape)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in said and said["dtype"] == "bfloat16"
    again, info = GptOssForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_allclose(tiny.torch_logits(again.float().eval(), ids), want, atol=1e-5)


@needs_5
def test_mxfp4_of_another_size_or_type_is_refused(mxfp4):
    from safetensors.torch import save_file

    folder, tensors = mxfp4
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    for other, told in (
        (tensors[name][..., :8].contiguous(), r"U8 \(4, 64, 1, 8\)"),
        (tensors[name].to(tiny.torch.int32), r"I32 \(4, 64, 1, 16\)"),
    ):
        save_file(tensors | {name: other}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FtjaxError, match=rf"down_proj_blocks is {told} with scales U8 \(4, 64, 1\), expected U8"):
            weights.read_params(folder, *families.read_config(folder))


def test_losses_of_routers_need_routers_and_no_privacy():
    config = configs.default()
    config.train.router_z = 0.1
    with pytest.raises(FtjaxError, match=r"train\.router_z: 0\.1, but this model has no experts"):
        tasks.objective(config, Transformer(families.from_hf({"model_type": "llama"})[1]))
    config.train.router_z, config.privacy.epsilon = 0.0, 1.0
    model = Transformer(families.from_hf({"model_type": "mixtral", "output_router_logits": True})[1])
    with pytest.raises(FtjaxError, match=r"train\.balance: 0\.001, but the loss of an example depends on the others"):
        tasks.objective(config, model)


def curve(pair, config, sizes):
    """[(loss, balance loss)] of steps on a mesh of these sizes, and the bytes of experts that a device holds."""
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        program = programs.build(config, pair.spec, mesh, jnp.float32, 3)
        base = jax.tree.map(lambda x, at: jax.device_put(np.array(x), at), pair.params, program.base_places)
        trained, frozen = program.begin(jax.random.key(0), base)
        held = programs.shard_bytes(
            programs.placed(program.frozen["layers"]["mlp"], program.frozen_places["layers"]["mlp"])
        )
        state, found = program.init_state(trained), []
        for _ in range(3):
            docs = tiny.documents((20, 13, 9, 5, 17, 20, 6, 8), 50)
            batch = tiny.batch([[doc] for doc in docs], [[1]] * 8, 20)
            state, report = program.step(state, frozen, place_batch(batch, mesh, 8, slice(0, 8)))
            found.append([float(report["loss"]), float(report["balance"])])
    return np.array(found), held


@needs_5
def test_a_run_with_lora_on_experts_has_one_curve_on_every_mesh():
    model, settings = check_families.draw("mixtral", 1)
    assert settings["num_local_experts"] == 8
    config = configs.default()
    config.tuning.targets = ("all-linear", "gate_up_proj", "down_proj")
    config.train.update(balance=0.1, batch_size=8)
    config.optim.lr = 0.005
    pair = tiny.read(model)
    pair = pair._replace(spec=pair.spec._replace(tuning=config.tuning))
    want, whole = curve(pair, config, {"data": 1})
    assert want[0, 0] - want[-1, 0] > 0.01
    for sizes in ({"expert": 8}, {"data": 2, "fsdp": 2, "expert": 2}, {"expert": 4, "tensor": 2}):
        found, held = curve(pair, config, sizes)
        np.testing.assert_allclose(found, want, rtol=1e-5, err_msg=str(sizes))
        assert held < whole / math.prod(sizes.values()) * sizes.get("data", 1) * 1.2


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_experts_that_cannot_be_dealt_are_refused(kind):
    family, shape = families.from_hf({"model_type": kind} | ({"num_local_experts": 5} if kind == "mixtral" else {}))
    config = configs.default()
    with pytest.raises(FtjaxError, match=rf"mesh\.expert: 2 devices cannot deal the {shape.experts} experts"):
        programs.build(config, tiny.spec(family, shape), abstract_mesh({"expert": 2}), jnp.float32, 1)


def test_only_the_experts_used_count_as_arithmetic():
    _, shape = families.from_hf({"model_type": "mixtral"})
    params = {path: jax.ShapeDtypeStruct(size, jnp.bfloat16) for path, size in families.shapes(shape).items()}
    total = sum(x.size for x in params.values())
    assert total == 46_702_792_704  # Mixtral-8x7B
    used = flops_per_token(shape, params, params, {}, 0) / 6
    assert used == 12_879_925_248 - 32000 * 4096 - 65 * 4096  # published active parameters, less embeddings and norms


def test_gpt_oss_20b_has_its_published_parameters():
    sizes = {"num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4}
    _, shape = families.from_hf({"model_type": "gpt_oss"} | sizes)
    params = {path: jax.ShapeDtypeStruct(size, jnp.bfloat16) for path, size in families.shapes(shape).items()}
    assert round(sum(x.size for x in params.values()) / 1e9, 2) == 20.91
    used = flops_per_token(shape, params, params, {}, 0) / 6  # without the embeddings, which OpenAI does not count
    assert round(used / 1e9, 1) == 3.6


def test_a_run_says_which_noise_of_transformers_it_leaves_out(tmp_path):
    noise = {"router_jitter_noise": 0.01, "attention_dropout": 0.1, "hidden_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"} | noise))
    spec, config = types.SimpleNamespace(family=families.FAMILIES["mixtral"]), configs.default()
    job = types.SimpleNamespace(folder=tmp_path, spec=spec, config=config)
    (told,) = about_noise(job)
    assert told.startswith("no effect: router_jitter_noise = 0.01, attention_dropout = 0.1 of config.json; ")
    config.train.dropout = 0.0  # the config decides
    assert about_noise(job) == [told.replace(", attention_dropout = 0.1", "")]


def test_a_run_says_that_experts_are_left_out():
    _, shape = families.from_hf({"model_type": "mixtral"})
    lora = {"layers": {"attn": {"q_proj": {"lora": {"a": 0}}}}}
    (told,) = about_experts(shape, lora)
    assert told.startswith("warning: the experts, 97% of the model's parameters, and their routers are not trained")
    assert about_experts(shape, {"layers": {"mlp": {"up_proj": {"experts": 0}}}}) == []
    assert about_experts(shape, {"layers": {"mlp": {"experts": {"down_proj": {"lora": {"a": 0}}}}}}) == []
    assert about_experts(families.from_hf({"model_type": "llama"})[1], lora) == []
    told, _ = about_experts(families.from_hf({"model_type": "qwen2_moe"})[1], lora)
    assert told.startswith("warning: the dense feed-forward parts beside the experts, or in layers without experts")
    mixed = families.from_hf({"model_type": "qwen3_moe", "mlp_only_layers": [3]})[1]
    assert about_experts(mixed, lora)[0] == told
    assert about_experts(mixed, {"top_layers": {"dense": {"up_proj": {"kernel": 0}}, "mlp": lora["layers"]}})[1:] == []


@needs_5
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # peft looks at modules alone
@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft, of a base in a folder that is gone
@pytest.mark.parametrize("quantise", ["none", "int8", "nf4"])
def test_a_lora_on_experts_made_by_peft_loads_trains_and_merges(quantise):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model, _ = check_families.draw("mixtral", 1)
    pair, ids = tiny.read(model), tiny.documents((20,), 50)[0][None]
    if quantise != "none":  # the files hold what the quantised base computes
        small = tree.map_paths(
            lambda path, x: quantised.quantise(x, kind) if (kind := quantised.kind_of(path, quantise)) != "none" else x,
            pair.params,
        )
        assert isinstance(small["layers"]["mlp"]["up_proj"]["experts"], quantised.Quantised)
        pair = pair._replace(params=small)
        with tempfile.TemporaryDirectory() as folder:
            weights.write_model(Path(folder), quantised.dequantised(small), None, pair.family, pair.model.config)
            model = type(model).from_pretrained(folder, attn_implementation="eager").eval()
    some = ["mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj", "layers.2.mlp.experts.gate_up_proj"]
    ranks = {r"layers\.2\.mlp\.experts\.gate_up_proj": 2}
    peft = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=some, rank_pattern=ranks)
    ).eval()
    tiny.torch.manual_seed(0)
    with tiny.torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * tiny.torch.randn_like(p))
    theirs = peft(tiny.torch.tensor(ids)).logits
    tiny.torch.nn.functional.cross_entropy(theirs[0, :-1], tiny.torch.tensor(ids)[0, 1:]).backward()
    tensors = {name: x.float().numpy() for name, x in get_peft_model_state_dict(peft).items()}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": ranks, "target_parameters": some}
    config["target_modules"] = ["q_proj"]
    trained, fields = METHODS["lora"].from_peft(config, tensors, pair.params, pair.spec)
    assert {x for x in fields["targets"] if "experts" in x} == {f"model.{x}" for x in some[1:]} | {
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(3)
    }
    pair = tiny.tuned(pair, method="lora", **fields)
    method, _, frozen = tiny.start(pair)

    def of(trained):
        y = pair.model.apply(method.variables(trained, frozen, pair.spec), jnp.asarray(ids))
        p = jax.nn.log_softmax(y[:, :-1])
        return -jnp.take_along_axis(p, ids[:, 1:, None], 2).mean(), y

    (_, logits), gradient = tiny.jit(jax.value_and_grad(of, has_aux=True))(trained)
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-4)
    named = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    got = method.to_peft(gradient, frozen, pair.spec)[1]
    assert got.keys() == named.keys() == tensors.keys()
    for name, g in got.items():
        np.testing.assert_allclose(g, named[name].grad.numpy(), atol=1e-5, err_msg=name)
    again = method.to_peft(trained, frozen, pair.spec)[1]
    assert all(np.array_equal(again[name], x) for name, x in tensors.items())
    merged = tiny.jit(lambda p: pair.model.apply({"params": p}, ids))(method.merge(trained, frozen, pair.spec))
    np.testing.assert_allclose(merged, logits, atol=1e-4)


@needs_5
@pytest.mark.parametrize(
    ("name", "part", "maps"),
    [("mixtral", "block_sparse_moe", ("w1", "w3", "w2")), ("olmoe", "mlp", ("gate_proj", "up_proj", "down_proj"))],
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # peft looks at modules alone
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_a_lora_with_a_module_for_each_expert_is_read_as_peft_reads_it(name, part, maps, tmp_path):
    from peft import PeftModel

    model, _ = check_families.draw(name, 1)
    pair, ids, rng = tiny.read(model), tiny.documents((20,), 50)[0][None], np.random.default_rng(0)
    shape, tensors = pair.model.config, {}
    for layer, e, each in itertools.product(range(shape.layers), range(shape.experts), maps):
        in_, out = (shape.hidden, shape.width) if each == maps[2] else (shape.width, shape.hidden)
        start = f"base_model.model.model.layers.{layer}.{part}.experts.{e}.{each}.lora_"
        for half, size in (("A", (2, in_)), ("B", (out, 2))):
            tensors[f"{start}{half}.weight"] = rng.normal(0, 0.3, size).astype(np.float32)
    config = lora_config(2, 4, list(maps))
    write_adapter(tmp_path, tensors, config, None, "base")
    want = tiny.torch_logits(PeftModel.from_pretrained(model, tmp_path).eval(), ids)
    trained, fields = METHODS["lora"].from_peft(config, tensors, pair.params, pair.spec)
    method, _, frozen = tiny.start(pair := tiny.tuned(pair, method="lora", **fields))
    run = tiny.jit(lambda trained: pair.model.apply(method.variables(trained, frozen, pair.spec), ids))
    np.testing.assert_allclose(run(trained), want, atol=1e-4)
    assert np.abs(want - pair.model.apply({"params": pair.params}, ids)).max() > 1e-2
    lost = next(iter(tensors))
    for said, broken, words in (
        (config | {"use_rslora": True}, tensors, "use_rslora is not supported for an adapter with a module for each"),
        (config, tensors | {lost: np.ones((3, 3))}, r"lora_A.weight has shape \(3, 3\), expected \(2, "),
        (config, {key: x for key, x in tensors.items() if key != lost}, "lora_A.weight is missing"),
        (config, {lost.replace("experts.0.", "experts.9."): tensors[lost]}, "lora_A.weight is missing"),
    ):
        with pytest.raises(FtjaxError, match=words):
            METHODS["lora"].from_peft(said, broken, pair.params, pair.spec)


def test_what_peft_cannot_do_with_experts_is_refused():
    family, shape = families.from_hf({"model_type": "olmoe", "num_hidden_layers": 1})
    base = weights.param_shapes(shape)
    for fields, words in (
        ({"method": "dora"}, "dora cannot adapt experts, for which peft has no DoRA"),
        ({"method": "lora", "init": "pissa"}, "adapters of experts start with BA = 0"),
        ({"method": "lora", "dropout": 0.1}, "adapters of experts have no dropout"),
        ({"method": "ia3"}, "matches no linear map"),
    ):
        spec = tiny.spec(family, shape, targets=("down_proj",), **fields)
        with pytest.raises(FtjaxError, match=words):
            METHODS[spec.tuning.method].init(jax.random.key(0), base, spec)


def test_experts_that_are_trained_whole_have_no_adapter_file():
    family, shape = families.from_hf({"model_type": "olmoe"})
    for path in ("mlp/up_proj/experts", "mlp/up_proj/biases", "mlp/gate/router", "attn/sinks"):
        with pytest.raises(FtjaxError, match="export the merged model"):
            saved({}, {}, {f"layers/{path}": np.ones(16, bool)}, {}, tiny.spec(family, shape))


def test_a_run_that_trains_experts_whole_is_exported_as_a_model(tmp_path):
    assert cli.main(["upcycle", "builtin:stories260K", "--experts", "2", "--top-k", "1", "--out", str(tmp_path)]) == 0
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {i} is here."}) + "\n" for i in range(20)))
    config = configs.default()
    config.model.path, config.data.train = str(tmp_path), str(tmp_path / "rows.jsonl")
    config.tuning.method, config.run_dir = "last_layers", str(tmp_path / "run")
    assert prepared(config, print).formats == ("full",)
    config.export.formats = ("adapter",)
    with pytest.raises(FtjaxError, match=r"last_layers can be written as merged or full; PEFT has no form for the tra"):
        prepared(config, print)


@needs_5
@pytest.mark.parametrize(
    "name",
    ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen3_moe", "olmoe"))],
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # peft looks at modules alone
def test_a_whole_run_with_lora_on_experts_is_that_of_peft(name, tmp_path):
    """Its folder, its adapter in peft and its merged model in transformers have the same logits."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    start = Path(assets.resolve("builtin:stories260K"))
    kind, settings = check_families.DRAWS[name]
    settings = settings(np.random.default_rng(1)) | {"vocab_size": 512}
    tiny.torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager")
    model.save_pretrained(tmp_path / "base")
    for file in start.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {i} is here."}) + "\n" for i in range(20)))
    config = configs.default()
    config.update_from_flattened_dict({
        "model.path": str(tmp_path / "base"), "data.train": str(tmp_path / "rows.jsonl"), "data.max_length": 32,
        "data.buckets": 1, "train.steps": 2, "train.batch_size": 4, "optim.lr": 0.05, "tuning.rank": 2,
        "tuning.targets": ("all-linear", "gate_up_proj", "down_proj"), "evaluate.compare": False,
        "export.formats": ("adapter", "merged"), "log.tensorboard": False, "run_dir": str(tmp_path / "run"),
    })  # fmt: skip
    ftjax.train(config, say=lambda line: None)
    ids = tiny.documents((20,), 512)[0][None]
    want = ftjax.load(tmp_path / "run").logits(ids)
    assert np.abs(want - tiny.torch_logits(model.eval(), ids)).max() > 1e-2
    adapted = PeftModel.from_pretrained(model, tmp_path / "run/adapter").eval()
    experts = [x for part, x in adapted.named_parameters() if "experts" in part and "lora_B" in part]
    assert len(experts) == 2 * model.config.num_hidden_layers and all(x.abs().max() > 1e-3 for x in experts)
    np.testing.assert_allclose(tiny.torch_logits(adapted, ids), want, rtol=0, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", attn_implementation="eager")
    np.testing.assert_allclose(tiny.torch_logits(theirs.eval(), ids), want, rtol=0, atol=1e-4)


@needs_5
@pytest.mark.parametrize("name", ["llama, llama3", "qwen3, yarn"])
def test_an_upcycled_model_has_the_logits_of_the_dense_one(name, tmp_path):
    from transformers import AutoModelForCausalLM

    dense, _ = check_families.draw(name, 4 if name[0] == "l" else 1)
    ids = tiny.documents((20,), 50)[0][None]
    dense.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config |= {"attention_bias": False} | {key: False for key in ("mlp_bias",) if key in config}
    if name[0] == "l":  # keys that the mixture reads, and the dense model does not
        config |= {"sliding_window": 4, "use_sliding_window": True, "num_local_experts": 1, "num_experts_per_tok": 1}
    else:
        config |= {"decoder_sparse_step": 2, "mlp_only_layers": [0], "norm_topk_prob": False}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    dense = type(dense).from_pretrained(tmp_path / "dense", attn_implementation="eager").eval()
    dense.save_pretrained(tmp_path / "dense")
    arguments = ["upcycle", str(tmp_path / "dense"), "--experts", "5", "--top-k", "3", "--out"]
    assert cli.main([*arguments, str(tmp_path / "mixed")]) == 0
    mixed, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixed", attn_implementation="eager", output_loading_info=True
    )
    assert mixed.config.model_type == ("mixtral" if name[0] == "l" else "qwen3_moe") and not any(info.values())
    want = tiny.torch_logits(dense, ids)
    np.testing.assert_allclose(tiny.torch_logits(mixed.eval(), ids), want, atol=1e-5 * np.abs(want).max())
    pair = tiny.read(mixed)
    np.testing.assert_allclose(pair.model.apply({"params": pair.params}, ids), want, atol=1e-5 * np.abs(want).max())
    experts = pair.params["layers"]["mlp"]["up_proj"]["experts"]
    assert experts.shape[1] == 5 and (experts == experts[:, :1]).all()
    assert cli.main([*arguments, str(tmp_path / "noisy"), "--noise", "0.1"]) == 0
    family, shape = families.read_config(tmp_path / "noisy")
    found = weights.read_params(tmp_path / "noisy", family, shape)["layers"]["mlp"]["up_proj"]["experts"]
    assert float((found - experts).std() / experts.std()) == pytest.approx(0.1, rel=0.1)


def test_what_cannot_be_upcycled_is_refused(tmp_path):
    config = {"model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FtjaxError, match="upcycle is for llama, mistral, qwen3 with a head over the vocabulary"):
        upcycle(tmp_path, tmp_path / "out", 4, 2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for wrong in ({"used": 4}, {"noise": math.nan}, {"noise": math.inf}, {"seed": -1}):
        with pytest.raises(FtjaxError, match="expected 1 <= top-k <= experts, a finite noise >= 0 and a seed >= 0"):
            upcycle(tmp_path, tmp_path / "out", **({"experts": 2, "used": 1} | wrong))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "mlp_bias": True}))
    with pytest.raises(FtjaxError, match="a mixtral model cannot have mlp_bias = True"):
        upcycle(tmp_path, tmp_path / "out", 4, 2)
