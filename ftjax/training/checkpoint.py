"""Checkpoints: what was trained, its optimizer, and the record of the run, written by Orbax in the background.

One folder a step, atomically renamed into place: `trained`, `optimizer`, `run`, and `ema` where an average is kept, lie
side by side in it, so that an export reads what was trained without its optimizer. The frozen base is named in the
run's record, never copied.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import jax
import numpy as np

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run folder: the latest `keep` and the best one by validation stay."""

    def __init__(self, run_dir: str | Path, keep: int = 1, read_only: bool = False):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every rename
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_rank,  # sorted ascending, the last are kept
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        # One file an array: on a single host three times as fast as OCDBT, which serves large pods.
        arrays = lambda: ocp.PyTreeCheckpointHandler(use_ocdbt=jax.process_count() > 1)  # noqa: E731
        self.ocp, self.folder, self.read_only = ocp, Path(run_dir).resolve() / FOLDER, read_only
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={name: arrays() for name in ("trained", "optimizer", "ema")}
            | {"run": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                best_fn=_rank,  # without it Orbax stores no metrics, and the policy sees none
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,  # what a killed run left half written
            ),
        )

    def save(self, state, run: dict, rank: float | None) -> None:
        """Start writing a checkpoint; return before it lies on disk.

        Args:
            state: a train.step.State.
            run: the record of the run.
            rank: how good the state is, more is better; None where that is not known, as then it is never the best.
        """
        save = self.ocp.args
        arrays = {name: save.PyTreeSave(getattr(state, name)) for name in _arrays(state)}
        self.manager.save(
            int(state.step),
            args=save.Composite(**arrays, run=save.JsonSave(run)),
            metrics=None if rank is None else {"rank": rank, "step": int(state.step)},
            force=True,
        )

    def latest(self) -> int | None:
        """Step of the latest checkpoint, None where there is none."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all checkpoints that are kept, ascending."""
        return sorted(self.manager.all_steps())

    def best(self) -> int | None:
        """Step of the best by validation; the latest where none has a rank; None without checkpoints."""
        ranked = [(_rank(metrics), step) for step in self.steps() if (metrics := self.manager.metrics(step))]
        return max(ranked)[1] if ranked else self.latest()

    def record(self, step: int) -> dict:
        """The record that `save` was given at `step`."""
        return self.manager.restore(step, args=self.ocp.args.Composite(run=self.ocp.args.JsonRestore()))["run"]

    def trained(self, step: int, abstract: dict, ema: bool = False) -> dict:
        """What was trained, into the shapes, dtypes and shardings of `abstract`: any mesh, not that of the run.

        ema: its average instead.
        """
        item = "ema" if ema else "trained"
        return self.manager.restore(step, args=self.ocp.args.Composite(**{item: self._into(abstract)}))[item]

    def state(self, step: int, abstract):
        """The whole `State`, into `abstract`, a State of jax.ShapeDtypeStruct with shardings."""
        arrays = {name: self._into(getattr(abstract, name)) for name in _arrays(abstract)}
        restored = self.manager.restore(step, args=self.ocp.args.Composite(**arrays))
        place = jax.device_put(np.int32(step), abstract.step.sharding)
        return type(abstract)(place, **{name: restored[name] for name in arrays})

    def _into(self, abstract):
        arguments = self.ocp.checkpoint_utils.construct_restore_args(abstract)
        return self.ocp.args.PyTreeRestore(item=abstract, restore_args=arguments)

    def close(self) -> None:
        """Wait until everything lies on disk. A folder without any checkpoint goes with the one who made it."""
        self.manager.wait_until_finished()
        self.manager.close()
        if not self.read_only:
            with contextlib.suppress(OSError):  # it is not empty
                self.folder.rmdir()


def _rank(metrics: dict) -> tuple[float, int]:
    """What checkpoints are ordered by: of equally good ones, the earlier is the better."""
    if "rank" not in metrics:  # written before runs could choose what to select by
        return -metrics["val_loss"], 0
    return metrics["rank"], -metrics["step"]


def _arrays(state) -> list[str]:
    """The fields of a State that a checkpoint holds."""
    return ["trained", "optimizer"] + ([] if state.ema is None else ["ema"])
