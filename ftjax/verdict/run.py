"""`ftjax compare`: measure contenders on the same held-out rows, check the comparison, and write one report."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ftjax
from ftjax import config as configs
from ftjax import tasks
from ftjax.data import template
from ftjax.errors import FtjaxError
from ftjax.evaluation.compare import spread
from ftjax.evaluation.metrics import find_any
from ftjax.files import replace_json, replace_text, write_jsonl
from ftjax.training import privacy
from ftjax.training.compiling import use_compilation_cache
from ftjax.training.run_folder import AnotherRun
from ftjax.verdict import pictures, report, statistics
from ftjax.verdict.amounts import amounts, learning_curve, with_curves
from ftjax.verdict.contenders import parse
from ftjax.verdict.cost import break_even, load, price
from ftjax.verdict.decision import contender_is, decide
from ftjax.verdict.energy import Meter
from ftjax.verdict.findings import Case, findings
from ftjax.verdict.measure import Measured, measure
from ftjax.verdict.memorisation import copied
from ftjax.verdict.rating import win_rate, write_ballots
from ftjax.verdict.rows import fix_rows
from ftjax.verdict.setting import Setting, check, held_out_labels, setting

UNTRAINED = ("prompt", "majority")  # kinds of contenders without training


def compare(
    config: configs.ConfigDict, out: str | Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Compare the contenders of `config.compare.contenders`, the first of which is the base, and write the report.

    Contenders that need training are trained in subfolders of `config.run_dir`. A run that has ended is not trained
    again, see ftjax.verdict.sweep.

    Args:
        config: The config.
        out: Folder for verdict.html, verdict.md, verdict.json (the figures and the config), answers.jsonl, the pictures
            and, if `compare.ballots` is set, the ballots. None: `config.run_dir`.
        say: Called with each line for a person.

    Returns:
        The verdict as plain data, as in verdict.json.

    Raises:
        FtjaxError: If contenders, rows or settings cannot be used, if the base failed, or if fewer than two contenders
            could be measured.
    """
    config = configs.copy(config)
    configs.validate(config)
    asked, settings = parse(config), config.to_dict()
    curved = with_curves(asked, config)
    metric = _metric(config)
    if config.log.compilation_cache:
        use_compilation_cache()
    folder, out, elsewhere = Path(config.run_dir), Path(out or config.run_dir), out
    for each in (folder, out):
        if each.is_file():
            raise FtjaxError(f"{each} is a file; expected a folder, or a path that does not exist")
        each.mkdir(parents=True, exist_ok=True)
    fix_rows(config, folder / "rows", say)
    found, known = setting(config, folder), {}
    check(asked, found)
    if curved:
        amounts(found)  # raises for wrong amounts before anything is trained
    lost: dict[str, str] = {}
    tried = {c.name: _tried(c.name, lost, say, functools.partial(measure, c, found, known, say)) for c in asked}
    measured = {name: m for name, m in tried.items() if m is not None}
    if asked[0].name in lost or len(measured) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in lost.items())
        raise FtjaxError(f"compare: these contenders failed, and without them there is nothing to compare: {why}")
    curves = []
    for c in curved:
        if c.name in measured:
            run = functools.partial(learning_curve, c, found, measured[c.name], metric, say)
            curves += [one for one in [_tried(f"{c.name}, learning curve", lost, say, run)] if one is not None]
    case = case_of(found, measured, metric)._replace(lost=lost)
    data = plain(case, metric, curves) | {"config": settings, "ftjax": ftjax.__version__}
    command = ["ftjax", "compare", "--config", str(out / "verdict.json"), *(["--out", str(out)] if elsewhere else [])]
    data["repeat"] = shlex.join(command)
    data["pictures"] = draw(data, measured, out)
    answers = list(_answers(found, measured, metric))
    write_jsonl(out / "answers.jsonl", answers)
    written = ["verdict.html", "verdict.md", "verdict.json", "answers.jsonl"]
    if config.compare.ballots:
        asked_of = spread(answers, config.compare.ballots)
        texts = {name: [row["answers"][name]["text"] for row in asked_of] for name in measured}
        prompts = [row["prompt"] for row in asked_of]
        write_ballots(out / "ballots.csv", out / "ballots_key.jsonl", prompts, texts, seed=config.seed)
        written += ["ballots.csv", "ballots_key.jsonl"]
    data["samples"] = spread(answers, config.evaluate.samples)
    replace_json(out / "verdict.json", data)
    replace_text(out / "verdict.md", report.markdown(data))
    replace_text(out / "verdict.html", report.html(data, out))
    say(report.table(data))
    if spent := privacy.together(folder):
        say(spent)
    for name in written:
        say(f"  {out / name}")
    return data


