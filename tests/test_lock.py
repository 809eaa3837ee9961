"""The installed versions are those of constraints.txt."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"


def differences(lock: str) -> list[str]:
    """A phrase for each installed package that is of another version than the lock says."""
    found = []
    for line in lock.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            installed = metadata.version(pin.name)
        except metadata.PackageNotFoundError:  # of another platform, or of an extra that is not installed
            continue
        if installed not in pin.specifier:
            found.append(f"{pin.name} {installed}, not {pin.specifier}")
    return found


def test_a_version_that_differs_is_named():
    lock = f"pytest=={pytest.__version__}\n# a comment\nabsent-package==1.0\npackaging==0.1\n"
    lock += "numpy==0.1 ; python_full_version < '3'\ntorch==0.1\n"
    torch, packaging = metadata.version("torch"), metadata.version("packaging")
    assert differences(lock) == [f"packaging {packaging}, not ==0.1", f"torch {torch}, not ==0.1"]


def test_every_requirement_is_locked():
    """What the project asks for directly has a pin for this Python."""
    pinned = {Requirement(line).name for line in LOCK.read_text().splitlines() if line and line[0] != "#"}
    wanted = [Requirement(text) for text in metadata.requires("ftjax")]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "test"})]
    assert len(wanted) > 20
    assert {r.name.lower().replace("_", "-") for r in wanted} <= pinned


def test_installed_versions_are_the_locked_ones():
    if found := differences(LOCK.read_text()):
        note = "the installed versions differ from constraints.txt: " + "; ".join(found)
        if os.environ.get("CI") == "true":
            pytest.fail(f'{note}. Install with: pip install -e ".[test]" -c constraints.txt', pytrace=False)
        pytest.skip(note)


def test_pre_commit_runs_the_locked_ruff():
    hooks = (LOCK.parent / ".pre-commit-config.yaml").read_text()
    locked = next(line.partition("==")[2] for line in LOCK.read_text().splitlines() if line.startswith("ruff=="))
    assert f"ruff-pre-commit\n    rev: v{locked}\n" in hooks
