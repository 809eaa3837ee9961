"""The cores of a CPU as JAX devices that share the rows of a batch.

Within one device, XLA's CPU backend uses several threads for large products and for little else. With one device per
core, all work on a row runs on one core, by one thread. Work that does not depend on rows, such as the update of the
trained parameters, is repeated on every device. `scripts/bench_devices.py` measures both.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftjax.models.axes import MESH_AXES

WIDTH = 160  # width of a model whose products are half of a program's time on one thread, see `serial_share`
GAIN = 1.25  # least estimated speed-up of several devices, because the estimate is not more accurate
SHARE = 0.05  # of the memory that copies of parameters on several devices may take
CACHED = 32 << 20  # bytes of parameters up to which decoding reads them from caches that cores do not share

_offered = 0


@functools.cache
def cores() -> int:
    """Number of physical cores that this process may use."""
    if not sys.platform.startswith("linux"):
        return os.cpu_count() or 1
    mine, siblings = os.sched_getaffinity(0), set()
    for cpu in mine:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(file.read_text() if file.is_file() else str(cpu))
    limit = Path("/sys/fs/cgroup/cpu.max")  # in a container: "quota period" in microseconds, or "max period"
    quota, period = limit.read_text().split() if limit.is_file() else ("max", "1")
    return len(siblings) if quota == "max" else max(1, min(len(siblings), int(quota) // int(period)))


def offer(least: int = 1) -> None:
    """Let JAX have a CPU device for each core, but at least `least` devices. `count` and `dealt` decide how many are
    used.

    Nothing changes if XLA_FLAGS or JAX's settings give the number of devices, if several processes share the work, or
    if this process has already used a device.
    """
    global _offered
    fixed = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if _offered or fixed or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # devices are in use
        jax.config.update("jax_num_cpu_devices", max(least, cores()))
        _offered = jax.config.jax_num_cpu_devices


def offered() -> int:
    """Number of CPU devices that `offer` made; 0 if it made none, or if an accelerator computes."""
    return _offered if _offered and jax.default_backend() == "cpu" else 0


def serial_share(width: int) -> float:
    """Share of a program's time on one thread that more threads of the same device do not shorten, estimated from the
    model's width."""
    return 1 / (1 + (width / WIDTH) ** 2)


def count(rows: int, width: int, seconds: float = 1.0, repeated: float = 0.0) -> int:
    """Number of devices that should share the rows of a program.

    It divides the rows, and it is 1 unless the estimate promises a speed-up of at least GAIN.

    Args:
        rows: Rows that are computed at once.
        width: Width of the model.
        seconds: Time that one thread takes for all rows.
        repeated: Seconds that each device adds to the program, for work that all devices repeat.

    Returns:
        The number of devices; 1 if `offer` made none.
    """
    most, serial = min(offered(), cores()), serial_share(width)

    def time(n: int) -> float:
        return seconds / n + repeated * n if n > 1 else seconds * (serial + (1 - serial) / max(most, 1))

    ways = [n for n in range(1, most + 1) if rows % n == 0]
    best = min(ways, key=time, default=1)
    return best if time(1) >= GAIN * time(best) else 1


@contextlib.contextmanager
def dealt(variables: dict, rows: int, width: int, most: float = math.inf) -> Iterator[dict]:
    """Place `variables` on as many devices as should share a forward pass, and set a mesh that splits rows between
    them.

    They stay as they are if `offer` made no devices, or if the current mesh splits more than rows.

    Args:
        variables: The Flax variables, on one device or on each device of the current mesh.
        rows: Rows of a batch.
        width: Width of the model.
        most: If `variables` have more bytes than this, one device computes. In any case copies take at most SHARE of
            the memory.

    Yields:
        The placed variables.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not offered() or (not mesh.empty and mesh.shape["data"] != mesh.size):
        yield variables
        return
    devices, size = count(rows, width), sum(x.nbytes for x in jax.tree.leaves(variables))
    if size > most or devices * size > SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        devices = 1
    if devices == max(mesh.size, 1):
        yield variables
        return
    shape = [devices if axis == "data" else 1 for axis in MESH_AXES]
    mesh = jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        yield jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
