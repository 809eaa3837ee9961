"""Supervised fine-tuning of any supported model on any rows with LoRA: set model.path and data.train, on the command
line too.

Rows that are short beside data.max_length are packed; the learning rate and the batch are LoRA's defaults.
"""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/sft"
    c.data.packing = True
    return c
