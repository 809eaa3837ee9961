"""The benchmarks run, and write what they measured with where and how."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_common  # noqa: E402
import bench_share  # noqa: E402
import bench_tables  # noqa: E402
import bench_torch  # noqa: E402


def run(name: str, *arguments: str, timeout: int = 500) -> str:
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_step_beside_torch(tmp_path):
    out = tmp_path / "out.json"
    asked = ("--only", "starter-lora-float32", "--turns", "1", "--seconds", "0.1", "--as-started", "--out", str(out))
    printed = json.loads(run("bench_torch.py", *asked))
    written = json.loads(out.read_text())
    assert written["rows"] == [printed]
    assert written["command"].startswith("python bench_torch.py --only") and written["machine"]["cores"] > 0
    assert set(written["versions"]) >= {"jax", "torch", "transformers"} and printed["malloc"] == "ftjax"
    assert printed["ratio"] == pytest.approx(printed["ftjax_tokens_s"] / printed["torch_tokens_s"], rel=0.01, abs=0.01)


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


TINY = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_against_the_machines_product(tmp_path, monkeypatch, method):
    """Rates of both sides, and arithmetic by the formula that this test writes out."""
    monkeypatch.setattr(bench_share, "SQUARES", {"cpu": (64, 128)})
    settings = {"model.dtype": "float32", "tuning.method": method}
    case = bench_share.Case(TINY, rows=2, length=32, settings=settings)
    folder = bench_share.folder_of(case, tmp_path)
    found = bench_share.ours(folder, case, False, 0.05)
    block, head, attention = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, 256 * 32, 6 * 2 * 32 * 32
    adapters = 2 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # of rank 16, all linear maps of two layers
    trained = {"full": 6 * (2 * block + head), "lora": 4 * (2 * block + head) + 6 * adapters}
    assert found["tflops"] * 1e12 / found["tokens_s"] == pytest.approx(trained[method] + attention)
    assert found["product_tflops"] > 0 and found["gb"] > 0
    theirs = bench_share.theirs(folder, case, 0.05)
    assert theirs["tokens_s"] > 0 and not theirs["checkpointing"]


def test_packed_rows():
    batch = bench_torch.batch_of(np.arange(20, dtype=np.int32).reshape(2, 10), 2)
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4] * 2] * 2
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 5] * 2
    assert batch["labels"][0].tolist() == list(range(1, 10)) and batch["loss_index"].shape == batch["weights"].shape


def test_tables_of_the_page_are_made_of_what_was_measured(tmp_path):
    page = (SCRIPTS.parent / "docs/performance.md").read_text()
    script = (SCRIPTS / "bench_all.sh").read_text()
    for name in bench_tables.TABLES:
        assert f"measure {name} " in script and f"<!-- {name} -->" in page and f"<!-- /{name} -->" in page, name
    row = {"model": "40m", "dtype": "float32", "weights": "model", "ftjax_tokens_s": 1234, "bandwidth_share": 0.71}
    told = {"machine": {"cpu": "A CPU", "cores": 3}, "versions": {"jax": "0.1"}, "malloc": False}
    for name, weights in (("generate", "model"), ("generate_rounded", "bfloat16")):
        command = f"python scripts/bench_generate.py --weights {weights} --out {name}.part"
        file = told | {"command": command, "rows": [row | {"weights": weights}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(file))
    found = bench_tables.rewritten(page, tmp_path)
    begin, end = "<!-- generate -->\n", "\n<!-- /generate -->"
    assert found.split(begin)[0] == page.split(begin)[0] and found.split(end)[1] == page.split(end)[1]
    assert found.split(begin)[1].split(end)[0].splitlines() == [
        "3 cores of A CPU. jax 0.1.", "", "```text", "python scripts/bench_generate.py --weights model",
        "python scripts/bench_generate.py --weights bfloat16", "```", "",
        "| model | dtype | weights | ftjax, tokens/s | share of that |", "|---|---|---|---|---|",
        "| 40m | float32 | model | 1,234 | 0.71 |", "| 40m | float32 | bfloat16 | 1,234 | 0.71 |",
    ]  # fmt: skip
    assert bench_tables.rewritten(found, tmp_path) == found
