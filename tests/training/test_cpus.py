"""The cores of a CPU as devices: how many are taken, that they compute what one does, and what a run remembers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftjax
from ftjax import config as configs
from ftjax import cpus, decoding, xla
from ftjax.hub import families
from ftjax.hub.resolve import resolve
from ftjax.models.config import ModelConfig
from ftjax.training import auto_mesh
from ftjax.training import program as programs
from ftjax.training.report import read_metrics
from ftjax.tuning import Spec

STARTER = "builtin:stories260K"
FORTY = ModelConfig(
    vocab_size=32_000, width=384, layers=9, heads=6, kv_heads=6, head_dim=64, hidden=1024, max_positions=1024,
    tied=False,
)  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A function that lets this process take some of its simulated devices for so many cores."""

    def has(cores: int) -> None:
        monkeypatch.setattr(cpus, "_offered", cores)
        monkeypatch.setattr(cpus, "cores", lambda: cores)

    return has


def chosen(shape, T: float, overrides, dtype="float32", recorded=0) -> int:
    config = configs.default()
    configs.override(config, overrides)
    programs.fill_defaults(config)
    family, starter = families.read_config(resolve(STARTER))
    spec = Spec(shape or starter, families.linear_names(family, shape or starter), config.tuning, family)
    return auto_mesh.cpu_devices(config, spec, T, jnp.dtype(dtype), recorded)


FULL, ROWS = "tuning.method=full", "train.batch_size={}"


@pytest.mark.parametrize(
    "cores, shape, T, overrides, dtype, want",
    [
        # Measured on two cores: the starter's step takes 0.65 of one device's time.
        (2, None, 72, [FULL, ROWS.format(64)], "float32", 2),
        (2, None, 72, [ROWS.format(64)], "float32", 2),
        (16, None, 72, [ROWS.format(64)], "float32", 16),
        (12, None, 72, [ROWS.format(32)], "float32", 8),  # as many as divide the rows
        (16, None, 72, [ROWS.format(32), "train.accumulate=8"], "float32", 4),  # of a microbatch
        # Measured: within a sixth of each other, slower in bfloat16.
        (2, FORTY, 512, [ROWS.format(4)], "float32", 1),
        (2, FORTY, 512, [FULL, ROWS.format(4)], "float32", 1),
        (2, FORTY, 512, [FULL, ROWS.format(4)], "bfloat16", 1),
        (1, None, 72, [ROWS.format(64)], "float32", 1),
        # The user's own mesh.
        (2, None, 72, [ROWS.format(64), "mesh.data=1"], "float32", 1),
        (16, None, 72, [ROWS.format(64), "mesh.data=2", "mesh.fsdp=2"], "float32", 4),
        (16, FORTY, 512, [ROWS.format(4), "mesh.data=4"], "float32", 4),
    ],
)
def test_how_many_devices_a_run_takes(machine, cores, shape, T, overrides, dtype, want):
    machine(cores)
    assert chosen(shape, T, overrides, dtype) == want


def test_a_run_takes_the_number_that_it_began_with(machine):
    machine(8)
    assert chosen(None, 72, [ROWS.format(64)], recorded=2) == 2
    assert chosen(None, 72, [ROWS.format(64), "mesh.data=4"], recorded=2) == 4
    assert chosen(None, 72, [ROWS.format(64)], recorded=16) == 8


def run(run_dir: Path, say, **more) -> ftjax.Result:
    c = configs.default()
    c.run_dir, c.data.prompt, c.data.completion, c.data.limit = str(run_dir), "Words: {src}\nSentence:", " {tgt}", 160
    c.data.buckets, c.train.batch_size, c.train.steps, c.train.log_every, c.train.save_every = 1, 8, 8, 1, 4
    c.train.keep = 2
    c.train.eval_every, c.evaluate.rows, c.export.formats, c.log.tensorboard = 4, 16, (), False
    configs.override(c, [f"{key}={value}" for key, value in more.items()])
    return ftjax.train(c, say)


def losses(run_dir) -> np.ndarray:
    rows = read_metrics(run_dir)
    return np.array([[row[k] for row in rows if k in row] for k in ("loss", "grad_norm")])


