"""Train a config at many points of its fields, with several seeds, and report the figures of each run.

A run's folder is named after its settings and holds `outcome.json` once the run has ended. The same command therefore
continues where it was stopped, and a wider grid runs only new points. Several processes, or hosts that share the
folder, divide the runs among themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from ftjax import config as configs
from ftjax import tasks
from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation import compare
from ftjax.evaluation.labelled import KINDS, LOWER
from ftjax.evaluation.metrics import METRICS, find
from ftjax.evaluation.tables import grid as grid_text
from ftjax.files import replace_json, within
from ftjax.foreign import read_json
from ftjax.hub import families, resolve, weights
from ftjax.progress import counted
from ftjax.training import claims, hosts, privacy
from ftjax.training.loop import train
from ftjax.training.program import count
from ftjax.training.report import METRICS_FILE
from ftjax.training.run_folder import FREE, AnotherRun
from ftjax.verdict import curve, pictures, report, search
from ftjax.verdict.energy import metered
from ftjax.verdict.rows import contents, fix_rows

OUTCOME = "outcome.json"
AMOUNTS = ("data.limit", "data.shots", "model.path")  # axes along which there is a learning curve
SIGNED = ("mcc", "pearson", "spearman", "r2")  # figures that may be negative
MOVABLE = ("model.path", "tuning.init_from", "data.train", "data.validation", "data.test")  # known by their content
NORMAL = 1.96  # half the width of a 95 % interval, in standard deviations


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        settings: {dotted key: value} of the point.
        seed: Seed of the run.
        run_dir: The run's folder.
        figures: {name: value}; empty if the run failed.
        seconds: Duration of the run; NaN if it failed.
        failed: Why the run failed; empty if it did not.
        noise: {name of a figure: its standard deviation from the sampling of the rows it is measured on}, if that is
            known.
        joules: Energy of the processors during the run; None if it cannot be read.
    """

    settings: dict
    seed: int
    run_dir: str
    figures: dict[str, float]
    seconds: float
    failed: str = ""
    noise: dict[str, float] = dataclasses.field(default_factory=dict)
    joules: float | None = None


def sweep(
    config: configs.ConfigDict,
    grid: Sequence[str] = (),
    seeds: int = 1,
    say: Callable[[str], None] = print,
    *,
    random: int = 0,
    halving: bool = False,
    optuna: int = 0,
    stale: float = claims.STALE,
) -> list[Outcome]:
    """Train `config` at every point of the grid, `seeds` times each, in subfolders of `config.run_dir`.

    Rows that are split off train are split once, for all seeds. Settings are checked for all points before the first
    run. A point whose fields equal those of a run that has ended, such as a new axis at its default, is not run again.

    A run that fails is reported with its reason, and the other runs go on. Numbers that are NaN or infinite are a final
    outcome. Any other error, such as running out of memory, is not: the same command runs that point again. An
    FtjaxError before training began ends the sweep.

    Writes sweep.json with every outcome and, if an axis is numeric or is model.path, sweep.png with a figure against
    it. Along one of AMOUNTS, the picture shows the law of the learning curve, and curves.json holds it.

    Args:
        config: The config. Its `seed` is the first seed.
        grid: Texts `key=value,value,...`, one per axis.
        seeds: Number of seeds per point: config.seed and those that follow it.
        say: Called with each line for a person.
        random: Number of points to draw; 0: all points of the grid. A text of the grid may then also be a range, such
            as `optim.lr=1e-5..1e-3:log`.
        halving: Successive halving: run all points with a small part of train.steps or train.epochs, then the best
            third by validation loss with three times as much, and so on.
        optuna: Number of points that Optuna proposes from lists and ranges, by the validation loss of the points
            before; 0: none.
        stale: Seconds after which the claim of a silent process on another host is free, see ftjax.training.claims.

    Returns:
        The outcome of every run; with `halving` those of all rungs.

    Raises:
        FtjaxError: If settings are invalid.
        AnotherRun: If a folder holds another run, finished or not, with other fields or other content of its files.
    """
    configs.validate(config)
    if seeds < 1:
        raise FtjaxError(f"--seeds: expected at least 1; found {seeds}")
    if min(random, optuna) < 0 or (random > 0) + (optuna > 0) + (halving and optuna > 0) > 1:
        raise FtjaxError(
            "expected a positive number of points for either --random or --optuna, not both; --halving works without "
            "--optuna only"
        )
    found, folder = search.axes(grid, drawn=bool(random or optuna)), Path(config.run_dir)
    if (random or optuna) and not found:
        raise FtjaxError(
            "--random and --optuna draw points from --grid, and there is none; add --grid key=values or --grid "
            "key=low..high"
        )
    plan = functools.partial(_plan, config, seeds=seeds, fixed={}, say=say)
    run = functools.partial(run_all, folder=folder, say=say, stale=stale)
    if optuna:
        outcomes = _by_optuna(found, optuna, config.seed, lambda points: run(plan(points)))
    else:
        points = search.drawn(found, random, config.seed) if random else search.every(found)
        outcomes = _halved(config, points, plan, run, say) if halving else run(plan(points))
    replace_json(folder / "sweep.json", [dataclasses.asdict(o) for o in outcomes])
    shown = main_figures(config, outcomes)
    say(table(outcomes, shown))
    if spent := privacy.together(folder):
        say(spent)
    if picture := draw(outcomes, shown[0], folder / "sweep.png", say):
        say(f"  picture      {picture}")
    return outcomes


