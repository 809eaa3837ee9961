"""A config run at many points of its fields, with several seeds: each run once, and what they came to.

A run's folder is named after its settings and holds `outcome.json` once it has ended, so that the same command goes on
where it was stopped, and a wider grid runs only what is new. Several processes, or hosts that share the folder, divide
the runs among themselves.
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
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare
from ftjax.evaluation.labelled import KINDS, LOWER
from ftjax.evaluation.metrics import METRICS
from ftjax.evaluation.tables import grid as grid_text
from ftjax.files import replace_json
from ftjax.hub import families, resolve, weights
from ftjax.objectives import TASKS
from ftjax.training import claims, hosts
from ftjax.training.loop import train
from ftjax.training.run_folder import FREE
from ftjax.verdict import curve, pictures, search
from ftjax.verdict.energy import metered
from ftjax.verdict.rows import contents, fix_rows

OUTCOME = "outcome.json"
AMOUNTS = ("data.limit", "data.shots", "model.path")  # axes along which there is a learning curve
SIGNED = ("mcc", "pearson", "spearman", "r2")  # figures that may be below 0
NORMAL = 1.96  # standard deviations on either side of an interval at 95 %


class AnotherRun(FtjaxError):
    """A folder holds a run of other settings or other rows; only the person can say which of them is meant."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to. figures: name -> value; noise: name -> its standard deviation by the sampling of the rows it
    is measured on, where that is known; failed: why it has none, else empty; seconds: that it took; joules: of its
    processors, None where they are not readable."""

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
    """Train `config` at every point of the grid, `seeds` times each, into folders of `config.run_dir`.

    grid: texts `key=value,value,...`; the seeds are config.seed and those that follow. random: so many points are
    drawn, where a text may also be a range, `optim.lr=1e-5..1e-3:log`; optuna: so many are proposed by Optuna, by the
    validation loss of those before. halving: all points are run with a small part of train.steps or train.epochs, the
    best third by validation loss with three times as much, and so on. stale: see ftjax.training.claims.

    Parts that are split off train are split once, for all seeds. Writes sweep.json with every outcome and, where an
    axis has numbers, sweep.png with a figure against it; along AMOUNTS with its law, in curves.json too. Settings are
    checked for all points before the first run. A run that ends with an error once it trains, such as for a loss that
    is no number, or with any error that is not ftjax's, such as for want of memory, is reported with its reason, and
    the others go on; the latter is run again by the same command. A point whose fields equal those of a run that has
    ended, such as on a new axis at its default, is not run again. Raises FtjaxError for settings that cannot be, and
    for a folder that holds another run, other fields or other content of its files.
    """
    configs.validate(config)
    if seeds < 1:
        raise FtjaxError(f"--seeds: expected at least 1; found {seeds}")
    if min(random, optuna) < 0 or (random > 0) + (optuna > 0) + (halving and optuna > 0) > 1:
        raise FtjaxError("--random and --optuna: a number of points, of one of them; --halving goes with --random")
    found, folder = search.axes(grid, drawn=bool(random or optuna)), Path(config.run_dir)
    if (random or optuna) and not found:
        raise FtjaxError("--random and --optuna: nothing to draw; name lists or ranges by --grid")
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
    if picture := draw(outcomes, shown[0], folder / "sweep.png", say):
        say(f"  picture      {picture}")
    return outcomes


# ---------------------------------------------------------------------------------------------- what is run

Job = tuple[dict, object]  # settings as plain values, and the whole config with seed and run_dir


def _plan(config, points: Sequence[search.Point], seeds: int, fixed: dict, say, budget: tuple[str, ...] = ()):
    """The jobs of points, `seeds` each; fixed: rows that were dealt, by what they depend on, added to; budget: texts
    that belong to all of them, of which a folder's name tells."""
    folder, jobs = Path(config.run_dir), []
    for point in points:
        for seed in range(config.seed, config.seed + seeds):
            c = configs.copy(config)
            configs.override(c, [*point, *budget])
            settings = {text.partition("=")[0]: None for text in (*point, *budget)}
            settings = {key: configs.flat(c)[key] for key in settings}
            _share_rows(c, config, fixed, say)
            c.seed, c.run_dir = seed, str(folder / _name([*point, *budget, f"seed={seed}"]))
            jobs.append((settings, c))
    return jobs


