"""Every command and every Python block of README and docs runs, in the order in which a reader meets them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A training command is run as it stands but for its length.
SHORT = ("train.steps=2", "train.eval_every=2", "evaluate.rows=8", "evaluate.compare_rows=4", "data.limit=64")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced block, in order."""
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.S)


def commands(body: str) -> list[list[str]]:
    """The `ftjax` commands of a shell block, each as its arguments."""
    parts = [part.strip() for line in body.splitlines() for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("ftjax ")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_documentation_runs(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    haste = "--xla_backend_optimization_level=0"
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "FTJAX_MALLOC": "0", "XLA_FLAGS": haste, "XDG_CACHE_HOME": str(tmp_path),
    }  # fmt: skip
    ran, seen = 0, set()
    for page in PAGES:
        for language, body in blocks(page.read_text()):
            if language == "python":
                todo = [[sys.executable, "-c", body]]
            elif language == "bash":
                todo = [[sys.executable, "-m", "ftjax", *args] for args in commands(body)]
            else:
                continue
            for command in todo:
                if "train" in command[:4]:
                    command = command + [f"--config.{field}" for field in SHORT]
                if tuple(command) in seen:
                    continue
                seen.add(tuple(command))
                done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
                assert done.returncode == 0, f"{page.name}: {shlex.join(command)}\n{done.stderr}"
                ran += 1
    assert ran >= 6
