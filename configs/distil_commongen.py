"""Distillation on CommonGen: a student of two of the starter's five layers learns from the model of quickstart_full.py.

Make the student first: `ftjax student --model builtin:stories260K --layers 0,4 --out runs/two_layers`. What it reaches,
beside the same student on the labels alone, has not been measured.
"""

from pathlib import Path

from ftjax import config


def get_config():
    c = config.load(Path(__file__).with_name("quickstart_full.py"))
    c.run_dir = "runs/distil_commongen"
    c.model.path = "runs/two_layers"
    c.task.reference = "runs/quickstart_full"
    c.distil.labels = 0.0
    c.train.steps = 300
    c.train.eval_every = 75
    c.evaluate.rows = 0
    c.evaluate.compare = False
    return c
