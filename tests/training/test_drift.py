"""A long run gets no slower and no larger: nothing compiles once every shape of batch was seen, and nothing is kept."""

from __future__ import annotations

import functools
import gc

import jax
import numpy as np
import psutil
import pytest
import tiny

import ftjax
from ftjax import config as configs
from ftjax.training import loop, sharding
from ftjax.training import program as programs

COMPILED = []  # one entry for each program that XLA compiled, or read from its cache
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


def settings(tmp_path, **fields):
    config = configs.default()
    config.update_from_flattened_dict(
        {
            "run_dir": str(tmp_path / "run"), "tuning.method": "lora", "mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4,
            "data.prompt": "Words: {src}\nSentence:", "data.completion": " {tgt}", "data.max_length": 96,
            "data.limit": 200, "data.buckets": 3, "data.cache": "", "data.workers": 1, "train.batch_size": 2,
            "train.log_every": 1, "evaluate.rows": 8, "export.formats": (), "log.tensorboard": False,
            "log.compilation_cache": False,
        }
        | fields
    )  # fmt: skip
    return config


@pytest.mark.slow
def test_nothing_compiles_once_every_shape_was_seen(tmp_path, monkeypatch):
    """Steps over three lengths of rows: of each length the first and the second may compile, and no later one."""
    seen = []  # (T of the batch, programs compiled by its step and by all that went on since the step before)

    def spy(build, *args):
        program = build(*args)

        def step(state, frozen, batch):
            out = program.step(state, frozen, batch)
            seen.append((batch["tokens"].shape[1], len(COMPILED)))
            return out

        return program._replace(step=step)

    monkeypatch.setattr(loop, "build", functools.partial(spy, programs.build))
    config = settings(tmp_path, **{"train.steps": 60, "train.eval_every": 60, "train.save_every": 60})
    ftjax.train(config, say=lambda line: None)
    lengths = [T for T, _ in seen]
    assert len(seen) == 60 and len(set(lengths)) == 3 and len(COMPILED) > 3
    late = [
        step for step in range(1, 60) if seen[step][1] > seen[step - 1][1] and lengths[:step].count(lengths[step]) > 1
    ]
    assert not late, f"steps {late} of lengths {lengths} compiled something"


@pytest.mark.slow
def test_a_thousand_steps_keep_nothing(tmp_path):
    """The run's own step on batches of two shapes, taken again and again: arrays and memory stay as they were."""
    config = settings(tmp_path, **{"mesh.fsdp": 1, "mesh.tensor": 1, "train.steps": 1100})
    programs.fill_defaults(config)
    pair = tiny.tuned(tiny.pair("llama2"), method="lora", rank=4)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = programs.build(config, pair.spec, mesh, np.dtype("float32"), 1100)
        trained, frozen = program.begin(jax.random.key(0), jax.tree.map(jax.numpy.copy, pair.params))
        state = program.init_state(trained)
        batches = [
            tiny.batch([[doc], [doc[::-1]]], [[1], [1]], T)
            for doc, T in zip(tiny.documents((8, 16), 50), (8, 16), strict=True)
        ]
        process, alive, memory, compiled = psutil.Process(), [], [], []
        for step in range(1100):
            batch = sharding.place_batch(batches[step % 2], mesh, 2, slice(0, 2))
            state, report = program.step(state, frozen, batch)
            if step % 100 == 99:
                assert np.isfinite(float(report["loss"]))
                gc.collect()
                alive.append(len(jax.live_arrays()))
                memory.append(process.memory_info().rss)
                compiled.append(len(COMPILED))
    assert len(set(alive)) == 1, alive
    assert len(set(compiled)) == 1, compiled
    assert memory[-1] - memory[0] < 10e6, memory  # 10 kB a step would be seen
