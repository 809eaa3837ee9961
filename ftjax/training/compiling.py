"""Settings of this process for XLA's compiler: keep compiled programs across runs, and return freed memory to the
system."""

from __future__ import annotations

import ctypes
import functools
import sys

import jax

from ftjax.files import cache_home

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event, recorded before the program runs
LONG = 0.5  # seconds of compiling after which there is enough freed memory to return


def use_compilation_cache() -> None:
    """Keep compiled programs across runs, if JAX can; without a cache a run works the same."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_home("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def trim_after_compiling() -> None:
    """From here on, make glibc return the memory that a compiler has freed before the compiled program allocates its
    own.

    Otherwise the C library keeps it, in pieces between what is still in use: 0.2 GB for a model of 40 million
    parameters. Other C libraries are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > LONG:
            trim(0)

    if trim:
        jax.monitoring.register_event_duration_secs_listener(listen)
