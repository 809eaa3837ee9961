"""A plan against what really happens: the program that `train` compiles, XLA's own counts, real runs of the command."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import haste
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_labelled
from jax.sharding import NamedSharding, PartitionSpec

import ftjax
from ftjax import cli
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.hub.peft import write_adapter
from ftjax.models.config import ModelConfig
from ftjax.plan import compiled, flops, search, worker
from ftjax.plan import run as planning
from ftjax.plan.devices import DEVICES, larger, parse
from ftjax.plan.report import report
from ftjax.plan.run import environment, plan
from ftjax.training import hlo, loop, sharding
from ftjax.training import program as programs
from ftjax.tuning.lora_peft import lora_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def forked(forks, monkeypatch):
    """What plans need not import anything, and compiles with the flags of the tests."""

    def run(command, *, env, **_):
        told = {"XLA_FLAGS": f"{env['XLA_FLAGS']} {haste.FLAGS}"}
        body = "import sys; from ftjax.plan import worker; sys.exit(worker.main())"
        status, said = forks.run(Path.cwd(), [command[-1]], program=body, env=told)
        return subprocess.CompletedProcess(command, status, stderr=said)

    # In this module alone: a run asks git through the same function.
    monkeypatch.setattr(planning, "subprocess", types.SimpleNamespace(run=run, PIPE=subprocess.PIPE))


def small(**fields):
    """A short run of the starter model."""
    config = configs.default()
    config.update_from_flattened_dict(
        {
            "data.prompt": "Words: {src}\nSentence:", "data.completion": " {tgt}", "data.limit": 64,
            "data.max_length": 64, "data.buckets": 1, "train.batch_size": 16, "train.steps": 2, "evaluate.rows": 8,
            "log.tensorboard": False, "log.compilation_cache": False, "export.formats": (),
        }
        | fields
    )  # fmt: skip
    return config


# ---- devices ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, kind, count, topology",
    [
        ("v5p:4x8x8", "v5p", 256, "v5p:4x8x8"),
        ("v6e:4x4", "v6e", 16, "v6e:4x4"),
        ("v6e-8", "v6e", 8, "v6e:2x4"),
        ("v5litepod-16", "v5e", 16, "v5e:4x4"),
        ("v4-8", "v4", 4, "v4:2x2x1"),  # v4 and v5p: TensorCores, two a chip
        ("v5p-16", "v5p", 8, "v5p:2x2x2"),
        ("v5p-64", "v5p", 32, "v5p:2x4x4"),
        ("h200x8", "h200", 8, None),
        ("h200", "h200", 1, None),
        ("cpu:8", "cpu", 8, None),
    ],
)
def test_devices_by_name(text, kind, count, topology):
    devices = parse(text)
    assert (devices.kind, devices.count, devices.topology) == (kind, count, topology)
    assert larger(devices)[0].count == 2 * count and devices.device is DEVICES[kind]


@pytest.mark.parametrize(
    "text, expected",
    [
        *((text, "unknown device") for text in ("v7:4x4", "h20x8", "", "v2-8")),
        *((text, "3 sides of the slice, such as v5p:2x2x2") for text in ("v5p:4x8", "v5p:0x4x8")),
        *((text, "2 sides of the slice, such as v6e:2x2") for text in ("v6e:16", "v6e")),
        *((text, "a number of devices, such as h200x8") for text in ("h200:2x2", "h200x0", "h200-8")),
        ("cpu:0", "a number of devices, such as cpu:8"),
        *((text, "one of gcloud's slices") for text in ("v5p-12", "v4-12288")),
    ],
)
def test_unknown_devices_are_told(text, expected):
    with pytest.raises(FtjaxError, match=f"--devices {text}: .*{expected}"):
        parse(text)


def test_gcloud_names_count_what_google_counts():
    """The rows of the tables on Google's pages of v5p and v6e: TensorCores of the one, chips of the other."""
    v5p = {"2x2x1": 8, "2x2x2": 16, "2x4x4": 64, "4x4x4": 128, "4x4x8": 256, "4x8x8": 512, "16x16x24": 12288}
    v6e = {"1x1": 1, "2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "8x16": 128, "16x16": 256}
    for kind, table in (("v5p", v5p), ("v6e", v6e)):
        for sides, number in table.items():
            assert parse(f"{kind}-{number}").name == f"{kind}:{sides}"
            assert parse(f"{kind}:{sides}").accelerator_type == f"{kind}-{number}"
    assert larger(parse("v6e-256")) == []
    with pytest.raises(FtjaxError, match=r"v5p-8 \(4\), v5p-16 \(8\)"):
        parse("v5p-4")


# ---- the program's text -----------------------------------------------------------------------------------------
def test_collectives_in_loops_count_as_often_as_they_run():
    """Five rounds of a gathered weight: each device sends 7 of its gathered result's 8 parts."""

    def f(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    mesh = jax.make_mesh((8,), ("x",))
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "x")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
    text = jax.jit(f).lower(weights, x).compile().as_text()
    found = {c.kind: c for c in hlo.collectives(text)}
    gathered = found["all-gather"]
    assert gathered.bytes == pytest.approx(5 * 64 * 64 * 4 * 7 / 8)
    assert found["all-reduce"].bytes == pytest.approx(2 * 4 * 7 / 8)  # one float, summed


@pytest.mark.parametrize(
    "line, n",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 4),
        ("replica_groups=[2,8]<=[16], dimensions={0}", 8),
        ("replica_groups=mesh['a'=2,'b'=16] {'b'}, dimensions={1}", 16),
        ("replica_groups=@mesh['a'=2,'b'=16] {'a','b'}, dimensions={1}", 32),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=2], device_ids=([2,8]T(1,0)) {'a'}, dimensions={0}", 8),
        ("replica_groups=mesh['a'=8,'b'=4] {'a':(2)4,'b'}, dimensions={0}", 16),
    ],
)
def test_groups_of_devices(line, n):
    text = f"""ENTRY %main (p: f32[8]) -> f32[{8 * n}] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[{8 * n}]{{0}} all-gather(%p), {line}
}}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.count) == ("all-gather", 1)
    assert found.bytes == pytest.approx(32 * n * (n - 1) / n)


def test_traffic_of_loops_slices_and_updates():
    """Each of 10 rounds reads one row of 1,000 floats, and writes one; the matrix is never copied."""

    def f(x, out):
        def body(i, out):
            row = jax.lax.dynamic_slice(x, (i, 0), (1, 1000))
            return jax.lax.dynamic_update_slice(out, row * 2 + 1, (i, 0))

        return jax.lax.fori_loop(0, 10, body, out)

    shape = jax.ShapeDtypeStruct((10, 1000), jnp.float32)
    text = jax.jit(f, donate_argnums=1).lower(shape, shape).compile().as_text()
    assert hlo.memory_bytes(text) == pytest.approx(10 * 2 * 4000, rel=0.1)


# Programs of L layers, D wide, for B rows of a table of V; what they read and write is counted by hand below.
L, D, B, V = 8, 4096, 8, 16384


def layers(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def scaled_layers(codes, scales, x):
    body = lambda x, layer: (x @ (layer[0].astype(x.dtype) * layer[1]), None)  # noqa: E731
    return jax.lax.scan(body, x, (codes, scales))[0]


def gradient(weights, x):
    return jax.grad(lambda weights: layers(weights, x).sum())(weights)


def filled(cache, x):
    def body(i, carry):
        cache, x = carry
        x = jnp.tanh(x)
        return jax.lax.dynamic_update_slice(cache, x[None], (i, 0, 0)), x

    return jax.lax.fori_loop(0, L, body, (cache, x))


def one_layer(weights, i):
    return jax.lax.dynamic_index_in_dim(jnp.sin(weights) * 2, i, keepdims=False)


def one_of_zeros(x, i):
    return jax.lax.dynamic_update_index_in_dim(jnp.zeros((L, D, D), x.dtype), jnp.sin(x), i, 0)


def adam(p, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return p - m / (jnp.sqrt(v) + 1e-8), m, v


def looked_up(table, ids):
    return table[ids]


def traffic(function, *shapes, donate=(), place=None):
    """hlo.memory_bytes of a function compiled for arguments of these (dtype, sides)."""
    arguments = [jax.ShapeDtypeStruct(sides, jnp.dtype(dtype), sharding=place) for dtype, *sides in shapes]
    return hlo.memory_bytes(jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    "function, shapes, donate, bytes_by_hand",
    [
        # A round cuts a kernel out of the stack (reads and writes it), and multiplies by it (reads it again); its rows
        # are read and written by the product and by tanh.
        (layers, [("float32", L, D, D), ("float32", B, D)], (), 4 * L * (3 * D * D + 4 * B * D)),
        # A round reads and writes x for tanh, then reads it and writes one part of the cache. The compiler computes
        # bfloat16 in float32: the cache stands there converted, and is not read for all that.
        (filled, [("float32", L, D, D), ("float32", D, D)], (0,), 4 * D * D * (4 * L + 2)),
        (filled, [("bfloat16", L, D, D), ("bfloat16", D, D)], (0,), 2 * D * D * (4 * L + 2)),
        # Computed of one layer alone, though sin stands before the slice.
        (one_layer, [("float32", L, D, D), ("int32",)], (), 4 * 2 * D * D),
        # The zeros are written, then one part of them from what is read.
        (one_of_zeros, [("float32", D, D), ("int32",)], (), 4 * (L * D * D + 2 * D * D)),
        (looked_up, [("float32", V, D), ("int32", B)], (), 4 * 2 * B * D),
    ],
    ids=["layers", "update", "update-bfloat16", "slice-of-computed", "update-of-zeros", "gather"],
)
def test_traffic_is_that_counted_by_hand(function, shapes, donate, bytes_by_hand):
    assert traffic(function, *shapes, donate=donate) == pytest.approx(bytes_by_hand, rel=0.02)


@pytest.mark.slow
def test_traffic_of_programs_for_a_tpu_is_that_counted_by_hand():
    """The kernels are all that counts: the rows are few, and stay on the chip. The compiler for TPUs puts the slices of
    kernels into fusions inside the fusions of the products."""
    pytest.importorskip("libtpu", reason="needs the extra `plan-tpu`")
    rows, kernels = ("bfloat16", B, D), ("bfloat16", L, D, D)
    cases = [
        ("layers", [kernels, rows], (), 2 * L * D * D),  # each kernel is read once
        ("scaled_layers", [("int8", L, D, D), ("bfloat16", L, 1, D), rows], (), L * D * D),
        # Forward and backward read each kernel; its gradient is set to zero, then written.
        ("gradient", [kernels, rows], (), 2 * L * D * D * 4),
        ("adam", [("float32", L, D, D)] * 4, (0, 1, 2), 4 * L * D * D * 7),  # four read, three written
        ("one_layer", [("float32", L, D, D), ("int32",)], (), 4 * 2 * D * D),
        ("one_of_zeros", [("float32", D, D), ("int32",)], (), 4 * (L * D * D + 2 * D * D)),
        ("looked_up", [("float32", V, D), ("int32", V)], (), 4 * 2 * V * D),
    ]
    script = "import json, sys; from jax.sharding import SingleDeviceSharding as S; import test_plan as t; "
    script += "at = S(t.compiled.device_list(t.parse('v6e:2x2'))[0]); cases = json.loads(sys.argv[1]); "
    script += "print([t.traffic(getattr(t, f), *s, donate=tuple(d), place=at) for f, s, d, _ in cases])"
    env = os.environ | environment(parse("v6e:2x2"))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/plan"), *sys.path])
    done = subprocess.run([sys.executable, "-c", script, json.dumps(cases)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    by_hand = [case[-1] for case in cases]
    assert found == pytest.approx(by_hand, rel=0.03), [f / h for f, h in zip(found, by_hand, strict=True)]


# As the TPU's compiler writes it: 16 layers of 512 x 512 in bfloat16, 64 rows on the chip.
NESTED = """%slice.1 (stack: bf16[16,512,512], i: s32[]) -> bf16[512,512] {
  %stack = bf16[16,512,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %dynamic_slice.1 = bf16[1,512,512]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,512,512}
  ROOT %bitcast.1 = bf16[512,512]{1,0} bitcast(%dynamic_slice.1)
}
%both.1 (x: bf16[64,512], y: bf16[64,512]) -> (bf16[64,512], f32[64,512]) {
  %x = bf16[64,512]{1,0} parameter(0)
  %y = bf16[64,512]{1,0} parameter(1)
  %mul.1 = bf16[64,512]{1,0} multiply(%x, %y)
  %convert.1 = f32[64,512]{1,0} convert(%y)
  ROOT %tuple.1 = (bf16[64,512]{1,0}, f32[64,512]{1,0}) tuple(%mul.1, %convert.1)
}
%product.1 (p0: bf16[64,512], p1: bf16[16,512,512], p2: s32[], p3: bf16[16,64,512]) -> bf16[16,64,512] {
  %p0 = bf16[64,512]{1,0} parameter(0)
  %p1 = bf16[16,512,512]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %fusion.1 = bf16[512,512]{1,0} fusion(%p1, %p2), kind=kLoop, calls=%slice.1
  %convolution.1 = bf16[64,512]{1,0} convolution(%p0, %fusion.1), dim_labels=bf_io->bf
  %fusion.2 = (bf16[64,512]{1,0}, f32[64,512]{1,0}) fusion(%convolution.1, %p0), kind=kLoop, calls=%both.1
  %element.1 = bf16[64,512]{1,0} get-tuple-element(%fusion.2), index=0
  %bitcast.2 = bf16[1,64,512]{2,1,0} bitcast(%element.1)
  %p3 = bf16[16,64,512]{2,1,0} parameter(3)
  %zero.1 = s32[] constant(0)
  ROOT %update.1 = bf16[16,64,512]{2,1,0} dynamic-update-slice(%p3, %bitcast.2, %p2, %zero.1, %zero.1)
}
ENTRY %main (x: bf16[64,512], w: bf16[16,512,512], i: s32[], saved: bf16[16,64,512]) -> bf16[16,64,512] {
  %x.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w.1 = bf16[16,512,512]{2,1,0} parameter(1)
  %i.1 = s32[]{:T(128)S(6)} parameter(2)
  %saved.1 = bf16[16,64,512]{2,1,0} parameter(3)
  %slice-start.1 = ((bf16[16,512,512]{2,1,0}, s32[]{:S(6)}), bf16[1,512,512]{2,1,0:S(1)}, s32[]{:S(2)}) dynamic-slice-start(%w.1, %i.1)
  %slice-done.1 = bf16[1,512,512]{2,1,0:S(1)} dynamic-slice-done(%slice-start.1)
  ROOT %fusion.3 = bf16[16,64,512]{2,1,0} fusion(%x.1, %w.1, %i.1, %saved.1), kind=kOutput, calls=%product.1
}
"""  # noqa: E501


def test_traffic_of_fusions_inside_fusions():
    """One kernel of the stack is read by the fusion inside, and one moved to the chip beside; one part is written."""
    assert hlo.memory_bytes(NESTED) == 2 * (512 * 512 + 512 * 512 + 64 * 512)


def test_what_lies_on_the_chip_is_no_traffic():
    line = "  %x.1 = (bf16[4,128]{1,0:T(8,128)(2,1)S(1)}, f32[8]{0}) copy-start(%p)"
    shape = hlo._instruction(line).shape
    assert (hlo.size(shape), hlo.outside(shape)) == (1024 + 32, 32)


# ---- FLOPs -----------------------------------------------------------------------------------------------------
LLAMA = ModelConfig(
    vocab_size=4096, width=512, layers=4, heads=8, kv_heads=4, head_dim=64, hidden=1376, max_positions=512, tied=False
)


@pytest.mark.slow
@pytest.mark.parametrize("method, remat", [("full", "none"), ("lora", "none"), ("full", "full")])
def test_flops_are_those_of_the_unrolled_program(method, remat):
    def built(unroll):
        config = small(**{"tuning.method": method, "model.unroll": unroll, "model.remat": remat})
        programs.fill_defaults(config)
        spec = tiny.spec(families.FAMILIES["llama"], LLAMA, method=method)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        program = programs.build(config, spec, mesh, jnp.dtype("float32"), 2)
        return program.step, programs.arguments(program, 4, 256, 256, config)

    (step, arguments), (scanned, shapes) = built(0), built(1)
    # XLA must not merge what remat computes twice.
    options = tiny.HASTE | {"xla_disable_hlo_passes": "cse"} if remat == "full" else tiny.HASTE
    exact = step.lower(*arguments).compile(options).cost_analysis()["flops"]
    counted = flops.count(scanned, *shapes)
    print(f"{method}, remat {remat}: {counted / exact:.4f}")
    assert counted == pytest.approx(exact, rel=0.02)


# ---- memory -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"tuning.method": "full", "mesh.data": 2, "mesh.fsdp": 4, "model.remat": "full"},
        {"tuning.method": "lora", "mesh.fsdp": 2, "mesh.tensor": 2, "train.accumulate": 2},
    ],
    ids=["full", "lora"],
)
def test_memory_is_that_of_the_program_that_train_compiles(forked, tmp_path, monkeypatch, fields):
    ran = []

    def spy(build, *args):
        program = build(*args)

        def step(*arguments):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)
            ran.append(program.step.lower(*shapes).compile().memory_analysis())
            return program.step(*arguments)

        return program._replace(step=step)

    config = small(run_dir=str(tmp_path), **fields)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "build", functools.partial(spy, programs.build))
        loop.train(config, say=lambda _: None)
    real = ran[-1]
    asked = plan(config, "cpu:8", data=True, seconds=1)["asked"]
    assert asked["temporaries"] == pytest.approx(real.temp_size_in_bytes, rel=0.1)
    new = real.output_size_in_bytes - real.alias_size_in_bytes
    total = real.argument_size_in_bytes + real.temp_size_in_bytes + new
    assert asked["total"] == pytest.approx(total, rel=0.1)
    # What is told by kind is what the program takes.
    assert sum(asked["held"].values()) == pytest.approx(real.argument_size_in_bytes, rel=0.02)


@pytest.mark.slow
def test_estimates_lie_near_what_is_compiled():
    """A search calibrated at one setting, against programs compiled at others."""
    config = small(**{"tuning.method": "full", "data.max_length": 256})
    programs.fill_defaults(config)
    spec = tiny.spec(families.FAMILIES["llama"], LLAMA, method="full")._replace(tuning=config.tuning)
    devices = parse("cpu:8")
    config.mesh.update(data=1, fsdp=8)
    asked = compiled.compile_step(config, spec, devices, 256, 256, 2)
    estimates = search.Search(config, spec, 256, 256, 2, asked, devices)
    wide = {"mesh.fsdp": 1, "mesh.tensor": 8}  # over four KV heads
    for overrides in ({"train.batch_size": 32}, {"model.remat": "full"}, {"mesh.fsdp": 4, "mesh.tensor": 2}, wide):
        guess = estimates.estimate(search.Setting(overrides, devices))
        real = compiled.compile_step(search.changed(config, overrides), spec, devices, 256, 256, 2)
        print(overrides, guess["total"] / real["total"], guess["flops"] / real["flops"])
        assert 0.6 < guess["total"] / real["total"] < 1.7
        assert guess["flops"] == pytest.approx(real["flops"], rel=0.05)


@pytest.mark.parametrize(
    "fields",
    [
        {"mesh.data": 1, "mesh.tensor": 4},  # two KV heads
        {"mesh.data": 0, "mesh.sequence": 1, "data.max_length": 1, "train.batch_size": 1},
    ],
    ids=["over-kv-heads", "one-row-of-one-token"],
)
def test_meshes_that_divide_little_are_planned(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "settings", lambda *_: [])  # other meshes divide
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 301, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    count = fields.get("mesh.tensor", 3)
    config = small(**{"model.path": str(tmp_path), "model.remat": "auto"} | fields)
    job = {"config": config.to_dict(), "devices": f"cpu:{count}", "data": False, "memory": None, "seconds": 1e-9}
    found = worker.work(job | {"choices": True, "quick": True}) | {"simulated": False}
    numbers = [found["asked"][key] for key in ("total", "temporaries", "flops", "traffic", "sent")]
    assert math.prod(found["asked"]["mesh"].values()) == count and all(0 <= n < math.inf for n in numbers)
    assert "nan" not in report(found, price=1.0)


def test_what_the_model_and_the_adapter_decide_is_planned(tmp_path, monkeypatch):
    """The rank and the targets of tuning.init_from; a prompt of text, whose tokens no plan needs; one run alone."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 301, "model_type": "llama"}))
    halves = {"A": np.zeros((7, 32), np.float32), "B": np.zeros((32, 7), np.float32)}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(half): x for half, x in halves.items()}
    write_adapter(tmp_path / "adapter", tensors, lora_config(7, 14, ["q_proj"]), None, "base")

    def planned(**fields):
        config = small(**{"model.path": str(tmp_path)} | fields)
        job = {"config": config.to_dict(), "devices": "cpu:1", "data": False, "memory": None, "seconds": 1e-9}
        return worker.work(job | {"choices": False, "quick": True})

    found = planned(**{"tuning.init_from": str(tmp_path / "adapter"), "tuning.layers": 2})
    assert found["asked"]["held"]["trained weights"] == 4 * 2 * 7 * 32
    assert found["chosen"][0] == "no effect with tuning.method=lora: tuning.layers"
    by_text = {"tuning.method": "prompt", "tuning.prompt_init": "text", "tuning.prompt_text": "Answer:"}
    found = planned(**by_text, **{"tuning.virtual_tokens": 3})
    assert found["asked"]["held"]["trained weights"] == 4 * 3 * 32
    with pytest.raises(FtjaxError, match="stages: a plan is of one run"):
        planned(stages=({"name": "first"},))


