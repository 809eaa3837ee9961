"""The public surface as a type checker, `help` and a Python prompt show it."""

import importlib.util
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest

import ftjax

ROOT = Path(__file__).resolve().parents[1]

# A program of a user. Each ignored line must be an error, or mypy says that the comment is not used.
PROGRAM = """
# mypy: warn-unused-ignores, disallow-untyped-calls, check-untyped-defs
import numpy as np
import ftjax

config = ftjax.config.load("configs/quickstart.py", ["optim.lr=1e-4"])
config.optim.lr = 1e-3
result = ftjax.train(config, say=lambda line: None)
loss: float = result.train_loss
best: float | None = result.val_loss
steps: list[int] = [row["step"] for row in result.history]
path: str = result.files["metrics"]
lm: ftjax.LM = ftjax.load(result.run_dir, adapters={"a": "runs/a"}, dtype="float32")
texts: list[str] = lm.with_adapter("a").generate(["Once"], max_new_tokens=8, temperature=0.5)
text: str = "".join(lm.stream("Once", max_new_tokens=8))
logits: np.ndarray = lm.logits([[1, 2]])
vectors: np.ndarray = lm.embed(["a text"], pool="mean")
figures = ftjax.evaluate(lm, "rows.jsonl", overrides=["data.limit=3"], generate=True)["loss"]
labels = [row["prediction"] for row in ftjax.predict("runs/x", "rows.jsonl")]
written: str = ftjax.export(result.run_dir, "out", "merged", dtype="bfloat16")["path"]
runs = [run.run_dir for run in ftjax.sweep(config, ["optim.lr=1e-3,1e-4"], seeds=2)]
verdict = ftjax.compare(config, out="runs/verdict")["answer"]
try:
    ftjax.config.from_dict({"optim.lr": 0.1})
except ftjax.FtjaxError as error:
    print(str(error).upper(), ftjax.__version__.upper())

ftjax.lode("runs/x")  # type: ignore[attr-defined]
ftjax.load(3)  # type: ignore[arg-type]
ftjax.load("runs/x", dtyp="float32")  # type: ignore[call-arg]
ftjax.train()  # type: ignore[call-arg]
lm.generate(3)  # type: ignore[arg-type]
result.losses  # type: ignore[attr-defined]
"""
CLEAN = [
    "__init__",
    "cli",
    "config",
    "errors",
    "evaluation/run",
    "lm",
    "listing",
    "loading",
    "training/feed",
    "training/loop",
    "training/outcome",
]


@pytest.mark.slow
def test_a_type_checker_knows_the_public_surface(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed; it is a part of the extra `test`")
    (tmp_path / "program.py").write_text(PROGRAM)
    files = [str(tmp_path / "program.py"), *(f"ftjax/{name}.py" for name in CLEAN)]
    check = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *files]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in ftjax.__all__ if name not in ("__version__", "config")])
def test_every_public_name_is_explained_and_typed(name):
    public = getattr(ftjax, name)
    assert inspect.getdoc(public)
    functions = [public] if inspect.isfunction(public) else [f for f in vars(public).values() if inspect.isfunction(f)]
    for f in functions:
        parameters = [p for p in inspect.signature(f).parameters.values() if p.name != "self"]
        if f.__name__.startswith("_"):
            continue
        assert all(p.annotation is not p.empty for p in parameters), f.__name__
        assert inspect.signature(f).return_annotation is not inspect.Signature.empty, f.__name__


def test_a_result_is_shown_in_a_line_and_keeps_the_history():
    result = ftjax.Result(
        run_dir="runs/x", steps=1500, resumed_from=0, stopped_early=False, train_loss=1.25, val_loss=1.5, best_step=900,
        best=1.5, seconds=3.0, results={"large": list(range(1000))}, files={}, history=[{"step": 10, "loss": 1.25}],
    )  # fmt: skip
    assert repr(result) == "<Result runs/x: 1,500 steps, training loss 1.2500, validation loss 1.5000 at step 900>"
    assert "validation" not in repr(ftjax.Result("r", 1, 0, False, math.nan, None, 1, None, 0.0, None, {}))
    assert [row["loss"] for row in result.history] == [1.25]
