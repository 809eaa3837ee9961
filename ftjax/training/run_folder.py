"""The folder of a run: locking it, checking that it belongs to the run, and opening the trained model in it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

import ftjax
from ftjax import assets, seals, tasks
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.files import DRAFT, replace_json, replacing
from ftjax.foreign import check_fields, listed, mapped, maybe, number, read_json, read_tensors, string, whole
from ftjax.hub import fingerprint, resolve, weights
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import LM, open_base, recipe_of
from ftjax.objectives import hidden
from ftjax.training import claims, hosts, provenance
from ftjax.training.checkpoint import FOLDER, Checkpoints, steps_in
from ftjax.tree import flatten, map_paths
from ftjax.tuning import METHODS, Method, Spec, begun

RUN = "run.json"  # the resolved config and the record of the base; a folder with this file is a run folder
START = "start.safetensors"  # values that the method computed from the base before the first step, see Method.start
TOKENIZER = "tokenizer"  # the run's tokenizer, if it is not the base's
LOCK = "lock"  # the process that works on the run
STALE = 120.0  # seconds after which the lock of a silent process on another host does not count

# Everything that a run writes into its folder, and into subfolders; exports list their own files.
WRITTEN = (RUN, START, "before.json", "metrics.jsonl", "loss.png", "results.json", "samples.jsonl", "removed.jsonl")
WRITTEN += ("predictions.jsonl", "mistakes.jsonl", "confusion.png", "calibration.png", "outcome.json")
WRITTEN += ("canaries.jsonl", "audit.json", "secret")
WRITTEN += ("profile.json", "profile.txt", "profile/plugins", f"{TOKENIZER}/*", "tensorboard/events.out.tfevents.*")
WRITTEN += (f"{FOLDER}/[0-9]*", "wandb/*run-*", "wandb/latest-run", "wandb/debug*.log")
FOLDERS = ("adapter", "merged", "full")

# Groups and fields that may differ when a run is resumed, because training does not depend on them.
FREE = ("run_dir", "overwrite", "mesh.", "log.", "export.", "generate.", "evaluate.", "compare.")
FREE += ("data.workers", "data.processes", "data.streaming", "data.cache", "train.log_every", "train.keep")
FREE += ("task.group", "task.threshold", "task.max_answer")  # how predictions are made and judged
FREE += ("train.cache_features", "train.deterministic")
FREE += ("model.remat", "model.attention", "model.unroll", "model.head_chunk")
# Of these, what a task whose batches the model writes (`Task.collect`) is trained by.
DRAWN = ("generate.max_new_tokens", "generate.stop", "evaluate.words", "evaluate.passage")
# Fields that name files -> the group of the record whose digests are compared instead of the names.
NAMES = {
    "weights": ("model.path", "model.revision"),
    "adapter": ("tuning.init_from",),
    "others": ("task.reference",),
    "rows": ("data.train", "data.validation", "data.test", "data.decontaminate", "data.augment.function"),
}


class AnotherRun(FtjaxError):
    """A folder holds a run of other settings or other rows. Only the user can decide which of them is meant."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run folder while the block runs. If a run has several processes, the first must
    call this.

    Raises FtjaxError, which names the other process, if the folder is locked. The lock of a process that was killed
    does not count, see ftjax.training.claims.
    """
    if run_dir.is_file():
        raise FtjaxError(f"run_dir: {run_dir} is a file; expected a folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    with claims.claimed(run_dir / LOCK, STALE) as mine:
        if not mine:
            raise FtjaxError(
                f"run_dir: {run_dir} is in use: {claims.owner(run_dir / LOCK)} works on this run. Wait for it, or "
                f"choose another run_dir. If that process gives no sign of life for {STALE:.0f} s, the folder is free"
            )
        yield


def read_record(run_dir: str | Path) -> dict | None:
    """The run.json of a run folder; None for a folder without one, or with a run.json of another program."""
    file = Path(run_dir) / RUN
    record = read_json(file) if file.is_file() else {}
    if not isinstance(record.get("config"), dict) or "base" not in record:
        return None
    if isinstance(record["base"], dict):
        fields = {"base": fingerprint.stored, "rows": string, "devices": whole(), "starts": listed(mapped())}
        check_fields(record, fields, file)
    else:
        warnings.warn(f"{file}: an earlier version kept no digests by which its base could be checked", stacklevel=2)
        record["base"] = {}
    return record


def run_config(run_dir: str | Path):
    """The resolved config of a run, with run_dir set to the folder. Raises FtjaxError for a folder without a run."""
    record = read_record(run_dir)
    if record is None:
        raise FtjaxError(
            f"{run_dir} is not a run folder: it has no {RUN} written by `ftjax train`; name the run_dir of a run"
        )
    config = configs.recorded(Path(run_dir) / RUN)
    config.run_dir = str(run_dir)
    return config


def base_folder(config) -> Path:
    """The directory of a config's base model. For a hub name without a revision it is the commit with which the run
    began."""
    record = None if config.overwrite else read_record(config.run_dir)
    revision = config.model.revision
    if record and not revision and record["config"]["model"]["path"] == config.model.path:
        revision = record["base"].get("revision", "")
    return resolve.resolve_model(config.model.path, revision)


def recorded_devices(config) -> int:
    """Number of devices with which the run in a config's folder began; 0 if the run starts anew."""
    run_dir = Path(config.run_dir)
    record = None if config.overwrite else read_record(run_dir)
    return 0 if record is None or _stillborn(run_dir) else record.get("devices", 0)


