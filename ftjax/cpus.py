"""The cores of a CPU as JAX devices, so that they share the rows of a batch.

Inside one device, XLA's CPU shares large products between threads, and little else of a program. With a device for each
core, everything that a row needs runs on one core, by one thread; what every device must repeat is what does not
depend on rows, such as the update of the trained parameters. `scripts/bench_devices.py` measures both.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftjax.models.axes import MESH_AXES

SINGLE = {"xla_cpu_multi_thread_eigen": False}
WIDTH = 160  # of a model whose products are half of what one thread takes for a program, see `serial_share`
GAIN = 1.25  # that several devices must promise: the estimate is not better than that
SHARE = 0.05  # of the memory, that copies of parameters for further devices may take
CACHED = 32 << 20  # bytes of parameters up to which decoding reads them from caches, which cores do not share

_offered = 0


@functools.cache
def cores() -> int:
    """The physical cores that this process may use."""
    if not sys.platform.startswith("linux"):
        return os.cpu_count() or 1
    mine, siblings = os.sched_getaffinity(0), set()
    for cpu in mine:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(file.read_text() if file.is_file() else str(cpu))
    limit = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores in a period, or "max"
    quota, period = limit.read_text().split() if limit.is_file() else ("max", "1")
    return len(siblings) if quota == "max" else max(1, min(len(siblings), int(quota) // int(period)))


def offer(least: int = 1) -> None:
    """Let JAX have a CPU device for each core, and at least `least` of them, of which `count` and `dealt` choose.

    Nothing changes where XLA_FLAGS or JAX's settings say how many devices there are, where several processes share the
    work, or where this process has used a device already.
    """
    global _offered
    said = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if _offered or said or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # devices are in use
        jax.config.update("jax_num_cpu_devices", max(least, cores()))
        _offered = jax.config.jax_num_cpu_devices


def offered() -> int:
    """How many CPU devices `offer` has made; 0 where it made none, or where an accelerator computes."""
    return _offered if _offered and jax.default_backend() == "cpu" else 0


def serial_share(width: int) -> float:
    """The share of a program's time on one thread that further threads of one device do not shorten, estimated from the
    width of the model."""
    return 1 / (1 + (width / WIDTH) ** 2)


def count(rows: int, width: int, seconds: float = 1.0, repeated: float = 0.0) -> int:
    """How many devices should share the rows of a program: as many as divide them, where the estimate promises GAIN.

    Args:
        rows: That are computed at once.
        width: Of the model.
        seconds: That one thread takes for all rows.
        repeated: Seconds by which each further device lengthens the program for all.

    Returns:
        1 where `offer` made no devices.
    """
    most, serial = min(offered(), cores()), serial_share(width)

    def time(n: int) -> float:
        return seconds / n + repeated * n if n > 1 else seconds * (serial + (1 - serial) / max(most, 1))

    ways = [n for n in range(1, most + 1) if rows % n == 0]
    best = min(ways, key=time, default=1)
    return best if time(1) >= GAIN * time(best) else 1


def options(devices: int) -> dict | None:
    """Options of XLA for a program on so many devices: each of several has one thread, however many cores there are, so
    that the number of devices alone decides the bits of what it computes."""
    own = "multi_thread_eigen" in os.environ.get("XLA_FLAGS", "")
    return SINGLE if offered() and devices > 1 and not own else None


def jit(f: Callable, **how) -> Callable:
    """`jax.jit(f, **how)` with the `options` that the mesh in force asks for."""
    plain, single = jax.jit(f, **how), jax.jit(f, compiler_options=SINGLE, **how)

    @functools.wraps(f)
    def run(*args, **kwargs):
        return (single if options(jax.sharding.get_abstract_mesh().size) else plain)(*args, **kwargs)

    return run


@contextlib.contextmanager
def dealt(variables: dict, rows: int, width: int, most: float = math.inf) -> Iterator[dict]:
    """`variables` on as many devices as should share a forward pass, and a mesh in force that splits rows between them.

    They stay as they are where `offer` made no devices, and where the mesh in force splits more than rows.

    Args:
        variables: What a model is applied to, on one device or on each of the mesh in force.
        rows: Of a batch.
        width: Of the model.
        most: Bytes of `variables` from which on one device computes; copies never take more than SHARE of the memory.
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
