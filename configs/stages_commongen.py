"""Two stages on CommonGen: write a sentence from given words, then name the words of a given sentence.

Each stage is scored on the held-out rows of both. docs/stages.md has the figures, without replay too.
"""

from ftjax import config

ROWS = {"data.train": "builtin:commongen/train.jsonl", "data.validation": "builtin:commongen/validation.jsonl"}


def get_config():
    c = config.default()
    c.run_dir = "runs/stages_commongen"
    c.model.unroll = 0
    c.data.end = "<s>"
    c.data.buckets = 2
    c.tuning.rank = 32
    c.tuning.alpha = 64.0
    c.optim.name = "muon"
    c.optim.lr = 1.2e-2
    c.train.batch_size = 32
    c.train.steps = 300
    c.stages = (
        ROWS | {"name": "sentence", "data.prompt": "Words: {src}\nSentence:", "data.completion": " {tgt}"},
        ROWS | {"name": "words", "data.prompt": "Sentence: {tgt}\nWords:", "data.completion": " {src}", "replay": 0.25},
    )
    return c