# ---------------------------------------------------------------------------------------------- what is run

Job = tuple[dict, object]  # ({dotted key: value}, the whole config with seed and run_dir)


def _plan(config, points: Sequence[search.Point], seeds: int, fixed: dict, say, budget: tuple[str, ...] = ()):
    """The jobs of points, `seeds` each.

    Args:
        config: The config of all points.
        points: The points of the search.
        seeds: Number of seeds per point.
        fixed: Files of rows that were split before, by what the rows depend on. Added to.
        say: Called with each line for a person.
        budget: Texts `key=value` that belong to all points and are part of the folders' names.
    """
    folder, jobs = Path(config.run_dir), []
    for point in points:
        for seed in range(config.seed, config.seed + seeds):
            c, texts = configs.copy(config), [*point, *budget]
            configs.override(c, texts)
            flat = configs.flat(c)
            settings = {key: flat[key] for key in (text.partition("=")[0] for text in texts)}
            _share_rows(c, config, fixed, say)
            c.seed, c.run_dir = seed, str(folder / _name([*texts, f"seed={seed}"]))
            jobs.append((settings, c))
    return jobs


def _share_rows(config, base, fixed: dict, say) -> None:
    """Split a point's rows by fix_rows, once for all points that read the same rows. If they differ from those of the
    base config, they get a folder of their own."""
    key = _read_by(config)
    if key not in fixed:
        name = "rows" if key == _read_by(base) else f"rows-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        fix_rows(config, Path(base.run_dir) / name, say)
        fixed[key] = {name: config.data[name] for name in ("train", "validation", "test", "columns", "split")}
    config.data.update(fixed[key])


def _read_by(config) -> str:
    """All that the rows of the parts depend on, as JSON."""
    data = {key: value for key, value in configs.flat(config.data).items() if key not in ("limit", "shots")}
    return json.dumps([data, config.task.kind, config.seed], sort_keys=True)


