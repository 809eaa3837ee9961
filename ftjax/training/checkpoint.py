"""Checkpoints: the trained parameters, the optimizer state and the record of the run, written by Orbax in the
background.

Each step has one folder, which is atomically renamed into place. It holds `trained`, `optimizer`, `run` and, where the
run has them, `ema` and `guard`, so that an export reads the trained parameters without the optimizer state. The frozen
base is never copied, only named in the run's record. Each folder also holds the checksums of its files. By them a
reader recognises a checkpoint that is torn, changed, renamed or made of parts of several.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import types
import warnings
from pathlib import Path

import jax
import numpy as np

from ftjax import seals
from ftjax.errors import FtjaxError, reason
from ftjax.files import below, mode, replace_json
from ftjax.foreign import mapped, maybe, number, read_json, whole
from ftjax.training import hosts

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit to it last; it is not read here
DAMAGED = "damaged"  # suffix of the folder of a damaged checkpoint
SMALL = 1 << 14  # bytes that the small files beside an array take, each at least a block of the disk
STORED = ("trained", "optimizer", "ema", "guard")  # fields of a State; its step is in the record of the run
RANKED = {"rank": number(), "val_loss": number(), "step": whole()}


class Checkpoints:
    """The checkpoints of one run folder. The latest `keep` and the best one by validation are kept."""

    def __init__(self, run_dir: str | Path, keep: int = 1, read_only: bool = False, say=None):
        """Open a run's checkpoints.

        Args:
            run_dir: Folder of the run.
            keep: How many of the latest checkpoints are kept.
            read_only: Whether nothing is written. Otherwise the folders of damaged checkpoints are renamed.
            say: Called with each line for a person; None: lines become warnings.

        Raises:
            FtjaxError: If there are checkpoints and all of them are damaged.
        """
        self.folder, self.read_only = Path(os.path.realpath(run_dir)) / FOLDER, read_only
        self.say = say or functools.partial(warnings.warn, stacklevel=3)
        self.manager, self.saving = None, 0  # saving: step of the checkpoint that is being written
        self.pinned = 0  # step of a checkpoint that is kept whatever follows it
        # A reader does not need the optimizer state, the largest part of a checkpoint.
        damaged = self._damaged() if read_only else hosts.from_first(self._damaged)
        self.damaged = {int(step): what for step, what in damaged.items()}
        intact = self.steps()
        if self.damaged and not intact:
            raise FtjaxError(
                f"{self.folder}: holds no whole checkpoint: {'; '.join(self.damaged.values())}. Put the files back, or "
                "start the run anew with --config.overwrite=True"
            )
        for step, what in self.damaged.items():
            lost = f"; {step - intact[-1]:,} steps are lost" if step > intact[-1] else ""
            kept = "" if read_only else f". It stays as {self._aside(step).name}"
            self.say(f"{self.folder}: {what}. The latest whole checkpoint is that of step {intact[-1]:,}{lost}{kept}")
        if not read_only:
            self._open(keep)

    def _open(self, keep: int) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every rename, and every error twice
        if jax.process_index() == 0:
            for step in self.damaged:
                (self.folder / str(step)).rename(self._aside(step))
        self.damaged = {}
        hosts.from_first(lambda: None)
        policies = ocp.checkpoint_managers
        # Sorted ascending by the metric, of which the last are kept.
        best = policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        pinned = types.SimpleNamespace(should_preserve=lambda all, context: [x.step == self.pinned for x in all])
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={name: self._arrays_handler() for name in STORED} | {"run": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                best_fn=_rank,  # without it Orbax stores no metrics for the policy
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best, pinned]),
                cleanup_tmp_directories=True,  # remove what a killed run left half written
                # Called after all files are written, and before the checkpoint is renamed and others are deleted.
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    @staticmethod
    def _arrays_handler():
        import orbax.checkpoint as ocp

        # One file per array: on a single host three times as fast as OCDBT, which is for large pods.
        return ocp.PyTreeCheckpointHandler(use_ocdbt=jax.process_count() > 1)

    def _seal(self) -> None:
        """Write the checksums of the checkpoint that was just written, in the thread that wrote it."""
        if jax.process_index():
            return
        drafts = [*self.folder.glob(f"{self.saving}.*tmp*"), self.folder / str(self.saving)]
        draft = next(path for path in drafts if path.is_dir())
        sums = seals.checksums(draft, _files(draft))
        replace_json(draft / CHECKSUMS, seals.sealed({"step": self.saving, "checksums": sums}))

    def _damaged(self) -> dict[int, str]:
        """{step of a damaged checkpoint: what is wrong with it}."""
        found = {step: damage(self.folder / str(step), self.read_only) for step in steps_in(self.folder.parent)}
        return {n: f"the checkpoint of step {n:,} is damaged: {what}" for n, what in found.items() if what}

    def _aside(self, step: int) -> Path:
        """An unused name for the folder of a damaged checkpoint."""
        names = (self.folder / f"{step}.{DAMAGED}{i or ''}" for i in range(1000))
        return next(path for path in names if not path.exists())

    def save(self, state, run: dict, rank: float | None) -> None:
        """Start writing a checkpoint, and return before it is on disk.

        Args:
            state: A ftjax.training.step.State.
            run: Record of the run.
            rank: Quality of the state, where more is better; None: unknown, and the checkpoint is then never the best.

        Raises:
            FtjaxError: If it, or the checkpoint before it, cannot be written.
        """
        from orbax.checkpoint import args

        self.wait()  # for the checkpoint before, which must be sealed with its own step
        # Orbax would write a part of each of several equal copies, and compile a program for every shape of them.
        one = lambda x: x.addressable_data(0) if x.is_fully_replicated and x.is_fully_addressable else x  # noqa: E731
        arrays = {name: args.PyTreeSave(jax.tree.map(one, getattr(state, name))) for name in _arrays(state)}
        self.saving = int(state.step)
        leaves = jax.tree.leaves([getattr(state, name) for name in arrays])
        self._check_room(sum(x.nbytes + SMALL for x in leaves) + (1 << 20))
        with self._written():
            self.manager.save(
                self.saving,
                args=args.Composite(**arrays, run=args.JsonSave(run)),
                metrics=None if rank is None else {"rank": rank, "step": self.saving},
                force=True,
            )

    def _check_room(self, size: int) -> None:
        """Raise FtjaxError if the disk has no room for so many bytes. Orbax's own error is very long, and its threads
        print tracebacks beside it."""
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise FtjaxError(self._unwritten(f"it takes up to {size:,} bytes, and the disk has room for {free:,}"))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is on disk. Raises FtjaxError if it cannot be written."""
        with self._written():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except FtjaxError:
            raise
        except Exception as error:  # Orbax and tensorstore raise many kinds for a full disk
            raise FtjaxError(self._unwritten(reason(error))) from error

    def _unwritten(self, why: str) -> str:
        return (
            f"{self.folder}: the checkpoint of step {self.saving:,} cannot be written: {why}. Those before it are "
            "whole. Make room, or let the folder be written to: the same command then goes on"
        )

    def latest(self) -> int | None:
        """Step of the latest checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of all undamaged checkpoints, ascending."""
        return [step for step in steps_in(self.folder.parent) if step not in self.damaged]

    def best(self) -> int | None:
        """Step of the best checkpoint by validation; the latest if none has a rank; None without checkpoints."""
        files = {step: self.folder / str(step) / "metrics" / "metrics" for step in self.steps()}
        ranked = [(_rank(read_json(file, **RANKED)), step) for step, file in files.items() if mode(file)]
        return max(ranked)[1] if ranked else self.latest()

    def record(self, step: int) -> dict:
        """The record that was passed to `save` at `step`. Raises FtjaxError if it is not complete."""
        fields = {"config": mapped(), "best": maybe(number()), "best_loss": maybe(number())}
        record = read_json(self.folder / str(step) / "run" / "metadata", **fields)
        if missing := {"config", "step", "best", "stale", "seconds"} - record.keys():
            raise FtjaxError(f"{self.folder / str(step)}: the record of the run lacks {min(missing)}")
        return record

    def trained(self, step: int, abstract: dict, ema: bool = False) -> dict:
        """Read the trained parameters.

        Args:
            step: Step of the checkpoint.
            abstract: Tree of jax.ShapeDtypeStruct with the wanted shapes, dtypes and shardings, on any mesh.
            ema: Whether to read their moving average instead.

        Raises:
            FtjaxError: If the checkpoint cannot be read as this tree.
        """
        return self._restored(step, "ema" if ema else "trained", abstract)

    def state(self, step: int, abstract):
        """Read the whole `State`. abstract: a State of jax.ShapeDtypeStruct with shardings."""
        arrays = {name: self._restored(step, name, getattr(abstract, name)) for name in _arrays(abstract)}
        place = jax.device_put(np.int32(step), abstract.step.sharding)
        return type(abstract)(place, **arrays)

    def rewound(self, step: int, to: int, abstract):
        """The State of the checkpoint of `step` as that of the later step `to`: what lies between changed nothing."""
        state, places = self.state(step, abstract), abstract.step.sharding
        guard = state.guard | {"skipped": jax.device_put(np.int32(int(state.guard["skipped"]) + to - step), places)}
        return state._replace(step=jax.device_put(np.int32(to), places), guard=guard)

    def _restored(self, step: int, item: str, abstract):
        import orbax.checkpoint as ocp
        from etils import epath

        logging.getLogger("absl").setLevel(logging.CRITICAL)
        folder, arguments = self.folder / str(step) / item, ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            return self._arrays_handler().restore(
                epath.Path(folder), args=ocp.args.PyTreeRestore(item=abstract, restore_args=arguments)
            )
        except Exception as error:  # for a checkpoint without checksums, or one of another run
            raise FtjaxError(
                f"{folder}: cannot be read as what this run trains: {reason(error)}. The checkpoint is damaged, or of "
                "another run"
            ) from error

    def close(self) -> None:
        """Wait until everything is on disk. If the folder holds no checkpoint, a process that may write removes it."""
        if self.read_only:
            return
        with self._written():
            self.manager.close()
        with contextlib.suppress(OSError):  # it is not empty
            self.folder.rmdir()