def _share_rows(config, base, fixed: dict, say) -> None:
    """Rows of a point as fix_rows deals them, once for all points that read the same; in a folder of their own where
    they are others than the base's."""
    key = _read_by(config)
    if key not in fixed:
        name = "rows" if key == _read_by(base) else f"rows-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        fix_rows(config, Path(base.run_dir) / name, say)
        fixed[key] = {name: config.data[name] for name in ("train", "validation", "test", "columns", "split")}
    config.data.update(fixed[key])


def _read_by(config) -> str:
    """What the rows of all parts depend on."""
    data = {key: value for key, value in configs.flat(config.data).items() if key not in ("limit", "shots")}
    return json.dumps([data, config.task.kind, config.seed], sort_keys=True)


def run_all(jobs: Sequence[Job], folder: Path, say=print, stale: float = claims.STALE) -> list[Outcome]:
    """The outcome of every job, in order; what has ended before is not run again, and what another process runs is
    waited for. Raises FtjaxError for a folder that holds another run."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    done = [_ended(c) or _alike(settings, c, known) for settings, c in jobs]
    say(f"{folder}: {len(jobs)} runs, of which {sum(o is not None for o in done)} have ended before")
    hosts.start()  # of a run on several hosts: all work on the same job
    ours = jax.process_count() > 1
    told = set()
    while None in done:
        went = False
        for number, (settings, c) in enumerate(jobs):
            if done[number] is not None:
                continue
            path = folder / f"{Path(c.run_dir).name}.claim"
            with contextlib.nullcontext(True) if ours else claims.claimed(path, stale) as mine:
                if not mine:
                    if number not in told:
                        say(f"{Path(c.run_dir).name}: is run by {claims.owner(path)}")
                    told.add(number)
                    continue
                went, done[number] = True, None if c.overwrite else _ended(c)
                if done[number] is None:
                    say(f"---- run {number + 1} of {len(jobs)}: {Path(c.run_dir).name}")
                    done[number] = _run(settings, c, say)
        if not went:
            time.sleep(claims.WAIT)
            done = [o or (None if c.overwrite else _ended(c)) for o, (_, c) in zip(done, jobs, strict=True)]
    return done


def _halved(config, points: list[search.Point], plan, run, say) -> list[Outcome]:
    """The outcomes of all rungs."""
    key = "train.steps" if config.train.steps else "train.epochs"
    whole, sizes, outcomes = configs.flat(config)[key], search.rungs(len(points)), []
    if any(text.partition("=")[0] == key for text in points[0]):
        raise FtjaxError(f"--halving: {key} is what is halved, and cannot be an axis too")
    for left, size in zip(range(len(sizes) - 1, -1, -1), sizes, strict=True):
        budget = whole / search.THIRD**left
        budget = max(1, round(budget)) if key == "train.steps" else float(f"{budget:.3g}")
        rung = len(sizes) - left
        say(f"---- rung {rung} of {len(sizes)}: {_points(size)}, {key}={budget}" + (", trained anew, as a schedule "
            "belongs to its length" if rung > 1 else ""))  # fmt: skip
        found = run(plan(points, budget=(f"{key}={budget}",)))
        outcomes += found
        if left:
            losses = [_loss(mine) for mine in _by_point(found, len(points))]
            best = np.argsort(losses, kind="stable")[: sizes[rung]]
            points = [points[i] for i in sorted(best)]
    return outcomes


def _points(n: int) -> str:
    return f"{n} point{'s' * (n != 1)}"


def _by_point(outcomes: list[Outcome], points: int) -> list[list[Outcome]]:
    seeds = len(outcomes) // points
    return [outcomes[i * seeds : (i + 1) * seeds] for i in range(points)]


def _loss(outcomes: list[Outcome]) -> float:
    """Mean validation loss over seeds, infinite where one failed. Raises FtjaxError where none was measured."""
    if any(o.failed for o in outcomes):
        return math.inf
    found = values(outcomes, "val_loss")
    if not found:
        raise FtjaxError(
            "--halving and --optuna choose by validation loss: name data.validation, or give it a share of data.split"
        )
    return float(np.mean(found))


def _by_optuna(found: list[search.Axis], trials: int, seed: int, run) -> list[Outcome]:
    """The outcomes of `trials` points, each proposed by Optuna's TPE from the validation losses of those before."""
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
    """A folder's name that tells a run's settings; where it cannot tell them all, a digest sets it apart."""
    whole = ",".join(texts)
    plain = re.sub(r"[^\w.=,+-]", "_", whole)[:120]
    return plain if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _asked(config) -> dict:
    """What a run's outcome depends on: fields and the content of the files that they name, as JSON gives them back."""
    said = {key: value for key, value in configs.flat(config).items() if not key.startswith(FREE)}
    judged = ("evaluate.", "generate.", "task.")
    said |= {key: value for key, value in configs.flat(config).items() if key.startswith(judged)}
    return json.loads(json.dumps(said | contents(config)))


