"""A config run at every point of a grid of its fields, with several seeds: each run once, and what they came to.

A run's folder is named after its settings and holds `outcome.json` once it has ended, so that the same command goes on
where it was stopped, and a wider grid runs only what is new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.evaluation.labelled import KINDS, grid
from ftjax.files import replace_text
from ftjax.objectives import TASKS
from ftjax.training.loop import train
from ftjax.training.run_folder import FREE

OUTCOME = "outcome.json"


class Axis(NamedTuple):
    """A field of the config and the values that it takes in turn."""

    key: str
    values: tuple


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to. figures: name -> value; failed: why it has none, else empty; seconds: that it took."""

    settings: dict
    seed: int
    run_dir: str
    figures: dict[str, float]
    seconds: float
    failed: str = ""


def axes(grid: Sequence[str]) -> list[Axis]:
    """`tuning.rank=4,8,16` -> its axis, of each text. Raises FtjaxError for anything else, and a key named twice."""
    found = []
    for text in grid:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise FtjaxError(f"--grid {text!r}: expected key=value,value,... such as tuning.rank=4,8,16")
        if key in ("seed", "run_dir"):
            raise FtjaxError(f"--grid {text!r}: {key} is of no grid; --seeds says how many, --config.seed the first")
        if key in (axis.key for axis in found):
            raise FtjaxError(f"--grid {text!r}: {key} is named twice")
        # A comma within brackets or quotes is a value's own.
        parts = re.findall(r"""(?:[^,("'\[]|\([^)]*\)|\[[^\]]*\]|"[^"]*"|'[^']*')+""", values)
        found.append(Axis(key, tuple(dict.fromkeys(parts))))
    return found


def sweep(config, grid: Sequence[str], seeds: int = 1, say: Callable[[str], None] = print) -> list[Outcome]:
    """Train `config` at every point of the grid, `seeds` times each, into folders of `config.run_dir`.

    grid: texts `key=value,value,...`; the seeds are config.seed and those that follow. Writes sweep.json with every
    outcome and, where an axis has numbers, sweep.png with a figure against it. Settings are checked for all points
    before the first run. A run that ends with an error once it trains, such as for a loss that is no number, is told
    with its outcome, and the others go on. Raises FtjaxError for settings that cannot be, and for a folder that holds
    another run.
    """
    if seeds < 1:
        raise FtjaxError(f"--seeds: expected at least 1; found {seeds}")
    found, folder = axes(grid), Path(config.run_dir)
    asked = []
    for values in itertools.product(*(axis.values for axis in found)):
        texts = [f"{axis.key}={value}" for axis, value in zip(found, values, strict=True)]
        for seed in range(config.seed, config.seed + seeds):
            c = configs.copy(config)
            configs.override(c, texts)
            c.seed, c.run_dir = seed, str(folder / _name([*texts, f"seed={seed}"]))
            settings = {axis.key: configs.flat(c)[axis.key] for axis in found}
            asked.append((settings, c))
    done = [_ended(c) for _, c in asked]
    say(f"{folder}: {len(asked)} runs, of which {sum(o is not None for o in done)} have ended before")
    outcomes = []
    for number, ((settings, c), outcome) in enumerate(zip(asked, done, strict=True), 1):
        if outcome is None:
            say(f"---- run {number} of {len(asked)}: {Path(c.run_dir).name}")
            outcome = _run(settings, c, say)
        outcomes.append(outcome)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "sweep.json", json.dumps([dataclasses.asdict(o) for o in outcomes], indent=2) + "\n")
    shown = main_figures(config, outcomes)
    say(table(outcomes, shown))
    if picture := draw(outcomes, shown[0], folder / "sweep.png"):
        say(f"  picture      {picture}")
    return outcomes