def steps_in(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, damaged ones included, ascending. Raises OSError if they lie in a
    folder that cannot be read."""
    folder = run_dir / FOLDER
    return sorted(int(name) for name in (os.listdir(folder) if os.path.lexists(folder) else ()) if name.isdigit())


def _files(folder: Path) -> list[str]:
    """Names of the files of a checkpoint that do not change after they are written."""
    names = [path.relative_to(folder).as_posix() for path in below(folder) if path.is_file()]
    return [name for name in names if name not in (CHECKSUMS, CHANGING)]


def damage(folder: Path, reading: bool) -> str:
    """What is wrong with the folder of a checkpoint; empty if its files are as they were written.

    reading: whether the caller only reads. The optimizer state is then not checked.
    """
    record = seals.opened(folder / CHECKSUMS)
    if record is None:
        if missing := [name for name in ("trained", "optimizer", "run") if not mode(folder / name)]:
            return f"{missing[0]} is missing"
        there = mode(folder / CHECKSUMS)  # an earlier version wrote none
        return f"{CHECKSUMS} is not as it was written" if there else ""
    if record["step"] != int(folder.name):
        return f"its folder is {folder.name}, and its files are of step {record['step']:,}"
    sums = {n: crc for n, crc in record["checksums"].items() if not (reading and n.startswith("optimizer/"))}
    if changed := seals.changed(folder, sums):
        more = f", and {len(changed) - 1} more files are" if len(changed) > 1 else " is"
        return f"{changed[0]}{more} missing or not as written"
    return ""


def _rank(metrics: dict) -> tuple[float, int]:
    """The key by which checkpoints are ordered. Of equally good ones, the earlier is better."""
    if "rank" not in metrics:  # written by a version in which runs could not choose what to select by
        return -metrics["val_loss"], 0
    return metrics["rank"], -metrics["step"]


def _arrays(state) -> list[str]:
    """Names of the fields of a State that a checkpoint of it holds."""
    return [name for name in STORED if getattr(state, name) is not None]
