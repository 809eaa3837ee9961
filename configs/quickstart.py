"""Quick start: teach a story model of 260,000 parameters to write a sentence from given words, on a laptop's CPU."""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/quickstart"
    c.data.train = "builtin:commongen/train.jsonl"
    c.data.validation = "builtin:commongen/validation.jsonl"
    c.data.test = "builtin:commongen/test.jsonl"
    c.data.prompt = "Words: {src}\nSentence:"
    c.data.completion = " {tgt}"
    c.tuning.rank = 16
    c.optim.lr = 5e-3
    c.train.batch_size = 64
    c.train.steps = 600
    c.evaluate.rows = 256
    c.evaluate.compare = True
    c.evaluate.compare_rows = 200
    c.evaluate.metrics = ("rouge_l", "coverage")
    c.evaluate.words = "src"
    c.evaluate.forgetting = "builtin:tinystories/stories.txt"
    c.generate.max_new_tokens = 48
    c.export.formats = ("adapter", "merged")
    return c
