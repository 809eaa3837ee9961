"""The folder of a run: claiming it, describing it, and opening what was trained in it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.files import replace_text
from ftjax.hub import resolve
from ftjax.hub.fingerprint import fingerprint
from ftjax.lm import LM, open_base
from ftjax.training.checkpoint import FOLDER, Checkpoints
from ftjax.tuning import METHODS, Spec

RUN = "run.json"  # the resolved config and the base it was started on; what has it is a run folder

# Everything that a run writes into its folder.
WRITTEN = (RUN, "before.json", "checkpoints", "tensorboard", "wandb", "metrics.jsonl", "loss.png", "results.json")
WRITTEN += ("samples.jsonl", "removed.jsonl", "adapter", "merged", "full")
WRITTEN += ("predictions.jsonl", "mistakes.jsonl", "confusion.png", "calibration.png", "outcome.json")
WRITTEN += ("profile", "profile.json", "profile.txt")

# Groups and fields that may differ when a run goes on: they do not change what is trained.
FREE = ("run_dir", "overwrite", "mesh.", "log.", "export.", "generate.", "evaluate.", "compare.")
FREE += ("data.workers", "data.processes", "data.streaming", "data.cache", "train.log_every", "train.keep")
FREE += ("train.cache_features", "model.remat", "model.attention", "model.unroll", "model.head_chunk")


def claim(config, folder: Path, rows: str) -> bool:
    """Make `config.run_dir` this run's. True where it holds the same run begun earlier, which then goes on.

    folder: directory of the base; rows: digest of the rows that the run reads. Raises FtjaxError where it holds
    anything else and `config.overwrite` is off, or where the earlier run was another one: then it names each field that
    differs.
    """
    run_dir = Path(config.run_dir)
    if run_dir.is_file():
        raise FtjaxError(f"run_dir: {run_dir} is a file; expected a folder")
    record = {"ftjax": ftjax.__version__, "config": config.to_dict(), "base": fingerprint(folder), "rows": rows}
    if config.overwrite or _stillborn(run_dir):
        _clear(run_dir)
    going_on = False
    if run_dir.is_dir() and any(run_dir.iterdir()) and not config.overwrite:
        if not (run_dir / RUN).is_file():
            raise FtjaxError(
                f"run_dir: {run_dir} holds files that are not of a run. Choose another run_dir, or write beside them, "
                "and over those of the same name, with --config.overwrite=True"
            )
        _same_run(record, json.loads((run_dir / RUN).read_text()), run_dir)
        going_on = True
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / RUN, json.dumps(record, indent=2) + "\n")
    return going_on


def _stillborn(run_dir: Path) -> bool:
    """Whether a run ended here before its first step, such as by an error in its config: it holds nothing to keep."""
    kept = run_dir / FOLDER
    trained = (run_dir / "metrics.jsonl").is_file() or (kept.is_dir() and any(kept.iterdir()))
    return (run_dir / RUN).is_file() and not trained


def _clear(run_dir: Path) -> None:
    """Delete what a run writes, and nothing else."""
    for name in WRITTEN:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _same_run(new: dict, old: dict, run_dir: Path) -> None:
    now, before = (configs.flat(configs.from_dict(record["config"])) for record in (new, old))
    changed = [key for key in now if now[key] != before[key] and not key.startswith(FREE)]
    told = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in changed]
    if new["base"] != old["base"]:
        told.append(f"the weights in {new['config']['model']['path']} are not those that it was started on")
    if new["rows"] != old.get("rows", new["rows"]):
        told.append("the rows in its data files are not those that it was started on")
    if told:
        raise FtjaxError(
            f"run_dir: {run_dir} holds another run: {'; '.join(told)}. Choose another run_dir, or delete that run with "
            "--config.overwrite=True"
        )


@dataclasses.dataclass
class Trained:
    """What a run trained, what it did not, and the model that it goes on: all that an export reads.

    base: the LM before training, whose parameters full training has given away; base_name: how others should call the
    base; config: the run's, resolved.
    """

    method: str
    trained: dict
    frozen: dict
    spec: Spec
    base: LM
    base_name: str
    config: dict


def base_name(config, folder: Path) -> str:
    """How files for others name the base: as the config does, but for what only ftjax could find."""
    return str(folder) if config.model.path.startswith(assets.PREFIX) else config.model.path


def open_run(run_dir: str | Path, dtype: str = "auto", checkpoint: str | int = "best", quantise: str = ""):
    """What a run trained, on the default device, and its config: (Trained, ConfigDict).

    checkpoint: `best`, `last`, or a step of those that it keeps; dtype, quantise: see ftjax.load. Raises FtjaxError
    where there is no run, or no such checkpoint.
    """
    run_dir = Path(run_dir)
    if not (run_dir / RUN).is_file():
        raise FtjaxError(f"{run_dir}: is not the folder of a run: it has no {RUN}; `ftjax train` makes such folders")
    config = configs.load(run_dir / RUN)
    method = METHODS[config.tuning.method]
    task = (config.task.kind, config.task.labels) if config.task.kind != "causal" else None
    lm, spec = open_base(resolve.resolve(config.model.path, config.model.revision), dtype, config, quantise, task)
    spec = spec._replace(tuning=config.tuning)
    saved = Checkpoints(run_dir, read_only=True)
    step = checkpoint if isinstance(checkpoint, int) else saved.best() if checkpoint == "best" else saved.latest()
    if isinstance(step, int) and step not in saved.steps():
        kept = ", ".join(map(str, saved.steps()))
        raise FtjaxError(f"{run_dir}: keeps no checkpoint of step {step}; it has those of {kept}")
    if step is None:
        raise FtjaxError(
            f"{run_dir}: the run has no checkpoint yet; let it reach its first, or load its base {lm.folder}"
        )
    # As the run began: of what is frozen, all that is not the base's comes from its seed.
    shapes, frozen = method.init(jax.random.key(config.seed), lm.params, spec)
    stored = jnp.dtype("float32" if config.train.ema else config.model.trained_dtype)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored, sharding=place), shapes)
    trained = saved.trained(step, abstract, ema=config.train.ema > 0)
    saved.close()
    name = base_name(config, lm.folder)
    return Trained(config.tuning.method, trained, frozen, spec, lm, name, config.to_dict()), config
