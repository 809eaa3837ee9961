"""What a process does about XLA's compiler: keep its programs across runs, and give back memory that it let go of."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event, recorded before the program runs
LONG = 0.5  # seconds of compiling that leave something worth looking for


def use_compilation_cache() -> None:
    """Keep compiled programs across runs, where JAX can: a run is never worse off without."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftjax" / "xla"
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def trim_after_compiling() -> None:
    """Let glibc give back what a compiler has freed, from here on in this process, before the program asks for more.

    It is kept otherwise, in pieces between what still lives: 0.2 GB of a model of 40 million parameters. Other C
    libraries are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > LONG:
            trim(0)

    if trim:
        jax.monitoring.register_event_duration_secs_listener(listen)
