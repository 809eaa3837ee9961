"""The devices that can be planned for: memory, speed and links from their makers' pages, and prices."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ftjax.errors import FtjaxError, nearest


class Device(NamedTuple):
    """One chip or card. Rates are peaks per second; a run reaches a share of them."""

    memory: float  # bytes that a program may use: the limit of the TPU compiler, or the nominal size of the card
    flops: float  # dense bfloat16
    bandwidth: float  # bytes of device memory
    link: float  # bytes that one device sends to its neighbours, all links together, one way
    price: float | None  # US dollars an hour, on demand; see PRICED
    topology: int = 0  # dimensions of a TPU slice; 0: no TPU
    per_host: int = 8  # devices of one host
    source: str = ""
    cores: int = 1  # how often gcloud's name of a slice counts each chip: 2 if it counts TensorCores


PRICED = "Google's list price on demand in its cheapest region, 2025; check it, or give --price"
TPUS = "https://docs.cloud.google.com/tpu/docs/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
GIB = 2**30

# Links of TPUs are stated both ways together; half of that is sent. GPUs: NVLink, likewise. A program's usable memory
# on a TPU is what its compiler says when it refuses one.
DEVICES = {
    "v4": Device(30.75 * GIB, 275e12, 1.2e12, 150e9, 3.22, 3, 4, TPUS + "v4", 2),
    "v5e": Device(15.75 * GIB, 197e12, 0.819e12, 200e9, 1.20, 2, 8, TPUS + "v5e"),
    "v5p": Device(95.74 * GIB, 459e12, 2.765e12, 600e9, 4.20, 3, 4, TPUS + "v5p", 2),
    "v6e": Device(31.25 * GIB, 918e12, 1.638e12, 400e9, 2.70, 2, 8, TPUS + "v6e"),
    "a100": Device(80e9, 312e12, 2.039e12, 300e9, None, source=NVIDIA + "a100"),
    "h100": Device(80e9, 989e12, 3.35e12, 450e9, None, source=NVIDIA + "h100"),
    "h200": Device(141e9, 989e12, 4.8e12, 450e9, None, source=NVIDIA + "h200"),
    # No datasheet: one process's share of a machine with two cores and AMX, measured with float32 products.
    "cpu": Device(math.inf, 0.35e12, 20e9, 10e9, 0.0, source="measured on two cores of a Xeon with AMX, float32"),
}

# The slices that gcloud names, by the pages of TPUS, 2025. Others are named by their sides.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SLICES = {"v4": DEEP, "v5e": FLAT, "v5p": (*DEEP, "16x16x24"), "v6e": FLAT}
GCLOUD = {"v5e": "v5litepod"}  # gcloud's name of a kind, if it is different


class Devices(NamedTuple):
    """A number of devices of one kind, as `--devices` names them."""

    name: str  # as given, or the sides of a TPU slice, such as v5p:4x8x8
    kind: str
    count: int
    device: Device

    @property
    def platform(self) -> str:
        """JAX's name of the platform: cpu, gpu or tpu."""
        return "tpu" if self.device.topology else "cpu" if self.kind == "cpu" else "gpu"

    @property
    def topology(self) -> str | None:
        """libtpu's name of the slice; None for devices that are not TPUs."""
        return self.name if self.device.topology else None

    @property
    def accelerator_type(self) -> str:
        """gcloud's name of a TPU slice with this number of chips: v5p-16 has 8 chips of 2 TensorCores, v6e-8 has 8
        chips."""
        return f"{GCLOUD.get(self.kind, self.kind)}-{self.count * self.device.cores}"


def parse(text: str) -> Devices:
    """Parse `v6e-8`, `v5p:4x8x8`, `h200x8`, `h200` or `cpu:8`. Raises FtjaxError that lists the known devices."""
    if sliced := re.fullmatch(r"([a-z]\w*)-(\d+)", text):
        return _by_accelerator_type(text, *sliced.groups())
    match = re.fullmatch(r"([a-z]\w*?)(?:(?::|(?<=\d)x)(\d+(?:x\d+)*))?", text)
    kind, shape = match.groups() if match else (text, None)
    device, sides = _kind(text, kind), [int(n) for n in (shape or "1").split("x")]
    if device.topology and (len(sides) != device.topology or min(sides) < 1):
        example = "x".join(["2"] * device.topology)
        raise FtjaxError(
            f"--devices {text}: expected {device.topology} sides of the slice, such as {kind}:{example}, or gcloud's "
            f"name of it, such as {parse(f'{kind}:{example}').accelerator_type}"
        )
    if device.topology:
        return Devices(f"{kind}:{'x'.join(map(str, sides))}", kind, math.prod(sides), device)
    if len(sides) != 1 or sides[0] < 1:
        raise FtjaxError(f"--devices {text}: expected a number of devices, such as {_many(kind, 8)}")
    return Devices(text, kind, sides[0], device)


def _many(kind: str, count: int) -> str:
    """The name of this many devices that are no TPUs: `h200x8` or `cpu:8`."""
    return f"{kind}{':' if kind == 'cpu' else 'x'}{count}"


def _kind(text: str, kind: str) -> Device:
    if kind not in DEVICES:
        known = "v6e-8, v5litepod-16, v5p-16 (gcloud's names), v4:2x2x2, v5p:4x8x8, a100x8, h100x8, h200x8, cpu:8"
        raise FtjaxError(f"--devices {text}: unknown device{nearest(kind, DEVICES)}; expected something like {known}")
    return DEVICES[kind]


def _by_accelerator_type(text: str, name: str, count: str) -> Devices:
    kind = next((kind for kind, other in GCLOUD.items() if other == name), name)
    if not _kind(text, kind).topology:
        raise FtjaxError(f"--devices {text}: expected a number of devices, such as {_many(kind, 8)}")
    slices = [parse(f"{kind}:{sides}") for sides in SLICES[kind]]
    found = [devices for devices in slices if devices.count * devices.device.cores == int(count)]
    if not found:
        known = ", ".join(f"{devices.accelerator_type} ({devices.count})" for devices in slices)
        raise FtjaxError(
            f"--devices {text}: expected one of gcloud's slices, here with their chips: {known}; or the sides of "
            f"another one, such as {slices[-1].name}"
        )
    return found[0]


def larger(devices: Devices) -> list[Devices]:
    """The next larger sizes of the same kind, at most three: doubled each time, and for TPUs the slices that gcloud
    names."""
    if devices.device.topology:
        slices = [parse(f"{devices.kind}:{sides}") for sides in SLICES[devices.kind]]
        more = [other for other in slices if other.count > devices.count][:3]
    else:
        more = [parse(_many(devices.kind, devices.count * times)) for times in (2, 4, 8)]
    return [other._replace(device=devices.device) for other in more]
