"""Compile time of a training step against depth: `python scripts/bench_compile.py`.

Lowering and compiling of the whole step (forward, backward, AdamW) of a LLaMA of width 256, best of three, in turn, the
persistent cache off. The layers are scanned, so that the ratio should stay near 1.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import bench_common
import jax

from ftjax import config as configs
from ftjax.hub import families, weights
from ftjax.models.config import ModelConfig
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.training.optimizer import optimizer, schedule
from ftjax.training.step import compile_step, init_state
from ftjax.tuning import METHODS, Spec


def compile_seconds(layers: int, method_name: str, remat: str) -> float:
    """Seconds from Python to an executable, nothing cached."""
    shape = ModelConfig(
        vocab_size=4096, width=256, layers=layers, heads=8, kv_heads=4, head_dim=32, hidden=688, max_positions=512,
        tied=False,
    )  # fmt: skip
    config, method = configs.default(), METHODS[method_name]
    spec = Spec(shape, families.linear_names(families.FAMILIES["llama"], shape), config.tuning)
    base = weights.param_shapes(shape)
    trained, frozen = jax.eval_shape(functools.partial(method.init, spec=spec), jax.random.key(0), base)
    optim = optimizer(config.optim, schedule(config.optim, 100, 1e-3))
    ids = {name: jax.ShapeDtypeStruct((4, 256), "int32") for name in ("tokens", "positions", "segment_ids")}
    ids |= {name: jax.ShapeDtypeStruct((4, 256), "int32") for name in ("loss_index", "labels")}
    batch = ids | {"weights": jax.ShapeDtypeStruct((4, 256), "float32")}
    step = compile_step(
        None, sums=functools.partial(causal.sums, Transformer(shape, remat=remat)),
        variables=functools.partial(method.variables, spec=spec), optimizer=optim, seed=0,
    )  # fmt: skip
    state = jax.eval_shape(functools.partial(init_state, optim), trained)
    jax.clear_caches()
    start = time.perf_counter()
    step.lower(state, frozen, batch).compile()
    return time.perf_counter() - start


def rows(depths: list[int]):
    """A row for each program."""
    for method, remat in (("full", "none"), ("lora", "none"), ("lora", "full")):
        best = dict.fromkeys(depths, float("inf"))
        for _ in range(3):
            best = {depth: min(best[depth], compile_seconds(depth, method, remat)) for depth in depths}
        row = {"method": method, "remat": remat, **{f"layers_{d}_s": round(s, 2) for d, s in best.items()}}
        yield row | {"ratio": round(best[max(depths)] / best[min(depths)], 3)}


def draw(table: list[dict], depths: list[int], path: Path) -> None:
    """Seconds against layers, a line a program."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for row in table:
        seconds = [row[f"layers_{depth}_s"] for depth in depths]
        axes.plot(depths, seconds, marker=".", label=f"{row['method']}, remat {row['remat']}")
    axes.set(xlabel="layers", ylabel="seconds to compile a step", ylim=0)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw seconds against depth")
    bench_common.add_arguments(parser)
    args, table = parser.parse_args(), []
    bench_common.restart_with_malloc(args.malloc)
    jax.config.update("jax_enable_compilation_cache", False)
    bench_common.report((table.append(row) or row for row in rows(args.depths)), args.out)
    if args.picture:
        draw(table, args.depths, args.picture)


if __name__ == "__main__":
    main()
