"""Checkpoints: what was trained, its optimizer, and the record of the run, written by Orbax in the background.

One folder a step, atomically renamed into place: `trained`, `optimizer`, `run`, and `ema` where an average is kept, lie
side by side in it, so that an export reads what was trained without its optimizer. The frozen base is named in the
run's record, never copied. Beside them lie the checksums of all files, by which a reader knows a checkpoint that is
torn, changed, renamed or made of parts of several.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np

from ftjax import seals
from ftjax.errors import FtjaxError
from ftjax.files import replace_json
from ftjax.foreign import mapped, maybe, number, read_json, whole
from ftjax.training import hosts

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit to it after all else; nothing here reads it
DAMAGED = "damaged"  # end of the name of a folder that was a checkpoint
METRICS = {"rank": number(), "val_loss": number(), "step": whole()}


class Checkpoints:
    """The checkpoints of one run folder: the latest `keep` and the best one by validation stay."""

    def __init__(self, run_dir: str | Path, keep: int = 1, read_only: bool = False, say=None):
        """Open a run's checkpoints.

        Args:
            run_dir: the folder of the run.
            keep: how many of the latest ones stay.
            read_only: nothing is written. Otherwise the folder of a damaged checkpoint gets another name.
            say: called with lines for a person; None: they are warnings.

        Raises:
            FtjaxError: where there are checkpoints, and none is whole.
        """
        self.folder, self.read_only = Path(run_dir).resolve() / FOLDER, read_only
        self.say = say or functools.partial(warnings.warn, stacklevel=3)
        self.manager, self.saving = None, 0  # the step of the checkpoint that is being written
        # A reader reads no optimizer, the largest part of a checkpoint.
        told = self._damaged() if read_only else hosts.from_first(self._damaged)
        self.damaged = {int(step): what for step, what in told.items()}
        whole = self.steps()
        if self.damaged and not whole:
            raise FtjaxError(
                f"{self.folder}: holds no whole checkpoint: {'; '.join(self.damaged.values())}. Put the files back, or "
                "start the run anew with --config.overwrite=True"
            )
        for step, what in self.damaged.items():
            lost = f"; {step - whole[-1]:,} steps are lost" if step > whole[-1] else ""
            kept = "" if read_only else f". It stays as {self._aside(step).name}"
            self.say(f"{self.folder}: {what}. The latest whole checkpoint is that of step {whole[-1]:,}{lost}{kept}")
        if not read_only:
            self._open(keep)

    def _open(self, keep: int) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every rename, and every error twice
        if jax.process_index() == 0:
            for step in self.damaged:
                (self.folder / str(step)).rename(self._aside(step))
        self.damaged = {}
        hosts.from_first(lambda: None)
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_rank,  # sorted ascending, the last are kept
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={name: self._arrays_handler() for name in ("trained", "optimizer", "ema")}
            | {"run": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                best_fn=_rank,  # without it Orbax stores no metrics, and the policy sees none
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                cleanup_tmp_directories=True,  # what a killed run left half written
                # Called when all files are written, before the checkpoint is renamed into place and others deleted.
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    @staticmethod
    def _arrays_handler():
        import orbax.checkpoint as ocp

        # One file an array: on a single host three times as fast as OCDBT, which serves large pods.
        return ocp.PyTreeCheckpointHandler(use_ocdbt=jax.process_count() > 1)

    def _seal(self) -> None:
        """Write the checksums of the checkpoint that has just been written, in the thread that wrote it."""
        if jax.process_index():
            return
        drafts = [*self.folder.glob(f"{self.saving}.*tmp*"), self.folder / str(self.saving)]
        draft = next(path for path in drafts if path.is_dir())
        sums = seals.checksums(draft, _files(draft))
        replace_json(draft / CHECKSUMS, seals.sealed({"step": self.saving, "checksums": sums}))

    def _damaged(self) -> dict[str, str]:
        """Step of each damaged checkpoint -> what is wrong with it."""
        steps = {path.name: path for path in self.folder.glob("*") if path.name.isdigit()}
        found = {step: _damage(path, self.read_only) for step, path in sorted(steps.items(), key=lambda x: int(x[0]))}
        return {
            step: f"the checkpoint of step {int(step):,} is damaged: {what}" for step, what in found.items() if what
        }

    def _aside(self, step: int) -> Path:
        """A name that nothing has, for the folder of a damaged checkpoint."""
        names = (self.folder / f"{step}.{DAMAGED}{i or ''}" for i in range(1000))
        return next(path for path in names if not path.exists())

    def save(self, state, run: dict, rank: float | None) -> None:
        """Start writing a checkpoint; return before it lies on disk.

        Args:
            state: a train.step.State.
            run: the record of the run.
            rank: how good the state is, more is better; None where that is not known, as then it is never the best.
        """
        from orbax.checkpoint import args

        self.wait()  # for the checkpoint before, which is sealed with its own step
        arrays = {name: args.PyTreeSave(getattr(state, name)) for name in _arrays(state)}
        self.saving = int(state.step)
        self._check_room(sum(x.nbytes for name in arrays for x in jax.tree.leaves(getattr(state, name))))
        with self._written():
            self.manager.save(
                self.saving,
                args=args.Composite(**arrays, run=args.JsonSave(run)),
                metrics=None if rank is None else {"rank": rank, "step": self.saving},
                force=True,
            )

    def _check_room(self, size: int) -> None:
        """Raises FtjaxError where the disk has no room for so many bytes: Orbax tells of that at great length."""
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise FtjaxError(self._unwritten(f"it has {size:,} bytes, and the disk has room for {free:,}"))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written lies on disk. Raises FtjaxError where it cannot be."""
        with self._written():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except FtjaxError:
            raise
        except Exception as error:  # Orbax and tensorstore have many for a disk that is full
            raise FtjaxError(self._unwritten(reason(error))) from error

    def _unwritten(self, why: str) -> str:
        return (
            f"{self.folder}: the checkpoint of step {self.saving:,} cannot be written: {why}. Those before it are "
            "whole. Make room, or let the folder be written to: the same command then goes on"
        )

    def latest(self) -> int | None:
        """Step of the latest checkpoint, None where there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints that are kept, ascending."""
        there = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
        return sorted(step for step in there if step not in self.damaged)

    def best(self) -> int | None:
        """Step of the best by validation; the latest where none has a rank; None without checkpoints."""
        files = {step: self.folder / str(step) / "metrics" / "metrics" for step in self.steps()}
        ranked = [(_rank(read_json(file, **METRICS)), step) for step, file in files.items() if file.is_file()]
        return max(ranked)[1] if ranked else self.latest()

    def record(self, step: int) -> dict:
        """The record that `save` was given at `step`."""
        fields = {"config": mapped(), "best": maybe(number()), "best_loss": maybe(number())}
        record = read_json(self.folder / str(step) / "run" / "metadata", **fields)
        if missing := {"config", "step", "best", "stale", "seconds"} - record.keys():
            raise FtjaxError(f"{self.folder / str(step)}: the record of the run lacks {min(missing)}")
        return record

    def trained(self, step: int, abstract: dict, ema: bool = False) -> dict:
        """What was trained, into the shapes, dtypes and shardings of `abstract`: any mesh, not that of the run.

        ema: its average instead.
        """
        return self._restored(step, "ema" if ema else "trained", abstract)

    def state(self, step: int, abstract):
        """The whole `State`, into `abstract`, a State of jax.ShapeDtypeStruct with shardings."""
        arrays = {name: self._restored(step, name, getattr(abstract, name)) for name in _arrays(abstract)}
        place = jax.device_put(np.int32(step), abstract.step.sharding)
        return type(abstract)(place, **arrays)

    def _restored(self, step: int, item: str, abstract):
        import orbax.checkpoint as ocp
        from etils import epath

        logging.getLogger("absl").setLevel(logging.CRITICAL)
        folder, arguments = self.folder / str(step) / item, ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            return self._arrays_handler().restore(
                epath.Path(folder), args=ocp.args.PyTreeRestore(item=abstract, restore_args=arguments)
            )
        except Exception as error:  # of a checkpoint without checksums, or of another run
            raise FtjaxError(
                f"{folder}: cannot be read as what this run trains: {reason(error)}. The checkpoint is damaged, or of "
                "another run"
            ) from error

    def close(self) -> None:
        """Wait until everything lies on disk. A folder without any checkpoint goes with the one who made it."""
        if self.read_only:
            return
        with self._written():
            self.manager.close()
        with contextlib.suppress(OSError):  # it is not empty
            self.folder.rmdir()


