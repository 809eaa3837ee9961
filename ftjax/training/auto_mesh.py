"""Choices that a config leaves open: how many CPU devices a run takes (`mesh.data = -1`), from arithmetic; the shape of
the mesh (`mesh.data = 0`), and which tensors are kept for the backward pass (`model.remat = auto`), from memory and
traffic. Each has a reason for the user.

`ftjax plan` compiles several settings and compares them; this module decides by rules, in a second. T tokens a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax import config as configs
from ftjax import cpus, tasks
from ftjax.models import axes, remat
from ftjax.models.axes import MESH_AXES
from ftjax.models.config import hidden_per_token, layers_with
from ftjax.models.delta import CHUNK
from ftjax.objectives import causal
from ftjax.training import privacy, sharding
from ftjax.training import program as programs
from ftjax.training.flops import flops_per_token
from ftjax.tuning import Spec

USED = 0.85  # share of a device's memory that a run is planned into: the rest is for what is not counted here
SMALL = 0.1  # of that: states that take less are not worth gathering
MANY = 0.5  # share of the parameters, from which on gradients are as large as weights
GIB = 2**30
ONE_DEVICE = dict.fromkeys(MESH_AXES, 1)
# Of one core of a CPU, about: FLOP/s of a step by bytes of a value; seconds by which each further device lengthens it
# for all, at least, and for each trained parameter, whose gradient is summed and whose update every device repeats.
CORE, MEETING, UPDATE = {4: 100e9, 2: 250e9}, 2.5e-4, 2e-9


class Machine(NamedTuple):
    """The properties of the devices that the rules use."""

    count: int
    memory: float  # bytes of a device that a program may use; inf: unknown
    per_host: int  # devices with fast links between all of them
    platform: str = "cpu"  # cpu | gpu | tpu
    compute_capability: str = ""  # of a GPU, such as 9.0
    offloads: bool = False  # whether the host's memory is another one, which they reach by themselves


def cpu_devices(config, spec: Spec, T: float, dtype, recorded: int = 0) -> int:
    """How many devices a run takes of those that `cpus.offer` made; where it made none, all that there are.

    The config's own mesh comes first, then the number that the run began with, then the estimate of `cpus.count`.

    Args:
        config: Of the run, with its defaults filled in.
        spec: What is trained.
        T: Tokens of a row, on average.
        dtype: Of computation.
        recorded: With how many devices the run began; 0 for a new run.
    """
    offered, sizes = cpus.offered(), [config.mesh[axis] for axis in MESH_AXES]
    if not offered:
        return jax.device_count()
    if min(sizes) > 0 or max(sizes) > 1:
        asked = math.prod(sizes)
        return asked if 0 < asked <= offered else offered
    if 0 < recorded <= offered:
        return recorded
    rows = config.train.batch_size // config.train.accumulate
    program = programs.build(config, spec, sharding.abstract_mesh(ONE_DEVICE), dtype, 1)
    passes = tasks.find(config.task.kind).passes(config)
    flops = rows * T * flops_per_token(spec.model, program.base, program.trained, program.frozen, T, passes)
    repeated = MEETING + UPDATE * programs.count(program.trained)
    return cpus.count(_parts(rows, spec.model), spec.model.width, flops / CORE[jnp.dtype(dtype).itemsize], repeated)


def _parts(rows: int, shape) -> int:
    """Number of parts that rows can be cut into. The groups of a mixture of tokens stay whole."""
    return max(rows // max(shape.mixing, 1), 1)


def here(devices: int = 0) -> Machine:
    """The devices of this run: so many of all, 0 for all."""
    device, count = jax.local_devices()[0], min(devices or jax.device_count(), jax.local_device_count())
    memory = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count
    offloads = device.platform != "cpu" and remat.HOST in {m.kind for m in device.addressable_memories()}
    capability = getattr(device, "compute_capability", "")
    return Machine(devices or jax.device_count(), memory, count, device.platform, capability, offloads)


def choose(config, spec: Spec, machine: Machine, T: int, dtype) -> tuple[dict[str, int], str]:
    """Choose the mesh for rows of T tokens.

    1. Rows are split over devices as far as they divide, because rows need nothing of each other. If devices are left,
       several of them share rows: between heads and feed-forward (tensor) within a host as far as they divide, else by
       tokens (sequence).
    2. If the activations of a row fit no device, the row is split by its tokens (sequence) until they do.
    3. Among the devices with rows of their own, data parallelism keeps weights whole and sends only gradients, while
       FSDP gathers weights twice a step. So weights are split only as far as needed to fit. If most parameters are
       trained, both send about 8 bytes a parameter, and splitting over all devices costs nothing.

    Args:
        config: The whole config.
        spec: The model and its tuning.
        machine: The devices.
        T: Tokens of a row.
        dtype: Dtype of computation.

    Returns:
        (sizes of the mesh's axes, the reason in one sentence).
    """
    shape, rows = spec.model, config.train.batch_size // config.train.accumulate
    states, many, _ = _states(config, spec, dtype, ONE_DEVICE)
    row = _row_bytes(config, shape, T, jnp.dtype(dtype).itemsize)
    budget = USED * machine.memory - _head_bytes(config, shape, machine)

    by_rows = math.gcd(machine.count, _parts(rows, shape))
    shared = machine.count // by_rows
    whole = math.gcd(math.gcd(shape.kv_heads, shape.hidden), machine.per_host)  # ways that tensor may cut
    recurrent = bool(layers_with(shape, "delta"))  # its rows stay whole; what tensor does not divide does so too
    tensor, reasons = shared if recurrent else math.gcd(shared, whole), []
    sequence = shared // tensor
    if shared > 1:
        reasons.append(f"{rows} rows divide over {by_rows} of {machine.count} devices")
    while row / (tensor * sequence) > budget / 2 and by_rows % 2 == 0 and not recurrent:
        by_rows, sequence = by_rows // 2, sequence * 2
        reasons = [f"a row of {T:,} tokens takes about {row / GIB:.3g} GiB"]

    def held(fsdp):
        return states / (fsdp * sequence * tensor) + row * rows / (by_rows * sequence * tensor)

    ways = [n for n in range(1, by_rows + 1) if by_rows % n == 0]
    fsdp = next((n for n in ways if held(n) <= budget), by_rows)
    shared = tensor * sequence
    need = f"weights, moments and gradients take {states / GIB:.3g} GiB"
    need += f", {states / shared / GIB:.3g} on each of {shared} devices that share rows" if shared > 1 else ""
    of = "" if math.isinf(machine.memory) else f" of {machine.memory / GIB:.3g} GiB a device"
    if states / shared <= SMALL * budget:
        fsdp = 1
        reasons.append(f"{need}{of}: little, not split further")
    elif many:
        fsdp = by_rows
        reasons.append(f"{need}, most of it trained: split over all devices with rows, which sends no more")
    elif fsdp > 1:
        reasons.append(f"{need}{of}: split as far as they must be")
    else:
        reasons.append(f"{need}{of}: not split further")
    if held(fsdp) > budget:
        reasons.append(f"about {held(fsdp) / GIB:.3g} GiB a device even so: see `ftjax plan`")
    sizes = {"data": by_rows // fsdp, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    return sizes, "; ".join(reasons)


def settle(config, spec: Spec, machine: Machine, T: int, dtype) -> str:
    """Fill in the mesh of a config that leaves it open. Returns the choice with its reason, or an empty text if there
    was no choice."""
    if config.mesh.data != 0:
        return ""
    sizes, reason = choose(config, spec, machine, T, dtype)
    config.mesh.update({"expert": 1} | sizes)
    return "mesh " + " x ".join(f"{axis}={n}" for axis, n in sizes.items()) + f": {reason}"


def settle_remat(config, spec: Spec, machine: Machine, sizes: dict[str, int], T: int, dtype) -> str:
    """Fill in model.remat of a config that leaves it open. Returns the choice with its reason, or an empty text if
    there was no choice.

    Presets are tried from the fastest on. A GPU computes elementwise operations again faster than it reads their
    results (docs/performance.md), so there `products` comes before `none`. A preset that sends tensors to the host's
    memory is taken only if no other fits. sizes: sizes of the mesh's axes.
    """
    if config.model.remat != "auto":
        return ""
    rows = config.train.batch_size / config.train.accumulate / (axes.by_rows(sizes) * sizes["sequence"])
    config.model.remat = "none"
    if machine.platform == "cpu" and _certainly_fits(config, spec.model, machine, rows, T, dtype):
        return ""
    states, _, gradient = _states(config, spec, dtype, sizes)
    if config.privacy.epsilon and not config.privacy.unit:  # a step computes groups of this many rows
        rows = min(rows, max(1, privacy.AT_ONCE // gradient))
    head, attention = _head_bytes(config, spec.model, machine), programs.kernels(config, machine)

    @functools.cache
    def saved(preset):
        return saved_row_bytes(config, spec, preset, T, dtype, sizes, attention)

    def needed(preset):
        return states + rows * (saved(preset) + saved("none") / spec.model.layers) + head  # one layer is at work

    tried, budget = {}, USED * machine.memory
    order = [name for name in remat.CHOICES if not name.startswith("offload")] + ["offload"] * machine.offloads
    if machine.platform == "gpu":
        order.remove("none")
    for preset in order:
        tried[preset] = needed(preset)
        if tried[preset] <= budget:
            break
    config.model.remat = preset
    of = "" if math.isinf(machine.memory) else f" of {machine.memory / GIB:.3g}"
    note = f"remat {preset}: about {tried[preset] / GIB:.3g}{of} GiB a device"
    if len(tried) > 1:
        note += "; " + ", ".join(f"{name} {size / GIB:.3g}" for name, size in tried.items() if name != preset)
    return note + ("; see `ftjax plan`" if tried[preset] > budget else "")


def settle_unroll(config, device) -> str:
    """Set model.unroll=1 where XLA fails to compile a deterministic program that calls cuDNN for each layer. Returns
    what was changed, or an empty text."""
    cudnn = programs.kernels(config, device).name == "cudnn"
    if config.model.unroll == 1 or not (cudnn and config.train.deterministic):
        return ""
    config.model.unroll = 1
    return "model.unroll=1: XLA cannot unroll cuDNN's attention if train.deterministic is set"


def _certainly_fits(config, shape, machine: Machine, rows: float, T: int, dtype) -> bool:
    """Whether a run without remat fits many times over, so that nothing has to be traced to know it."""
    hidden = shape.hidden * max(shape.experts, 1) + shape.shared_hidden
    parameters = shape.layers * shape.width * (4 * shape.width + 3 * hidden) + 2 * shape.vocab_size * shape.width
    activations = rows * _row_bytes(config, shape, T, jnp.dtype(dtype).itemsize)
    return 20 * parameters + 2 * activations + _head_bytes(config, shape, machine) < machine.memory / 2


def saved_row_bytes(config, spec: Spec, preset: str, T: int, dtype, sizes: dict[str, int], attention) -> float:
    """Bytes that a device of a mesh of these sizes keeps for the backward pass of the blocks, for one of its rows.

    They are read from the program itself, which is traced with the remat `preset` and these Kernels of attention.
    """
    config = configs.copy(config)
    config.model.update(remat=preset, quantise="none")
    spec = spec._replace(model=shape_of_one(spec.model, sizes), tuning=config.tuning)
    program = programs.build(config, spec, sharding.abstract_mesh(ONE_DEVICE), jnp.dtype(dtype), 1, attention)
    # Weights are among what is kept, as they lie, cast, or those of some layers. They do not grow with the rows and are
    # not counted: with more rows than layers, no other array has their shape.
    parameters = {x.shape for x in jax.tree.leaves((program.trained, program.frozen))}
    rows, of_layer = spec.model.layers + 1, {shape[1:] for shape in parameters}
    ids = jax.ShapeDtypeStruct((rows, T), jnp.int32)

    def hidden(trained, frozen, ids):
        return program.model.apply(program.variables(trained, frozen), ids, method="hidden")

    kept = remat.kept_bytes(hidden, program.trained, program.frozen, ids)
    weights = lambda shape: shape in parameters or shape[:1] < (rows,) and shape[1:] in of_layer  # noqa: E731
    return sum(size for shape, size in kept if not weights(shape)) / rows


def shape_of_one(shape, sizes: dict[str, int]):
    """The part of a model that one device of a mesh of these sizes computes of its rows, as a ModelConfig.

    What `tensor` does not divide stays whole, as in `models.axes.spec`. Attention is assumed to be cut between KV heads
    as far as these divide. If `tensor` is larger, the compiler may cut further, and this is an upper estimate. The
    devices of `expert` have room for the tokens of one another: each token may choose the experts of one device alone.
    """
    tensor, expert = sizes["tensor"], sizes.get("expert", 1)
    groups = math.gcd(shape.kv_heads, shape.global_kv_heads, tensor)  # 0: all layers have kv_heads
    part = lambda size: size // tensor if size % tensor == 0 else size  # noqa: E731
    used = expert * min(shape.experts_used, shape.experts // expert) if expert > 1 else shape.experts_used
    return dataclasses.replace(
        shape, heads=shape.heads // groups, kv_heads=shape.kv_heads // groups,
        global_kv_heads=shape.global_kv_heads // groups, hidden=part(shape.hidden),
        vocab_size=part(shape.vocab_size), experts_used=used,
    )  # fmt: skip


def _states(config, spec: Spec, dtype, sizes: dict[str, int]) -> tuple[float, bool, int]:
    """Memory of the state on one device.

    Returns (bytes of weights, moments, averages and gradients on a mesh of these sizes, whether most parameters are
    trained, bytes of the gradients alone).
    """
    program = programs.build(config, spec, sharding.abstract_mesh(sizes), dtype, 1)
    state = programs.placed(jax.eval_shape(program.init_state, program.trained), program.state_places)
    held = programs.shard_bytes((state, programs.placed(program.frozen, program.frozen_places)))
    trained, total = programs.count(program.trained), programs.count((program.trained, program.frozen))
    gradient = programs.gradient_bytes(program)
    return held + gradient, trained > MANY * total, gradient


def _row_bytes(config, shape, T: int, itemsize: int) -> float:
    """Approximate bytes of one row's activations: what is kept for the backward pass, and one layer at work."""
    products = itemsize * (8 * shape.width + 4 * hidden_per_token(shape))  # a token of a layer
    keys, values = (shape.delta_value_heads * size for size in (shape.delta_key_dim, shape.delta_value_dim))
    # What `delta.chunked` keeps of a token: its arrays (H, d) and (H, e), its rows of (c, c), its share of the states.
    delta = 16 * (keys + values) + 8 * shape.delta_value_heads * CHUNK + 4 * keys * shape.delta_value_dim / CHUNK
    products += 4 * delta * len(layers_with(shape, "delta")) / shape.layers  # in float32
    at_work = products + 12 * shape.heads * T  # scores, probabilities and their gradients in float32
    kept = products + itemsize * shape.heads * T
    if config.model.remat != "none":  # auto makes do with what the mesh leaves
        preset = remat.PRESETS["full" if config.model.remat == "auto" else config.model.remat]
        names = preset.keep if "input" in preset.offload else ("input", *preset.keep)
        kept = itemsize * remat.kept_values(shape, names)
    return T * (shape.layers * kept + at_work)


def _head_bytes(config, shape, machine: Machine) -> int:
    """Bytes of the logits that a device holds at once, and of their gradients."""
    return 8 * causal.tokens_at_once(config.model.head_chunk, shape.vocab_size, machine.platform) * shape.vocab_size
