"""Sentiment of film reviews with differential privacy: LoRA and a head on MiniLM, on SST-2, at epsilon 3.

Needs `pip install "ftjax[privacy]"`.
"""

from pathlib import Path

from ftjax import config


def get_config():
    c = config.load(Path(__file__).with_name("sst2_minilm_lora.py"))
    c.run_dir = "runs/private_sst2"
    c.privacy.epsilon = 3.0
    c.privacy.delta = 1e-5
    c.task.pool = "mean"
    c.tuning.rank = 8
    c.optim.clip_norm = 0.0  # single examples' gradients are clipped already
    c.train.dropout = 0.0
    c.train.batch_size = 1024  # a large batch needs less noise per example
    c.export.checkpoint = "last"
    return c
