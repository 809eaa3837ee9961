"""Train contenders on fewer rows, for the learning curves of a comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from ftjax import tasks
from ftjax.errors import FtjaxError, check_known
from ftjax.training.program import fill_defaults
from ftjax.verdict import curve
from ftjax.verdict.contenders import Contender
from ftjax.verdict.measure import Measured, answer, briefly, train_config
from ftjax.verdict.setting import Setting, labels, open_model
from ftjax.verdict.sweep import law_of, sweep


def with_curves(contenders: list[Contender], config) -> list[Contender]:
    """The contenders that get a learning curve, by compare.curve_of; none if no amounts are set.

    Raises FtjaxError for a contender or a task that cannot have one.
    """
    comp = config.compare
    if not (comp.curve or comp.curve_shots):
        return []
    if comp.curve_shots and config.task.kind != "classify":
        raise FtjaxError(
            f"compare.curve_shots counts rows per label and needs task.kind classify, not {config.task.kind}; set "
            "compare.curve instead"
        )
    tuned = {c.name: c for c in contenders if c.kind == "tuned"}
    for name in comp.curve_of:
        check_known(name, tuned, "compare.curve_of: no trained contender")
    chosen = [tuned[name] for name in comp.curve_of] or list(tuned.values())
    for contender in chosen:
        own = next((key for key in contender.settings if key.startswith("data.")), None)
        if own:
            raise FtjaxError(
                f"compare.curve: contender {contender.name!r} sets {own}, so it would be trained on other rows than "
                "the other contenders; leave it out of compare.curve_of"
            )
    if not chosen:
        raise FtjaxError(
            'compare.curve needs a trained contender, and compare.contenders has none; add one, such as {"name": '
            '"tuned"}'
        )
    return chosen


def amounts(setting: Setting) -> tuple[list[tuple[str, int]], int]:
    """The amounts of rows of the learning curves.

    Returns:
        ([(field of the config that limits the rows, number of rows)], fewest first; number of all rows of train).

    Raises:
        FtjaxError: If an amount is not smaller than all rows.
    """
    comp, train = setting.config.compare, setting.data.train
    whole = sum(len(piece.table) for piece in train.pieces)
    found = [(f"data.limit={n}", n) for n in comp.curve]
    if comp.curve_shots:
        counts = Counter(labels(setting.data, train)).values()
        found += [(f"data.shots={k}", sum(min(k, count) for count in counts)) for k in comp.curve_shots]
    for text, n in found:
        if n >= whole:
            raise FtjaxError(
                f"compare.curve: {text} does not select fewer than the {whole:,} training rows; set a smaller amount"
            )
    return sorted(found, key=lambda item: item[1]), whole


def _same_rows(config) -> bool:
    """Whether a run of a labelled task has already been evaluated on the rows, and by the rule, of the comparison."""
    plain = config.evaluate.compare_on == "test" and not config.evaluate.compare_rows and not config.task.threshold
    return plain and bool(tasks.find(config.task.kind).right)


def learning_curve(
    contender: Contender, setting: Setting, measured: Measured, metric: str, say: Callable = print
) -> dict:
    """Train a contender on each amount of rows, and fit the law of its metric.

    Args:
        contender: The contender.
        setting: What all contenders share.
        measured: The contender with all rows, on which the law of the smaller amounts is checked.
        metric: Name of the metric.
        say: Called with each line for a person.

    Returns:
        The dict of curve.report, with the contender's "name" and the reasons of runs that "failed".
    """
    config, (asked, whole) = setting.config, amounts(setting)
    points, failed = {}, []
    for text, rows in asked:
        say(f"{contender.name}, {text}: {config.compare.seeds} runs")
        c = train_config(contender, setting)
        c.run_dir = f"{c.run_dir}/curve"
        fill_defaults(c)
        if config.compare.curve_steps and not c.train.steps:
            steps = math.ceil(c.train.epochs * math.ceil(rows / c.train.batch_size))
            c.train.steps = max(config.compare.curve_steps, steps)
        for outcome in sweep(c, [text], config.compare.seeds, briefly(say)):
            if outcome.failed:
                failed.append(f"{text}, seed {outcome.seed}: {outcome.failed}")
                continue
            value = outcome.figures[metric] if _same_rows(config) else None
            if value is None:
                lm = open_model(outcome.run_dir, config)
                value = float(answer(contender, setting, lm, outcome.seed)[0][metric].mean())
            points.setdefault(rows, []).append(value)
    scores = measured.scores[metric]
    noise = scores.mean(0).std(ddof=1) / math.sqrt(scores.shape[1])
    how = {"at": config.compare.curve_to, "noise": noise, "seed": config.seed, **law_of(metric)}
    found = curve.report(points, whole=(whole, np.mean(scores, 1)), **how)
    return {"name": contender.name, "failed": failed} | found
