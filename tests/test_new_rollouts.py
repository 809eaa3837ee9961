"""A task whose batches the model writes itself, in one file, which no other file knows: it imitates the best of its own
answers to each prompt."""

import numpy as np
import pytest
import tiny_labelled

import ftjax
from ftjax import tasks
from ftjax.data.batches import Batches
from ftjax.data.tokenise import Example
from ftjax.decoding import generate
from ftjax.objectives import causal
from ftjax.training.report import read_metrics

ANSWERS, LONGEST, WANTED = 8, 3, 11  # WANTED: a token id


def collect(lm, variables, data, config, step, examples):
    prompts = [data.train.examples[int(i)].ids.tolist() for i in examples]
    repeated = [prompt for prompt in prompts for _ in range(ANSWERS)]
    found = generate(lm.model, variables, repeated, max_new_tokens=LONGEST, temperature=1.0, seed=(config.seed, step))
    worth = np.array([answer.count(WANTED) for answer in found]).reshape(-1, ANSWERS)
    rows = []
    for i, k in enumerate(worth.argmax(1)):
        ids = prompts[i] + found[i * ANSWERS + k]
        rows.append(Example(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompts[i])))
    batches = [Batches(rows, config.train.batch_size, 32, buckets=1, shuffle=False)[0]] * 2
    return tasks.Collected(batches, {"wanted": float(worth.mean())})


def measure(lm, variables, part, config):
    prompts = [part.examples[i].ids.tolist() for i in range(len(part))]
    found = generate(lm.model, variables, prompts, max_new_tokens=LONGEST)
    return {"loss": -float(np.mean([answer.count(WANTED) for answer in found])), "answers": len(part)}


IMITATE = tasks.Task(
    head="causal",
    sums=causal.sums,
    always=causal.chunk,
    collect=collect,
    updates=lambda config: 2,
    longest=lambda config, data: int(data.train.examples.length.max()) + LONGEST,
    measure=measure,
)


@pytest.fixture
def imitate():
    tasks.register("imitate", IMITATE)
    yield
    del tasks.TASKS["imitate"]


def test_a_task_that_draws_its_own_batches_is_trained(imitate, tmp_path):
    c = tiny_labelled.config(
        tmp_path, tiny_labelled.make(tmp_path / "llama", "llama"), task__kind="imitate", optim__lr="3e-2"
    )
    c.train.update(steps=30, batch_size=8, eval_every=15)
    result = ftjax.train(c, say=lambda text: None)
    drawn = [row["wanted"] for row in read_metrics(c.run_dir) if "wanted" in row]
    assert len(drawn) == 15
    assert np.mean(drawn[-3:]) > np.mean(drawn[:3]) + 0.1
    assert result.val_loss < -2
