"""Damaged runs, caches, model and adapter files: each is repaired or refused by name, and none gives other numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import haste
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import damage  # noqa: E402
import fuzz  # noqa: E402

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "hostile.jsonl").read_text().splitlines()]


def test_damages_of_a_run_its_cache_and_its_adapter():
    faults = []
    found = damage.several(40, seed=3, say=faults.append)
    assert not faults, "\n".join(faults)
    assert sum(found.values()) == 40 and min(found["told"], found["refused"]) > 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_and_full_disks_in_every_stage_end_in_the_same_bytes(tmp_path):
    disks = 6
    try:
        with damage.small_disk(tmp_path, damage.PAGE):
            pass
    except (OSError, subprocess.CalledProcessError):  # only root may mount a disk
        disks = 0
    # In a process of its own: a fork of one that has used a device cannot use it.
    command = [sys.executable, damage.__file__, "--kills", "12", "--disks", str(disks), "--count", "0", "--seed", "2"]
    # One device, and every program is compiled once.
    env = os.environ | {"XLA_FLAGS": haste.FLAGS, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: int(n) for name, n in (part.split() for part in done.stdout.splitlines()[-1].split(", "))}
    verbs = {"train", "evaluate", "generate", "export", "inspect", "check", "upcycle"}
    assert {name.removeprefix("in-") for name in found if name.startswith("in-")} == verbs
    assert found["same"] == 12 + disks and found["killed"] > 6 and found.get("full", 0) == disks


@pytest.mark.parametrize("target", sorted({entry["target"] for entry in CORPUS}))
def test_what_fuzzing_found_is_read_or_refused(target, tmp_path):
    make, whole = fuzz.TARGETS[target][0], tmp_path / "whole"
    if make:
        make(whole)
    for entry in CORPUS:
        if entry["target"] == target:
            came = fuzz.attempt(entry, whole, tmp_path / "damaged")
            wanted = entry.get("told", "refused")
            assert came.startswith("refused") and wanted in came, f"{entry}: {came}"