def reason(error: Exception) -> str:
    """What an error of a library says, in a line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint that do not change once they are written."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if name not in (CHECKSUMS, CHANGING)]


def _damage(folder: Path, reading: bool) -> str:
    """What is wrong with the folder of a checkpoint; empty: its files are those that were written.

    reading: the optimizer is not looked at.
    """
    record, optimizer = seals.opened(folder / CHECKSUMS), "" if not reading else "optimizer/"
    if record is None:
        missing = [name for name in ("trained", "optimizer", "run") if not (folder / name).is_dir()]
        if (folder / CHECKSUMS).exists() or missing:
            return f"{CHECKSUMS} is not as it was written" if not missing else f"{missing[0]} is missing"
        return ""  # an earlier version wrote it
    if record["step"] != int(folder.name):
        return f"its folder is {folder.name}, and its files are of step {record['step']:,}"
    sums = {name: crc for name, crc in record["checksums"].items() if not (optimizer and name.startswith(optimizer))}
    if changed := seals.changed(folder, sums):
        more = f", and {len(changed) - 1} more files are" if len(changed) > 1 else " is"
        return f"{changed[0]}{more} missing or not as written"
    return ""


def _rank(metrics: dict) -> tuple[float, int]:
    """What checkpoints are ordered by: of equally good ones, the earlier is the better."""
    if "rank" not in metrics:  # written before runs could choose what to select by
        return -metrics["val_loss"], 0
    return metrics["rank"], -metrics["step"]


def _arrays(state) -> list[str]:
    """The fields of a State that a checkpoint holds."""
    return ["trained", "optimizer"] + ([] if state.ema is None else ["ema"])