def claim(config, base: dict, rows: str, devices: int = 1) -> bool:
    """Make `config.run_dir` the folder of this run. Returns True if it already holds this run, which is then resumed.

    Args:
        config: The run's resolved config.
        base: The record of the base, see fingerprint.record.
        rows: Digest of the rows that the run reads.
        devices: Number of devices of the run, which decides the last bits of its figures.

    Raises:
        FtjaxError: If the folder holds files that are no run.
        AnotherRun: If it holds another run and `config.overwrite` is off; it names each field that differs.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(base["path"], run_dir)
    record = {
        "ftjax": ftjax.__version__,
        "config": config.to_dict(),
        "base": base | {"relative": relative},
        "rows": rows,
        "devices": devices,
    }
    old = read_record(run_dir)
    for path in run_dir.glob(f"*{DRAFT}"):  # left by a process that was killed, because this one holds the lock
        if any(path.name.startswith(f"{name}.") for name in (*WRITTEN, TOKENIZER)):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    if old is None and (foreign := [path.name for path in run_dir.iterdir() if path.name.split(".")[0] != LOCK]):
        raise FtjaxError(
            f"run_dir: {run_dir} contains files that no run wrote, such as {min(foreign)}, and these are not "
            "overwritten. Choose another run_dir"
        )
    if old and (config.overwrite or _stillborn(run_dir)):
        _clear(run_dir)
        old = None
    if old:
        _same_run(record, old, run_dir)
    starts = [*(old or {}).get("starts", []), provenance.start()]
    replace_json(run_dir / RUN, record | {"starts": starts})
    return old is not None


def _stillborn(run_dir: Path) -> bool:
    """Whether the folder's run ended before its first step, for instance by an error in its config, so that there is
    nothing to keep."""
    return not (run_dir / "metrics.jsonl").is_file() and not steps_in(run_dir)


def _clear(run_dir: Path) -> None:
    """Delete the files of a run and nothing else. If one of its folders is a link, the link stays."""
    for path in [path for pattern in WRITTEN for path in run_dir.glob(pattern)]:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.parent.name != FOLDER or path.name.split(".")[0].isdigit():
            shutil.rmtree(path)
    for name in FOLDERS:
        resolve.remove_written(run_dir / name)
    for name in dict.fromkeys(pattern.split("/")[0] for pattern in WRITTEN if "/" in pattern):
        with contextlib.suppress(OSError):  # not there, a link, or not empty
            (run_dir / name).rmdir()


def _same_run(new: dict, old: dict, run_dir: Path) -> None:
    """Raise AnotherRun if the new record and the folder's older record are of different runs."""
    now, before = (configs.flat(configs.from_dict(record["config"])) for record in (new, old))
    changes = fingerprint.changes(old["base"], new["base"])
    same = {group for group in fingerprint.GROUPS if group in old["base"] and old["base"][group] == new["base"][group]}
    if new["rows"] == old.get("rows"):
        same.add("rows")
        now["data.mixture"], before["data.mixture"] = map(_unnamed, (now, before))
    elif "rows" in old:
        changes.append("the rows in its data files are not those that it was started on")
    changed = _changed(before, now, *(key for group in same for key in NAMES.get(group, ())))
    changes = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in changed] + changes
    if changes:
        raise AnotherRun(
            f"run_dir: {run_dir} holds another run: {'; '.join(changes)}. Choose another run_dir, or delete that run "
            "with --config.overwrite=True"
        )