def run_all(jobs: Sequence[Job], folder: Path, say=print, stale: float = claims.STALE) -> list[Outcome]:
    """Run the jobs that have not ended, and wait for those that another process runs.

    Args:
        jobs: (settings, config) of each run.
        folder: Folder of the runs and of their claims.
        say: Called with each line for a person.
        stale: See `sweep`.

    Returns:
        The outcome of every job, in order.

    Raises:
        AnotherRun: If a folder holds another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    done = [_ended(settings, c, known) for settings, c in jobs]
    say(f"{folder}: {len(jobs)} runs, {sum(o is not None for o in done)} of them already finished")
    hosts.start()  # if one run spans several hosts, all of them work on the same job
    ours = jax.process_count() > 1
    announced = set()
    while None in done:
        went = False
        for number, (settings, c) in enumerate(jobs):
            if done[number] is not None:
                continue
            path = folder / f"{Path(c.run_dir).name}.claim"
            with contextlib.nullcontext(True) if ours else claims.claimed(path, stale) as mine:
                if not mine:
                    if number not in announced:
                        say(f"{Path(c.run_dir).name} is being run by {claims.owner(path)}")
                    announced.add(number)
                    continue
                went, done[number] = True, _ended(settings, c, known)
                if done[number] is None:
                    say(f"---- run {number + 1} of {len(jobs)}: {Path(c.run_dir).name}")
                    done[number] = _run(settings, c, say)
        if not went:
            time.sleep(claims.WAIT)
            done = [o or _ended(settings, c, known) for o, (settings, c) in zip(done, jobs, strict=True)]
    return done


def _halved(config, points: list[search.Point], plan, run, say) -> list[Outcome]:
    """The outcomes of all rungs of successive halving."""
    key = "train.steps" if config.train.steps else "train.epochs"
    whole, sizes, outcomes = configs.flat(config)[key], search.rungs(len(points)), []
    if any(text.partition("=")[0] == key for text in points[0]):
        raise FtjaxError(f"--halving sets {key} itself, so {key} cannot be an axis of --grid; remove it")
    for left, size in zip(range(len(sizes) - 1, -1, -1), sizes, strict=True):
        budget = whole / search.THIRD**left
        budget = max(1, round(budget)) if key == "train.steps" else float(f"{budget:.3g}")
        rung = len(sizes) - left
        again = ", trained from the start, because the schedule depends on the length" if rung > 1 else ""
        say(f"---- rung {rung} of {len(sizes)}: {counted(size, 'point')}, {key}={budget}{again}")
        found = run(plan(points, budget=(f"{key}={budget}",)))
        outcomes += found
        if left:
            seeds = len(found) // len(points)
            losses = [_loss(found[i : i + seeds]) for i in range(0, len(found), seeds)]
            best = np.argsort(losses, kind="stable")[: sizes[rung]]
            points = [points[i] for i in sorted(best)]
    return outcomes


def _loss(outcomes: list[Outcome]) -> float:
    """Mean validation loss over seeds; infinite if one failed. Raises FtjaxError if no run has a validation loss."""
    if any(o.failed for o in outcomes):
        return math.inf
    found = values(outcomes, "val_loss")
    if not found:
        raise FtjaxError(
            "--halving and --optuna need a validation loss to choose points: set data.validation, or its share in "
            "data.split"
        )
    return float(np.mean(found))


def _by_optuna(found: list[search.Axis], trials: int, seed: int, run) -> list[Outcome]:
    """The outcomes of `trials` points. Optuna's TPE proposes each from the validation losses of the points before
    it."""
    try:
        import optuna
    except ImportError:
        raise FtjaxError("--optuna: Optuna is not installed; pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    outcomes, known = [], {}
    for _ in range(trials):
        trial = study.ask()
        point = tuple(f"{axis.key}={_proposed(trial, axis)}" for axis in found)
        if point not in known:
            mine = run([point])
            outcomes += mine
            known[point] = _loss(mine)
        if math.isfinite(known[point]):
            study.tell(trial, known[point])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return outcomes


def _proposed(trial, axis: search.Axis) -> str:
    if not isinstance(axis.values, search.Range):
        return trial.suggest_categorical(axis.key, list(axis.values))
    suggest = trial.suggest_int if axis.values.whole else trial.suggest_float
    low, high = (int(x) if axis.values.whole else x for x in axis.values[:2])
    value = suggest(axis.key, low, high, log=axis.values.log)
    return f"{value}" if axis.values.whole else f"{value:.4g}"


def _name(texts: list[str]) -> str:
    """The name of a run's folder, made of its settings. If they do not fit or hold unusual characters, a digest is
    appended."""
    whole = ",".join(texts)
    plain = re.sub(r"[^\w.=,+-]", "_", whole)[:120]
    return plain if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _asked(config) -> dict:
    """What a run's outcome depends on, as plain JSON data: fields of the config, and digests of the files that they
    name; see `_by_content`."""
    return _by_content(_fields(config) | json.loads(json.dumps(contents(config))))


def _fields(config) -> dict:
    """The fields of a config that a run's outcome depends on, as plain JSON data."""
    scored, flat = ("evaluate.", "generate.", "task."), configs.flat(config)
    found = {key: value for key, value in flat.items() if key.startswith(scored) or not key.startswith(FREE)}
    return json.loads(json.dumps(found))


def _recorded(record: dict) -> dict:
    """What the run of a record depended on, which is taken out of it. Fields that are newer had their defaults."""
    return _by_content(_fields(configs.default()) | record.pop("asked"))


def _by_content(asked: dict) -> dict:
    """What a run's outcome depends on, without the names of files and folders whose digests it holds, because they may
    be moved."""
    return {key: x for key, x in asked.items() if key not in MOVABLE or f"content of {key}" not in asked}


