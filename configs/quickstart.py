"""Quick start: teach a story model of 260,000 parameters to write a sentence from three given words, on a laptop's CPU.

LoRA alone. It reaches a coverage of 0.38 to 0.44 in one to two and a half minutes, depending on the processor;
docs/results.md tells what else was tried, and so why Muon and why rank 32.
"""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/quickstart"
    c.model.unroll = 0  # five small layers: scanning them costs more than compiling them
    c.data.train = "builtin:commongen/train.jsonl"
    c.data.validation = "builtin:commongen/validation.jsonl"
    c.data.test = "builtin:commongen/test.jsonl"
    c.data.prompt = "Words: {src}\nSentence:"
    c.data.completion = " {tgt}"
    c.data.end = "<s>"  # what the stories end with; the tokenizer's own </s> was never pretrained
    c.data.buckets = 2
    c.tuning.rank = 32
    c.tuning.alpha = 64.0
    c.optim.name = "muon"
    c.optim.lr = 1.2e-2
    c.train.batch_size = 32
    c.train.steps = 750
    c.train.eval_every = 150
    c.evaluate.rows = 256
    c.evaluate.compare = True
    c.evaluate.metrics = ("rouge_l", "coverage")
    c.evaluate.words = "src"
    c.evaluate.forgetting = "builtin:tinystories/stories.txt"
    c.generate.max_new_tokens = 48
    c.generate.batch_size = 64
    c.export.formats = ("adapter", "merged")
    return c
