"""Compile a run's step for devices that need not be present, and read memory, arithmetic and traffic from the program.

B rows, T tokens, M trained tokens a row at most.
"""

from __future__ import annotations

import math
import re
import resource
import time

import jax
import jax.numpy as jnp

from ftjax import tasks
from ftjax.errors import FtjaxError
from ftjax.lm import compute_dtype
from ftjax.models.axes import by_rows
from ftjax.models.config import attentions, layers_with
from ftjax.objectives import causal
from ftjax.plan import flops
from ftjax.plan.devices import Devices
from ftjax.training import hlo, privacy, sharding
from ftjax.training import program as programs
from ftjax.training.flops import flops_per_token
from ftjax.tuning import Spec

QUICK = {"exec_time_optimization_effort": -1.0}  # compiler options
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What the TPU compiler says when it refuses a program: early, of its temporaries alone, or late, of everything.
NUMBER = r"([\d.]+)([KMGT]?)"
EARLY = rf"HLO temporaries \({NUMBER}\) exceeds available HBM \({NUMBER}\)"
LATE = rf"Used {NUMBER} of {NUMBER} hbm"


def device_list(devices: Devices) -> list:
    """The devices of a TPU slice as its compiler knows them, or simulated devices. Raises FtjaxError for an unknown
    slice."""
    if not devices.topology:
        return jax.devices()[: devices.count]
    from jax.experimental import topologies

    layout = {}
    if devices.device.cores > 1:
        layout["chip_config_name"] = "megacore"  # as on the machines: a chip is one device, its TensorCores together
    if devices.count == 1:
        layout["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(devices.topology, "tpu", **layout).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise FtjaxError(f"--devices {devices.name}: the TPU compiler has no such slice: {error}") from None


def held(program, state, frozen, batch) -> dict[str, int]:
    """{kind: bytes that one device holds between steps}, exactly, from the shardings alone."""
    return {
        "trained weights": programs.shard_bytes(state.trained),
        "frozen weights": programs.shard_bytes(frozen),
        "moments": programs.shard_bytes(state.optimizer),
        "averaged weights": programs.shard_bytes(state.ema),
        "batch": programs.shard_bytes(batch),
    }


def compile_step(config, spec: Spec, devices: Devices, T: int, M: int, steps: int, quick: bool = False) -> dict:
    """Compile the step that `train` would run with `config`, and read memory, FLOPs, traffic and collectives from it.

    Args:
        config: The run's config.
        spec: The model and its tuning.
        devices: The planned devices.
        T: Tokens of a row.
        M: Most trained tokens of a row.
        steps: Steps of the run.
        quick: Let the TPU compiler use a quarter of its time and half of its memory. The program sends the same, but is
            fused less: Llama-3.1-8B with LoRA on v6e 4x4 needs 1 % more temporaries and 47 % more traffic through
            memory.

    Returns:
        A dict. For a program that the compiler refuses for its size, it has "fits": False and the memory that it would
        have used, and no traffic.

    Raises:
        FtjaxError: For a mesh or batch that is impossible.
    """
    mesh = sharding.make_mesh(config.mesh, device_list(devices))
    programs.check_rows(config, mesh, spec.model)
    started = time.perf_counter(), time.process_time()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = programs.build(config, spec, mesh, compute_dtype(config.model.dtype, devices.platform), steps)
        rows = privacy.fullest(config, sharding.row_ways(mesh))
        arguments = programs.arguments(program, rows, T, M, config)
        passes = tasks.find(config.task.kind).passes(config)
        out = {
            "mesh": {axis: int(n) for axis, n in mesh.shape.items()},
            "parameters": {"trained": programs.count(program.trained), "total": programs.total(program)},
            "model_flops_per_token": flops_per_token(
                spec.model, program.base, program.trained, program.frozen, T, passes
            ),
            "flops": flops.count(program.step, *arguments),
            "held": held(program, *arguments),
            "gradients": programs.gradient_bytes(program),
            "head": head_bytes(config, spec, mesh.shape, M, devices.platform),
            "drawing": drawing(config, spec, program, mesh, T),
            "sent": 0.0,
        }
        try:
            compiled = program.step.trace(*arguments).lower().compile(QUICK if quick and devices.topology else None)
        except jax.errors.JaxRuntimeError as error:
            early, late = re.search(EARLY, str(error)), re.search(LATE, str(error))
            if not (found := early or late):
                raise
            used, limit = (float(found[i]) * UNITS[found[i + 1]] for i in (1, 3))
            total = used + (sum(out["held"].values()) if early else 0)
            out |= {"fits": False, "at_first_sight": bool(early), "total": total, "limit": limit}
            out["temporaries"] = total - sum(out["held"].values())
            return out | _spent(started)
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    collectives = [c._asdict() for c in hlo.collectives(text)]
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = analysis.argument_size_in_bytes + new + analysis.temp_size_in_bytes
    out |= {
        "fits": total <= devices.device.memory,
        "total": total,
        "limit": devices.device.memory,
        "temporaries": analysis.temp_size_in_bytes,
        "arguments": analysis.argument_size_in_bytes,
        "traffic": hlo.memory_bytes(text),
        "collectives": collectives,
        "sent": sum(c["bytes"] for c in collectives),
    }
    return out | _spent(started)


def drawing(config, spec: Spec, program, mesh, T: int) -> dict:
    """Arithmetic and memory traffic, by formula, of drawing the texts of a step, each as long as it may be, and of
    scoring them; empty for a task that draws none.

    Every token reads all parameters once for a batch of texts, and the cache of the tokens before it or their state.
    Parameters that are split over `fsdp` are gathered, so that each device reads them all.
    """
    task = tasks.find(config.task.kind)
    if not task.collect:
        return {}
    N, passes = task.draws(config)
    model, texts = spec.model, config.train.batch_size / task.updates(config)
    shapes = model, program.base, program.trained, program.frozen, T
    forward = flops_per_token(*shapes, 1) - flops_per_token(*shapes)
    size = jnp.dtype(program.model.dtype).itemsize
    read = (
        programs.count(program.base) * size / mesh.shape["tensor"] * N * math.ceil(texts / config.generate.batch_size)
    )
    keys = 2 * T * size * sum(own.kv_heads * own.head_dim * len(layers) for own, layers in attentions(model).values())
    states = model.delta_value_heads * model.delta_key_dim * model.delta_value_dim * len(layers_with(model, "delta"))
    cache = texts * N * (keys + 8 * states) / mesh.size  # a state of float32 is read and written
    return {"flops": (1 + passes) * texts * T * forward, "traffic": read + cache, "sent": 0.0}


def _spent(started) -> dict:
    """The cost of compiling on this machine: seconds, CPU seconds, and the most memory of the process so far, in
    bytes."""
    return {
        "compile_seconds": time.perf_counter() - started[0],
        "compile_cpu_seconds": time.process_time() - started[1],
        "compile_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def head_bytes(config, spec: Spec, sizes: dict, M: int, platform: str) -> float:
    """Bytes of one chunk's logits on one device, float32; 0 for a head over labels, whose logits are few."""
    V, tensor = spec.model.vocab_size if spec.model.head.labels == 0 else 0, sizes["tensor"]
    rows = config.train.batch_size / config.train.accumulate / by_rows(sizes)
    at_once = causal.tokens_at_once(config.model.head_chunk, spec.model.vocab_size, platform)
    held = min(rows * M / sizes["sequence"], max(rows, at_once))
    return 4 * held * (V / tensor if V % tensor == 0 else V)
