"""One CPU device with all threads beside several with their share of the rows: `python scripts/bench_devices.py`.

Training steps as `ftjax train` builds them, by turns in one process. `one`, `one_thread`: milliseconds of a step on one
device, with all threads and with one; `devices`: on so many devices, one thread each; `takes`: how many a run takes.
`cpu`: processor time of a step over its devices, in milliseconds. Pinned to a core (`taskset -c 1`), it tells what each
of several devices would take on a core of its own, and `share_cpu` what its share of the rows takes alone. The models:
see scripts/bench_torch.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import bench_common
import bench_torch
import numpy as np


def step(folder: Path, method: str, dtype: str, rows: int, T: int, devices: int, single: bool):
    """A function that takes a step and waits for its loss; single: with one thread for each device."""
    run = bench_torch.ours(folder, method, dtype, rows, T, devices=devices, single=single)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocab, (rows, T)).astype(np.int32)
    return lambda: float(run(ids))


def taken(folder: Path, method: str, dtype: str, rows: int, T: int, cores: int) -> int:
    """How many devices a run takes on so many cores."""
    import jax.numpy as jnp

    from ftjax import config as configs
    from ftjax import cpus
    from ftjax.hub import families
    from ftjax.training import auto_mesh
    from ftjax.tuning import Spec

    config = configs.default()
    config.tuning.method, config.train.batch_size, config.optim.lr = method, rows, 1e-4
    family, shape = families.read_config(folder)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    cpus.cores = lambda: cores
    return auto_mesh.cpu_devices(config, spec, T, jnp.dtype(dtype))


def rows(args):
    """A row for each case and number of devices."""
    with tempfile.TemporaryDirectory() as scratch:
        for case in bench_torch.CASES:
            if args.only and "-".join(case) not in args.only:
                continue
            model, method, dtype = case
            folder, (B, T) = bench_torch.folder_of(model, Path(scratch)), bench_torch.SHAPES[model]
            for n in (n for n in args.devices if B % n == 0 and n > 1):
                runs = {
                    "one": (B, 1, False),
                    "one_thread": (B, 1, True),
                    "devices": (B, n, True),
                    "share": (B // n, 1, True),
                }
                runs = {name: step(folder, method, dtype, b, T, d, s) for name, (b, d, s) in runs.items()}
                wall, cpu = ({name: float("inf") for name in runs} for _ in range(2))
                for run in runs.values():
                    run(), run()
                end = time.monotonic() + args.seconds
                while time.monotonic() < end:
                    for name, run in runs.items():
                        start = time.perf_counter(), time.process_time()
                        run()
                        wall[name] = min(wall[name], time.perf_counter() - start[0])
                        cpu[name] = min(cpu[name], time.process_time() - start[1])
                yield (
                    {"model": model, "method": method, "dtype": dtype, "devices_n": n}
                    | {name: round(1000 * wall[name], 2) for name in ("one", "one_thread", "devices")}
                    | {"gain": round(wall["one"] / wall["devices"], 2)}
                    | {"cpu": round(1000 * cpu["devices"] / n, 2), "share_cpu": round(1000 * cpu["share"], 2)}
                    | {"takes": taken(folder, method, dtype, B, T, n)}
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=["-".join(case) for case in bench_torch.CASES], default=[])
    parser.add_argument("--devices", type=int, nargs="+", default=[2])
    parser.add_argument("--seconds", type=float, default=20.0, help="that a case is measured")
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    from ftjax import cpus

    cpus.offer(max(args.devices))
    bench_common.report(rows(args), args.out)


if __name__ == "__main__":
    main()
