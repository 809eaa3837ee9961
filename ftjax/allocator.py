"""glibc's malloc, told to keep a step's memory for the next: XLA's CPU asks for it anew each time, and page faults of
memory that was given back take 10 to 25 % of a step.

Imports nothing heavy: the command line calls it before all else.
"""

from __future__ import annotations

import glob
import os
import sys

# What only the start of a process can set: large pages.
TUNABLES = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "trim_threshold=1000000000", "top_pad=268435456")
)
# Parameters of mallopt(3) and their values: one arena, since those of threads give back what is large; no memory by
# mmap; none back to the system; 256 MiB more than is asked for.
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2
MALLOPT = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 1 << 28))


def wanted() -> bool:
    """Whether it is for us to set: Linux, no accelerator, no GLIBC_TUNABLES set, and FTJAX_MALLOC not 0."""
    accelerator = glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    mine = "GLIBC_TUNABLES" not in os.environ and os.environ.get("FTJAX_MALLOC") != "0"
    return sys.platform.startswith("linux") and not accelerator and mine


def restart(command: list[str]) -> None:
    """Become `command`, a Python program's arguments, with TUNABLES set."""
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *command])


def keep_pages() -> bool:
    """Set MALLOPT in this process, where wanted; whether it was done. Threads that have run before, XLA's among them,
    keep their arenas and gain nothing: call it before the first computation."""
    if not wanted():
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in MALLOPT)
