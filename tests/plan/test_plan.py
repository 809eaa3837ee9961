"""A plan against what really happens: the program that `train` compiles, XLA's own counts, real runs of the command."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_labelled
from jax.sharding import NamedSharding, PartitionSpec

from ftjax import cli
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.models.config import ModelConfig
from ftjax.plan import compiled, flops, search
from ftjax.plan.devices import DEVICES, larger, parse
from ftjax.plan.report import report
from ftjax.plan.run import environment, plan
from ftjax.training import hlo, loop, sharding
from ftjax.training import program as programs

ROOT = Path(__file__).resolve().parents[2]


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
        ("h200x8", "h200", 8, None),
        ("h200", "h200", 1, None),
        ("cpu:8", "cpu", 8, None),
    ],
)
def test_devices_by_name(text, kind, count, topology):
    devices = parse(text)
    assert (devices.kind, devices.count, devices.topology) == (kind, count, topology)
    assert larger(devices)[0].count == 2 * count and devices.device is DEVICES[kind]


@pytest.mark.parametrize("text", ["v7:4x4", "h20x8", "v6e:16", "v6e", "h200:2x2", "cpu:0", "v5p:4x8", ""])
def test_unknown_devices_are_told(text):
    with pytest.raises(FtjaxError, match="--devices"):
        parse(text)


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
        return program.step, programs.arguments(program, 4, 256, 256)

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
def test_memory_is_that_of_the_program_that_train_compiles(tmp_path, monkeypatch, fields):
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
    for overrides in ({"train.batch_size": 32}, {"model.remat": "full"}, {"mesh.fsdp": 4, "mesh.tensor": 2}):
        guess = estimates.estimate(search.Setting(overrides, devices))
        real = compiled.compile_step(search.changed(config, overrides), spec, devices, 256, 256, 2)
        print(overrides, guess["total"] / real["total"], guess["flops"] / real["flops"])
        assert 0.6 < guess["total"] / real["total"] < 1.7
        assert guess["flops"] == pytest.approx(real["flops"], rel=0.05)


# ---- the command ------------------------------------------------------------------------------------------------
def command(*args, **environment):
    env = os.environ | {"FTJAX_MALLOC": "0", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "ftjax", "plan", *args], capture_output=True, text=True, env=env, cwd=ROOT
    )


QUICK = ("--config", "configs/quickstart.py", "--config.data.max_length=128", "--config.model.unroll=1")


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(tmp_path):
    out = tmp_path / "plan.json"
    done = command(*QUICK, "--devices", "cpu:1", "--memory", "0.1", "--json", str(out))
    assert done.returncode == 3, done.stderr
    assert "does not fit: 0." in done.stdout and "of 0.1 GiB a device" in done.stdout
    found = json.loads(out.read_text())
    first = found["instead"][0]
    overrides = [f"--config.{key}={value}" for key, value in first["overrides"].items()]
    assert " ".join(overrides) in done.stdout
    again = command(*QUICK, "--devices", first["devices"], "--memory", "0.1", "--seconds", "1", *overrides)
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.parametrize(
    "args, told",
    [
        (("--devices", "v9:2x2"), "unknown device"),
        (("--devices", "cpu:8", "--config.mesh.fsdp=3"), "does not multiply to the 8 devices"),
        (("--devices", "cpu:8", "--config.train.batch_size=4"), "cannot be split"),
        (("--share", "0"), "--share"),
    ],
)
def test_a_plan_that_cannot_be_is_told_in_a_line(args, told):
    done = command("--config", "configs/quickstart.py", *args)
    assert done.returncode == 2
    assert told in done.stderr and "Traceback" not in done.stderr


def test_a_tpu_needs_its_compiler(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", "--config", str(ROOT / "configs/quickstart.py"), "--devices", "v6e:2x2"]) == 2
    assert "plan-tpu" in capsys.readouterr().err


def test_axes_that_take_part_of_a_side_of_a_slice():
    pytest.importorskip("libtpu", reason="needs the extra `plan-tpu`")
    script = "from ftjax.plan.compiled import device_list as d; from ftjax.plan.devices import parse; "
    script += "from ftjax.training.sharding import make_mesh as m; "
    script += "print(m({'data': 2, 'fsdp': 8, 'tensor': 1}, d(parse('v6e:4x4'))).shape['fsdp'])"
    env = os.environ | environment(parse("v6e:4x4")) | {"PYTHONPATH": str(ROOT)}
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
def test_heads_of_other_tasks_are_planned(kind, name, tmp_path):
    import transformers

    base = tiny_labelled.make(tmp_path / "base", "bert")
    config = tiny_labelled.config(tmp_path, base, task__kind=kind, tuning__method="full")
    model = getattr(transformers, f"AutoModelFor{name}").from_config(transformers.AutoConfig.from_pretrained(base))
    found = plan(config, "cpu:1", data=True, choices=False)
    assert found["asked"]["fits"] and found["rows"]["labels"] == 8 and found["steps"] == 60
    assert found["asked"]["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert plan(config, "cpu:1", choices=False)["asked"]["parameters"] == found["asked"]["parameters"]