def check_record(config, record: dict, run_dir: Path, step: int) -> None:
    """Check that a checkpoint belongs to its folder's run, by the configs that both hold.

    Args:
        config: The run's resolved config.
        record: The checkpoint's record.
        run_dir: The run folder.
        step: Step that the checkpoint's folder is named after.

    Raises:
        FtjaxError: If the checkpoint is of another run or another step.
    """
    now, then = configs.flat(config), configs.flat(configs.from_dict(record["config"]))
    changed = _changed(then, now, "data.mixture", *(key for keys in NAMES.values() for key in keys))
    if changed or record["step"] != step:
        changes = [f"{key} is {then[key]!r} there, and {now[key]!r} in {RUN}" for key in changed]
        raise FtjaxError(
            f"{run_dir / FOLDER / str(step)}: this checkpoint is of another run or step than its folder: "
            f"{'; '.join(changes) or record['step']}"
        )


def _changed(before: dict, now: dict, *free: str) -> list[str]:
    """The keys of two flat configs whose values differ although they may not: they are neither in FREE nor in `free`,
    or the task is trained by them."""
    fixed = [key for key in now if key in _drawn_by(now) or not key.startswith((*FREE, *free))]
    return [key for key in fixed if now[key] != before[key]]


def _drawn_by(flat: dict) -> tuple[str, ...]:
    """The fields of DRAWN if the task of a flat config is trained by them, else none."""
    return DRAWN if tasks.find(flat["task.kind"]).collect else ()


def _unnamed(flat: dict) -> list[dict]:
    """The entries of data.mixture of a flat config, without the names of their files, and without what may change when
    a run is resumed."""
    named = [{"name": Path(entry["train"]).stem} | dict(entry) for entry in flat["data.mixture"]]
    free = ("train", "validation", "test", *{*configs.OWN}.difference(_drawn_by(flat)))
    return [{k: v for k, v in entry.items() if k not in free} for entry in named]


def keep_tokenizer(run_dir: Path, folder: Path) -> None:
    """Copy a tokenizer that is not the base's into the run folder, so that the run does not depend on the other
    folder."""
    draft = run_dir / f"{TOKENIZER}.part"
    if not (run_dir / TOKENIZER).is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        tokenizers.copy_tokenizer(folder, draft)
        draft.rename(run_dir / TOKENIZER)


def with_start(method, frozen: dict, run_dir: Path) -> dict:
    """`frozen` with the values that the run stored at its start (see Method.start) instead of newly computed ones.

    Another device, dtype or mesh would compute other values than the run's first start did.

    Args:
        method: The tuning method.
        frozen: Tree of frozen parameters.
        run_dir: The run folder.

    Raises:
        FtjaxError: If the run folder lacks the values, or if its file is not as the run wrote it.
    """
    wanted, file = flatten(method.start(frozen)), run_dir / START
    if not wanted:
        return frozen
    if not file.is_file():
        raise FtjaxError(
            f"{file}: is missing. It holds the initial adapter of tuning.init, which cannot be computed again to the "
            f"bit. Earlier versions did not keep it: use {run_dir / 'adapter'}, or train again with "
            "--config.overwrite=True"
        )
    stored = read_start(file)
    for path, x in wanted.items():
        found = stored[path].shape if path in stored else "none"
        if found != x.shape:
            raise FtjaxError(f"{file}: expected a tensor {path} of shape {x.shape}, found {found}")
    return map_paths(lambda path, x: jax.device_put(stored[path], x.sharding) if path in wanted else x, frozen)


def read_start(file: Path) -> dict:
    """{path: array} of a file with initial values. Raises FtjaxError if it is not as the run wrote it."""
    stored = read_tensors(file)
    with safe_open(file, "numpy") as f:
        digest = (f.metadata() or {}).get("digest")
    if digest and digest != _of_arrays(stored):
        raise FtjaxError(
            f"{file}: the file has changed since the run wrote it; restore it, or train again with "
            "--config.overwrite=True"
        )
    return stored


def _of_arrays(arrays: dict) -> str:
    return seals.digest(*(part for name in sorted(arrays) for part in (name, arrays[name].tobytes())))


def keep_start(method, frozen: dict, run_dir: Path) -> dict:
    """As `with_start`, but store the values if the run has none yet. If there are several processes, all must call."""
    wanted = flatten(method.start(frozen))
    if not wanted or hosts.from_first(lambda: (run_dir / START).is_file() or bool(steps_in(run_dir))):
        return with_start(method, frozen, run_dir)
    arrays = {path: weights.whole(x) for path, x in wanted.items()}
    if jax.process_index() == 0:
        with replacing(run_dir / START) as draft:
            save_file(arrays, draft, {"digest": _of_arrays(arrays)})
    return frozen


