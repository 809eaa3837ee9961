"""Answers to questions as stretches of a text: all of MiniLM, on articles of SQuAD v1.1's dev file, judged on others of
them by the official rule; with the training file in data.train and this one in data.test it is the usual task."""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/squad_qa"
    c.model.path = "sentence-transformers/all-MiniLM-L6-v2"
    c.data.train = "squad/dev-v1.1.json"
    c.data.group = ("title",)
    c.data.max_length = 384
    c.data.buckets = 8
    c.task.kind = "span"
    c.task.stride = 128
    c.tuning.method = "full"
    c.optim.lr = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup = 0.1
    c.optim.weight_decay = 0.01
    c.train.epochs = 2.0
    c.train.batch_size = 16
    return c
