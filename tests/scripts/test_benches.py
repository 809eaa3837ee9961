"""The benchmarks run, and write what they measured with where and how."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_common  # noqa: E402


def run(name: str, *arguments: str, timeout: int = 120) -> str:
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_step_beside_torch(tmp_path):
    out = tmp_path / "out.json"
    asked = ("--only", "starter-lora-float32", "--turns", "1", "--seconds", "0.1", "--out", str(out))
    printed = json.loads(run("bench_torch.py", *asked))
    written = json.loads(out.read_text())
    assert written["rows"] == [printed]
    assert written["command"].startswith("python bench_torch.py --only") and written["machine"]["cores"] > 0
    assert set(written["versions"]) >= {"jax", "torch", "transformers"}
    assert printed["ratio"] == pytest.approx(printed["ftjax_tokens_s"] / printed["torch_tokens_s"], abs=0.01)


def test_turns_leave_out_the_first_piece_of_each(monkeypatch):
    clock = itertools.count()  # a second passes at each look
    monkeypatch.setattr(bench_common.time, "perf_counter", lambda: next(clock))
    calls = []

    def side():
        calls.append(None)
        return 100 if len(calls) == 1 else 6

    # A piece that is not counted; then looks at 1, 2 and 3 seconds, a piece after each of the first two.
    assert bench_common.in_turn({"ours": side}, 1, 2.5) == {"ours": 3.0}
    assert len(calls) == 3
