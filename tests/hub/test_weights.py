"""Model directories read and written: every tensor and the logits against transformers and torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import TRANSFORMERS_5, load, logits

from ftjax.errors import FtjaxError
from ftjax.hub import weights
from ftjax.hub.families import read_config, shapes
from ftjax.hub.weights import param_shapes, read_params, stored_dtype, write_model
from ftjax.tree import flatten, map_paths, unflatten

# Our name -> the referee's, written down a second time and by hand: the last two parts of its path, or all of it.
REFEREE = {
    "gpt2": {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "c_attn": "attn.c_attn",
        "o_proj": "attn.c_proj",
        "up_proj": "mlp.c_fc",
        "down_proj": "mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    "llama": {
        "embed": "model.embed_tokens",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "final_norm": "model.norm",
        "lm_head": "lm_head",
        **{n: f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
        **{n: f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")},
    },
}


def referee(model, path):
    """The referee's parameter at one of our paths, stacked over layers, (out, in)."""
    gpt2 = model.config.model_type == "gpt2"
    *_, module, leaf = path.split("/")
    name = REFEREE["gpt2" if gpt2 else "llama"][module]
    state = model.state_dict()
    suffix = "bias" if leaf == "bias" else "weight"
    if not path.startswith("layers/"):
        return state[f"{name}.{suffix}"].float().numpy()
    stem = "transformer.h" if gpt2 else "model.layers"
    layers = [state[f"{stem}.{i}.{name}.{suffix}"].float().numpy() for i in range(3)]
    return np.stack([x.T if gpt2 and leaf == "kernel" else x for x in layers])


def check(params, model):
    flat = flatten(params)
    assert flat
    for path, x in flat.items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), referee(model, path), err_msg=path)
    if "lm_head/kernel" not in flat:
        assert model.config.tie_word_embeddings


def read(folder, **options):
    return read_params(folder, *read_config(folder), **options)


def test_every_tensor_is_read_and_written_back(variant, tmp_path):
    folder, model = variant
    family, config = read_config(folder)
    params = read(folder)
    check(params, model)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, param_shapes(config))
    write_model(tmp_path / "out", params, folder, family, config)
    again = load(tmp_path / "out")
    np.testing.assert_array_equal(logits(again), logits(model))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_a_large_tensor_is_read_in_pieces(saved, monkeypatch, name):
    whole = read(saved(name)[0])
    for setting, value in (("LARGE", 0), ("READERS", 3)):
        monkeypatch.setattr(f"ftjax.hub.weights.{setting}", value)
    jax.tree.map(np.testing.assert_array_equal, read(saved(name)[0]), whole)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama-tied", "llama3", "qwen3"])