def _ended(settings: dict, config, known: dict[str, dict]) -> Outcome | None:
    """The outcome of a run that has ended, also in another folder if it depends on the same fields and files; None if
    it has not.

    Args:
        settings: {dotted key: value} of the point.
        config: The run's config.
        known: See `_known`.

    Raises:
        AnotherRun: If the run in the folder had other settings or files.
    """
    file = Path(config.run_dir) / OUTCOME
    if config.overwrite or not (file.is_file() or known):
        return None
    now = _asked(config)
    if not file.is_file():
        record = known.get(json.dumps(now, sort_keys=True))
        return Outcome(**record | {"settings": settings}) if record else None
    record = read_json(file)
    before = _recorded(record)
    keys = dict.fromkeys([*now, *(key for key in before if key.startswith("content of "))])
    changed = [
        f"the {key} has changed" if key.startswith("content of ") else f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in keys
        if now.get(key) != before.get(key)
    ]
    if changed:
        raise AnotherRun(
            f"run_dir: {config.run_dir} holds another run: {'; '.join(changed)}. Choose another run_dir, or delete "
            "these runs with --config.overwrite=True"
        )
    return Outcome(**record | {"run_dir": config.run_dir})


def _known(folder: Path) -> dict[str, dict]:
    """{what a run depends on, as JSON: its record} of the runs of a folder that have ended. Raises OSError if a run may
    not be read."""
    records = [read_json(file) | {"run_dir": str(file.parent)} for file in within(folder, OUTCOME)]
    return {json.dumps(_recorded(record), sort_keys=True): record for record in records}


def _run(settings: dict, config, say) -> Outcome:
    run_dir = Path(config.run_dir)
    file = run_dir / METRICS_FILE  # written anew when training begins
    begun = lambda: file.is_file() and file.stat().st_mtime_ns  # noqa: E731
    before = begun()
    failed = functools.partial(Outcome, settings, config.seed, str(run_dir), {}, math.nan)
    try:
        with metered() as meter:
            result = train(config, say=say)
    except FtjaxError as error:
        if begun() == before:
            raise type(error)(f"{run_dir.name}: {error}") from error
        say(f"failed: {error}")
        outcome = failed(failed=str(error))
        if not isinstance(error, NotFinite):
            return outcome
    except Exception as error:  # such as out of memory: the same command tries again
        say(traceback.format_exc())
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        say(f"failed: {why}")
        return failed(failed=why)
    else:
        found, noise = figures(result)
        joules = None if result.resumed_from else meter.joules  # those of the processes before are not known
        outcome = Outcome(settings, config.seed, str(run_dir), found, result.seconds, noise=noise, joules=joules)
    replace_json(run_dir / OUTCOME, dataclasses.asdict(outcome) | {"asked": _asked(config)})
    return outcome


def run_joules(run_dir: str) -> float | None:
    """Energy in joules that a run of a sweep took; None if it is not known."""
    file = Path(run_dir) / OUTCOME
    return read_json(file).get("joules") if file.is_file() else None


def figures(result) -> tuple[dict[str, float], dict[str, float]]:
    """What a run measured: its losses, and its figures on the test part, or on validation if there is no test part.

    Returns:
        ({name: value}, {name: standard deviation from the sampling of rows}). The latter is half the width of the
        figure's interval, divided by NORMAL; figures without an interval have none.
    """
    losses = {"train_loss": result.train_loss, "val_loss": result.val_loss}
    results = result.results or {}
    part = results.get("after") or results.get("test") or results.get("validation") or {}
    entries = {n: e if isinstance(e, dict) else {"value": e} for n, e in part.get("metrics", part).items()}
    values = losses | {name: entry["value"] for name, entry in entries.items()}
    spans = {name: entry for name, entry in entries.items() if entry.get("low") is not None}
    return (
        {name: float(value) for name, value in values.items() if isinstance(value, int | float)},
        {name: (entry["high"] - entry["low"]) / (2 * NORMAL) for name, entry in spans.items()},
    )


def main_figures(config, outcomes: list[Outcome]) -> list[str]:
    """Names of the figures that the table shows: the main ones of the task, if the runs have them, else
    `train_loss`."""
    judged = tasks.find(config.task.kind).judged
    usual = KINDS[judged].main if judged in KINDS else (*config.evaluate.metrics, "perplexity", "accuracy", "val_loss")
    there = set().union(*(o.figures for o in outcomes))
    return [name for name in usual if name in there] or ["train_loss"]


