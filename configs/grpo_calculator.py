"""A calculator as a tool: the starter model learns to use it on sums in GSM8K's form, by GRPO on whole episodes.

The model writes `<<12+30=`, where its turn ends (generate.stop), and the environment below goes on with `42>>`. The
reward is 1 if the final number of the solution is that of the row. scripts/make_sums.py writes the rows: GSM8K itself
is far beyond a model of 260,000 parameters. The 600 supervised steps are on hasty solutions: 60 % of those with two
sums end after the first, so that the model does the same. Of its greedy solutions to the 400 test questions 0.480,
0.483 and 0.495 are right after them (seeds 0, 1 and 2), and 0.983, 0.983 and 0.945 after GRPO. About five minutes on
two cores of an Intel Xeon.
"""

import re

from ftjax import config
from ftjax.evaluation.metrics import final_number

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
MOST = 9  # digits of a number


class Calculator:
    """The environment: a text without an open `<<` is the end of a solution."""

    def reset(self, row):
        self.wanted, self.solution = final_number(row["answer"]), ""
        return None  # the prompt is that of the row

    def step(self, text):
        self.solution += text
        _, opened, asked = text.rpartition("<<")
        if not opened or ">>" in asked:
            return "", float(final_number(self.solution) == self.wanted), True
        return f"{result(asked)}>>", 0.0, False


def result(asked: str) -> str:
    """What an expression such as `12 + 30` makes, or `error`."""
    found = re.fullmatch(rf"\s*(\d{{1,{MOST}}})\s*([-+*/])\s*(\d{{1,{MOST}}})\s*=?\s*", asked)
    if not found or (found[2] == "/" and int(found[3]) == 0):
        return "error"
    return f"{OPERATIONS[found[2]](int(found[1]), int(found[3])):g}"


def get_config():
    c = config.default()
    c.run_dir = "runs/grpo_calculator"
    c.model.unroll = 0
    c.data.train = "sums/train.jsonl"
    c.data.validation = "sums/validation.jsonl"
    c.data.test = "sums/test.jsonl"
    c.data.prompt = "{question}\nAnswer:"
    c.data.completion = " {answer}"
    c.data.end = "<s>"
    c.data.max_length = 128
    c.tuning.method = "full"
    c.evaluate.rows = 200
    c.generate.max_new_tokens = 16
    c.generate.batch_size = 64
    c.generate.stop = ("=",)
    c.stages = (
        {
            "name": "format", "data.train": "sums/drafts.jsonl", "optim.lr": 2e-3, "train.batch_size": 32,
            "train.steps": 600, "train.eval_every": 300,
        },
        {
            "name": "reward",
            "task.kind": "policy",
            "task.environment": f"{__file__}:Calculator",
            "task.beta": 0.0,
            "rollout.turns": 4,
            "rollout.group": 8,
            "train.batch_size": 128,
            "train.steps": 60,
            "train.eval_every": 15,
            "optim.lr": 2e-4,
        },
    )  # fmt: skip
    return c
