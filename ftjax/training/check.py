"""`ftjax check`: whether everything that a run folder holds, and all that it was made from, is as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ftjax import config as configs
from ftjax import seals, user_code
from ftjax.errors import FtjaxError
from ftjax.files import as_json
from ftjax.foreign import read_json, string
from ftjax.hub import fingerprint, peft, resolve
from ftjax.training import checkpoint
from ftjax.training.job import named_files, prepared
from ftjax.training.report import METRICS_FILE, read_metrics
from ftjax.training.run_folder import FOLDERS, RUN, START, TOKENIZER, read_record, read_start, run_config
from ftjax.training.selection import LOSS


def check(run_dir: str | Path, say: Callable[[str], None] = print, overrides: Sequence[str] = ()) -> bool:
    """Check every item of a run, and say one line about each: `ok`, or what is wrong. Nothing is written.

    The optimizer's state is read too. A file of the base above 256 MiB is compared by its header and samples of each
    tensor, see ftjax.hub.fingerprint.

    Args:
        run_dir: The run folder.
        say: Called with each line.
        overrides: Texts `dotted.key=value`, which name the functions of the run that may be run to compare its rows.

    Returns:
        Whether all items are whole.

    Raises:
        FtjaxError: If the folder is not that of a run.
    """
    run_dir = Path(run_dir)
    config = run_config(run_dir)
    configs.override(config, overrides)
    fine = True
    for name, problem in _items(run_dir, config, read_record(run_dir), overrides):
        try:
            fault = problem()
        except FtjaxError as error:
            fault = str(error)
        say(f"{name}: {fault or 'ok'}")
        fine = fine and not fault
    return fine


def _items(run_dir: Path, config, record: dict, overrides) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(name of an item, a function that returns or raises what is wrong with it)."""
    kept = record["base"]
    own = run_dir / TOKENIZER if (run_dir / TOKENIZER).is_dir() else None
    initial = resolve.resolve(config.tuning.init_from) if config.tuning.init_from else None
    for group, what in fingerprint.GROUPS.items():
        if kept.get(group):
            yield what, lambda group=group: _changed(kept, group, run_dir, config, own, initial)
    if "rows" in record:
        yield "the rows", lambda: _rows(config, record, overrides)
    names = [f"{checkpoint.FOLDER}/{step}" for step in checkpoint.steps_in(run_dir)]
    for name in names:
        yield name, lambda name=name: checkpoint.damage(run_dir / name, reading=False)
    if (run_dir / START).is_file():
        yield START, lambda: read_start(run_dir / START) and None
    if (run_dir / METRICS_FILE).is_file():
        yield METRICS_FILE, lambda: _metrics(run_dir, run_dir / names[-1] if names else None)
    for name in FOLDERS:
        if (run_dir / name / resolve.MARKER).is_file():
            yield name, lambda name=name: _export(run_dir / name)


def _changed(kept: dict, group: str, run_dir: Path, config, own: Path | None, initial: Path | None) -> str:
    """How the files of one of fingerprint.GROUPS differ from those of the training."""
    wanted = kept | dict.fromkeys(fingerprint.GROUPS) | {group: kept[group]}
    if group in fingerprint.ALONE:
        found = fingerprint.of_named(named_files(config)) if group == "others" else fingerprint.adapter_digests(initial)
        return "; ".join(fingerprint.changes(wanted, {group: found}))
    key = f"config.model.path in {run_dir / RUN}"
    fingerprint.find(wanted, run_dir, config.model.path, config.model.revision, key, own)
    return ""


def _rows(config, record: dict, overrides) -> str:
    """How the rows differ. Code that only the run folder names is not run; scores and rewards are not needed here."""
    config = configs.copy(config)
    config.evaluate.metrics, config.train.select = (), LOSS
    rewarded = config.task.rewards or config.task.environment
    config.task.update(rewards=("exact_match",) if rewarded else (), reward_weights=(), environment="")
    if left := user_code.not_named_by(overrides, config.to_dict()):
        key, function = left[0]
        return f"not compared: code that only a run folder names is not run; to run it, add --config.{key}={function}"
    found = prepared(config, lambda text: None, record.get("devices", 0)).data.fingerprint
    return "" if found == record["rows"] else "the rows in the data files are not those that the run was started on"


def _metrics(run_dir: Path, latest: Path | None) -> str:
    """What is wrong with metrics.jsonl, by the digest in the latest checkpoint's record."""
    rows = read_metrics(run_dir)
    kept = read_json(latest / "run" / "metadata", metrics=string).get("metrics") if latest else None
    known = "".join(as_json(row) + "\n" for row in rows if latest and row["step"] <= int(latest.name))
    if kept and seals.digest(known.encode()) != kept:
        return f"the rows up to step {int(latest.name):,} are not those that the run wrote"
    return ""


def _export(folder: Path) -> str:
    """What is wrong with an exported folder, by the list of its files and the checksums in its ftjax.json."""
    written = resolve.written(folder)
    gone = [name for name in written.get("files", ()) if not (folder / name).is_file()]
    changed = sorted({*gone, *seals.changed(folder, written.get("checksums", {}))})
    if changed:
        return f"{', '.join(changed)}: missing or not as written; export again with `ftjax export`"
    if (folder / peft.CONFIG).is_file():
        peft.read_adapter(folder)
    return ""
