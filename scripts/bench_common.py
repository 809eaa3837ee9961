"""What the benchmarks share: where they ran, what they write, memory of a process, and the allocator of both sides."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def add_arguments(parser) -> None:
    """The flags that every benchmark has."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures there, too")
    parser.add_argument("--malloc", action="store_true", help="with the allocator that ftjax gives itself, both sides")


def restart_with_malloc(wanted: bool) -> None:
    """Start this script again with the allocator that `ftjax` takes on a CPU, where it has not got it."""
    if wanted and "GLIBC_TUNABLES" not in os.environ:
        from ftjax.cli import MALLOC

        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.argv])


def report(rows: Iterable[dict], out: Path | None) -> None:
    """Print each row as it comes, and write what there is so far: {"command", "machine", versions, "rows"}."""
    kept = []
    for row in rows:
        print(json.dumps(row), flush=True)
        kept.append(row)
        if out:
            out.write_text(json.dumps(told() | {"rows": kept}, indent=2) + "\n")


def told() -> dict:
    """What was run, where, and of which versions."""
    versions = {}
    for name in ("jax", "torch", "transformers", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
    machine = {"cpu": model[1] if model else platform.processor(), "cores": len(os.sched_getaffinity(0))}
    command = " ".join(["python", *(Path(a).name if a.startswith("/") else a for a in sys.argv)])
    return {"command": command, "machine": machine, "malloc": "GLIBC_TUNABLES" in os.environ, "versions": versions}


def memory() -> dict[str, int]:
    """Bytes of this process: `now` that it holds, and the most that it held since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    now, peak = (1024 * int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))
    return {"now": now, "peak": peak}


def forget_peak() -> None:
    """Let the most memory be counted from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(arguments: list[str]) -> dict:
    """What this script prints last, called with `arguments` in a process of its own."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(sides: dict[str, Callable[[], float]], turns: int, seconds: float) -> dict[str, float]:
    """Side -> the best rate of its turns; a side does one piece of work a call and returns how much that was.

    The first piece of a turn is not counted: memory that the other side gave back must be asked for anew.
    """
    best = dict.fromkeys(sides, 0.0)
    for _ in range(turns):
        for name, side in sides.items():
            side()
            start, work = time.perf_counter(), 0.0
            while time.perf_counter() - start < seconds:
                work += side()
            best[name] = max(best[name], work / (time.perf_counter() - start))
    return best
