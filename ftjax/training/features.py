"""What a run computes beside its steps: values that every epoch reads (the states that a head alone reads when nothing
else is trained, and the log-probabilities of a reference model or the distributions of a teacher), and the hidden
states of a teacher for each batch.

B rows, T tokens, M trained tokens a row at most, D width, N examples, S trained tokens of all examples.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import ftjax
from ftjax import tasks, xla
from ftjax.data import store
from ftjax.data.batches import Batches
from ftjax.data.prepare import cache_of
from ftjax.errors import FtjaxError
from ftjax.files import naming
from ftjax.hub import fingerprint, peft, resolve
from ftjax.lm import LM
from ftjax.loading import base_of_adapter, load
from ftjax.objectives import causal, hidden
from ftjax.seals import digest
from ftjax.training import sharding

VALUES = "values"  # file of a cache entry

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
    task = tasks.find(config.task.kind)
    same = same and not task.whole_rows and not task.once(config)
    head_alone = set(trained) in ({"lm_head"}, {"head"})
    return config.train.cache_features and head_alone and same and steps > epoch and jax.process_count() == 1


def keeper(job, program, trained: dict, frozen: dict) -> tuple[Callable[..., Any] | None, float | None]:
    """What a run computes once for its batches.

    Args:
        job: The run's Job.
        program: Its Program.
        trained: Tree of the trained parameters.
        frozen: Tree of the other parameters.

    Returns:
        (Batches -> Features, or None if there is nothing to keep; FLOPs of a step for each token, if they change).

    Raises:
        FtjaxError: If the reference model cannot be used.
    """
    config, mesh, model = job.config, job.mesh, program.model

    def kept(name, f, shape, dtype, **stored):
        def compute(batch):
            rows = len(batch["tokens"])
            return f(sharding.place_batch(batch, mesh, rows, slice(0, rows)))

        return functools.partial(
            Features, name=name, compute=compute, shape=shape, dtype=dtype, folder=Path(config.run_dir), **stored
        )

    if usable(config, program.trained, job.steps, len(job.batches)) and not job.spec.model.mixing:
        f = functools.partial(states, model, program.variables(trained, frozen))
        return kept("states", f, (model.config.width,), model.dtype), flops_per_token(program.trained)
    if once := job.task.once(config):
        shape = job.task.per_token(config, model.config.vocab_size)
        same = model.config.vocab_size if shape else 0
        compute = reference(config.task.reference, config.model.dtype, once, job.tokenizer, mesh, same)
        cache, key = cache_of(config.data), known_by(config, mesh)
        return kept("reference", compute, shape, np.float32, cache=cache, key=key), None
    return None, None


def known_by(config, mesh) -> str:
    """Digest of all that the values of a reference model depend on besides the rows: its files, the settings, the code,
    and the devices, because others compute other last digits."""
    code = [file.read_bytes() for file in sorted(Path(ftjax.__file__).parent.rglob("*.py"))]
    settings = [config.task.to_dict(), config.distil.to_dict(), config.model.dtype, config.model.head_chunk]
    devices = [jax.__version__, jax.devices()[0].device_kind, dict(mesh.shape)]
    named = {"task.reference": config.task.reference}
    folder = resolve.resolve(config.task.reference)
    if (folder / peft.CONFIG).is_file():
        named["its base"] = str(base_of_adapter(folder))
    return digest(fingerprint.of_named(named), settings, devices, *code)


def opened(path: str, dtype: str, tokenizer, mesh=None, causal: bool = True) -> LM:
    """The model of task.reference.

    Args:
        path: Its name there.
        dtype: See ftjax.load.
        tokenizer: The tokenizer that encoded the rows.
        mesh: The devices of the run; None: the default device.
        causal: Whether it must continue texts; else it is an encoder, see program.with_teacher.

    Raises:
        FtjaxError: If the reference has other tokens or another task, or for a mesh of several processes.
    """
    if mesh and jax.process_count() > 1:
        raise FtjaxError("task.reference: is for runs of one process; leave it empty, or use one process")
    lm = load(path, dtype=dtype)
    if causal and lm.kind != "causal":
        raise FtjaxError(f"task.reference: expected a model of task.kind causal; {path} is for {lm.kind}")
    own, other = tokenizer.get_vocab(), lm.tokenizer.get_vocab()
    if differing := sorted(own.items() ^ other.items(), key=lambda item: item[1]):
        raise FtjaxError(
            f"task.reference: {path} has {len(other):,} tokens and the model that is trained has {len(own):,}, and "
            f"they differ, first in {differing[0][0]!r} with the id {differing[0][1]}. Both are compared token by "
            "token, so they need the same vocabulary"
        )
    return lm


def taught(job) -> Callable[[dict], dict]:
    """The function that adds `reference`, the hidden states of a run's teacher, to a batch on the devices. Without such
    a teacher it returns the batch. job: the run's Job. Raises FtjaxError if the teacher cannot be used."""
    config = job.config
    if not config.distil.hidden:
        return lambda batch: batch
    lm = opened(config.task.reference, config.model.dtype, job.tokenizer, job.mesh, causal=False)
    if job.longest > lm.max_tokens:
        raise too_long(config.task.reference, lm, job.longest)
    variables = jax.device_put(lm.variables, NamedSharding(job.mesh, PartitionSpec()))
    layers = tuple(layer for _, layer in config.distil.layers)
    compiled = xla.jit(functools.partial(hidden.states, lm.model, layers=layers))
    return lambda batch: batch | {"reference": compiled(variables, batch)}