@dataclasses.dataclass
class Trained:
    """All that an export reads: the trained parameters, the frozen ones, and the base model.

    Attributes:
        trained: Tree of trained parameters.
        frozen: Tree of frozen parameters.
        spec: The model and its tuning.
        base: The LM before training. Full training has donated its parameters.
        config: The run's resolved config.
        base_record: Record of the base's files, see fingerprint.record.
        privacy: "privacy" of privacy.record; None without private training.
    """

    trained: dict
    frozen: dict
    spec: Spec
    base: LM
    config: ConfigDict
    base_record: dict = dataclasses.field(default_factory=dict)
    privacy: dict | None = None

    @property
    def method(self) -> Method:
        """The row of METHODS."""
        return METHODS[self.config.tuning.method]

    @property
    def base_name(self) -> str:
        """Name of the base in files for other programs: as in the config, unless only ftjax can resolve that name."""
        path = self.config.model.path
        return str(self.base.folder) if path.startswith(assets.PREFIX) else path


def base_of_run(run_dir: Path, config) -> tuple[Path, Path | None]:
    """(the directory of a run's base, that of its tokenizer if the run folder has one). config: of the run.

    Raises FtjaxError if the base is not found, or has changed.
    """
    own = run_dir / TOKENIZER if (run_dir / TOKENIZER).is_dir() else None
    kept, key = read_record(run_dir)["base"], f"config.model.path in {run_dir / RUN}"
    return fingerprint.find(kept, run_dir, config.model.path, config.model.revision, key, own), own


def open_run(
    run_dir: str | Path, dtype: str = "auto", checkpoint: str | int = "best", quantise: str = ""
) -> Trained:  # fmt: skip
    """Open the trained model of a run, on the default device.

    Args:
        run_dir: The run folder.
        dtype: See ftjax.load.
        checkpoint: `best`, `last`, or a step that the run kept.
        quantise: See ftjax.load.

    Raises:
        FtjaxError: If there is no run, or no such checkpoint.
    """
    run_dir, config = Path(run_dir), run_config(run_dir)
    kept = read_record(run_dir)["base"]
    method = METHODS[config.tuning.method]
    task = (config.task.kind, config.task.labels) if tasks.find(config.task.kind).head != "causal" else None
    folder, own = base_of_run(run_dir, config)
    if kept and not kept["revision"] and folder != Path(assets.resolve(config.model.path)).expanduser():
        config.model.path = str(folder)  # it was moved
    kept |= {"path": os.path.abspath(folder)} if kept else {}
    lm, spec = open_base(folder, dtype, config, quantise, task, own)
    spec = spec._replace(tuning=config.tuning)
    saved = Checkpoints(run_dir, read_only=True)
    chosen = {"best": saved.best(), "last": saved.latest()}
    step = checkpoint if isinstance(checkpoint, int) else chosen[checkpoint]
    if isinstance(step, int) and step not in saved.steps():
        there = ", ".join(map(str, saved.steps()))
        raise FtjaxError(f"{run_dir}: has no checkpoint of step {step}; it has those of {there}")
    if step is None:
        raise FtjaxError(
            f"{run_dir}: the run has no checkpoint yet; wait for the first one, or load its base model {lm.folder}"
        )
    record = saved.record(step)
    check_record(config, record, run_dir, step)
    # As at the start of the run: frozen values that are not the base's come from its seed or its file.
    key = jax.random.key(config.seed)
    shapes, frozen = begun(method, key, lm.params, spec)
    shapes |= jax.eval_shape(lambda: hidden.maps(key, config.distil, spec.model.width))
    frozen = with_start(method, frozen, run_dir)
    stored = jnp.dtype("float32" if config.train.ema else config.model.trained_dtype)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored, sharding=place), shapes)
    trained, _ = hidden.divided(saved.trained(step, abstract, ema=config.train.ema > 0))
    saved.close()
    results, thresholds = run_dir / "results.json", None
    if config.task.threshold and results.is_file() and step == chosen[config.export.checkpoint]:
        thresholds = read_json(results, thresholds=maybe(listed(number()))).get("thresholds")
    lm.recipe = recipe_of(config, thresholds)
    return Trained(trained, frozen, spec, lm, config, kept, record.get("privacy"))
