"""Which parameters the rows of earlier stages depend on: the diagonal of their Fisher information, for EWC."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import config as configs
from ftjax import tasks, xla
from ftjax.data.batches import Batches
from ftjax.data.prepare import prepare
from ftjax.training.step import as_float32, summed

ROWS = 512  # of the earlier rows that are used, spread over all of them


def diagonal(sums, variables, trained, frozen, batches):
    """Mean over the rows of the squared gradient of a row's log-likelihood (the empirical Fisher information).

    Args:
        sums: As in step.gradients.
        variables: As in step.gradients.
        trained: Tree of the trained parameters.
        frozen: Tree of the other parameters.
        batches: Batches of rows with one example each.

    Returns:
        A tree as `trained`, float32.
    """

    def added(total, trained, frozen, batch):
        def squared(row):
            row = jax.tree.map(lambda x: x[None], row)
            gradient = as_float32(jax.grad(lambda t: sums(variables(t, frozen), row)[0])(trained))
            return jax.tree.map(jnp.square, gradient)

        return summed(squared, total, batch)

    total, added = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained), xla.jit(added)
    for step in range(len(batches)):
        total = added(total, trained, frozen, batches[step])
    return jax.tree.map(lambda x: x / len(batches.examples), total)


def weighed(job, program, state, frozen):
    """The state before the first step with the importance of each parameter for the rows of `data.earlier`.

    Args:
        job: The run's Job.
        program: Its Program.
        state: The State.
        frozen: Tree of the frozen parameters.
    """
    config = configs.copy(job.config)
    config.data.mixture, config.data.earlier = config.data.earlier, ()
    part = prepare(config, job.tokenizer, job.data.max_length, parts=("train",)).train
    rows = part.select(np.unique(np.linspace(0, len(part) - 1, ROWS).astype(int)))
    task = tasks.find(config.task.kind)
    batches = Batches(rows.examples, config.train.batch_size, job.data.max_length, buckets=1, shuffle=False)
    sums = functools.partial(task.sums, program.model, **task.always(config))
    found = diagonal(sums, program.variables, state.trained, frozen, batches)
    found = jax.device_put(found, program.trained_places)
    # An Anchor without importance is that of optim.start_l2.
    return state._replace(optimizer=optax.tree.set(state.optimizer, lambda path, x: x is not None, importance=found))
