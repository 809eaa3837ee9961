"""XLA's compiler options for a program, by the devices that run it, and a `jit` that applies them."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable

import jax

from ftjax import cpus

# One thread on each of several CPU devices, however many cores there are, so that the number of devices alone decides
# the bits of the result.
SINGLE = {"xla_cpu_multi_thread_eigen": False}
# Otherwise cuDNN's attention and scatters add in the order in which threads finish.
DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True}
# Whether Triton or cuBLAS computes a product is decided by a race in each process, and they round differently. cuBLAS
# alone is also faster (docs/performance.md).
GPU = {"xla_gpu_enable_triton_gemm": False}
# Most programs that wait for several CPU devices. At the 33rd, XLA blocks one of its few threads until a program ends,
# and that program may need this thread to exchange values between the devices: then the process is aborted.
QUEUED = 8

_queued: deque[jax.Array] = deque()


def options(devices: int, deterministic: bool = True) -> dict:
    """Compiler options for a program on so many devices; empty for XLA's defaults.

    An option that XLA_FLAGS sets is left as it is.

    Args:
        devices: Number of devices that the program runs on.
        deterministic: Whether the program must compute the same bits in each run. On a GPU it is slower for it.
    """
    if jax.default_backend() == "gpu":
        wanted = GPU | (DETERMINISTIC if deterministic else {})
    else:
        wanted = SINGLE if cpus.offered() and devices > 1 else {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in wanted.items() if name not in flags}


def jit(f: Callable, **how) -> Callable:
    """`jax.jit(f, **how)` with the `options` for the mesh. At most QUEUED programs wait for several CPU devices."""
    compiled = functools.cache(lambda *pairs: jax.jit(f, compiler_options=dict(pairs) or None, **how))

    @functools.wraps(f)
    def run(*args, **kwargs):
        devices = jax.sharding.get_abstract_mesh().size
        out = compiled(*options(devices).items())(*args, **kwargs)
        if devices > 1 and jax.default_backend() == "cpu":
            _wait_for_earlier(out)
        return out

    return run


def _wait_for_earlier(out) -> None:
    """Add a program's outputs to the queue, and wait until no more than QUEUED programs are in it."""
    arrays = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    if arrays:
        _queued.append(min(arrays, key=lambda x: x.nbytes))  # all are ready at once
    while len(_queued) > QUEUED:
        earliest = _queued.popleft()
        if not earliest.is_deleted():  # if it is, a later program in the queue has taken its memory
            earliest.block_until_ready()