def _tried(name: str, lost: dict[str, str], say, run):
    """Return what `run` returns, or None if it fails, so that the other contenders go on. The reason of a failure is
    added to `lost`. AnotherRun is raised, because only the user can settle it."""
    try:
        return run()
    except AnotherRun:
        raise
    except Exception as error:
        say(f"{error}" if isinstance(error, FtjaxError) else traceback.format_exc())
        kind = "" if isinstance(error, FtjaxError) else f"{type(error).__name__}: "
        lost[name] = f"{kind}{error}".partition("\n")[0][:300].removeprefix(f"{name}: ")
        say(f"failed: {name}: {lost[name]}")
        return None


def _metric(config) -> str:
    """The metric that the verdict is about. A metric of answers is added to evaluate.metrics."""
    of_labels = tasks.find(config.task.kind).right
    name = of_labels or config.compare.metric or next(iter(config.evaluate.metrics), "")
    if not name:
        raise FtjaxError("compare.metric and evaluate.metrics are both empty; name the metric of the verdict")
    if find_any(name).higher is None:
        raise FtjaxError(
            f"compare.metric: {name} has no better direction (neither more nor less is better); name another metric"
        )
    if not of_labels:
        config.evaluate.metrics = tuple(dict.fromkeys((name, *config.evaluate.metrics)))
        for other in config.evaluate.metrics:
            find_any(other)
    return name


# ---------------------------------------------------------------------------------------------- the verdict


def case_of(found: Setting, measured: dict[str, Measured], metric: str, base: str = "") -> Case:
    """The comparison with a verdict on every contender against the base.

    Args:
        found: The setting.
        measured: {name: Measured}.
        metric: The metric that the verdict is about.
        base: The contender that the others are compared with; empty: the first.

    Returns:
        The Case.
    """
    base, scores = base or next(iter(measured)), {name: m.scores[metric] for name, m in measured.items()}
    by = find_any(metric)
    verdicts = statistics.verdicts(scores, base, higher=by.higher, seed=found.config.seed, bounds=by.bounds)
    return Case(found, measured, base, verdicts)


def plain(case: Case, metric: str, curves: list[dict]) -> dict:
    """All content of the report as plain data.

    Args:
        case: The comparison, from `case_of`.
        metric: The metric that the verdict is about.
        curves: Learning curves, see ftjax.verdict.amounts.learning_curve.

    Returns:
        The content of verdict.json without what `compare` adds: config, version, command, pictures and samples.
    """
    measured, config = case.measured, case.setting.config
    n = measured[case.base].scores[metric].shape[-1]
    kinds = {name: m.contender.kind for name, m in measured.items()}
    entries, against = [], {}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    higher, bounds = find_any(metric).higher, find_any(metric).bounds
    ready = [name for name, kind in kinds.items() if kind in UNTRAINED]
    best = max if higher else min
    untrained = best(ready, key=lambda name: measured[name].scores[metric].mean(), default="")
    if untrained:  # chosen on these rows, which favours it: a contender that still beats it is better all the more
        others = {name: m for name, m in measured.items() if name == untrained or name not in ready}
        against = case_of(case.setting, others, metric, untrained).verdicts
    prices = {n: price(m.cost, config.compare, kinds[n]) for n, m in measured.items()}
    of_base = measured[case.base].scores[metric].mean(0)
    for name, m in measured.items():
        figures = {key: _interval(key, x) for key, x in m.scores.items()}
        verdict, trains = case.verdicts.get(name), against.get(name)
        entry = {
            "name": name, "kind": kinds[name], "settings": m.contender.settings, "seeds": len(m.scores[metric]),
            "figures": figures, "verdict": verdict and verdict._asdict(), "cost": dataclasses.asdict(m.cost),
            "price": dataclasses.asdict(prices[name]), "forgetting": m.forgetting,
            "checkpoints": [passed._asdict() for passed in m.way],
            "refused": {key: float(x.mean()) for key, x in m.refused.items()}, "runs": [run.path for run in m.runs],
            "unsupported": m.unsupported, "against_untrained": trains and trains._asdict(), "divergence": m.divergence,
            "is": contender_is(m.contender, config),
            "wins": None if name == case.base else win_rate(m.scores[metric].mean(0), of_base, higher=higher),
            "copied": _copied(m, case.setting),
        }  # fmt: skip
        others = [other for other, kind in kinds.items() if kind == "prompt" and m.cost.trained]
        asked = config.compare.requests
        entry["pays_after"] = {other: break_even(prices[name], prices[other], asked) for other in others}
        entry["pays_from"] = {other: load(prices[name], prices[other]) for other in others}
        entries.append(entry)
    data = {
        "metric": metric, "higher": higher, "rows": n, "level": statistics.LEVEL, "base": case.base,
        "untrained": untrained, "task": config.task.kind, "model": config.model.path,
        "data": config.data.test or config.data.train, "device": device, "energy": bool(Meter().counters),
        "contenders": entries, "curves": curves, "requests": config.compare.requests,
        "worst": bounds and bounds[not higher], "reach": bounds and bounds[1],
        "metrics": {name: find_any(name).described for name in entries[0]["figures"]},
        "findings": [finding._asdict() for finding in findings(case)],
    }  # fmt: skip
    data |= {"question": report.question(data), "decision": decide(data)}
    return data | {"answer": report.answer(data), "detail": report.detail(data)}