def test_a_change_arrives_in_torch(saved, tmp_path, name):
    folder, model = saved(name)
    params = map_paths(lambda path, x: x * 1.01, read(folder))
    write_model(tmp_path / "out", params, folder, *read_config(folder))
    changed = load(tmp_path / "out")
    assert np.abs(logits(changed) - logits(model)).max() > 1e-3
    check(params, changed)


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_shards_in_and_out(saved, tmp_path, name):
    folder, model = saved(name, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    params = read(folder)
    check(params, model)
    write_model(tmp_path / "out", params, folder, *read_config(folder), shard_size=5000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = {f: sum(x.nbytes for x in load_file(tmp_path / "out" / f).values()) for f in files}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 5000 or len(load_file(tmp_path / "out" / f)) == 1 for f, size in sizes.items())
    np.testing.assert_array_equal(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_bfloat16(saved, tmp_path, name):
    folder, model = saved(name)
    model.bfloat16().save_pretrained(folder)
    params = read(folder)
    assert {str(x.dtype) for x in flatten(params).values()} == {"bfloat16"} == {stored_dtype(folder)}
    check(params, model)
    mixed = read(folder, dtype=lambda path: np.float32 if path.endswith("scale") else jnp.bfloat16)
    assert {str(x.dtype) for p, x in flatten(mixed).items() if p.endswith("scale")} == {"float32"}
    check(mixed, model)
    write_model(tmp_path / "out", read(folder, dtype=lambda path: np.float32), folder, *read_config(folder))
    assert stored_dtype(tmp_path / "out") == "bfloat16"
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"
    # The model in memory is no referee here: its .bfloat16() rounded the rotary frequencies too.
    np.testing.assert_array_equal(logits(load(tmp_path / "out")), logits(load(folder)))


def test_rounding_to_bfloat16_is_torchs(saved, tmp_path):
    folder, model = saved("llama-biases")
    params = read(folder, dtype=lambda path: jnp.bfloat16)
    check(params, model.bfloat16())
    write_model(tmp_path / "out", read(folder), folder, *read_config(folder), dtype="bfloat16")
    check(read(tmp_path / "out"), model)


def test_float16_overflow_is_refused_and_leaves_nothing(saved, tmp_path):
    folder, _ = saved("llama2")
    params = map_paths(lambda path, x: x * 1e6, read(folder))
    with pytest.raises(FtjaxError, match="model.embed_tokens.weight holds values not finite, or too large for float16"):
        write_model(tmp_path / "out", params, folder, *read_config(folder), dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_a_head_untied_by_training_survives(saved, tmp_path, name):
    folder, model = saved(name)
    params = read(folder)
    params["lm_head"] = {"kernel": params["embed"]["embedding"] * 2}
    write_model(tmp_path / "out", params, folder, *read_config(folder))
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["tie_word_embeddings"] is False
    np.testing.assert_allclose(logits(load(tmp_path / "out")), 2 * logits(model), rtol=1e-5, atol=1e-6)


def test_config_says_rotary_for_both_versions(saved, tmp_path):
    folder, model = saved("llama3")
    hf = json.loads((folder / "config.json").read_text())
    assert ("rope_parameters" in hf, "rope_theta" in hf) == (TRANSFORMERS_5, not TRANSFORMERS_5)
    write_model(tmp_path / "out", read(folder), folder, *read_config(folder))
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 500000.0
    assert hf["rope_scaling"]["rope_type"] == "llama3"
    for key in ("rope_parameters", "rope_scaling") if TRANSFORMERS_5 else ("rope_parameters",):  # one version's alone
        (tmp_path / "out" / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if k != key}))
        np.testing.assert_array_equal(logits(load(tmp_path / "out")), logits(model))


def test_a_model_made_from_nothing(saved, tmp_path):
    folder, model = saved("qwen2-window")
    write_model(tmp_path / "out", read(folder), None, *read_config(folder), dtype="float32")
    np.testing.assert_array_equal(logits(load(tmp_path / "out")), logits(model))


def test_generation_config_and_tokenizer_go_along(saved, tmp_path):
    folder, _ = saved("llama2")
    files = {"tokenizer.json": "{ }", "chat_template.jinja": "x", "additional_chat_templates/tool.jinja": "y"}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_p": 0.9}))
    params, (family, config) = read(folder), read_config(folder)
    write_model(tmp_path / "out", params, folder, family, config, end_tokens=(2, 7))
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    written = tmp_path / "out" / "generation_config.json"
    assert json.loads(written.read_text()) == {"eos_token_id": [2, 7], "top_p": 0.9}
    (folder / "generation_config.json").unlink()
    write_model(tmp_path / "out", params, folder, family, config)
    assert json.loads(written.read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


# -- what other people's files look like


def rewrite(folder, change):
    """Rewrite model.safetensors with `change` applied to its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("llama-tied", "model."), ("qwen3", "model.")])
def test_keys_without_prefix(saved, name, prefix):
    folder, model = saved(name)
    rewrite(folder, lambda tensors: {n.removeprefix(prefix): x for n, x in tensors.items()})
    check(read(folder), model)


def test_known_buffers_are_dropped(saved):
    folder, model = saved("gpt2")
    extra = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    extra |= {"transformer.h.1.attn.masked_bias": np.zeros((), np.float32)}
    rewrite(folder, lambda tensors: tensors | extra)
    check(read(folder), model)
    folder, model = saved("llama2", folder="llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewrite(folder, lambda tensors: tensors | extra)
    check(read(folder), model)


def test_a_tied_model_may_store_its_head_again(saved):
    folder, model = saved("llama-tied")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    check(read(folder), model)
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    message = "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings .* set it to false"
    with pytest.raises(FtjaxError, match=message):
        read(folder)


# -- bad input, each with its message


def drop(name):
    return lambda tensors: {n: x for n, x in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), r"tensor model.layers.1.mlp.up_proj.weight \(24, 16\) is missing"),
        (drop("lm_head.weight"), r"tensor lm_head.weight \(50, 16\) is missing"),
        (
            lambda t: t | {"model.norm.weight": np.ones(9, np.float32)},
            r"model.safetensors: tensor model.norm.weight has shape \(9,\), expected \(16,\)",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)},
            r"model.safetensors: tensor model.layers.0.self_attn.q_proj.bias \(16,\) is not expected",
        ),
        (
            lambda t: t | {"norm.weight": t["model.norm.weight"] + 1},
            "tensors model.norm.weight and norm.weight are one parameter by two names; remove one",
        ),
        (lambda t: t | {"gate.weight": np.ones((2, 16), np.float32)}, r"gate.weight \(2, 16\) is not expected"),
        (lambda t: t | {"model.norm.weight": np.ones(16, np.int8)}, r"norm.weight is I8, expected one of .*quantised"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    folder, _ = saved("llama2")
    rewrite(folder, change)
    with pytest.raises(FtjaxError, match=message):
        read(folder)


def test_missing_shard_is_named(saved):
    folder, _ = saved("llama2", max_shard_size="5KB")
    (folder / sorted(p.name for p in folder.glob("model-*"))[1]).unlink()
    with pytest.raises(FtjaxError, match="model.safetensors.index.json: names files that are missing.*model-00002-of-"):
        read(folder)


def test_truncated_file_is_named(saved):
    folder, _ = saved("llama2")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FtjaxError, match="model.safetensors: not a whole safetensors file"):
        read(folder)


def test_pickles_are_refused_with_the_way_out(saved):
    folder, _ = saved("llama2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FtjaxError, match="no model.safetensors.*To convert it"):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FtjaxError, match="pytorch_model.bin only, a pickle.*save_pretrained"):
        read(folder)


def test_parameters_that_are_no_whole_model(saved, tmp_path):
    folder, _ = saved("llama2")
    params = read(folder)
    params["layers"]["mlp"]["up_proj"]["kernel"] = params["layers"]["mlp"]["up_proj"]["kernel"][-1:]
    with pytest.raises(FtjaxError, match=r"layers/mlp/up_proj/kernel: \(1, 24, 16\), expected \(3, 24, 16\)"):
        write_model(tmp_path / "out", params, folder, *read_config(folder))


def test_folders_of_others_are_not_overwritten(saved, tmp_path):
    folder, model = saved("llama2")
    params, (family, config) = read(folder), read_config(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FtjaxError, match="out: holds files that no export of ftjax wrote: thesis.txt"):
        write_model(out, params, folder, family, config)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    for _ in range(2):  # its own work it replaces
        write_model(out, params, folder, family, config)
    (out / "README.md").write_text("about this model")
    with pytest.raises(FtjaxError, match="no export of ftjax wrote: README.md. Move them"):
        write_model(out, params, folder, family, config)
    assert (out / "README.md").read_text() == "about this model"
    np.testing.assert_array_equal(logits(load(out)), logits(model))


def test_a_kill_leaves_the_old_model_and_no_half_one(saved, tmp_path, forks):
    folder, model = saved("llama2")
    out = tmp_path / "out"
    write_model(out, read(folder), folder, *read_config(folder))
    script = (
        "import os, signal, sys\nfrom ftjax.hub import weights\nfrom ftjax.hub.families import read_config\n"
        "source, out = sys.argv[1:]\nargs = read_config(source)\nparams = weights.read_params(source, *args)\n"
        "real, calls = weights.save_file, []\n"
        "def save_file(*a):\n    calls.append(real(*a))\n    len(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "weights.save_file = save_file\nweights.write_model(out, params, source, *args, shard_size=4000)\n"
    )
    assert forks.run(tmp_path, [str(folder), str(out)], program=script)[0] == -9
    np.testing.assert_array_equal(logits(load(out)), logits(model))
    write_model(out, read(folder), folder, *read_config(folder))  # and the leftovers are cleared
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


# -- shardings and memory


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_each_device_gets_its_own_slice_alone(saved, monkeypatch, name):
    folder, model = saved(name)
    _, config = read_config(folder)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(path, shape):
        last = len(shape) - 1
        axes = [None] * len(shape)
        if path.endswith(("kernel", "embedding")) and shape[last] % 4 == 0:
            axes[last] = "fsdp"
        elif path.endswith("scale"):
            axes[last] = ("data", "fsdp")
        return NamedSharding(mesh, PartitionSpec(*axes))

    flat = {path: sharding(path, shape) for path, shape in shapes(config).items()}
    asked, real = [], weights._slice

    def counted(tensor, bounds, transposed):
        part = real(tensor, bounds, transposed)
        asked.append((tensor.name, part.size))
        return part

    monkeypatch.setattr(weights, "_slice", counted)
    params = read(folder, shardings=unflatten(flat))
    check(params, model)
    for path, x in flatten(params).items():
        assert x.sharding == flat[path], path
    stored = weights.stored_tensors(folder)
    read_sizes = {}
    for tensor, size in asked:
        read_sizes[tensor] = read_sizes.get(tensor, 0) + size
        whole = int(np.prod(stored[tensor].shape))
        is_table = "wte" in tensor or "embed_tokens" in tensor
        assert size <= (whole // 4 if is_table else whole), tensor
    for tensor, total in read_sizes.items():  # each value once, however many replicas there are
        assert total == int(np.prod(stored[tensor].shape)), tensor


# Automatic collection is off: when it runs is chance, and what must be freed is read_params's own business.
MEMORY = """
import gc, json, sys, threading
import jax, numpy as np, psutil
from ftjax.hub.families import read_config
from ftjax.hub.weights import read_params, write_model
folder, out = sys.argv[1:]
gc.disable()
family, config = read_config(folder)
jax.device_put(np.zeros(8)).block_until_ready()
process, peak, done = psutil.Process(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], process.memory_info().rss)
threading.Thread(target=watch, daemon=True).start()
start = process.memory_info().rss
params = jax.block_until_ready(read_params(folder, family, config))
held = sum(x.nbytes for x in jax.tree.leaves(params))
largest = max(x.nbytes for x in jax.tree.leaves(params))
reading, peak[0] = peak[0] - start, 0
gc.enable()
write_model(out, params, folder, family, config, shard_size=2e7)
writing = peak[0] - start
done.set()
print(json.dumps({"held": held, "largest": largest, "reading": reading, "writing": writing}))
"""


def test_host_memory_stays_below_what_devices_hold_and_a_few_tensors(tmp_path):
    """A 200 MB model in shards, in a process of its own; figures in bytes above the start."""
    layers, D, F, V = 12, 512, 2048, 4000
    hf = {"model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_attention_heads": 8, "tie_word_embeddings": True}))
    family, config = read_config(tmp_path)
    random = np.random.default_rng(0)
    weight_map = {}
    for path, (names, *_) in weights.tensor_names(family, config).items():
        shape = shapes(config)[path][path.startswith("layers/") :]
        tensors = {name: random.standard_normal(shape, np.float32) for name in names}
        file = path.replace("/", "-") + ".safetensors"
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2], check=True)
    seen = json.loads(run.stdout)
    shutil.rmtree(tmp_path)
    assert seen["held"] > 190e6
    assert seen["reading"] < seen["held"] + 2 * seen["largest"], seen
    assert seen["writing"] < seen["held"] + 3 * 2e7, seen
