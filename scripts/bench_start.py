"""`ftjax --help`, and from a command to its first training step, in seconds: `python scripts/bench_start.py`.

The step is that of the starter model in configs/quickstart.py, taken in a process of its own, once with empty caches of
compiled programs and rows, and then with full ones (the median of several). Told with it is where the time goes, and
what of each stage went into tracing, lowering and compiling. `ftjax train` starts once more with another allocator,
which costs what `ftjax --help` takes: that is added.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_common

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = ("evaluate.compare=False", "log.tensorboard=False")
COMPILES = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
COMPILES += ("cache_retrieval_time_sec",)


def first_step(config: str, run_dir: str, began: float) -> None:
    """Run `ftjax train` up to the end of its first step, print the stages as JSON, and leave."""
    stages, spent, now = {"python": time.time() - began}, collections.Counter(), [time.time()]

    def stage(name):
        stages[name] = stages.get(name, 0.0) + time.time() - now[0]
        now[0] = time.time()

    from ftjax import cli

    stage("imports")
    import jax

    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: spent.update({event.rsplit("/", 1)[-1]: seconds})
    )
    from ftjax.training import loop

    stage("imports")

    def timed(name, f):
        def run(*args, **kwargs):
            stage("other")
            out = f(*args, **kwargs)
            stage(name)
            return out

        return run

    class Leaving(loop.Profiler):
        def __call__(self, *args):
            stage("other")
            jax.block_until_ready(super().__call__(*args))
            stage("first step")
            compiling = {name: round(spent[name], 3) for name in COMPILES}
            told = {"stages": {name: round(s, 3) for name, s in stages.items()}, "compiling": compiling}
            print(json.dumps(told | {"seconds": round(time.time() - began, 3)}), flush=True)
            os._exit(0)

    loop.prepared = timed("data and tokenizer", loop.prepared)
    loop.build = timed("program", loop.build)
    loop.first_state = timed("weights", loop.first_state)
    loop.Profiler = Leaving
    with contextlib.redirect_stdout(sys.stderr):
        arguments = ["train", "--config", config, f"--config.run_dir={run_dir}"]
        sys.exit(cli.main(arguments + [f"--config.{o}" for o in OVERRIDES]))


def spawn(config: str, caches: str) -> dict:
    """One run of `first_step` in a process of its own, with its caches in a folder."""
    from ftjax.cli import MALLOC

    env = os.environ | {"XDG_CACHE_HOME": caches, "GLIBC_TUNABLES": MALLOC, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, __file__, "--child", run_dir, repr(time.time()), "--config", config]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stderr.splitlines()[-1])


def help_seconds(times: int) -> list[float]:
    """Seconds of `ftjax --help`, each in a process of its own."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ftjax", "--help"], capture_output=True, check=True, cwd=ROOT)
        found.append(time.perf_counter() - start)
    return found


def rows(config: str, times: int, warm: int):
    """A row for each figure."""
    found = help_seconds(times)
    again = statistics.median(found)
    yield {"what": "ftjax --help", "seconds": round(again, 3), "best": round(min(found), 3), "must": 0.3, "goal": 0.15}
    with tempfile.TemporaryDirectory() as caches:
        runs = [spawn(config, caches) for _ in range(1 + warm)]
    warmest = sorted(runs[1:], key=lambda run: run["seconds"])[len(runs[1:]) // 2]
    for name, run in (("cold", runs[0]), ("warm", warmest)):
        run["stages"]["start again with the allocator"] = round(again, 3)
        run["seconds"] = round(run["seconds"] + again, 3)
        yield {"what": f"first step, {name} caches"} | run | ({"must": 8, "goal": 4} if name == "warm" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--times", type=int, default=15, help="that ftjax --help is run")
    parser.add_argument("--warm", type=int, default=3, help="starts with warm caches")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    if args.child:
        run_dir, began = args.child
        first_step(args.config, f"{run_dir}/run", float(began))
    bench_common.report(rows(args.config, args.times, args.warm), args.out)


if __name__ == "__main__":
    main()