# ---- the command ------------------------------------------------------------------------------------------------
QUICK = ("--config", "configs/quickstart.py", "--config.data.max_length=128", "--config.model.unroll=1")


@pytest.mark.slow
def test_batches_that_are_tried_are_whole_groups_of_a_mixture_of_tokens():
    shape = types.SimpleNamespace(mixing=4, experts=8, kv_heads=2, hidden=64)
    config = small(**{"train.batch_size": 64, "train.accumulate": 2})
    tried = search.settings(config, types.SimpleNamespace(model=shape), parse("cpu:8"))
    assert len({setting.overrides.get("train.batch_size") for setting in tried}) > 3
    for setting in tried:
        mesh = types.SimpleNamespace(
            shape={axis: setting.overrides[f"mesh.{axis}"] for axis in ("data", "fsdp", "expert")}
        )
        programs.check_rows(search.changed(config, setting.overrides), mesh, shape)


def test_more_devices_are_all_used_and_no_others(tmp_path, monkeypatch):
    """The settings for more devices, of a run that splits its rows by tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 301, "model_type": "llama"}))
    config = small(**{"model.path": str(tmp_path), "mesh.sequence": 2, "tuning.method": "full"})
    monkeypatch.setattr(search, "settings", lambda *_: [search.Setting({"train.accumulate": 7}, parse("cpu:2"))])
    job = {"config": config.to_dict(), "devices": "cpu:2", "data": False, "memory": 1.3e6, "seconds": 1e-9}
    found = worker.work(job | {"choices": True, "quick": True})
    assert not found["asked"]["fits"] and found["instead"]
    for row in found["instead"]:
        assert math.prod(row["mesh"].values()) == parse(row["devices"]).count


def test_what_does_not_fit_is_refused_with_what_would(tmp_path, forks):
    out = tmp_path / "plan.json"
    asked = *QUICK, "--config.model.remat=none", "--devices", "cpu:1", "--memory", "0.1", "--json", str(out)
    status, said = forks.run(ROOT, ["plan", *asked])
    assert status == 3, said
    assert "does not fit: 0." in said and "of 0.1 GiB a device" in said
    found = json.loads(out.read_text())
    first = found["instead"][0]
    overrides = [f"--config.{key}={value}" for key, value in first["overrides"].items()]
    assert " ".join(overrides) in said
    changed = *QUICK, "--devices", first["devices"], "--memory", "0.1", "--seconds", "1", *overrides
    status, said = forks.run(ROOT, ["plan", *changed])
    assert status == 0, said


@pytest.mark.parametrize(
    "args, told",
    [
        (("--devices", "v9:2x2"), "unknown device"),
        (("--devices", "cpu:8", "--config.mesh.fsdp=3"), "does not multiply to the 8 devices"),
        (("--devices", "cpu:8", "--config.train.batch_size=4"), "cannot be split"),
        (("--share", "0"), "--share"),
    ],
)
def test_a_plan_that_cannot_be_is_told_in_a_line(args, told, forks):
    status, said = forks.run(ROOT, ["plan", "--config", "configs/quickstart.py", *args])
    assert status == 2
    assert told in said and "Traceback" not in said


@pytest.mark.parametrize("option", ["memory", "seconds", "price", "share"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1"])
def test_numbers_that_mean_nothing_are_refused(option, value, capsys):
    assert cli.main(["plan", "--config", str(ROOT / "configs/quickstart.py"), f"--{option}={value}"]) == 2
    assert f"--{option}: expected" in capsys.readouterr().err


def test_a_run_does_not_pass_the_peak(capsys):
    assert cli.main(["plan", "--config", str(ROOT / "configs/quickstart.py"), "--share", "5"]) == 2
    assert "--share: expected a share of the peak, above 0 and 1 at most; found 5.0" in capsys.readouterr().err
    with pytest.raises(FtjaxError, match="--memory"):
        plan(small(), memory=float("nan"))
    with pytest.raises(FtjaxError, match="--price"):
        report({}, price=float("inf"))


def test_a_tpu_needs_its_compiler(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", "--config", str(ROOT / "configs/quickstart.py"), "--devices", "v6e:2x2"]) == 2
    assert "plan-tpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v6e-1", "v5litepod-4", "v4-8", "v5p-16"])
def test_a_chip_of_a_slice_is_a_device(name):
    pytest.importorskip("libtpu", reason="needs the extra `plan-tpu`")
    script = "from ftjax.plan.compiled import device_list as d; from ftjax.plan.devices import parse; "
    script += f"print(len(d(parse({name!r}))))"
    env = os.environ | environment(parse(name))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(parse(name).count), done.stderr


def test_axes_that_take_part_of_a_side_of_a_slice():
    pytest.importorskip("libtpu", reason="needs the extra `plan-tpu`")
    script = "from ftjax.plan.compiled import device_list as d; from ftjax.plan.devices import parse; "
    script += "from ftjax.training.sharding import make_mesh as m; "
    script += "print(m({'data': 2, 'fsdp': 8, 'tensor': 1}, d(parse('v6e:4x4'))).shape['fsdp'])"
    env = os.environ | environment(parse("v6e:4x4"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "8", done.stderr


@pytest.mark.slow
def test_tpu_compiler_without_a_tpu(tmp_path):
    pytest.importorskip("libtpu", reason="needs the extra `plan-tpu`")
    model = tmp_path / "config.json"
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model.write_text(json.dumps({"model_type": "llama", "vocab_size": 1024, **shape}))
    found = plan(small(**{"model.path": str(tmp_path), "mesh.data": 1, "mesh.fsdp": 4}), "v6e:2x2", seconds=1)
    asked = found["asked"]
    assert asked["fits"] and asked["limit"] == DEVICES["v6e"].memory
    assert {c["kind"] for c in asked["collectives"]} & {"all-gather", "collective-permute"}
    text = report(found, price=2.0)
    assert "the TPU compiler" in text and "US dollars" in text
    assert np.isfinite(found["time"]["seconds"])


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [("classify", "SequenceClassification"), ("masked", "MaskedLM")])
def test_heads_of_other_tasks_are_planned(forked, kind, name, tmp_path):
    import transformers

    base = tiny_labelled.make(tmp_path / "base", "bert")
    config = tiny_labelled.config(tmp_path, base, task__kind=kind, tuning__method="full")
    model = getattr(transformers, f"AutoModelFor{name}").from_config(transformers.AutoConfig.from_pretrained(base))
    found = plan(config, "cpu:1", data=True, choices=False)
    assert found["asked"]["fits"] and found["rows"]["labels"] == 8 and found["steps"] == 60
    assert found["asked"]["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert plan(config, "cpu:1", choices=False)["asked"]["parameters"] == found["asked"]["parameters"]


POLICY = {
    "task.kind": "policy", "task.rewards": ("length",), "task.updates": 2, "rollout.group": 4, "train.steps": 3,
    "generate.max_new_tokens": 16,
}  # fmt: skip
PRIVATE = {
    "privacy.epsilon": 8.0, "privacy.unit": "src", "export.checkpoint": "last", "train.steps": 0, "train.epochs": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, data, steps, unit_rows",
    [
        (POLICY, False, 4, 1),  # whole rollouts, each for two steps
        (POLICY, True, 4, 1),
        (PRIVATE, True, 8, 2),
    ],
    ids=["rollouts", "rollouts-of-rows", "persons"],
)
def test_a_plan_has_the_steps_that_a_run_has(fields, data, steps, unit_rows, tmp_path, monkeypatch):
    class Compiling(Exception):
        pass

    def compile_step(config, spec, devices, T, M, steps, quick):
        raise Compiling(f"{steps} {config.privacy.unit_rows}")

    monkeypatch.setattr(compiled, "compile_step", compile_step)
    rows = [{"src": f"dog {i // 2}", "tgt": "A dog."} for i in range(128)]  # 64 persons of two rows
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = {"data.train": str(tmp_path / "rows.jsonl"), "data.split": (1.0, 0.0, 0.0), "data.limit": 0}
    config = small(**parts | fields)
    job = {"config": config.to_dict(), "devices": "cpu:1", "data": data, "memory": None, "seconds": 1e-9}
    with pytest.raises(Compiling, match=f"^{steps} {unit_rows}$"):
        worker.work(job | {"choices": False, "quick": True})


@pytest.mark.slow
def test_drawing_is_counted_where_the_model_writes_its_batches(forked):
    config = small(**{
        "task.kind": "policy", "task.rewards": ("length",), "task.updates": 2, "generate.max_new_tokens": 16,
        "train.steps": 0, "train.epochs": 2.0, "rollout.group": 4, "data.split": (1.0, 0.0, 0.0),
    })  # fmt: skip
    found = plan(config, "cpu:1", data=True, choices=False)
    assert found["steps"] == 2 * 2 * 64 // 4  # four prompts a step, two epochs, two updates of each rollout
    lm = ftjax.load("builtin:stories260K")
    ids = jnp.zeros((1, found["rows"]["length"]), jnp.int32)
    forward = flops.count(jax.jit(lm.model.apply), lm.variables, ids, ids, ids + 1)
    # Eight answers a step of a rollout for two; the base and the model before the first update score them too.
    work = found["drawing"]["arithmetic"] * DEVICES["cpu"].flops
    assert work == pytest.approx(3 * 8 * forward, rel=0.2)
    size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    assert found["drawing"]["memory"] * DEVICES["cpu"].bandwidth > 16 * size
    found["choices"] = []
    assert "drawing the answers of a step" in report(found, price=2.0)
    config.task.environment, config.rollout.turns = "calculator.py:Calculator", 3
    assert plan(config, "cpu:1", choices=False)["drawing"]["memory"] > 2 * found["drawing"]["memory"]


@pytest.mark.slow
def test_answers_with_labels_and_rewards_are_planned(forked, tmp_path):
    rows = [{"prompt": f"Who has {n}?", "chosen": " Lily.", "rejected": " Tim has it."} for n in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"data.train": str(file), "data.prompt": "", "data.completion": "", "data.split": (1.0, 0.0, 0.0)}
    found = {}
    for name, task in (("causal", {}), ("kto", {"kind": "preference", "loss": "kto"}), ("reward", {"kind": "reward"})):
        config = small(**more, **{f"task.{key}": value for key, value in task.items()})
        found[name] = plan(config, "cpu:1", data=True, choices=False)
        assert found[name]["asked"]["fits"] and "drawing" not in found[name]
    assert found["kto"]["rows"]["length"] > 1.5 * found["causal"]["rows"]["length"]  # two texts a row
    assert found["reward"]["rows"]["length"] > 1.5 * found["causal"]["rows"]["length"]
    per_token = {name: one["asked"]["model_flops_per_token"] for name, one in found.items()}
    assert 1.2 < per_token["kto"] / per_token["causal"] < 1.6  # with a forward pass of the reference
