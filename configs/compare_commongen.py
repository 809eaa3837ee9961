"""Is tuning worth it? The quick start's task: the model as it is, with examples or passages, and tuned in three ways.

    ftjax compare --config configs/compare_commongen.py

Three seeds of all that is trained or drawn. The report, runs/compare_commongen/verdict.html, should say that LoRA and
full training use far more of the given words than any prompt, and what of the stories each of them forgot.
"""

from pathlib import Path

from ftjax import config

ADAMW = {"optim.name": "adamw"}  # in place of the quick start's Muon


def get_config():
    c = config.load(Path(__file__).with_name("quickstart.py"))
    c.run_dir = "runs/compare_commongen"
    c.train.steps = 500
    c.train.eval_every = 100
    c.evaluate.metrics = ("coverage", "rouge_l")
    c.evaluate.compare_rows = 300
    c.compare.contenders = (
        "zero-shot",
        "few-shot",
        "few-shot-near",
        "retrieval-few-shot",
        {"name": "LoRA", "tuning.method": "lora"},
        {"name": "full", "tuning.method": "full", **ADAMW, "optim.lr": 4e-3},
        {"name": "prompt tuning", "tuning.method": "prompt", **ADAMW, "optim.lr": 1e-2},
    )
    c.compare.shots = 3
    c.compare.documents = "builtin:commongen/train.jsonl"
    c.compare.passages = 2
    c.compare.device_hour = 0.1  # about what two cores cost in a cloud
    c.compare.requests = 100_000
    return c
