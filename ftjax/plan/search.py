"""Other meshes, remat presets and batches for the same run, estimated and calibrated by one compiled program.

Memory between steps is exact: it follows from the shardings. Temporaries are estimated from the residuals of the
model's own backward pass, and scaled by what the compiler needed for the requested program. B rows, T tokens, M trained
tokens a row at most, V vocabulary, D width, L layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax import config as configs
from ftjax import tasks
from ftjax.errors import FtjaxError
from ftjax.lm import compute_dtype
from ftjax.models import remat
from ftjax.models.axes import by_rows
from ftjax.models.config import attentions, layers_with
from ftjax.plan import compiled, flops
from ftjax.plan.devices import Devices, larger
from ftjax.training import auto_mesh, sharding
from ftjax.training import program as programs
from ftjax.tree import flatten
from ftjax.tuning import Spec

TENSOR_WAYS = (1, 2, 4, 8)
BATCHES = (0.25, 0.5, 1, 2, 4, 8)  # times the batch that is asked for
STATE_PASSES = 3  # times that a step reads or writes weights and moments: forward, backward, update
ACCUMULATE = (2, 4, 8)  # tried where the batch does not fit at once
NO_SHAPES = ("model.remat", "train.batch_size", "train.accumulate")  # fields that no state or weight has its shape from
# Bytes a second between a device and its host's memory, one way, which makers do not state for TPUs: PCIe 4.0, 16 lanes
HOST_LINK = 32e9

# Tried where nothing fits: what a run may do without, the smallest change to what it learns first.
SMALLER = (
    {"model.trained_dtype": "bfloat16"},
    {"optim.name": "adafactor"},
    {"model.trained_dtype": "bfloat16", "optim.name": "adafactor"},
    {"tuning.method": "lora"},
    {"tuning.method": "lora", "model.quantise": "int8"},
    {"tuning.method": "lora", "model.quantise": "nf4"},
)


class Setting(NamedTuple):
    """One way to run: the overrides of the config, and the devices."""

    overrides: dict
    devices: Devices


def settings(config, spec: Spec, devices: Devices, batches=BATCHES, change: dict | None = None) -> list[Setting]:
    """All meshes with all remat presets, and with the requested batch times each of `batches`. change: overrides of all
    settings."""
    out = []
    # A CPU's memory is the host's.
    presets = [name for name in remat.CHOICES if devices.kind != "cpu" or not name.startswith("offload")]
    for sizes, preset in itertools.product(meshes(spec, devices), presets):
        multiple = programs.rows_multiple(config, sizes, spec.model)
        for batch in sorted({max(1, round(config.train.batch_size * n / multiple)) * multiple for n in batches}):
            cut = {"model.remat": preset} | ({"train.batch_size": batch} if batch != config.train.batch_size else {})
            out.append(Setting((change or {}) | _overrides(sizes) | cut, devices))
    return out


def accumulating(spec: Spec, devices: Devices) -> list[Setting]:
    """All meshes with remat, and the batch in more microbatches."""
    return [
        Setting(_overrides(sizes) | {"model.remat": "full", "train.accumulate": times}, devices)
        for sizes, times in itertools.product(meshes(spec, devices), ACCUMULATE)
    ]


def meshes(spec: Spec, devices: Devices) -> list[dict[str, int]]:
    """Possible sizes of the mesh's axes: tensor within a host and between heads; data only, fsdp only, or
    both; and experts dealt over the devices of data, or not."""
    out, dealt = [], 1 if spec.model.mixing else max(spec.model.experts, 1)
    for tensor in TENSOR_WAYS:
        whole = spec.model.kv_heads % tensor == 0 and spec.model.hidden % tensor == 0
        if devices.count % tensor or tensor > devices.device.per_host or not whole:
            continue
        rest = devices.count // tensor
        for fsdp in sorted({rest, min(rest, max(1, devices.device.per_host // tensor)), 1}):
            for expert in {1, math.gcd(rest // fsdp, dealt)} if rest % fsdp == 0 else ():
                sizes = {"data": rest // fsdp // expert, "fsdp": fsdp, "expert": expert, "tensor": tensor}
                out.append(auto_mesh.ONE_DEVICE | sizes)
    return out


def _overrides(sizes: dict[str, int]) -> dict:
    return {f"mesh.{axis}": n for axis, n in sizes.items()}


def changed(config, overrides: dict):
    """A copy of a config with other values. Learning rate and batch follow the method if they are not set."""
    new = configs.copy(config)
    configs.override(new, [f"{key}={value}" for key, value in overrides.items()])
    programs.fill_defaults(new)
    return new


class Search:
    """Estimates for settings of one run."""

    def __init__(self, config, spec: Spec, T: int, M: int, steps: int, asked: dict, devices: Devices):
        """asked: what compiled.compile_step returned for `config` on `devices`."""
        self.config, self.spec, self.T, self.M, self.steps = config, spec, T, M, steps
        self.programs, self.holds = {}, {}  # what settings have in common
        self.kernels = programs.kernels(config, compiled.device_list(devices)[0])
        guess = self._temporaries(config, asked["mesh"], devices)
        # What is refused at first sight was not compiled: nothing to calibrate by.
        self.scale = 1.0 if asked.get("at_first_sight") else max(asked["temporaries"], 1) / guess
        # What is left of the traffic without that of weights and moments is of activations, which goes with the rows.
        states = STATE_PASSES * sum(asked["held"].values())
        self.row_traffic = max(0.0, asked.get("traffic", 0.0) - states) / _rows(config, asked["mesh"])
        self.asked_flops = self._flops(config, devices)

    def estimate(self, setting: Setting) -> dict:
        """{"total", "flops", "traffic", "sent", ...} of a setting, with the same keys as compile_step returns."""
        config, devices = changed(self.config, setting.overrides), setting.devices
        sizes = sharding.mesh_sizes(config.mesh, devices.count)
        held = self._held(config, sizes, devices)
        total = sum(held.values()) + self.scale * self._temporaries(config, sizes, devices)
        row_flops = self._flops(config, devices)
        again = row_flops / self.asked_flops  # what is computed again is read and written again
        return described(config, self.spec, setting.overrides, sizes, devices, self.T) | {
            "total": total,
            "fits": total <= devices.device.memory,
            "flops": row_flops * config.train.batch_size,
            "traffic": STATE_PASSES * sum(held.values()) + again * self.row_traffic * _rows(config, sizes),
            "sent": self._sent(config, sizes, devices),
            "compiled": False,
        }

    def _program(self, config, sizes, devices):
        """The program of a setting. It is built once for all settings with the same shapes and shardings of its
        inputs."""
        dtype = compute_dtype(config.model.dtype, devices.platform)
        like = {key: value for key, value in configs.flat(config).items() if key not in NO_SHAPES}
        key = repr((like, sizes, dtype))
        if key not in self.programs:
            spec, mesh = self.spec._replace(tuning=config.tuning), sharding.abstract_mesh(sizes)
            self.programs[key] = programs.build(config, spec, mesh, dtype, self.steps)
        return key, self.programs[key]

    def _held(self, config, sizes, devices) -> dict[str, int]:
        B, (key, program) = config.train.batch_size, self._program(config, sizes, devices)
        if (key, B) not in self.holds:
            arguments = programs.arguments(program, B, self.T, self.M, config)
            self.holds[key, B] = compiled.held(program, *arguments)
        return self.holds[key, B]

    def _temporaries(self, config, sizes, devices) -> float:
        """Gradients, saved activations, one layer at work, the head's chunk, and a layer's gathered weights."""
        _, program = self._program(config, sizes, devices)
        gradients = programs.gradient_bytes(program)
        dtype = compute_dtype(config.model.dtype, devices.platform)
        saved, one_layer = (
            self._residuals(preset, sizes["tensor"], sizes.get("expert", 1), config.tuning.method, str(dtype))
            for preset in (config.model.remat, "none")
        )
        rows, layers = _rows(config, sizes) / config.train.accumulate, self.spec.model.layers
        weights = 2 * dtype.itemsize * programs.count(program.base) / layers / sizes["tensor"]
        gathered = weights if sizes["fsdp"] * sizes["sequence"] > 1 else 0
        head = 2 * compiled.head_bytes(config, self.spec, sizes, self.M, devices.platform)
        twice = 2 if config.train.accumulate > 1 else 1
        return twice * gradients + rows * (saved + one_layer / layers) + head + gathered

    @functools.cache  # noqa: B019  one search lives as long as the process
    def _residuals(self, preset: str, tensor: int, expert: int, method: str, dtype: str) -> float:
        """Bytes that the backward pass of the blocks keeps of one row, on a device of a mesh with these axes."""
        config = changed(self.config, {"tuning.method": method, "model.quantise": "none"})
        spec, sizes = self.spec._replace(tuning=config.tuning), {"tensor": tensor, "expert": expert}
        return auto_mesh.saved_row_bytes(config, spec, preset, self.T, dtype, sizes, self.kernels)

    def _flops(self, config, devices) -> float:
        """FLOPs of a step for each of its rows."""
        dtype = compute_dtype(config.model.dtype, devices.platform)
        return self._row_flops(config.model.remat, config.tuning.method, str(dtype))

    @functools.cache  # noqa: B019
    def _row_flops(self, preset: str, method: str, dtype: str) -> float:
        config = changed(self.config, {"tuning.method": method, "model.remat": preset, "model.quantise": "none"})
        spec, mesh = self.spec._replace(tuning=config.tuning), sharding.abstract_mesh(auto_mesh.ONE_DEVICE)
        program = programs.build(config, spec, mesh, jnp.dtype(dtype), self.steps, self.kernels)
        sums = tasks.objective(config, program.model)
        _, _, batch = programs.arguments(program, 1, self.T, self.M, config)

        def gradient(trained, frozen, batch):
            return jax.grad(lambda t: sums(program.variables(t, frozen), batch)[0])(trained)

        return flops.count(gradient, program.trained, program.frozen, batch)

    def _sent(self, config, sizes, devices) -> float:
        """Estimate the bytes that a device sends per step.

        Over fsdp and sequence, weights are gathered twice and gradients scattered. Over data and expert, gradients are
        summed, but those of experts over data alone: over expert their tokens are gathered and their results scattered.
        Over tensor, activations are summed four times per layer, or six times if remat does not keep them. Over
        sequence, keys and values are sent.
        """
        _, program = self._program(config, sizes, devices)
        itemsize = compute_dtype(config.model.dtype, devices.platform).itemsize
        data, expert, sequence, tensor = (sizes[a] for a in ("data", "expert", "sequence", "tensor"))
        split = sizes["fsdp"] * sequence
        away = lambda n: (n - 1) / n  # noqa: E731
        own, trained = _not_experts(program.base), _not_experts(program.trained)
        of_experts = (programs.count(program.trained) - trained) / expert
        base = own + (programs.count(program.base) - own) / expert
        weights = base * itemsize / tensor * config.train.accumulate
        gradients = 4 * (trained + of_experts) / tensor * config.train.accumulate
        preset = remat.PRESETS.get(config.model.remat)
        again = 2 * (preset is not None and "o" not in preset.keep + preset.offload)
        sums = (4 + again) * self.spec.model.layers
        activations = _rows(config, sizes) * self.T * self.spec.model.width * itemsize
        over_fsdp = (2 * weights + gradients) * away(split)
        # Keys and values of rows are gathered forward and again backward, and their gradients scattered.
        shape = self.spec.model
        heads = sum(own.kv_heads * own.head_dim * len(layers) for own, layers in attentions(shape).values())
        keys = 2 * heads / tensor * self.T * _rows(config, sizes) * itemsize
        over_tokens = 3 * keys * (sequence - 1)
        summed = trained * away(data * expert) + of_experts * away(data)
        summed *= 8 / tensor * config.train.accumulate / split
        between_experts = (4 + again) * len(layers_with(shape, "mlp")) * activations * (expert - 1)
        return over_fsdp + over_tokens + summed + between_experts + 2 * sums * activations * away(tensor)

    def fitting_instead(self, devices: Devices) -> list[dict]:
        """Estimates of settings that would fit, the fastest of each kind first: the same run split otherwise, or, if
        that does not help, runs that train less; and the same run on more devices."""
        same = self._fitting(settings(self.config, self.spec, devices, (1,)))
        cut = same or self._fitting(accumulating(self.spec, devices))
        rows, now = self.config.train.batch_size, configs.flat(self.config)
        smaller = []
        for change in SMALLER:
            if not cut and any(now[key] != value for key, value in change.items()):
                smaller += self._fitting(settings(self.config, self.spec, devices, (1,), change))[:1]
        more = []
        for next_size in larger(devices):
            sizes = auto_mesh.ONE_DEVICE | {"fsdp": next_size.count}
            multiple = programs.rows_multiple(self.config, sizes, self.spec.model)
            batch = {"model.remat": "full", "train.batch_size": -(-rows // multiple) * multiple}
            overrides = _overrides(sizes) | batch
            more = more or self._fitting([Setting(overrides, next_size)])
        return cut[:2] + smaller + more

    def _fitting(self, tried: list[Setting]) -> list[dict]:
        rows = [row for setting in tried if (row := self.try_estimate(setting)) and row["fits"]]
        return sorted(rows, key=lambda row: _seconds(row, tried[0].devices))

    def try_estimate(self, setting: Setting) -> dict | None:
        """`estimate`, or None for a setting that the method, the mesh or the batch makes impossible."""
        config = changed(self.config, setting.overrides)
        try:
            sizes = sharding.mesh_sizes(config.mesh, setting.devices.count)
            divides = config.train.batch_size % programs.rows_multiple(config, sizes, self.spec.model) == 0
            return self.estimate(setting) if divides else None
        except FtjaxError:  # such as a method that changes what quantised kernels hold
            return None


def described(config, spec: Spec, overrides: dict, sizes: dict, devices: Devices, T: int) -> dict:
    """What is known of a setting without compiling it, see `Search.estimate`."""
    return {
        "overrides": overrides, "devices": devices.name, "mesh": sizes, "remat": config.model.remat,
        "batch": config.train.batch_size, "accumulate": config.train.accumulate,
        "host": _host_bytes(config, spec, sizes, devices, T),
    }  # fmt: skip


def _host_bytes(config, spec: Spec, sizes: dict, devices: Devices, T: int) -> float:
    """Bytes that a device sends to its host's memory in a step, and reads back, for tensors that remat keeps there; 0
    on a CPU, whose memory is the host's."""
    preset = remat.PRESETS.get(config.model.remat, remat.Preset())
    itemsize = compute_dtype(config.model.dtype, devices.platform).itemsize * (devices.kind != "cpu")
    values = remat.kept_values(auto_mesh.shape_of_one(spec.model, sizes), preset.offload) * spec.model.layers
    return values * itemsize * T * _rows(config, sizes)


