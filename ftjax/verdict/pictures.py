"""Pictures of a comparison, as PNG files. `order` lists all contenders, so that each looks alike in every picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ftjax.evaluation.pictures import escaped, new_axes, plain, saved, series

COLOURS = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#66ccee", "#888833", "#bb5566", "#555555")
MARKS = "osD^vPX*"
SIZE = (5.6, 4.2)  # inches: text is large enough on a phone


def scores(points: Mapping[str, dict], says: Mapping[str, str], path: Path, *, x_label: str) -> Path:
    """Draw a figure with its interval for each contender, the first at the top.

    Args:
        points: {name: {"value", "low", "high"}}.
        says: {name: `better`, `worse` or any other text}, which decides the colour.
        path: The PNG file.
        x_label: Label of the axis.

    Returns:
        The path.
    """
    colours = {"better": "#228833", "worse": "#bb3322"}
    figure, axes = new_axes(4.8, 1.3 + 0.5 * len(points))
    for at, (name, one) in enumerate(points.items()):
        look = {"color": colours.get(says[name], "#555555"), "marker": "o", "markersize": 8, "capsize": 4}
        axes.errorbar(one["value"], -at, xerr=_around(one), linewidth=2, **look)
        axes.annotate(f"{one['value']:.2g}", (one["value"], -at), xytext=(0, 7), textcoords="offset points",
                      ha="center", fontsize=11)  # fmt: skip
    axes.set_yticks([-at for at in range(len(points))], [textwrap.fill(escaped(name), 18) for name in points])
    axes.set_ylim(0.7 - len(points), 0.6)
    axes.tick_params(labelsize=12)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.label.set_fontsize(12)
    return _saved(figure, axes, path, x_label)


def quality_cost(
    points: Mapping[str, tuple[float, dict]], path: Path, order: list[str], *, x_label: str, y_label: str
) -> Path:
    """Draw figures with their intervals against the cost of a request.

    Args:
        points: {name: (cost, {"value", "low", "high"})}.
        path: The PNG file.
        order: Names of all contenders.
        x_label: Label of the costs.
        y_label: Label of the figures.

    Returns:
        The path.
    """
    figure, axes = new_axes(*SIZE)
    for name, (x, y) in points.items():
        look = _look(order.index(name)) | {"capsize": 3, "linestyle": "none"}
        axes.errorbar(x, y["value"], yerr=_around(y), label=escaped(name), **look)
    costs = [x for x, _ in points.values()]
    if min(costs) > 0 and max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    return _saved(figure, axes, path, x_label, y_label)


def forgetting_gain(
    points: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    order: list[str],
    *,
    x_label: str,
    y_label: str,
    ways: Mapping[str, Sequence[tuple[int, float, float]]] | None = None,
) -> Path:
    """Draw the loss on general text against the gain on the task.

    Each seed is a small mark, and the mean over seeds is a large one.

    Args:
        points: {name: [(gain, loss) of each seed]}.
        path: The PNG file.
        order: Names of all contenders.
        x_label: Label of the gains.
        y_label: Label of the losses.
        ways: {name: [(step, gain, loss) of each checkpoint of a run]}, joined by a line that starts at (0, 0).

    Returns:
        The path.
    """
    figure, axes = new_axes(*SIZE)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(0, color="#888888", linewidth=1)
    for name, each in points.items():
        each, look = np.array(each), _look(order.index(name))
        axes.plot(*each.T, look["marker"], color=look["color"], alpha=0.4, markersize=5)
        axes.plot(*each.mean(0), look["marker"], color=look["color"], markersize=10, label=escaped(name))
    for name, way in (ways or {}).items():
        if way:
            look = _look(order.index(name))
            xs, ys = zip((0, 0), *((x, y) for _, x, y in way))
            axes.plot(xs, ys, ".-", color=look["color"], linewidth=1)
            for step, x, y in way:
                beside = {"textcoords": "offset points", "xytext": (4, -9), "fontsize": 7, "color": look["color"]}
                axes.annotate(f"{step:,}", (x, y), **beside)
    return _saved(figure, axes, path, x_label, y_label)


def losses(histories: Mapping[str, Sequence[list[dict]]], path: Path, order: list[str]) -> Path:
    """Draw the validation loss of every run as a line.

    The training loss is faint. If a run has no validation loss, its training loss is drawn as its line.

    Args:
        histories: {name: [rows of metrics.jsonl of each seed]}.
        path: The PNG file.
        order: Names of all contenders.

    Returns:
        The path.
    """
    figure, axes = new_axes(*SIZE)
    for name, runs in histories.items():
        mine = _look(order.index(name))
        for seed, history in enumerate(runs):
            val, train = (series(history, key) for key in ("val_loss", "loss"))
            label = escaped(name) if not seed else None
            faint = {"alpha": 0.7, "label": label, **mine, "markersize": 3}
            if len(val[0]):
                axes.plot(*val, linewidth=2, label=label, **mine)
                faint = {"alpha": 0.25, "color": mine["color"]}
            if len(train[0]):
                axes.plot(*train, linewidth=1, **faint)
    return _saved(figure, axes, path, "optimizer step", "loss (nats a trained token)")


def curves(drawn: Mapping[str, dict], path: Path, order: list[str], *, x_label: str, y_label: str) -> Path:
    """Draw learning curves.

    Runs are dots and their means are marks. The law is a line with its interval, dashed beyond the runs. Without a law,
    a line joins the means, with one standard deviation on either side. A hollow mark with an error bar is the
    prediction of the law of smaller amounts.

    Args:
        drawn: {name: dict of ftjax.verdict.curve.report or curve.drawn}.
        path: The PNG file.
        order: Names of all curves.
        x_label: Label of the amounts.
        y_label: Label of the figures.

    Returns:
        The path.
    """
    figure, axes = new_axes(*SIZE)
    for name, one in drawn.items():
        look, points, law = _look(order.index(name)), one["points"], one["law"]
        for point in points:
            axes.plot([point["amount"]] * len(point["values"]), point["values"], ".", color=look["color"], alpha=0.4)
        x, y = [p["amount"] for p in points], [np.mean(p["values"]) for p in points]
        axes.plot(x, y, linestyle="none", label=escaped(name), **look)
        if law:
            at, value, low, high = (np.array([p[k] for p in law]) for k in ("amount", "value", "low", "high"))
            for part, dash in ((at <= x[-1] * 1.0001, "-"), (at >= x[-1] * 0.93, "--")):
                axes.plot(at[part], value[part], dash, color=look["color"], linewidth=1.5)
            axes.fill_between(at, low, high, color=look["color"], alpha=0.13, linewidth=0)
        else:
            spread = [np.std(p["values"], ddof=1) if len(p["values"]) > 1 else 0.0 for p in points]
            axes.plot(x, y, color=look["color"], linewidth=1.5)
            axes.fill_between(
                x, np.subtract(y, spread), np.add(y, spread), color=look["color"], alpha=0.13, linewidth=0
            )
        if check := one["check"]:
            hollow = look | {"markerfacecolor": "none", "capsize": 4}
            axes.errorbar(1.06 * check["amount"], check["value"], yerr=_around(check), **hollow)
    every = [n for one in drawn.values() for n in [p["amount"] for p in one["points"] + one["law"]]]
    if 0 < 20 * min(every) <= max(every):
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    return _saved(figure, axes, path, x_label, y_label)


def _look(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "markersize": 6}


def _around(one: dict) -> list[list[float]]:
    """The interval of {"value", "low", "high"} as matplotlib's error bars take it: what is below, and what is above."""
    return [[max(one["value"] - one["low"], 0)], [max(one["high"] - one["value"], 0)]]


def _saved(figure, axes, path: Path, x_label: str, y_label: str = "") -> Path:
    axes.set(xlabel=x_label, ylabel=y_label)
    plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=9
        )
    return saved(figure, path)
