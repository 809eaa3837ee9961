"""What is done about XLA's compiler in a process."""

import subprocess
import sys

import pytest

BODY = """
import ctypes, re
from pathlib import Path
import jax
from ftjax.training import compiling

seen = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.append(event))
jax.jit(lambda x: x + 1)(1.0)
assert compiling.COMPILED in seen, seen  # the event has this name in this JAX

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
held = lambda: int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
pieces = [libc.malloc(100_000) for _ in range(2000)]
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
full = held()
for i, piece in enumerate(pieces):
    if i % 20:  # what lives lies between what was freed
        libc.free(piece)
kept = held()
compiling.trim_after_compiling()
compiling.trim_after_compiling()
jax.monitoring.record_event_duration_secs(compiling.COMPILED, 0.1)
short = held()
jax.monitoring.record_event_duration_secs(compiling.COMPILED, 10.0)
print(full, kept, short, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has malloc_trim")
def test_memory_that_a_long_compilation_freed_is_given_back():
    done = subprocess.run([sys.executable, "-c", BODY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, kept, short, trimmed = map(int, done.stdout.split())
    assert full - kept < 20 and kept - short < 20  # 190 MB freed, and nothing given back
    assert short - trimmed > 120
