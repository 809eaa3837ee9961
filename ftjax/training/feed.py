"""The batches of a run, on their way to the devices."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ftjax.data.batches import loader
from ftjax.data.store import ahead
from ftjax.training import sharding
from ftjax.training.job import Job
from ftjax.training.program import Program
from ftjax.training.report import Progress

PLACED = 2  # batches that wait on the devices for the next steps


class Feed:
    """The batches of a run in the order of its steps.

    The next ones travel to the devices while a step runs. If the task's batches depend on the state (`Task.collect`),
    each is made when it is asked for.
    """

    def __init__(
        self, job: Job, program: Program, frozen: dict, batches, after: int, progress: Progress,
        note: Callable[[int, dict], Any], taught: Callable[[dict], dict] = lambda batch: batch,
    ):  # fmt: skip
        """Prepare the batches of the steps after the step `after`.

        Args:
            job: The run.
            program: The compiled functions.
            frozen: Tree of frozen parameters.
            batches: job.batches, or Features of them.
            after: Number of steps that are done.
            progress: The line on the screen, which does not count the time of `Task.collect`.
            note: note(step, values) records what `Task.collect` found.
            taught: See features.taught.
        """
        self.job, self.program, self.frozen, self.batches = job, program, frozen, batches
        self.progress, self.note, self.taught = progress, note, taught
        self.local = sharding.local_rows(job.mesh, job.rows)
        self.made: collections.deque = collections.deque()  # collected batches of the next steps
        self.last: dict = {}  # the batch of the last step
        self.go_on(after)

    def go_on(self, after: int) -> None:
        """Go on with the batch that follows the step `after`."""
        self.step = after
        if not self.job.task.collect:
            self.ahead = ahead(self._fed(), PLACED)

    def _fed(self) -> Iterator[tuple[dict, int]]:
        share = self.job.rows / (self.local.stop - self.local.start)  # of a batch, of which this process has one
        left = self.job.steps - self.step
        for batch in loader(self.batches, self.step, left, self.job.config.data.workers, self.local):
            yield self._placed(batch), int(share * np.count_nonzero(batch["segment_ids"]))

    def _placed(self, batch: dict) -> dict:
        return sharding.place_batch(batch, self.job.mesh, self.job.rows, self.local)

    def next(self, state) -> tuple[dict, int]:
        """The batch of the next step on the devices, and its number of tokens. state: the State before the step."""
        self.last, tokens = self._collected(state) if self.job.task.collect else next(self.ahead)
        self.step += 1
        return self.taught(self.last), tokens

    def get(self, step: int) -> dict:
        """The batch of a step again; of collected ones there is only the last."""
        return self.last if self.job.task.collect else self._placed(self.batches.get(step - 1, self.local))

    def places(self, step: int) -> list[str]:
        """The names of the rows of a step's batch."""
        members = np.concatenate(self.job.batches.rows((step - 1) // self.job.updates))
        return list(dict.fromkeys(self.job.data.train.place(int(i)) for i in members))

    def _collected(self, state) -> tuple[dict, int]:
        job = self.job
        if not self.made:
            assert job.task.collect
            n = self.step // job.updates
            lm, variables = job.lm(self.program.model), self.program.variables(state.trained, self.frozen)
            members = np.concatenate(self.batches.rows(n))
            with self.progress.aside("drawing answers"):
                found = job.task.collect(lm, variables, job.data, job.config, n, members)
            self.made.extend(found.batches)
            if found.noted:
                self.note(self.step + 1, found.noted)
        batch = self.made.popleft()
        rows = len(batch["tokens"])
        own = sharding.local_rows(job.mesh, rows)
        arrays = sharding.place_batch({name: x[own] for name, x in batch.items()}, job.mesh, rows, own)
        return arrays, int(np.count_nonzero(batch["segment_ids"]))
