"""A reward model on CommonGen, for best-of-n: which of two sentences a person wrote for these words.

It starts from the merged model of the quick start. Half of the pairs of scripts/make_preferences.py have a sentence of
that model as the worse one, half a person's sentence for other words. At temperature 0.3, the
best of 8 answers has a coverage of 0.511 on test prompts, where greedy answers have 0.421; see docs/preferences.md.
"""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/reward_commongen"
    c.model.path = "runs/quickstart/merged"
    c.model.unroll = 0
    c.task.kind = "reward"
    c.data.train = "pairs/reward_train.jsonl"
    c.data.validation = "pairs/reward_validation.jsonl"
    c.data.test = "pairs/test.jsonl"
    c.data.end = "<s>"
    c.data.buckets = 2
    c.tuning.method = "full"
    c.optim.lr = 2e-3
    c.train.batch_size = 32
    c.train.epochs = 4
    c.train.eval_every = 100
    c.export.formats = ("full",)
    return c
