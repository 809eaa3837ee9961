"""Hidden states of a frozen model, computed once. A head that is trained alone reads them in every epoch.

B rows, T tokens, M trained tokens a row at most, D width, N examples, S trained tokens of all examples.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np

from ftjax import tasks, xla
from ftjax.data.batches import Batches
from ftjax.objectives import causal
from ftjax.training import sharding

states = xla.jit(causal.states, static_argnums=0)


def usable(config, trained: dict, steps: int, epoch: int) -> bool:
    """Whether a run should keep hidden states.

    It should if only the head is trained, on states that are the same in every epoch, for more than one epoch. Runs of
    several processes keep none, because each process would need the states of all rows.

    Args:
        config: The whole config.
        trained: Tree of the trained parameters.
        steps: Steps of the whole run, so that a resumed run decides as its first start did.
        epoch: Steps of an epoch.
    """
    same = not config.train.dropout and not config.train.neftune
    same = same and not tasks.find(config.task.kind).whole_rows
    head_alone = set(trained) in ({"lm_head"}, {"head"})
    return config.train.cache_features and head_alone and same and steps > epoch and jax.process_count() == 1


class Features:
    """The batches of a Batches with an additional array `states` (B, M, D), which the objective uses instead of
    computing them."""

    def __init__(self, batches: Batches, model, variables: dict, mesh, folder: Path):
        """Compute the states of all examples, in the model's compute dtype.

        Args:
            batches: The batches.
            model: The Flax module.
            variables: The Flax variables that it is applied to.
            mesh: The devices.
            folder: Folder of the file with the states (S, D). The file has no name, so it vanishes with the process.
        """
        examples = batches.examples
        self.batches, self.labels = batches, examples.labels
        self.start = np.cumsum(self.labels) - self.labels
        self.file = tempfile.TemporaryFile(dir=folder)
        shape = (int(self.labels.sum()), model.config.width)
        self.states = np.memmap(self.file, np.dtype(model.dtype), "w+", shape=shape)
        # Padded by length and in order: no packing, in which rows of the last batch would be compiled anew.
        rows = batches.batch_size
        plain = Batches(examples, rows, int(examples.length.max()), shuffle=False)
        for step in range(len(plain)):
            batch = sharding.place_batch(plain[step], mesh, rows, slice(0, rows))
            for found, members in zip(np.asarray(states(model, variables, batch)), plain.rows(step), strict=True):
                for example in members:
                    count = self.labels[example]
                    self.states[self.start[example] :][:count] = found[:count]

    def __len__(self) -> int:
        return len(self.batches)

    def get(self, step: int, row_slice: slice = slice(None)) -> dict[str, np.ndarray]:
        """As Batches.get, with `states` (B, M, D), which are zero where `weights` are zero."""
        batch = self.batches.get(step, row_slice)
        out = np.zeros((*batch["labels"].shape, self.states.shape[1]), self.states.dtype)
        for row, members in zip(out, self.batches.rows(step)[row_slice], strict=True):
            at = 0
            for example in members:
                count = self.labels[example]
                row[at : at + count] = self.states[self.start[example] :][:count]
                at += count
        return batch | {"states": out}


def flops_per_token(trained: dict) -> float:
    """FLOPs of the forward and backward pass of a head on known states, for one token. trained: tree of the head's
    shapes."""
    return 4.0 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(trained) if len(x.shape) > 1)
