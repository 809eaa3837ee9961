"""Distillation on answers that the student writes itself (GKD, Agarwal et al. 2024): in a share `rollout.own` of the
steps the student answers the prompts of the rows, and learns its teacher's distributions for its own answers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from ftjax import user_code
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError
from ftjax.objectives import distil
from ftjax.tasks import Collected, causal, policy
from ftjax.training import features

OWN = 3  # tells the random choice of steps from other random numbers


def _teacher(path: str, dtype: str, how: distil.Teacher, head_chunk: int, *where):
    """The function batch -> what is kept of the teacher's distributions. where: see features.reference."""
    return features.reference(path, dtype, functools.partial(causal.known, how=how, head_chunk=head_chunk), *where)


def start(example: Example) -> int:
    """The place of the first token of the last answer of a row; of a text without a prompt its second token."""
    before = np.append(False, example.trained[:-1])
    return int(np.flatnonzero(example.trained & ~before)[-1])


def collect(lm, variables, data, config, step: int, examples: np.ndarray) -> Collected:
    """See Task.collect: the rows of a step, or the student's answers to their prompts, with the teacher's
    distributions. Which of the two depends on the seed and the step alone."""
    own = np.random.default_rng((config.seed, step, OWN)).random() < config.rollout.own
    texts = [data.train.examples[int(i)] for i in examples]
    if own:
        prompts = [text.ids[: start(text)].tolist() for text in texts]
        drawn = policy.sample(lm, variables, prompts, (config.seed, step, policy.DRAWS), config)
        texts = policy.answered(prompts, drawn)
    batch, _ = policy.laid_out(texts, data, config, jax.sharding.get_abstract_mesh())
    batch["given"] = np.full_like(batch["weights"], not own)
    model = config.task.reference, config.model.dtype, causal.teacher(config), config.model.head_chunk
    compute = user_code.once(_teacher, *model, lm.tokenizer, jax.sharding.get_mesh(), lm.model.config.vocab_size)
    batch["reference"] = np.asarray(compute(batch))
    return Collected([batch])


def check(config, method, spec, data) -> None:
    """See Task.check: the student needs room for an answer to each prompt."""
    if not config.task.reference:
        raise FtjaxError("task.reference: task.kind gkd needs a teacher; name its directory, adapter or run folder")
    most, length = config.generate.max_new_tokens, data.train.examples.length
    for i in np.flatnonzero(length + most > data.max_length) if config.rollout.own else ():
        if (first := start(data.train.examples[i])) + most > data.max_length:
            raise policy.no_room(data.train.place(int(i)), first, most, data.max_length, "remove the row")


TASK = dataclasses.replace(
    causal.TASK,
    private=False,
    once=lambda config: None,
    check=check,
    collect=collect,
    longest=policy.longest,
    arrays=("given", "reference"),
)