def _name(texts: list[str]) -> str:
    """A folder's name that tells a run's settings; where it cannot tell them all, a digest sets it apart."""
    whole = ",".join(texts)
    plain = re.sub(r"[^\w.=,+-]", "_", whole)[:120]
    return plain if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _asked(config) -> dict:
    """The fields that a run's outcome depends on, as JSON gives them back."""
    said = {key: value for key, value in configs.flat(config).items() if not key.startswith(FREE)}
    said |= {key: value for key, value in configs.flat(config).items() if key.startswith(("evaluate.", "generate."))}
    return json.loads(json.dumps(said))


def _ended(config) -> Outcome | None:
    """The outcome of a run that has ended; None where it has not."""
    file = Path(config.run_dir) / OUTCOME
    if config.overwrite or not file.is_file():
        return None
    record = json.loads(file.read_text())
    now, before = _asked(config), record.pop("asked")
    changed = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if now[key] != before.get(key)]
    if changed:
        raise FtjaxError(
            f"run_dir: {config.run_dir} holds another run: {'; '.join(changed)}. Choose another run_dir, or delete "
            "these runs with --config.overwrite=True"
        )
    return Outcome(**record)


def _run(settings: dict, config, say) -> Outcome:
    run_dir = Path(config.run_dir)
    try:
        result = train(config, say=say)
    except FtjaxError as error:
        if not (run_dir / "metrics.jsonl").is_file():
            raise FtjaxError(f"{run_dir.name}: {error}") from error
        outcome = Outcome(settings, config.seed, str(run_dir), {}, math.nan, failed=str(error))
        say(f"failed: {error}")
    else:
        outcome = Outcome(settings, config.seed, str(run_dir), figures(result), result.seconds)
    replace_text(
        run_dir / OUTCOME, json.dumps(dataclasses.asdict(outcome) | {"asked": _asked(config)}, indent=2) + "\n"
    )
    return outcome


def figures(result) -> dict[str, float]:
    """Every figure of a run by name: its losses, and those on the test part, or else on validation."""
    found = {"train_loss": result.train_loss}
    found |= {} if result.val_loss is None else {"val_loss": result.val_loss}
    results = result.results or {}
    judged = results.get("after") or results.get("test") or results.get("validation") or {}
    metrics = judged.get("metrics", judged)
    values = {name: entry["value"] if isinstance(entry, dict) else entry for name, entry in metrics.items()}
    return found | {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


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
    keys = list(outcomes[0].settings)
    head = [*((key, False) for key in keys), ("runs", True), *((name, True) for name in shown), ("seconds", True)]
    lines, failed = [], []
    for settings, runs in points(outcomes).items():
        ended = [o for o in runs if not o.failed]
        failed += [o for o in runs if o.failed]
        seconds = f"{np.mean([o.seconds for o in ended]):.0f}" if ended else ""
        cells = [_spread(values(runs, name)) for name in shown]
        lines.append([*(f"{value}" for _, value in settings), f"{len(ended)}", *cells, seconds])
    said = [f"failed: {Path(o.run_dir).name}: {o.failed}" for o in failed]
    return "\n".join([grid(head, lines) + "mean ± standard deviation over seeds", *said])


def _spread(found: list[float]) -> str:
    if not found:
        return "none"
    return f"{np.mean(found):.4g}" + (f" ± {np.std(found, ddof=1):.2g}" if len(found) > 1 else "")


def draw(outcomes: list[Outcome], name: str, path: Path) -> Path | None:
    """A figure against the axis with most numbers, one curve a setting of the others; None without such an axis."""
    from ftjax.evaluation.pictures import learning_picture

    numbers = {}
    for key in outcomes[0].settings:
        found = {o.settings[key] for o in outcomes}
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in found) and len(found) > 1:
            numbers[key] = len(found)
    if not numbers:
        return None
    key = max(numbers, key=numbers.get)
    curves: dict[str, dict] = {}
    for outcome in outcomes:
        if name in outcome.figures:
            others = [f"{k.split('.')[-1]}={v}" for k, v in outcome.settings.items() if k != key]
            curve = curves.setdefault(", ".join(others) or name, {})
            curve.setdefault(outcome.settings[key], []).append(outcome.figures[name])
    return learning_picture(curves, path, x_label=key, y_label=name) if curves else None