def too_long(path: str, lm: LM, longest: int) -> FtjaxError:
    """The error for a text of `longest` tokens, which the model of task.reference has no positions for."""
    return FtjaxError(
        f"task.reference: {path} has {lm.max_tokens:,} positions, and a text has {longest:,} tokens; lower "
        "data.max_length"
    )


def reference(path: str, dtype: str, f: Callable, tokenizer, mesh=None, vocab_size: int = 0) -> Callable[[dict], Any]:
    """The function batch -> (B, M, ...) values of a reference model, such as log-probabilities.

    Args:
        path: The model, as task.reference names it.
        dtype: See ftjax.load.
        f: The function (model, variables, batch) -> the values, see Task.once.
        tokenizer: The tokenizer that encoded the rows.
        mesh: The devices, each of which gets the whole reference model; None: the default device.
        vocab_size: Number of logits of the model that is trained, which the reference must have too; 0: any number.

    Raises:
        FtjaxError: See `opened`; and if the reference has logits for another number of tokens, or too few positions.
    """
    lm = opened(path, dtype, tokenizer, mesh)
    if vocab_size not in (0, found := lm.model.config.vocab_size):
        raise FtjaxError(
            f"task.reference: {path} gives logits for {found:,} tokens and the model that is trained for "
            f"{vocab_size:,}, of which some are padding without a token. A teacher needs the same number: give both "
            "tables the same rows"
        )
    variables = jax.device_put(lm.variables, NamedSharding(mesh, PartitionSpec())) if mesh else lm.variables
    compiled = xla.jit(functools.partial(f, lm.model))

    def compute(batch):
        if (longest := int(batch["positions"].max()) + 1) > lm.max_tokens:
            raise too_long(path, lm, longest)
        return compiled(variables, batch)

    return compute


class Features:
    """The batches of a Batches with one more array (B, M, ...), which the objective uses instead of computing it."""

    def __init__(
        self, batches: Batches, name: str, compute: Callable, shape: tuple[int, ...], dtype, folder=None,
        cache: store.Cache | None = None, key: str = "",
    ):  # fmt: skip
        """Compute the values of all trained tokens.

        Args:
            batches: The batches.
            name: Name of the array in a batch.
            compute: compute(batch) -> the values (B, M, *shape).
            shape: Shape of the values of a token.
            dtype: Their dtype.
            folder: Folder of the file with the values (S, *shape), without a cache; None: that for temporary files. The
                file has no name, so it vanishes with the process.
            cache: Where the values are kept for later runs.
            key: Digest of all that they depend on besides the batches' rows.
        """
        examples = batches.examples
        self.batches, self.name, self.labels = batches, name, examples.labels
        self.start = np.cumsum(self.labels) - self.labels
        # Padded by length and in order: no packing, in which rows of the last batch would be compiled anew.
        plain = Batches(examples, batches.batch_size, int(examples.length.max()), shuffle=False, apart=batches.apart)
        shape, dtype = (int(self.labels.sum()), *shape), np.dtype(dtype)
        array = functools.partial(np.memmap, dtype=dtype, shape=shape)

        def computed(file) -> np.memmap:
            if hasattr(os, "posix_fallocate"):  # where the disk is full, a write to the map would kill the process
                os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
            values = array(file, mode="w+")
            for step in range(len(plain)):
                for found, members in zip(np.asarray(compute(plain[step])), plain.rows(step), strict=True):
                    places = self._places(members)
                    values[places] = found[: len(places)]
            return values

        if cache is None or cache.folder is None:
            folder = folder or tempfile.gettempdir()
            with naming(folder), tempfile.TemporaryFile(dir=folder) as file:  # the map stays when it is closed
                self.values = computed(file)
            return
        rows = [digest(e.ids.tobytes(), e.trained.tobytes(), e.second) for e in examples]
        key = digest(key, rows, name, batches.batch_size, batches.apart)

        def write(draft: Path) -> None:
            with (draft / VALUES).open("w+b") as file:
                computed(file).flush()

        with store.kept(cache, key, "values of a reference model", write) as (entry, _):
            self.values = array(entry / VALUES, mode="r")

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The whole batch of a step; see `get`."""
        return self.get(step)

    def get(self, step: int, row_slice: slice = slice(None)) -> dict[str, np.ndarray]:
        """As Batches.get, with the values (B, M, ...), which are zero where `weights` are padding."""
        batch = self.batches.get(step, row_slice)
        out = np.zeros((*batch["labels"].shape[:2], *self.values.shape[1:]), self.values.dtype)
        for row, members in zip(out, self.batches.rows(step)[row_slice], strict=True):
            places = self._places(members)
            row[: len(places)] = self.values[places]
        return batch | {self.name: out}

    def _places(self, members: np.ndarray) -> np.ndarray:
        """Where the values of the trained tokens of a row's examples are, in the order of the row."""
        ranges = [np.arange(self.start[i], self.start[i] + self.labels[i]) for i in members]
        return np.concatenate([np.zeros(0, int), *ranges])


def flops_per_token(trained: dict) -> float:
    """FLOPs of the forward and backward pass of a head on known states, for one token. trained: tree of the head's
    shapes."""
    return 4.0 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(trained) if len(x.shape) > 1)
