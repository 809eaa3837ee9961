"""Pictures of a comparison, as PNG files. order: all contenders, so that each looks alike in every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ftjax.evaluation.pictures import new_axes, plain, saved

COLOURS = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#66ccee", "#888833", "#bb5566", "#555555")
MARKS = "osD^vPX*"


def quality_cost(
    points: Mapping[str, tuple[float, dict]], path: Path, order: list[str], *, x_label: str, y_label: str
) -> Path:
    """Figures with their intervals against what a request costs. points: name -> (cost, {"value", "low", "high"})."""
    figure, axes = new_axes(7.5, 4.5)
    for name, (x, y) in points.items():
        around = [[max(y["value"] - y["low"], 0)], [max(y["high"] - y["value"], 0)]]
        axes.errorbar(
            x, y["value"], yerr=around, label=_plain(name), **_look(order.index(name)), capsize=3, linestyle="none"
        )
    costs = [x for x, _ in points.values()]
    if min(costs) > 0 and max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    return _saved(figure, axes, path)


def forgetting_gain(
    points: Mapping[str, Sequence[tuple[float, float]]], path: Path, order: list[str], *, x_label: str, y_label: str
) -> Path:
    """What was lost against what was won, a point each seed, a large one their mean. points: name -> (gain, loss)s."""
    figure, axes = new_axes(7.5, 4.5)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(0, color="#888888", linewidth=1)
    for name, each in points.items():
        each, look = np.array(each), _look(order.index(name))
        axes.plot(*each.T, look["marker"], color=look["color"], alpha=0.4, markersize=5)
        axes.plot(*each.mean(0), look["marker"], color=look["color"], markersize=10, label=_plain(name))
    axes.set(xlabel=x_label, ylabel=y_label)
    return _saved(figure, axes, path)


def losses(histories: Mapping[str, Sequence[list[dict]]], path: Path, order: list[str]) -> Path:
    """Validation loss of every run as a line, training loss faint. histories: name -> rows of metrics.jsonl a seed."""
    figure, axes = new_axes(7.5, 4.5)
    for name, runs in histories.items():
        mine = _look(order.index(name))
        for seed, history in enumerate(runs):
            for key, width, strength in (("loss", 1, 0.25), ("val_loss", 2, 1)):
                rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
                label = _plain(name) if key == "val_loss" and not seed else None
                look = mine if key == "val_loss" else {"color": mine["color"]}
                axes.plot(*zip(*rows), alpha=strength, linewidth=width, label=label, **look) if rows else None
    axes.set(xlabel="optimizer step", ylabel="loss (nats a trained token)")
    return _saved(figure, axes, path)


def _look(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "markersize": 6}


def _plain(name: str) -> str:
    """No mathematics in `$`."""
    return name.replace("$", r"\$")


def _saved(figure, axes, path: Path) -> Path:
    plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return saved(figure, path)
