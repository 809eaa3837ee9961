"""Reinforcement on CommonGen: the model of the quick start learns to use more of the given words, by GRPO.

It starts from the merged model of the quick start, which is also the base that `kl` is measured from. The reward of an
answer is the share of the given words that it uses. With three seeds the coverage of greedy answers to the test
prompts rises from 0.396 to 0.614, 0.623 and 0.605, at about 0.4 nats a token from the base, while ROUGE-L falls from
0.298 to 0.244, 0.231 and 0.227. It takes five to eleven minutes on two cores; docs/policy.md says more.
"""

from ftjax import config


def get_config():
    c = config.default()
    c.run_dir = "runs/grpo_commongen"
    c.model.path = "runs/quickstart/merged"
    c.model.unroll = 0
    c.task.kind = "policy"
    c.task.policy = "grpo"
    c.task.rewards = ("coverage",)
    c.task.beta = 0.03
    c.data.train = "builtin:commongen/train.jsonl"
    c.data.validation = "builtin:commongen/validation.jsonl"
    c.data.test = "builtin:commongen/test.jsonl"
    c.data.prompt = "Words: {src}\nSentence:"
    c.data.completion = " {tgt}"
    c.data.end = "<s>"
    c.tuning.rank = 32
    c.tuning.alpha = 64.0
    c.optim.lr = 1.5e-3
    c.optim.schedule = "linear"
    c.rollout.group = 8
    c.train.batch_size = 256
    c.train.steps = 240
    c.train.eval_every = 60
    c.evaluate.rows = 256
    c.evaluate.compare = True
    c.evaluate.metrics = ("rouge_l", "coverage")
    c.evaluate.words = "src"
    c.evaluate.forgetting = "builtin:tinystories/stories.txt"
    c.generate.max_new_tokens = 48
    c.generate.batch_size = 64
    return c
