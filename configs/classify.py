"""One label a text, by any encoder or decoder: set model.path and data.train; rows have a text and a label.

docs/encoders.md tells what a run then writes; configs/sst2_minilm_full.py is an example with a real encoder.
"""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/classify"
    c.model.path = "builtin:stories260K"
    c.data.max_length = 128
    c.data.buckets = 8
    c.task.kind = "classify"
    c.tuning.method = "lora"
    c.optim.lr = 5e-4
    c.optim.schedule = "linear"
    c.train.epochs = 3.0
    c.train.batch_size = 32
    return c
