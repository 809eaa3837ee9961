"""A run that is killed and goes on ends in the bits of the run that was never killed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import ftjax
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.training import loop
from ftjax.training.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
from ftjax import config

def get_config():
    c = config.default()
    c.data.prompt = "Words: {src}\\nSentence:"
    c.data.completion = " {tgt}"
    c.data.limit = 400
    c.data.buckets = 1
    c.tuning.rank = 4
    c.tuning.dropout = 0.1
    c.train.steps = 60
    c.train.batch_size = 8
    c.train.log_every = 1
    c.train.eval_every = 10
    c.train.save_every = 5
    c.evaluate.rows = 16
    c.export.formats = ("adapter",)
    c.log.tensorboard = False
    return c
"""


@pytest.fixture
def train(config, forks, tmp_path):
    """train(run_dir) starts the run there; what it says goes to tmp_path / "said"."""
    # One device is enough, and one cache of compiled programs makes every start but the first short.
    env = {"XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = ["train", "--config", str(config)]
    return lambda run_dir: forks.start(ROOT, tmp_path / "said", [*arguments, f"--config.run_dir={run_dir}"], env=env)


def losses(run_dir) -> list[dict]:
    """Metrics by step, without the clock's."""
    names = ("step", "loss", "accuracy", "grad_norm", "lr", "val_loss")
    return [{k: row[k] for k in names if k in row} for row in read_metrics(run_dir)]


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "killed.py"
    file.write_text(CONFIG)
    return file


@pytest.mark.slow
def test_killed_three_times_it_ends_in_the_same_bits(train, tmp_path):
    from safetensors.numpy import load_file

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole).wait() == 0, (tmp_path / "said").read_text()
    chance = random.Random(20)
    codes = []
    for target, sent in zip(sorted(chance.sample(range(1, 55), 3)), (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process = train(killed)
        # A random moment behind a random step: in a step, a validation or the writing of a checkpoint.
        while process.poll() is None and max([0] + [row["step"] for row in read_metrics(killed)]) < target:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        if process.poll() is None:
            os.kill(process.pid, sent)
        codes.append(process.wait())
        if sent == signal.SIGTERM:  # it saves the step that it was in
            kept = [int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit()]
            assert max(kept) >= read_metrics(killed)[-1]["step"]
    assert codes == [-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGKILL]
    (tmp_path / "said").unlink()
    code, said = train(killed).wait(), (tmp_path / "said").read_text()
    assert code == 0 and "going on after step" in said, said
    assert losses(killed) == losses(whole)
    ours, theirs = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_few_steps_are_queued_so_that_a_signal_is_heard_soon(config, tmp_path, monkeypatch):
    reports, queued = [], []

    class Counted(loop.Profiler):
        def __call__(self, *arguments):
            state, report = super().__call__(*arguments)
            reports.append(report)
            queued.append(sum(not each["loss"].is_ready() for each in reports))
            return state, report

    monkeypatch.setattr(loop, "Profiler", Counted)
    c = configs.load(config)
    c.run_dir = str(tmp_path / "run")
    c.train.update(steps=8, batch_size=64, log_every=20, eval_every=8, save_every=8)
    c.export.formats = ()
    ftjax.train(c, say=lambda line: None)
    assert len(queued) == 8 and max(queued) <= 3, queued


def test_a_run_folder_is_kept_from_other_runs(config, tmp_path):
    run_dir = tmp_path / "run"

    def again(*extra):
        said = []
        short = ["train.steps=2", "train.eval_every=2", f"run_dir={run_dir}", *extra]
        ftjax.train(configs.load(str(config), short), say=said.append)
        return "\n".join(said)

    again()
    with pytest.raises(FtjaxError, match="optim.lr was 0.0002, is 0.5"):
        again("optim.lr=0.5")
    assert "going on after step 2 of 2" in again("mesh.data=8")  # the mesh may change
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config"]["train"]["steps"] == 2
    assert [start["ended"] for start in record["starts"]] == ["finished", "finished"]
    assert record["starts"][0]["packages"]["jax"] == jax.__version__ and record["starts"][1]["devices"] == {"cpu": 8}

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FtjaxError, match="contains files that no run wrote, such as thesis.txt"):
        again(f"run_dir={foreign}")
    assert (foreign / "thesis.txt").read_text() == "years of work"
