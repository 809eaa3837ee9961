"""`ftjax plan`: what a run needs, before it runs. Nothing here imports JAX; the work is done in a process of its
own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.plan.devices import Devices, parse

SECONDS = 60.0  # a plan's further programs are compiled within


def plan(
    config,
    devices: str = "cpu:1",
    *,
    data: bool = False,
    memory: float | None = None,
    seconds: float = SECONDS,
    choices: bool = True,
    exact: bool = False,
) -> dict:
    """Memory, FLOPs, traffic, collectives and time of a step of `config` on `devices`, and other settings that would
    fit.

    No weights are read: the model's config.json is enough.

    Args:
        config: The run's config.
        devices: Their name, see ftjax.plan.devices.parse.
        data: Read the run's rows for the number of steps and the lengths. Otherwise a row has data.max_length tokens,
            all of them trained.
        memory: Bytes that a program may use on a device; None: by the table of devices.
        seconds: Other settings are compiled, not only estimated, as long as this time lasts.
        choices: Look for other settings that would fit.
        exact: Let the TPU compiler use its full time, see compile_step.

    Raises:
        FtjaxError: For numbers, devices, a config or a mesh that are impossible.
    """
    configs.validate(config)
    check_numbers(memory=memory, seconds=seconds)
    target = parse(devices)
    with tempfile.TemporaryDirectory() as folder:
        job = {"config": config.to_dict(), "devices": target.name, "data": data, "memory": memory, "seconds": seconds}
        job |= {"choices": choices, "quick": not exact}
        job["result"] = str(Path(folder) / "result.json")
        (Path(folder) / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "ftjax.plan.worker", str(Path(folder) / "job.json")],
            env=os.environ | environment(target), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode == 2:
            raise FtjaxError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(f"the planning process ended with {done.returncode}:\n{done.stderr}")
        result = json.loads(Path(job["result"]).read_text())
    result["simulated"] = not target.topology and target.kind != "cpu"
    return result


def check_numbers(**options: float | None) -> None:
    """Raise FtjaxError for an option of a plan that is not a finite number above 0; a share is at most 1."""
    for name, value in options.items():
        if value is not None and not 0 < value <= (1.0 if name == "share" else sys.float_info.max):
            expected = "a share of the peak, above 0 and 1 at most" if name == "share" else "a number above 0"
            raise FtjaxError(f"--{name}: expected {expected}; found {value}")


def environment(devices: Devices) -> dict[str, str]:
    """The environment of the process that compiles. It uses no accelerator, however many devices it compiles for.

    Raises FtjaxError for a TPU whose compiler is not installed.
    """
    folders = [*filter(None, sys.path), str(Path(__file__).parents[2])]  # the last one, where ftjax is not installed
    out = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(folders)}
    if not devices.topology:
        return out | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices.count}"}
    if importlib.util.find_spec("libtpu") is None:
        raise FtjaxError(
            f"--devices {devices.name}: the TPU compiler is missing: in the checkout of ftjax, "
            "pip install -e '.[plan-tpu]' (it needs no TPU)"
        )
    # Outside a TPU's host the compiler would ask the metadata server who it is; and several plans may run at once.
    out |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return out | {"TPU_ACCELERATOR_TYPE": devices.accelerator_type, "XLA_FLAGS": ""}
