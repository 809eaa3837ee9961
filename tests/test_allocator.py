"""Memory of a step that is kept for the next, in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAULTS = """
import json, resource
from ftjax import allocator
done = allocator.keep_pages()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.cumsum(jnp.sin(x), 0).sum())  # arrays of 64 MiB between
x, faults = jnp.ones((4096, 4096)), []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    float(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([done, min(faults[4:])]))
"""


def faults(**environment: str) -> list:
    env = {k: v for k, v in os.environ.items() if k not in ("FTJAX_MALLOC", "GLIBC_TUNABLES", "XLA_FLAGS")}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_has_no_page_faults():
    done, kept = faults()
    assert done and kept < 50
    done, given_back = faults(FTJAX_MALLOC="0")
    assert not done and given_back > 500


def test_what_is_set_already_is_left_alone():
    assert faults(GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] is False
