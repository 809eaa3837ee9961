"""Runs one after another (`config.stages`), each from the best model of the one before, and how each stage changed what
was learnt in the others.

After each stage the held-out rows of every stage are scored, as far as its model computes their task. S stages.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import seals, tasks
from ftjax.data import prepare
from ftjax.data.read import read_table
from ftjax.data.store import table_digest
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare
from ftjax.evaluation.pictures import new_axes, saved
from ftjax.evaluation.run import evaluate
from ftjax.evaluation.tables import grid
from ftjax.files import replace_json
from ftjax.hub import fingerprint, resolve
from ftjax.hub.derived import averaged
from ftjax.lm import LM
from ftjax.loading import load
from ftjax.pages import macros
from ftjax.progress import doing
from ftjax.tasks.preference import changing
from ftjax.training import hosts, job, loop
from ftjax.training.loop import Result
from ftjax.training.run_folder import read_record, run_config
from ftjax.tuning import METHODS

RESULTS, PICTURE = "stages.json", "stages.png"  # in run_dir
BEFORE = "before"  # the row of the base model
DIGITS = 3  # of a score in the table


@hosts.together()
def train(config: ConfigDict, say: Callable[[str], None] = print) -> Result:
    """Train as `config` says: one run, or its stages one after another, each in a folder of its own in `run_dir`.

    The same call again resumes the stage that was stopped and leaves out those that are done. After each stage the
    held-out rows of all stages are scored; a score is computed again only if the model, the rows or the settings that
    it belongs to have changed. Of several processes the first scores for all, on its own devices.

    Args:
        config: See ftjax.training.loop.train.
        say: See ftjax.training.loop.train.

    Returns:
        The Result of the run; with stages that of the last one, whose `results` is the content of stages.json:
        `scores` {model: {stage: scores}}, `forgotten` and `transferred` {stage: nats per token}.

    Raises:
        FtjaxError: See ftjax.training.loop.train; for a stage it starts with the stage's name.
    """
    configs.validate(config)
    stages = configs.staged(config)
    if not stages:
        return loop.train(config, say)
    for position, stage in enumerate(stages):
        if len(stage.average) > 1 and stage.config.privacy.epsilon:
            raise FtjaxError(
                f"stages: {stage.name}: average: private training (privacy.epsilon) needs one factor, because the best "
                "of several would be chosen on rows without noise"
            )
        for other in stages[: position + 1] if len(stage.average) > 1 else ():
            scored = tasks.find(other.config.task.kind).head == "causal" and _computes(stage, other, stages[0])
            if not other.config.data.validation or not scored:
                raise FtjaxError(
                    f"stages: {stage.name}: average: its factor is chosen by the mean loss per token on the validation "
                    f"rows of all stages so far, which cannot be computed for {other.name}: it names no "
                    "data.validation, or its task is not one that both models compute. Name validation rows there, or "
                    "give one factor"
                )
        used = stage is not stages[-1] or stage.average != (1.0,)
        if used and not METHODS[stage.config.tuning.method].merge:
            raise FtjaxError(
                f"stages: {stage.name}: {stage.config.tuning.method} makes no whole model for the next stage to start "
                "from, or to be averaged; take another method, or make it the last stage without average"
            )
    first = hosts.start()
    say = say if first else (lambda line: None)
    run_dir = Path(config.run_dir)
    scores: dict[str, dict] = {BEFORE: {}}
    start = resolve.resolve_model(stages[0].config.model.path, stages[0].config.model.revision)
    run_dir.mkdir(parents=True, exist_ok=True)
    kept = _kept(run_dir / RESULTS)
    result, model = None, start
    for position, stage in enumerate([None, *stages]):
        before = model
        if stage:
            say(f"\nstage {position} of {len(stages)}: {stage.name}")
            result, model = _run(stages[: position - 1], stage, before, say)
            if stage.average != (1.0,):
                made = functools.partial(_averaged, stages[:position], before, model, run_dir, kept, say)
                model = Path(hosts.from_first(made))
        name = stage.name if stage else BEFORE
        known = {token for one in stages[:position] for token in one.config.data.add_tokens}
        scored = [
            other
            for other in stages
            if _computes(stage, other, stages[0]) and known.issuperset(other.config.data.add_tokens)
        ]
        scores[name] = hosts.from_first(functools.partial(_all_scored, model, scored, kept, before))
        results = seals.sealed(_results(stages, scores))
        if first:
            replace_json(run_dir / RESULTS, results)
    changes = macros("stages.jinja").changes(results)
    say("\n" + _table(stages, results["scores"]) + changes.rstrip("\n"))
    if small := [stage.name for stage in stages if stage.config.model.quantise != "none"]:
        say(f"{', '.join(small)}: trained on a quantised base; {BEFORE} is the base as its files have it")
    picture = hosts.from_first(lambda: str(_picture(stages, results["scores"], run_dir / PICTURE)))
    files = result.files | {"stages": str(run_dir / RESULTS), "stages picture": picture}
    return dataclasses.replace(result, results=results, files=files)


def _run(earlier, stage, base: Path, say) -> tuple[Result, Path]:
    """Train one stage. Returns its Result and the folder of its model."""
    config = configs.copy(stage.config)
    if earlier:
        config.model.path, config.model.revision = str(base), ""
    if stage.replay:
        config.data.mixture = _mixed(earlier, stage)
        # An epoch of a mixture has as many rows as all its sources; one of a stage is a pass over its own rows.
        counts = [len(source.tables["train"]) for source in prepare.rows(config)[0]]
        config.train.epochs *= counts[-1] / (1 - stage.replay) / sum(counts)
    config.data.earlier = tuple(_entry(one, 1.0) for one in earlier) if config.optim.ewc else ()
    config.optim.ewc = config.optim.ewc if earlier else 0.0  # the first stage has nothing to forget that is known
    method, folder = config.tuning.method, Path(config.run_dir)
    if METHODS[method].merge:
        whole = "full" if method == "full" else "merged"
        config.export.formats = tuple(dict.fromkeys((*config.export.formats, whole)))
        folder = folder / whole
    try:
        return loop.train(config, say), folder
    except FtjaxError as error:
        error.args = (f"stages: {stage.name}: {error}",)
        raise


def _averaged(so_far, before: Path, model: Path, run_dir: Path, kept: dict, say) -> str:
    """The folder of the average of a stage's model and the one before it. Of several factors it takes the one with the
    lowest mean loss on the validation rows of the stages so far."""
    stage, losses = so_far[-1], {}
    for factor in stage.average:
        out = averaged(before, model, factor, run_dir / f"{stage.name}-average-{factor:g}", stage.config.seed)
        for other in so_far if len(stage.average) > 1 else ():
            config = configs.copy(other.config)
            config.data.test = config.data.validation
            losses.setdefault(factor, []).append(_scored(out, other._replace(config=config), kept, before)["loss"])
    best = min(stage.average, key=lambda factor: float(np.mean(losses.get(factor, 0.0))))
    by_factor = ", ".join(f"{factor:g}: {np.mean(found):.4f}" for factor, found in losses.items())
    say(
        f"average with the model before {stage.name}: factor {best:g}"
        + (f"; mean loss by factor {by_factor}" if by_factor else "")
    )
    return str(run_dir / f"{stage.name}-average-{best:g}")


def _mixed(earlier, stage) -> tuple[dict, ...]:
    """The rows of a stage and, as a share `replay`, those of the stages before it, as a data.mixture."""
    return (*(_entry(one, stage.replay / len(earlier)) for one in earlier), _entry(stage, 1 - stage.replay))


def _entry(stage, weight: float) -> dict:
    """The rows of a stage as an entry of data.mixture."""
    fields = configs.flat(stage.config)
    own = {key.removeprefix("data."): value for key, value in fields.items() if key.startswith("data.")}
    own = {key: value for key, value in own.items() if key.split(".")[0] not in configs.OF_ALL}
    return own | {key: fields[key] for key in configs.OWN} | {"name": stage.name, "weight": weight}


def _computes(stage, other, first) -> bool:
    """Whether the model after a stage (None: the base) can be scored on the rows of another one."""
    continues, kind = tasks.find((stage or first).config.task.kind).head == "causal", other.config.task.kind
    return (continues and (kind in tasks.ANSWERS or tasks.find(kind).measure is not None)) or stage is other


def _all_scored(model: Path, stages, kept: dict, before: Path) -> dict[str, dict]:
    return {stage.name: _scored(model, stage, kept, before) for stage in stages}


def _scored(model: Path, other, kept: dict, before: Path | None = None) -> dict:
    """Scores of a model on the held-out rows of a stage; `kept` has those that were measured with the same of all.

    before: the model before the stage, with which a loss compares that compares with the base in training. The merged
    model has no adapter to be without. If the stage had a quantised base, that one is the reference, in the run.
    """
    config, run = configs.copy(other.config), None
    if tasks.find(config.task.kind).passes(config):
        config.task.reference, run = str(before), _quantised(model)
    config.data.test = config.data.test or config.data.validation
    generates = config.task.kind in tasks.ANSWERS and config.evaluate.compare
    settings = {k: v for k, v in configs.flat(config).items() if not k.startswith(("train.", "optim.", "tuning."))}
    held_out = read_table(config.data.test, "data.test", header=config.data.columns)
    settings |= {"model": fingerprint.weights_digests(model), "rows": table_digest(held_out)}
    settings |= {"files": fingerprint.of_named(compare.named_files(config) | job.named_files(config))}
    settings |= {"quantised": run.model.quantise} if run else {}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    if key not in kept or not settings["model"]:
        with doing(f"scoring {model} on the held-out rows of {other.name}"):
            lm: str | LM = str(model)
            if run:
                config.task.reference, lm = "", load(model.parent, checkpoint=run.export.checkpoint)
            report = evaluate(lm, None, config, generate=generates, say=lambda line: None)
        kept[key] = {name: value for name, value in report.items() if isinstance(value, int | float)}
    return kept[key] | {"key": key}


def _quantised(model: Path) -> ConfigDict | None:
    """The config of the run that a merged model is of, if it has a quantised base and an adapter alone."""
    config = run_config(model.parent) if model.name == "merged" and read_record(model.parent) else None
    alone = config and not changing(METHODS[config.tuning.method], config.tuning)
    return config if alone and config.model.quantise != "none" else None


def _kept(file: Path) -> dict[str, dict]:
    """{key: scores} of an earlier start; empty if the file is not as it was written."""
    found = (seals.opened(file) or {}).get("scores", {})
    cells = [dict(cell) for row in found.values() for cell in row.values()]
    return {cell.pop("key"): cell for cell in cells}


def _results(stages, scores: dict) -> dict[str, Any]:
    """The content of stages.json: the scores, and by how much the loss on each stage's rows has changed.

    `transferred`: from the base to the model before the stage; below 0, earlier stages helped. `forgotten`: from the
    lowest loss at or after the stage to the last model; 0 if nothing is lost.
    """
    names, forgotten, transferred = [stage.name for stage in stages], {}, {}
    for position, name in enumerate(names):
        found = {model: row.get(name, {}) for model, row in scores.items()}
        losses = {model: x["loss"] for model, x in found.items() if "loss" in x and "answers" not in x}  # nats a token
        since = [losses[model] for model in names[position:] if model in losses]
        prior = names[position - 1] if position else BEFORE
        if len(since) > 1:
            forgotten[name] = since[-1] - min(since)
        if position and {BEFORE, prior} <= losses.keys():
            transferred[name] = losses[prior] - losses[BEFORE]
    return {"scores": scores, "forgotten": forgotten, "transferred": transferred}


def _main(scores: dict) -> tuple[str, float]:
    """The score that a table shows: the reward or the loss where there is one, else the first."""
    name = next((name for name in ("reward", "loss") if name in scores), next(iter(scores)))
    return name, scores[name]


def _table(stages, scores: dict) -> str:
    head = [("model after", False), *((stage.name, True) for stage in stages)]
    lines = []
    for model, row in scores.items():
        cells = [_main(row[stage.name]) if stage.name in row else None for stage in stages]
        lines.append([model, *(f"{cell[0]} {cell[1]:.{DIGITS}f}" if cell else "–" for cell in cells)])
    return "held-out rows of each stage, scored by the model before and after each stage\n" + grid(head, lines)


def _picture(stages, scores: dict, path: Path) -> Path:
    """The table as a PNG file; a cell is darker, the worse its score is within its column."""
    figure, axes = new_axes(2 + 1.6 * len(stages), 1.2 + 0.5 * len(scores))
    shades = np.full((len(scores), len(stages)), np.nan)
    for column, stage in enumerate(stages):
        found = {i: _main(row[stage.name]) for i, row in enumerate(scores.values()) if stage.name in row}
        values = [value if name == "loss" else -value for name, value in found.values()]
        low, wide = min(values), (max(values) - min(values)) or 1
        for (i, (name, value)), place in zip(found.items(), values):
            shades[i, column] = (place - low) / wide
            axes.text(column, i, f"{name}\n{value:.{DIGITS}f}", ha="center", va="center", fontsize=8)
    axes.imshow(shades, cmap="Oranges", vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(len(stages)), [stage.name for stage in stages])
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set(xlabel="held-out rows of", ylabel="model after")
    return saved(figure, path)