def points(outcomes: list[Outcome]) -> dict[tuple, list[Outcome]]:
    """The outcomes of all seeds, grouped by their settings, in order."""
    found = {}
    for outcome in outcomes:
        found.setdefault(tuple(outcome.settings.items()), []).append(outcome)
    return found


def values(outcomes: list[Outcome], name: str) -> list[float]:
    """The values of a figure in all runs that have it."""
    return [o.figures[name] for o in outcomes if name in o.figures]


def table(outcomes: list[Outcome], shown: Sequence[str]) -> str:
    """Mean and sample standard deviation over seeds of each figure at each point, as text."""
    keys = list(dict.fromkeys(key for o in outcomes for key in o.settings))
    head = [*((key, False) for key in keys), ("runs", True), *((name, True) for name in shown), ("seconds", True)]
    lines, failed = [], []
    for settings, runs in points(outcomes).items():
        ended = [o for o in runs if not o.failed]
        failed += [o for o in runs if o.failed]
        seconds = f"{np.mean([o.seconds for o in ended]):.0f}" if ended else ""
        cells = [report.mean_text(values(runs, name), 4) or "none" for name in shown]
        lines.append([*(f"{value}" for _, value in settings), f"{len(ended)}", *cells, seconds])
    notes = [f"failed: {Path(o.run_dir).name}: {o.failed}" for o in failed]
    return "\n".join([grid_text(head, lines) + "mean ± standard deviation over seeds", *notes])


def draw(outcomes: list[Outcome], name: str, path: Path, say=print) -> Path | None:
    """Draw a figure against an axis of the sweep.

    The axis is the first of AMOUNTS that varies, and the curve is then drawn with its law. Otherwise it is the numeric
    axis with the most values. Each combination of the other settings is a curve.

    Args:
        outcomes: The outcomes of the sweep.
        name: Name of the figure.
        path: The PNG file. Along one of AMOUNTS, curves.json is written next to it.
        say: Called with each line for a person.

    Returns:
        The path; None if there is no such axis or no such figure.
    """
    varied = {key: {o.settings[key] for o in outcomes} for key in outcomes[0].settings}
    numbers = [key for key, found in varied.items() if len(found) > 1 and (key == "model.path" or _numeric(found))]
    if not numbers:
        return None
    key = next((k for k in AMOUNTS if k in numbers), None) or max(numbers, key=lambda key: len(varied[key]))
    x_label = "parameters" if key == "model.path" else key
    amount = functools.cache(_parameters) if key == "model.path" else lambda value: value
    curves: dict[str, dict] = {}
    for outcome in outcomes:
        all_rows = key in AMOUNTS and not outcome.settings[key]  # 0: all rows, whose number is not known here
        if name in outcome.figures and not all_rows:
            others = [f"{k.split('.')[-1]}={v}" for k, v in outcome.settings.items() if k != key]
            points = curves.setdefault(", ".join(others) or name, {})
            points.setdefault(amount(outcome.settings[key]), []).append(outcome.figures[name])
    if not curves:
        return None
    drawn = {label: curve.drawn(points) for label, points in curves.items()}
    if key in AMOUNTS:
        noise = [o.noise[name] for o in outcomes if name in o.noise]
        what = "the parameters" if key == "model.path" else "the data"
        how = {**law_of(name), "noise": float(np.mean(noise)) if noise else 0.0, "what": what}
        drawn = {label: curve.report(points, **how) for label, points in curves.items()}
        for label, one in drawn.items():
            say(f"{label}: {one['says']}")
        replace_json(path.with_name("curves.json"), drawn)
    return pictures.curves(drawn, path, list(drawn), x_label=x_label, y_label=name)


def _numeric(values) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def law_of(name: str) -> dict:
    """A figure's direction and bounds, as arguments of curve.fit."""
    if name in METRICS or ":" in name:
        metric = find(name)
        higher, bounds = bool(metric.higher), metric.bounds
        return {"higher": higher, "best": metric.best, "worst": bounds and bounds[not higher], "bounded": bool(bounds)}
    lower = name in (*LOWER, *compare.LOWER) or "loss" in name
    worst = None if lower or name in SIGNED else 0.0
    return {"higher": not lower, "best": 1.0 if name == "perplexity" else None, "worst": worst}


def _parameters(path: str) -> int:
    """Number of parameters of the model in a directory."""
    folder = resolve.resolve(path)
    _, shape = families.read_config(folder)
    return count(weights.param_shapes(shape))