def _interval(metric: str, scores: np.ndarray) -> dict[str, float]:
    """The mean of scores (S, N), with its interval over rows and seeds."""
    low, high = statistics.score_interval(scores, find_any(metric).bounds)
    return {"value": float(scores.mean()), "low": float(low), "high": float(high)}


def _copied(measured: Measured, found: Setting) -> float | None:
    """Share of the n-grams of COPIED words in a contender's answers that also occur in training answers. None if the
    answers have no such n-gram, or if the contender was not trained here."""
    if not found.questions or measured.contender.kind != "tuned":
        return None
    training = [template.reference(rendered).split() for rendered, _ in found.data.train.each()]
    return copied([answer.split() for answer in measured.answers], training, report.COPIED)


def _answers(found: Setting, measured: dict[str, Measured], metric: str):
    """One record per question: the prompt, its references, and the answer and score of each contender's first seed."""
    if found.questions:
        shown = [template.question(q.rendered) for q in found.questions]
        right = [q.references for q in found.questions]
    else:
        labels = held_out_labels(found)
        part = getattr(found.data, found.config.evaluate.compare_on)
        shown, right = [part.rendered(i).prompt for i in range(len(labels))], [[label] for label in labels]
    for i, (text, references) in enumerate(zip(shown, right, strict=True)):
        answers = {n: {"text": m.answers[i], "score": float(m.scores[metric][0, i])} for n, m in measured.items()}
        yield {"prompt": text, "references": references, "answers": answers}


def draw(data: dict, measured: dict[str, Measured], out: Path) -> dict[str, str]:
    """Draw the pictures for which there are figures.

    Args:
        data: The verdict as plain data, from `plain`.
        measured: {name: Measured}, the base first.
        out: Folder for the PNG files.

    Returns:
        {caption: name of the file in `out`}.
    """
    drawn, metric = {}, data["metric"]
    entries = {entry["name"]: entry for entry in data["contenders"]}
    shown = {name: entry["figures"][metric] for name, entry in entries.items()}
    marks = {name: (entry["verdict"] or {}).get("says", "") for name, entry in entries.items()}
    label = f"{metric} ({'more' if data['higher'] else 'less'} is better)"
    pictures.scores(shown, marks, out / report.SCORES, x_label=label)
    drawn[f"{metric} of each contender on {data['rows']:,} rows, with intervals at {data['level']:.0%}"] = report.SCORES
    timed = {n: (1000 * e["cost"]["request_seconds"], e["figures"][metric]) for n, e in entries.items()}
    timed = {name: point for name, point in timed.items() if point[0] > 0}
    if len(timed) > 1:
        x_label = f"milliseconds a request, on {data['device']}"
        pictures.quality_cost(timed, out / "quality_cost.png", list(entries), x_label=x_label, y_label=metric)
        drawn["Quality against cost, with intervals over rows and seeds"] = "quality_cost.png"
    if data["curves"]:
        by_name = {one["name"]: one for one in data["curves"]}
        pictures.curves(by_name, out / "curve.png", list(entries), x_label="rows of train", y_label=metric)
        caption = "Learning curves and their laws, dashed beyond the runs; hollow: all rows, by the smaller amounts"
        drawn[caption] = "curve.png"
    base, lost, ways = measured[data["base"]], {}, {}
    for name, m in measured.items():
        if m.runs and len(m.forgetting) == len(m.scores[metric]) and base.forgetting:
            gains = m.scores[metric].mean(1) - base.scores[metric].mean()
            lost[name] = list(zip(gains.tolist(), (np.array(m.forgetting) - np.mean(base.forgetting)).tolist()))
            start = base.scores[metric].mean(), np.mean(base.forgetting)
            ways[name] = [(p.step, p.scores[metric] - start[0], p.forgetting - start[1]) for p in m.way]
    if lost:
        labels = {
            "x_label": f"gain in {metric} over {data['base']}",
            "y_label": "loss on general text, nats a token more",
        }
        pictures.forgetting_gain(lost, out / "forgetting_gain.png", list(entries), ways=ways, **labels)
        way = "; lines: the checkpoints of a run, by their steps" if any(ways.values()) else ""
        drawn[f"Forgetting against gain, a point each seed{way}"] = "forgetting_gain.png"
    histories = {name: [run.history for run in m.runs] for name, m in measured.items() if m.runs}
    if histories:
        pictures.losses(histories, out / "losses.png", list(entries))
        drawn["Losses: validation bold, training faint, or alone"] = "losses.png"
    return drawn