def _ended(config) -> Outcome | None:
    """The outcome of a run that has ended; None where it has not."""
    file = Path(config.run_dir) / OUTCOME
    if config.overwrite or not file.is_file():
        return None
    record = json.loads(file.read_text())
    now, before = _asked(config), record.pop("asked")
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
    return Outcome(**record)


def _known(folder: Path) -> dict[str, dict]:
    """The records of the runs of a folder that have ended, by what they depend on."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{OUTCOME}"))]
    return {json.dumps(record.pop("asked"), sort_keys=True): record for record in records}


def _alike(settings: dict, config, known: dict[str, dict]) -> Outcome | None:
    """The outcome of a run in another folder that depends on the same; None where there is none."""
    record = known.get(json.dumps(_asked(config), sort_keys=True)) if known and not config.overwrite else None
    return Outcome(**record | {"settings": settings}) if record else None


def _run(settings: dict, config, say) -> Outcome:
    run_dir = Path(config.run_dir)
    try:
        with metered() as meter:
            result = train(config, say=say)
    except FtjaxError as error:
        if not (run_dir / "metrics.jsonl").is_file():
            raise FtjaxError(f"{run_dir.name}: {error}") from error
        outcome = Outcome(settings, config.seed, str(run_dir), {}, math.nan, failed=str(error))
        say(f"failed: {error}")
    except Exception as error:  # out of memory, or a fault: the other runs go on, and the same command tries again
        say(traceback.format_exc())
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        say(f"failed: {why}")
        return Outcome(settings, config.seed, str(run_dir), {}, math.nan, failed=why)
    else:
        found, noise = figures(result), _noise(result)
        outcome = Outcome(settings, config.seed, str(run_dir), found, result.seconds, noise=noise, joules=meter.joules)
    replace_json(run_dir / OUTCOME, dataclasses.asdict(outcome) | {"asked": _asked(config)})
    return outcome


def run_joules(run_dir: str) -> float | None:
    """What a run of a sweep has taken; None where that is not known."""
    file = Path(run_dir) / OUTCOME
    return json.loads(file.read_text()).get("joules") if file.is_file() else None


def figures(result) -> dict[str, float]:
    """Every figure of a run by name: its losses, and those on the test part, or else on validation."""
    found = {"train_loss": result.train_loss}
    found |= {} if result.val_loss is None else {"val_loss": result.val_loss}
    values = {name: entry["value"] if isinstance(entry, dict) else entry for name, entry in _judged(result).items()}
    return found | {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _judged(result) -> dict:
    """What was measured on held-out rows: name -> a number, or an entry with its interval."""
    results = result.results or {}
    judged = results.get("after") or results.get("test") or results.get("validation") or {}
    return judged.get("metrics", judged)


def _noise(result) -> dict[str, float]:
    """Half of the width of the intervals over rows, in standard deviations."""
    spans = {n: e for n, e in _judged(result).items() if isinstance(e, dict) and e.get("low") is not None}
    return {name: (entry["high"] - entry["low"]) / (2 * NORMAL) for name, entry in spans.items()}


def main_figures(config, outcomes: list[Outcome]) -> list[str]:
    """The figures that a table shows: those that the task is judged by, as far as the runs have them."""
    judged = TASKS[config.task.kind].judged
    usual = KINDS[judged].main if judged in KINDS else (*config.evaluate.metrics, "perplexity", "accuracy", "val_loss")
    there = set().union(*(o.figures for o in outcomes))
    return [name for name in usual if name in there] or ["train_loss"]


def points(outcomes: list[Outcome]) -> dict[tuple, list[Outcome]]:
    """The outcomes of all seeds by their settings, in order."""
    found = {}
    for outcome in outcomes:
        found.setdefault(tuple(outcome.settings.items()), []).append(outcome)
    return found


def values(outcomes: list[Outcome], name: str) -> list[float]:
    """A figure of every run that has it."""
    return [o.figures[name] for o in outcomes if name in o.figures]


def table(outcomes: list[Outcome], shown: Sequence[str]) -> str:
    """Mean and standard deviation (of a sample) over seeds of each figure at each point, as text."""
    keys = list(dict.fromkeys(key for o in outcomes for key in o.settings))
    head = [*((key, False) for key in keys), ("runs", True), *((name, True) for name in shown), ("seconds", True)]
    lines, failed = [], []
    for settings, runs in points(outcomes).items():
        ended = [o for o in runs if not o.failed]
        failed += [o for o in runs if o.failed]
        seconds = f"{np.mean([o.seconds for o in ended]):.0f}" if ended else ""
        cells = [_spread(values(runs, name)) for name in shown]
        lines.append([*(f"{value}" for _, value in settings), f"{len(ended)}", *cells, seconds])
    said = [f"failed: {Path(o.run_dir).name}: {o.failed}" for o in failed]
    return "\n".join([grid_text(head, lines) + "mean ± standard deviation over seeds", *said])


def _spread(found: list[float]) -> str:
    if not found:
        return "none"
    return f"{np.mean(found):.4g}" + (f" ± {np.std(found, ddof=1):.2g}" if len(found) > 1 else "")


def draw(outcomes: list[Outcome], name: str, path: Path, say=print) -> Path | None:
    """A figure against an axis of AMOUNTS, with its law, or else that with most numbers, one curve a setting of the
    others; None without such an axis."""
    numbers = {}
    for key in outcomes[0].settings:
        found = {o.settings[key] for o in outcomes}
        number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)
        if len(found) > 1 and (number or key == "model.path"):
            numbers[key] = len(found)
    if not numbers:
        return None
    key = next((k for k in AMOUNTS if k in numbers), None) or max(numbers, key=numbers.get)
    amount = functools.cache(_parameters) if key == "model.path" else lambda value: value
    curves: dict[str, dict] = {}
    for outcome in outcomes:
        all_rows = key in AMOUNTS and not outcome.settings[key]  # 0: however many there are
        if name in outcome.figures and not all_rows:
            others = [f"{k.split('.')[-1]}={v}" for k, v in outcome.settings.items() if k != key]
            points = curves.setdefault(", ".join(others) or name, {})
            points.setdefault(amount(outcome.settings[key]), []).append(outcome.figures[name])
    if not curves:
        return None
    if key not in AMOUNTS:
        told = {label: curve.drawn(points) for label, points in curves.items()}
        return pictures.curves(told, path, list(told), x_label=key, y_label=name)
    noise = [o.noise[name] for o in outcomes if name in o.noise]
    what = "the parameters" if key == "model.path" else "the data"
    how = {**law_of(name), "noise": float(np.mean(noise)) if noise else 0.0, "what": what}
    told = {label: curve.report(points, **how) for label, points in curves.items()}
    for label, one in told.items():
        say(f"{label}: {one['says']}")
    replace_json(path.with_name("curves.json"), told)
    return pictures.curves(told, path, list(told), x_label="parameters" if key == "model.path" else key, y_label=name)


def law_of(name: str) -> dict:
    """Which way a figure is better and what bounds it, as curve.fit takes them."""
    if name in METRICS:
        higher, best = bool(METRICS[name].higher), METRICS[name].best
        return {"higher": higher, "best": best, "worst": 0.0 if higher and best else None}
    lower = name in (*LOWER, *compare.LOWER) or "loss" in name
    worst = None if lower or name in SIGNED else 0.0
    return {"higher": not lower, "best": 1.0 if name == "perplexity" else None, "worst": worst}


def _parameters(path: str) -> int:
    """Of a model directory."""
    folder = resolve.resolve(path)
    _, shape = families.read_config(folder)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(weights.param_shapes(shape, np.float32)))
