"""Sentiment of film reviews by MiniLM: a head on frozen states, LoRA, all of it, and the commonest label, on SST-2.

    ftjax compare --config configs/compare_sst2.py

Each is trained on 8,000 rows, and for its learning curve on 8 to 512 rows a class, 2,000 and 4,000 rows; two seeds.
The report, runs/compare_sst2/verdict.html, says whether the law of the smaller amounts holds at 8,000 rows, and what it
says of all 67,349.
"""

from pathlib import Path

from ftjax import config


def get_config():
    c = config.load(Path(__file__).with_name("sst2_minilm_full.py"))
    c.run_dir = "runs/compare_sst2"
    c.data.limit = 8000
    c.data.buckets = 16  # every multiple of 4 tokens: all runs share their compiled programs
    c.train.eval_every = 10**6  # no rows are held out for validation: the last state is taken
    c.compare.contenders = (
        "majority",
        {"name": "head", "tuning.method": "head", "task.pool": "mean", "optim.lr": 1e-3, "train.epochs": 10.0,
         "train.dropout": 0.0},
        {"name": "LoRA", "tuning.method": "lora", "tuning.rank": 16, "tuning.alpha": 32.0, "optim.lr": 1e-3,
         "optim.weight_decay": 0.0, "optim.warmup": 0.06, "train.dropout": 0.0},
        {"name": "full", "tuning.method": "full"},
    )  # fmt: skip
    c.compare.seeds = 2
    c.compare.curve_shots = (8, 64, 512)
    c.compare.curve = (2000, 4000)
    c.compare.curve_steps = 40
    c.compare.curve_to = (67_349,)
    c.compare.device_hour = 0.05  # about what one core costs in a cloud
    c.compare.requests = 100_000
    return c
