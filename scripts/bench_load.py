"""Loading weights beside torch: `python scripts/bench_load.py`.

A made LLaMA of about 0.5 GB, in float32 and in bfloat16: `ftjax.hub.weights.read_params`, and the same file by
safetensors into torch with a clone of every tensor, the file in the page cache. `seconds`: of the first load of a
process, as who starts one meets it, processes of either side by turns, the median of each. `again`: by turns in one
process, where torch's allocator hands out memory that an earlier turn has touched. Memory: the most that such a first
load holds above what its process held before, as a multiple of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_common
import numpy as np

DTYPES = ("float32", "bfloat16")
LAYERS = {"float32": 18, "bfloat16": 38}  # so that either file has about half a gigabyte


def made(folder: Path, dtype: str) -> Path:
    """A model directory with random weights in `dtype`."""
    import jax
    import ml_dtypes  # noqa: F401  gives numpy the name bfloat16

    from ftjax.hub import families, weights
    from ftjax.models.config import ModelConfig

    shape = ModelConfig(
        vocab_size=32_000, width=768, layers=LAYERS[dtype], heads=12, kv_heads=4, head_dim=64, hidden=2048,
        max_positions=1024, tied=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = weights.param_shapes(shape)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(dtype), shapes)
    weights.write_model(folder, params, None, families.FAMILIES["llama"], shape, dtype=dtype)
    return folder


def ours(folder: Path) -> Callable[[], int]:
    """A function that loads the weights and returns their bytes."""
    import jax

    from ftjax.hub import families, weights

    family, shape = families.read_config(folder)
    jax.block_until_ready(jax.device_put(0.0))  # JAX looks for its devices once

    def load():
        params = jax.block_until_ready(weights.read_params(folder, family, shape))
        return params, sum(x.nbytes for x in jax.tree.leaves(params))

    return load


def theirs(folder: Path) -> Callable[[], int]:
    """The same by safetensors into torch; a clone owns its memory, as a model that is trained must."""
    from safetensors.torch import load_file

    def load():
        params = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
        return params, sum(x.nbytes for x in params.values())

    return load


SIDES = {"ftjax": ours, "torch": theirs}


def first(side: str, folder: Path) -> dict:
    """Seconds of a process's first load, the most memory it takes above what was held before, the weights' bytes."""
    load = SIDES[side](folder)
    before = bench_common.memory()["now"]
    bench_common.forget_peak()
    start = time.perf_counter()
    _, size = load()
    return {
        "seconds": time.perf_counter() - start,
        "above": bench_common.memory()["peak"] - before,
        "bytes": size,
    }


def again(folder: Path, turns: int) -> dict[str, float]:
    """Side -> seconds of its best turn."""
    loads = {name: side(folder) for name, side in SIDES.items()}
    best = dict.fromkeys(loads, float("inf"))
    for _ in range(turns):
        for name, load in loads.items():
            start = time.perf_counter()
            kept = load()
            best[name] = min(best[name], time.perf_counter() - start)
            del kept
    return best


def rows(turns: int):
    """A row for each dtype."""
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = made(Path(scratch) / "model", dtype)
            found = {side: [] for side in SIDES}
            for _ in range(turns):
                for side in SIDES:
                    found[side].append(bench_common.in_a_process(["--first", side, str(folder)]))
            recycled = again(folder, turns)
        middle = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
        held = {side: min(run["above"] / run["bytes"] for run in runs) for side, runs in found.items()}
        yield (
            {"dtype": dtype, "gigabytes": round(found["ftjax"][0]["bytes"] / 1e9, 3)}
            | {f"{side}_seconds": round(s, 3) for side, s in middle.items()}
            | {"speed": round(middle["torch"] / middle["ftjax"], 2), "must_speed": 1.0, "goal_speed": 1.5}
            | {f"{side}_again": round(s, 3) for side, s in recycled.items()}
            | {f"{side}_memory": round(ratio, 3) for side, ratio in held.items()}
            | {"must_memory": 1.1, "goal_memory": 1.0}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--first", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    if args.first:
        bench_common.report([first(args.first[0], Path(args.first[1]))], None)
        return
    bench_common.report(rows(args.turns), args.out)


if __name__ == "__main__":
    main()