def _not_experts(tree) -> int:
    kept = {path: x for path, x in flatten(tree).items() if "/experts" not in path}
    return programs.count(kept)


def _rows(config, sizes) -> float:
    """Rows of a step on one device; a device with a part of a row counts that part."""
    return config.train.batch_size / (by_rows(sizes) * sizes["sequence"])


def _seconds(row: dict, devices: Devices) -> float:
    """Seconds per token of a setting, by the roofline."""
    return roofline(row, devices)["seconds"] / row["batch"]


def roofline(row: dict, devices: Devices) -> dict:
    """Seconds of a step at the peaks of the devices: arithmetic, memory and links, and the longest of them.

    It assumes that the others overlap with the longest; a real run reaches a share of this.
    """
    device = devices.device
    parts = {
        "arithmetic": row["flops"] / devices.count / device.flops,
        "memory": row["traffic"] / device.bandwidth,
        "links": row["sent"] / device.link if devices.count > 1 else 0.0,
        "host": row.get("host", 0.0) / HOST_LINK,
    }
    longest = max(parts, key=parts.get)
    return parts | {"seconds": parts[longest], "bound": longest}


def pareto(rows: list[dict], devices: Devices) -> list[dict]:
    """The settings that fit and that no other setting beats in both speed and memory, the fastest first."""
    fitting = sorted((row for row in rows if row["fits"]), key=lambda row: (_seconds(row, devices), row["total"]))
    out, least = [], math.inf
    for row in fitting:
        if row["total"] < least:
            out.append(row)
            least = row["total"]
    return out
