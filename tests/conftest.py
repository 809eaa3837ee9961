"""Fixtures shared by all tests: real data where it lies on disk, one compilation cache for the session."""

from __future__ import annotations

import atexit
import collections
import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

import forks as processes
import haste
import hypothesis
import pytest

from ftjax import cli

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {haste.FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What runs keep for later ones (tokenised rows) goes with the session too.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ftjax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# One cache of compiled programs for the session, its subprocesses included; gone with it, so that no test leans on an
# earlier session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ftjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

gc.set_threshold(cli.COLLECTED)  # as the command line does

# A slow machine is no failure.
hypothesis.settings.register_profile("ftjax", deadline=None)
hypothesis.settings.load_profile("ftjax")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left with one when all others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter):
    """The reasons of all skips, each once, with the number of tests."""
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        terminalreporter.section("skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4} {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, models and tokenizers beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the real data of ../shared, which is not on this machine")
    return path


@pytest.fixture(params=["raises", "says no"])
def bound_by_permissions(request, monkeypatch):
    """Root may read and write only what the permissions of files allow, as any other user. `Path.is_file` and its like
    raise PermissionError in a closed folder, as until Python 3.13, or say no, as from 3.14 on."""
    if request.param == "says no":
        for name, of in (("is_file", os.path.isfile), ("is_dir", os.path.isdir), ("exists", os.path.exists)):
            monkeypatch.setattr(Path, name, lambda self, of=of, **how: of(self))
    if os.geteuid() == 0:
        libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if not hasattr(libc, "capset") or libc.capget(header, rights):
            pytest.skip("needs Linux, where root can give rights up for a while")
        fewer = (ctypes.c_uint32 * 6)(*rights)
        fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        assert not libc.capset(header, fewer)
    yield
    if os.geteuid() == 0:
        libc.capset(header, rights)


@pytest.fixture(scope="session")
def forks():
    """Starts commands and programs of ftjax as processes of their own that need not import anything."""
    server = processes.Forks(os.environ | {"PYTHONPATH": str(ROOT), "FTJAX_MALLOC": "0", "XLA_FLAGS": haste.FLAGS})
    yield server
    server.close()


@pytest.fixture(autouse=True)
def small_mesh():
    """A run whose config names no mesh takes one of the simulated devices: it compiles in less time than for all."""
    from ftjax.training import sharding

    make_mesh = sharding.make_mesh

    def make(config, devices=None):
        named = config.get("data", 1) != -1 or any(config.get(axis, 1) != 1 for axis in sharding.MESH_AXES[1:])
        if devices is None and not named:
            devices = sharding.jax.devices()[:1]
        return make_mesh(config, devices)

    with pytest.MonkeyPatch.context() as patched:  # one that a test's own undo() leaves as it is
        patched.setattr(sharding, "make_mesh", make)
        yield


@pytest.fixture(autouse=True, scope="module")
def no_old_programs():
    """Programs of one module are of no use to the next, and hold memory that every garbage collection walks through."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


def pytest_collection_finish():
    """What the tests' modules have imported stays, and no garbage collection looks through it."""
    gc.collect()
    gc.freeze()
