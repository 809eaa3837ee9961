"""A reward model on CommonGen: which of two sentences a person wrote. Best-of-n takes it to choose between answers.

It starts from the merged model of the quick start and learns from the pairs of scripts/make_preferences.py. It orders
0.937 of the test pairs as they are; docs/preferences.md tells how little it helps to choose between the model's own
sentences.
"""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/reward_commongen"
    c.model.path = "runs/quickstart/merged"
    c.model.unroll = 0
    c.task.kind = "reward"
    c.data.train = "pairs/train.jsonl"
    c.data.validation = "pairs/validation.jsonl"
    c.data.test = "pairs/test.jsonl"
    c.data.end = "<s>"
    c.data.buckets = 2
    c.tuning.rank = 32
    c.tuning.alpha = 64.0
    c.optim.lr = 1e-3
    c.train.batch_size = 32
    c.train.epochs = 3
    c.train.eval_every = 40
    return c
