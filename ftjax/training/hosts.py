"""Several processes that train one model: how they start, agree on values, and end together.

In a run of one process every function here does nothing, or the obvious thing.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from ftjax import stops
from ftjax.errors import FtjaxError

VARIABLES = ("FTJAX_COORDINATOR", "FTJAX_PROCESSES", "FTJAX_PROCESS")
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead, and all others end
GRACE = 10  # seconds in which an error of all processes shows itself on all

# Launcher of the processes -> how many it started, from its environment variables. JAX finds the rest by itself.
LAUNCHERS = {
    "SLURM's srun": lambda: os.environ.get("SLURM_STEP_NUM_TASKS"),
    "Open MPI": lambda: os.environ.get("OMPI_COMM_WORLD_SIZE"),
    "the TPU slice": lambda: tpu_hosts(),
}


def start() -> bool:
    """Join the other processes of this run, if there are any, before a device is used. Returns True on the first
    process.

    The variables FTJAX_COORDINATOR (host:port of process 0), FTJAX_PROCESSES and FTJAX_PROCESS (0, 1, ...) take
    precedence over what SLURM, Open MPI or a TPU slice says. If the processes are joined already, nothing changes.
    Raises FtjaxError for settings that cannot be used, and if the other processes do not answer.
    """
    if not jax.distributed.is_initialized():
        given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
        launcher = next((name for name, processes in LAUNCHERS.items() if _several(name, processes())), None)
        if given:
            _initialize("FTJAX_COORDINATOR", **_explicit(given))
        elif launcher:
            _initialize(launcher)
        else:
            return True
    return jax.process_index() == 0


def _several(name: str, processes: str | None) -> bool:
    if processes and not processes.isdecimal():
        raise FtjaxError(f"{name}: says that it started {processes!r} processes; expected a number")
    return int(processes or 1) > 1


def _explicit(given: dict[str, str]) -> dict:
    """The arguments of jax.distributed.initialize, from the three variables."""
    if missing := [name for name in VARIABLES if name not in given]:
        raise FtjaxError(f"{', '.join(given)}: set, but {', '.join(missing)} not; set all of them, or none")
    coordinator, processes, process = (given[name] for name in VARIABLES)
    host, colon, port = coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise FtjaxError(f"FTJAX_COORDINATOR: {coordinator!r}; expected host:port of the machine with process 0")
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise FtjaxError(
            f"FTJAX_PROCESS={process}, FTJAX_PROCESSES={processes}: expected the number of processes, and the "
            "number of this one, from 0 to one less, which no other process has"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": int(processes),
        "process_id": int(process),
        # Each process sees the devices that its environment shows it (CUDA_VISIBLE_DEVICES), whatever started it.
        "cluster_detection_method": "deactivate",
    }


def _initialize(what: str, **arguments) -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **arguments)
    except (RuntimeError, ValueError) as error:  # devices in use already; nobody answers; nothing found out
        raise FtjaxError(
            f"{what}: the processes of this run did not find each other: {error}. Start all of them at once, before "
            f"anything uses a device; {', '.join(VARIABLES)} set by hand where the first one is and how many there are"
        ) from None


def tpu_hosts() -> str | None:
    """Number of machines of this job's TPU slices; None without a TPU, or if the number cannot be found."""
    if not _tpu_devices():
        return None
    names, slices = os.environ.get("TPU_WORKER_HOSTNAMES"), os.environ.get("MEGASCALE_NUM_SLICES")
    names = names or _metadata("worker-network-endpoints")
    if slices is None:
        lines = dict(line.split(":", 1) for line in _metadata("tpu-env").splitlines() if ":" in line)
        slices = lines.get("MEGASCALE_NUM_SLICES", "1").strip(" '")
    return str(len(names.split(",")) * int(slices))


def _tpu_devices() -> list[str]:
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def _metadata(key: str) -> str:
    """A value of Google's metadata server for this machine; empty if there is no server or no such value."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as f:
            return f.read().decode()
    except OSError:
        return ""


def from_first(f: Callable):
    """Call f() on the first process and return its result, plain JSON data, on all processes.

    The others wait for it, so this is a barrier too.
    """
    if jax.process_count() == 1:
        return f()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = json.dumps(f()).encode() if jax.process_index() == 0 else b""
    size = int(broadcast_one_to_all(np.int32(len(text))))
    return json.loads(broadcast_one_to_all(np.frombuffer(text.ljust(size), np.uint8)).tobytes())


def check_shared(file: Path) -> None:
    """Raise FtjaxError if this process does not see a file of the run that the first process has just written."""
    if not file.is_file():
        raise FtjaxError(
            f"run_dir: process {jax.process_index()} does not see {file}, which the first process wrote. Checkpoints "
            "are written by all: choose a folder on a file system that all machines share"
        )


def preempted(step: int) -> bool:
    """Whether this process, or any of several, was told to stop, so that all should stop after this step.

    To be called at every step. All processes learn of it in time to stop after the same step.
    """
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        if reached_preemption_sync_point(step):
            stops.heard.append(signal.SIGTERM)
    return bool(stops.heard)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block, or as a decorator a function, that every process enters: an error in one process ends all of them.

    If every process failed, each raises its error. If only this one did, it exits at once, so that the others stop
    waiting.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            _end_if_alone(error)
        raise


def _end_if_alone(error: BaseException) -> None:
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key="ftjax.end_together", timeout_ms=GRACE * 1000)
    except jax.errors.JaxRuntimeError:
        text = f"ftjax: {error}" if isinstance(error, FtjaxError) else "".join(traceback.format_exception(error))
        print(f"{text}\nftjax: process {jax.process_index()} ends, and with it all others", file=sys.stderr, flush=True)
        # Not sys.exit: whatever would be closed on the way out waits for the other processes.
        os._exit(2 if isinstance(error, FtjaxError) else 1)