def test_two_devices_train_as_one_does_and_a_run_that_goes_on_remembers_them(machine, tmp_path):
    said: list[str] = []
    machine(1)
    run(tmp_path / "one", said.append)
    machine(2)
    run(tmp_path / "two", said.append)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert [line for line in said if "CPU devices" in line] == [
        "2 CPU devices on 2 cores share the rows; mesh.data=1 takes one device"
    ]
    kept = [json.loads((tmp_path / name / "run.json").read_text())["devices"] for name in ("one", "two")]
    assert kept == [1, 2]

    # The last half again: to the bit with the same devices, however many cores there are.
    whole = losses(tmp_path / "two")
    for cores in (4, 1):
        said.clear()
        machine(cores)
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "8")
        run(tmp_path / "two", said.append)
        assert any("going on after step 4 of 8" in line for line in said)
        changed = [line for line in said if "began with 2 devices and goes on with 1" in line]
        assert len(changed) == (cores == 1)
        np.testing.assert_allclose(losses(tmp_path / "two"), whole, rtol=0 if cores > 1 else 1e-5)


def test_rows_dealt_to_devices_are_answered_and_judged_as_on_one(machine, tmp_path):
    lm = ftjax.load(STARTER)
    prompts = [f"Once upon a time there was a {word}" for word in ("dog", "little girl", "boat", "big red ball", "cat")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": " who was happy."}) + "\n" for p in prompts))
    found = {}
    for cores in (1, 2, 8):
        machine(cores)
        greedy = lm.generate(prompts, max_new_tokens=24)
        drawn = lm.generate(prompts, max_new_tokens=24, temperature=0.8, top_p=0.9, seed=3)
        found[cores] = greedy, drawn, ftjax.evaluate(lm, str(rows), say=lambda line: None)["loss"]
    for cores in (2, 8):
        assert found[cores][:2] == found[1][:2]
        assert found[cores][2] == pytest.approx(found[1][2], rel=1e-5)


def test_few_programs_wait_for_several_devices(machine, monkeypatch):
    machine(2)
    lm, decode, made, waiting = ftjax.load(STARTER), decoding.decode, [], []

    def counted(*arguments):
        made.append(decode(*arguments))
        waiting.append(sum(not state.counts.is_ready() for state in made))
        return made[-1]

    monkeypatch.setattr(decoding, "decode", counted)
    lm.generate([f"Once upon a time there were {i} dogs" for i in range(80)], max_new_tokens=40, batch_size=2)
    assert len(waiting) == 40 and max(waiting) <= 8


SAYS = "import jax; from ftjax import cpus; cpus.cores = lambda: 3; {}cpus.offer(); "
SAYS += "print(jax.device_count(), cpus.offered())"


@pytest.mark.parametrize(
    "before, flags, want",
    [
        ("", "", "3 3"),
        ("", "--xla_force_host_platform_device_count=2", "2 0"),
        ("jax.config.update('jax_num_cpu_devices', 5); ", "", "5 0"),
        ("jax.devices(); ", "", "1 0"),
    ],
)
def test_devices_are_offered_where_nobody_has_said_how_many(before, flags, want, forks, tmp_path):
    assert forks.run(tmp_path, program=SAYS.format(before), env={"XLA_FLAGS": flags}) == (0, f"{want}\n")


def test_a_model_that_is_opened_for_a_comparison_offers_devices_too(forks, tmp_path):
    program = "import jax; from ftjax import config, cpus; from ftjax.verdict.setting import open_model; "
    program += "cpus.cores = lambda: 3; config = config.default(); config.model.path = 'builtin:stories260K'; "
    program += "open_model('', config); print(jax.device_count(), cpus.offered())"
    assert forks.run(tmp_path, program=program, env={"XLA_FLAGS": ""}) == (0, "3 3\n")


def test_a_gpu_computes_the_same_bits_unless_speed_is_asked_for(monkeypatch):
    monkeypatch.setattr(xla.jax, "default_backend", lambda: "gpu")
    assert xla.options(1) == xla.GPU | xla.DETERMINISTIC
    assert xla.options(1, deterministic=False) == xla.GPU
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert xla.options(1) == xla.DETERMINISTIC


def test_xla_knows_the_options_for_a_gpu():
    assert jax.jit(lambda x: x + 1, compiler_options=xla.GPU | xla.DETERMINISTIC)(1) == 2
    with pytest.raises(Exception, match="xla_gpu_nothing"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_nothing": True})(1)


@pytest.mark.parametrize(
    "platform, settings, unroll",
    [("gpu", [], 1), ("gpu", ["train.deterministic=False"], 0), ("gpu", ["model.attention=xla"], 0), ("cpu", [], 0)],
)
def test_layers_with_cudnn_are_not_unrolled_where_the_bits_must_be_the_same(platform, settings, unroll):
    config = configs.default()
    configs.override(config, ["model.unroll=0", *settings])
    device = auto_mesh.Machine(1, 1e9, 1, platform, "9.0")
    told = auto_mesh.settle_unroll(config, device)
    assert config.model.unroll == unroll and bool(told) == (unroll == 1)
