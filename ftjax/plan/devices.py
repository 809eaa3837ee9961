"""What devices there are to plan for: their memory, speed and links from their makers' pages, and their price."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ftjax.errors import FtjaxError, nearest


class Device(NamedTuple):
    """One chip or card. Rates are peaks, a second; a run reaches a share of them."""

    memory: float  # bytes that a program may use: what TPU compilers allow, else what the card is sold with
    flops: float  # dense bfloat16
    bandwidth: float  # bytes of device memory
    link: float  # bytes that one device sends to its neighbours, all links together, one way
    price: float | None  # US dollars an hour, on demand; see PRICED
    topology: int = 0  # dimensions of a TPU slice; 0: no TPU
    per_host: int = 8  # devices of one host
    source: str = ""


PRICED = "Google's list price on demand in its cheapest region, 2025; check it, or give --price"
TPUS = "https://docs.cloud.google.com/tpu/docs/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
GIB = 2**30

# Links of TPUs are stated both ways together; half of that is sent. GPUs: NVLink, likewise. A program's usable memory
# on a TPU is what its compiler says when it refuses one.
DEVICES = {
    "v4": Device(30.75 * GIB, 275e12, 1.2e12, 150e9, 3.22, 3, 4, TPUS + "v4"),
    "v5e": Device(15.75 * GIB, 197e12, 0.819e12, 200e9, 1.20, 2, 8, TPUS + "v5e"),
    "v5p": Device(95.74 * GIB, 459e12, 2.765e12, 600e9, 4.20, 3, 4, TPUS + "v5p"),
    "v6e": Device(31.25 * GIB, 918e12, 1.638e12, 400e9, 2.70, 2, 8, TPUS + "v6e"),
    "a100": Device(80e9, 312e12, 2.039e12, 300e9, None, source=NVIDIA + "a100"),
    "h100": Device(80e9, 989e12, 3.35e12, 450e9, None, source=NVIDIA + "h100"),
    "h200": Device(141e9, 989e12, 4.8e12, 450e9, None, source=NVIDIA + "h200"),
    # No datasheet: one process's share of a machine with two cores and AMX, measured with float32 products.
    "cpu": Device(math.inf, 0.35e12, 20e9, 10e9, 0.0, source="measured on two cores of a Xeon with AMX, float32"),
}


class Devices(NamedTuple):
    """So many of one kind, as `--devices` names them."""

    name: str  # as given, such as v5p:4x8x8
    kind: str
    count: int
    device: Device

    @property
    def platform(self) -> str:
        """What JAX calls devices of this kind: cpu, gpu or tpu."""
        return "tpu" if self.device.topology else "cpu" if self.kind == "cpu" else "gpu"

    @property
    def topology(self) -> str | None:
        """How libtpu calls the slice; None for what is no TPU."""
        return self.name if self.device.topology else None


def parse(text: str) -> Devices:
    """`v5p:4x8x8`, `v6e:4x4`, `h200x8`, `h200` or `cpu:8` -> Devices. Raises FtjaxError that says what is known."""
    match = re.fullmatch(r"([a-z]\w*?)(?:(?::|(?<=\d)x)(\d+(?:x\d+)*))?", text)
    kind, shape = match.groups() if match else (text, None)
    if kind not in DEVICES:
        known = "v4:2x2x2, v5e:4x4, v5p:4x8x8, v6e:4x4, a100x8, h100x8, h200x8, cpu:8"
        raise FtjaxError(f"--devices {text}: unknown device{nearest(kind, DEVICES)}; expected something like {known}")
    device, sides = DEVICES[kind], [int(n) for n in (shape or "1").split("x")]
    if device.topology and len(sides) != device.topology:
        example = "x".join(["2"] * device.topology)
        raise FtjaxError(f"--devices {text}: expected {device.topology} sides of the slice, such as {kind}:{example}")
    if not device.topology and len(sides) != 1 or min(sides) < 1:
        raise FtjaxError(f"--devices {text}: expected a number of devices, such as {kind}{':' * (kind == 'cpu')}8")
    if device.topology:
        return Devices(f"{kind}:{'x'.join(map(str, sides))}", kind, math.prod(sides), device)
    return Devices(text, kind, sides[0], device)


def larger(devices: Devices) -> list[Devices]:
    """The next sizes of the same kind: each twice as many, eight times at most."""
    sides, out = [int(n) for n in re.findall(r"\d+", devices.name.partition(":")[2])], []
    for doubled in (1, 2, 3):
        if not devices.device.topology:
            mark = ":" if devices.kind == "cpu" else "x"
            out.append(parse(f"{devices.kind}{mark}{devices.count * 2**doubled}"))
            continue
        smallest = min(range(len(sides)), key=lambda i: (sides[i], -i))
        sides[smallest] *= 2
        out.append(parse(f"{devices.kind}:{'x'.join(map(str, sorted(sides)))}"))
    return [more._replace(device=devices.device) for more in out]
