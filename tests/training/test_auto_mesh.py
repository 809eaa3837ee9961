"""The mesh where a config leaves it open: what is chosen for models and machines of every size, and that it runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

import ftjax
from ftjax import config as configs
from ftjax.hub import families
from ftjax.models import remat
from ftjax.models.config import ModelConfig
from ftjax.plan.devices import parse
from ftjax.training import auto_mesh
from ftjax.training import program as programs
from ftjax.tuning import Spec

ROOT = Path(__file__).resolve().parents[2]


def choose(folder, devices, T, overrides, dtype="bfloat16"):
    config = configs.default()
    configs.override(config, ["mesh.data=0", "model.remat=full", *overrides])
    programs.fill_defaults(config)
    family, shape = families.read_config(ROOT / folder)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    devices = parse(devices)
    machine = auto_mesh.Machine(devices.count, devices.device.memory, devices.device.per_host)
    said = auto_mesh.settle(config, spec, machine, T, jnp.dtype(dtype))
    sizes = {axis: config.mesh[axis] for axis in ("data", "fsdp", "sequence", "tensor")}
    assert math.prod(sizes.values()) == devices.count
    return {axis: n for axis, n in sizes.items() if n > 1}, said


FULL = ["tuning.method=full", "model.trained_dtype=bfloat16"]


@pytest.mark.parametrize(
    "model, devices, T, overrides, want, why",
    [
        # It fits beside its rows: nothing but adapters' gradients is sent.
        ("8b", "v6e:4x4", 2048, ["train.batch_size=16"], {"data": 16}, "not split further"),
        # 15 GiB of weights and devices of 15.75 GiB.
        ("8b", "v5e:4x4", 2048, ["train.batch_size=16"], {"data": 8, "fsdp": 2}, "as far as they must"),
        ("8b", "v6e:4x4", 4096, [*FULL, "train.batch_size=16"], {"fsdp": 16}, "most of it trained"),
        # Rows run out: four devices of a host share one.
        ("70b", "v5p:4x8x8", 4096, [*FULL, "train.batch_size=64"], {"fsdp": 64, "tensor": 4}, "64 rows divide over 64"),
        # 8 KV heads cut 8 ways at most, and hosts have 4 devices: the rest is split by tokens.
        ("8b", "v5p:4x4x2", 4096, [*FULL, "train.batch_size=2"], {"data": 2, "sequence": 4, "tensor": 4}, "2 rows"),
        # One row after another on each device would fit, but for its length.
        ("8b", "v6e:4x4", 12288, ["train.batch_size=16"], {"data": 2, "sequence": 8}, "a row of 12,288 tokens"),
    ],
)
def test_what_is_chosen(model, devices, T, overrides, want, why):
    found, said = choose(f"configs/llama-3.1-{model}", devices, T, overrides)
    print(said)
    assert found == want and why in said


def test_what_does_not_fit_is_told():
    found, said = choose("configs/llama-3.1-70b", "v5e:2x4", 4096, [*FULL, "train.batch_size=8"])
    assert found == {"fsdp": 2, "sequence": 4} and "even so: see `ftjax plan`" in said


ODD = ModelConfig(
    vocab_size=301, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=60, max_positions=64, tied=False
)


@pytest.mark.parametrize(
    "tensor, heads, kv_heads, hidden, vocab",
    [(1, 4, 2, 60, 301), (2, 2, 1, 30, 301), (3, 4, 2, 20, 301), (4, 2, 1, 15, 301), (7, 4, 2, 60, 43)],
)
def test_what_one_of_several_devices_computes_of_a_row(tensor, heads, kv_heads, hidden, vocab):
    """Attention is cut between its two KV heads at most; what a number of devices does not divide stays whole."""
    part = auto_mesh.shape_of_one(ODD, {"tensor": tensor})
    assert (part.heads, part.kv_heads, part.hidden, part.vocab_size) == (heads, kv_heads, hidden, vocab)


def test_heads_of_both_kinds_of_attention_are_cut():
    shape = dataclasses.replace(ODD, heads=8, kv_heads=4, global_head_dim=16, global_kv_heads=2)
    part = auto_mesh.shape_of_one(shape, {"tensor": 4})
    assert (part.heads, part.kv_heads, part.global_kv_heads) == (4, 2, 1)


@pytest.mark.parametrize("expert, pairs", [(1, 2), (2, 4), (4, 8), (8, 8)])
def test_a_device_has_room_for_all_that_may_choose_its_experts(expert, pairs):
    """Of 8 experts a token has 2. A device holds E / n experts, and a token of each of the n devices has at most as
    many of them; so its feed-forward part keeps values for n * min(2, E / n) pairs for each token of its own."""
    shape = dataclasses.replace(ODD, experts=8, experts_used=2)
    part = auto_mesh.shape_of_one(shape, {"tensor": 1, "expert": expert})
    assert remat.kept_values(part, ("up",)) == pairs * ODD.hidden


@pytest.mark.parametrize("tensor", [3, 4, 7])
def test_remat_is_chosen_where_a_mesh_divides_little(tensor):
    config = configs.default()
    configs.override(config, ["model.remat=auto", "tuning.method=full", f"train.batch_size={tensor}"])
    programs.fill_defaults(config)
    spec = Spec(ODD, families.linear_names(families.FAMILIES["llama"], ODD), config.tuning, families.FAMILIES["llama"])
    sizes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": tensor}
    # Two tables of the vocabulary, q and o, k and v, three kernels of the MLP, three norms: the parameters of a device.
    parts = {3: (1, 1, 1, 3), 4: (1, 4, 1, 4), 7: (7, 1, 1, 1)}[tensor]
    values = (2 * 301 * 32 / parts[0], 2 * 32 * 32 / parts[1], 2 * 32 * 16 / parts[2], 3 * 32 * 60 / parts[3], 3 * 32)
    # Weights, two moments and gradients are in float32; the optimizer counts its steps.
    states, *_ = auto_mesh._states(config, spec, jnp.dtype("float32"), sizes)
    assert states == pytest.approx(4 * 4 * sum(values), abs=64)
    machine = auto_mesh.Machine(tensor, 2**33, 8, "tpu")
    assert "remat none: about" in auto_mesh.settle_remat(config, spec, machine, sizes, 64, jnp.dtype("float32"))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "qwen3_5_text"])
def test_activations_are_estimated_and_no_weights_are_among_them(kind):
    """The quick estimate beside what the program keeps. In a hybrid, runs of layers read slices of the stacks."""
    hf = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1000}
    hf |= {"num_hidden_layers": 4, "vocab_size": 512, "head_dim": 8}
    hf |= {"num_local_experts": 4} if kind == "gpt_oss" else {}
    family, shape = families.from_hf(
        {"model_type": kind, **{f"linear_{n}_head_dim": 16 for n in ("key", "value")}, **hf}
    )
    config = configs.default()
    configs.override(config, ["model.remat=none", "tuning.method=full", "train.batch_size=8"])
    programs.fill_defaults(config)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    kernels = programs.kernels(config, auto_mesh.here())
    kept = {
        preset: auto_mesh.saved_row_bytes(config, spec, preset, 64, jnp.float32, auto_mesh.ONE_DEVICE, kernels)
        for preset in ("none", "full")
    }
    assert 0.5 < kept["none"] / auto_mesh._row_bytes(config, shape, 64, 4) < 2
    inputs = 4 * 64 * shape.layers * shape.width
    assert inputs <= kept["full"] < 2 * inputs


def test_a_mesh_that_is_given_stays():
    config = configs.default()
    assert auto_mesh.settle(config, None, auto_mesh.here(), 64, None) == "" and config.mesh.data == -1


@pytest.mark.slow
def test_a_run_tells_its_mesh(tmp_path):
    config = configs.default()
    config.update_from_flattened_dict(
        {
            "run_dir": str(tmp_path / "run"), "mesh.data": 0, "train.batch_size": 8, "train.steps": 1, "data.limit": 64,
            "data.prompt": "Words: {src}\nSentence:", "data.completion": " {tgt}", "data.max_length": 64,
            "data.buckets": 1, "data.cache": "", "evaluate.rows": 8, "export.formats": (), "log.tensorboard": False,
            "log.compilation_cache": False,
        }
    )  # fmt: skip
    said = []
    ftjax.train(config, say=said.append)
    assert any(line.startswith("mesh data=8 x fsdp=1 x sequence=1 x tensor=1: weights") for line in said)
