"""The quick start with full training: only what differs from quickstart.py. docs/results.md compares them."""

from pathlib import Path

from ftjax import config


def get_config():
    c = config.load(Path(__file__).with_name("quickstart.py"))
    c.run_dir = "runs/quickstart_full"
    c.tuning.method = "full"
    c.optim.name = "adamw"
    c.optim.lr = 4e-3
    c.train.steps = 1000
    c.train.eval_every = 200
    c.export.formats = ("full",)
    return c
