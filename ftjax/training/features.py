"""Hidden states of a frozen model, computed once: what a head that alone is trained reads in every epoch.

B rows, T tokens, M trained tokens a row at most, D width, N examples, S trained tokens of all examples.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np

from ftjax.data.batches import Batches
from ftjax.objectives import causal
from ftjax.training import sharding

states = jax.jit(causal.states, static_argnums=0)


def usable(config, trained: dict, steps: int, epoch: int) -> bool:
    """Whether a run should keep states: the head alone is trained, on states that are the same in every epoch, and for
    more than one epoch. Runs of several processes keep none: each would need the states of all rows.

    trained: tree of what is trained; steps: of the whole run, so that one that goes on does as before; epoch: steps of
    one.
    """
    same = not config.train.dropout and not config.train.neftune
    same = same and config.task.kind != "span"  # whose head reads all tokens
    head_alone = set(trained) in ({"lm_head"}, {"head"})
    return config.train.cache_features and head_alone and same and steps > epoch and jax.process_count() == 1


class Features:
    """The batches of a Batches with `states` (B, M, D) beside, which the objective takes for the model's own."""

    def __init__(self, batches: Batches, model, variables: dict, mesh, folder: Path):
        """variables: what `model` is applied to. The states (S, D) lie in an unnamed file in `folder`, which goes with
        the process, in the model's compute dtype."""
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
        """As Batches.get, with `states` (B, M, D), zero where `weights` are."""
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
    """FLOPs of forward and backward of a head on states that are there, for one place; trained: tree of its shapes."""
    return 4.0 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(trained) if len(x.shape) > 1)
