"""Pictures of a report (ftjax.evaluation.labelled) and of few-shot runs, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ftjax.errors import FtjaxError

BLUE, RED, GREY = "#4477aa", "#aa3311", "#888888"
COLOURS = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#66ccee", "#888833")
NUMBERED = 25  # classes up to which every cell tells its count
NAMED = 60  # classes up to which every one is named
LONGEST = 24  # characters of a class's name on an axis


def confusion_picture(report: dict, path: str | Path) -> Path:
    """Draw the confusion matrix of a `single_label` report; returns the path.

    A cell's colour is its share of the rows with that label, on a scale that parts small shares; its number is the
    count. Above 25 classes the counts are left out, and above 60 only every second, third, ... class is named.
    """
    from matplotlib.colors import PowerNorm

    names, counts = report["confusion"]["names"], np.array(report["confusion"]["counts"])
    C, labelled = len(names), counts.sum(1, keepdims=True)
    share = np.divide(counts, labelled, out=np.zeros(counts.shape), where=labelled > 0)
    size = float(np.clip(2.5 + 0.42 * C, 5, 13))
    figure, axes = new_axes(size + 1, size)
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    if C <= NUMBERED:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if share[i, j] > 0.3 else "black"
            size = 9 if counts.max() < 10_000 or C < 12 else 7
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=size)
    places = np.arange(0, C, -(-C // NAMED))
    shown = [_shortened(names[i]) for i in places]
    small = 10 if C <= 12 else 8 if C <= 30 else 6
    flat = C <= 6 and max(map(len, shown)) <= 12
    axes.set_xticks(places, shown, fontsize=small, rotation=0 if flat else 90)
    axes.set_yticks(places, shown, fontsize=small)
    accuracy = report["metrics"]["accuracy"]["value"]
    axes.set(xlabel="predicted", ylabel="label", title=f"Accuracy {accuracy:.4f} of {counts.sum():,} rows")
    axes.tick_params(length=0 if C <= NAMED else 2)
    figure.colorbar(image, ax=axes, label="share of the rows with that label", shrink=0.8)
    return saved(figure, path)


def reliability_picture(report: dict, path: str | Path) -> Path:
    """Draw how often a `single_label` report's predictions are right against how sure they are; returns the path.

    Above, a dot a bin of confidence, as large as its rows, and the diagonal of a calibrated model; below, the rows.
    """
    bins = report["calibration"]
    confidence, right, rows = (np.array([b[k] for b in bins]) for k in ("confidence", "accuracy", "rows"))
    low, width = np.array([b["low"] for b in bins]), bins[0]["high"] - bins[0]["low"]
    figure, (axes, below) = new_axes(5.5, 6.5, 2, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="calibrated")
    axes.vlines(confidence, np.minimum(confidence, right), np.maximum(confidence, right), color=RED, alpha=0.5)
    axes.plot(confidence, right, color=BLUE, linewidth=1)
    sizes = 12 + 110 * rows / rows.max()
    axes.scatter(confidence, right, s=sizes, color=BLUE, zorder=3, label="predictions, by bin of confidence")
    error = report["metrics"]["calibration_error"]
    axes.set(ylabel="share right", xlim=(0, 1), ylim=(-0.02, 1.05))
    known = error["low"] is not None
    within = f" ({error['low']:.3f} to {error['high']:.3f})" if known else ""
    axes.set_title(f"Calibration error {error['value']:.3f}{within}, {report['rows']:,} rows")
    axes.legend(frameon=False)
    below.bar(low, rows, width=width, align="edge", color=BLUE, alpha=0.6)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="rows")
    for each in (axes, below):
        plain(each)
    return saved(figure, path)


def learning_picture(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    path: str | Path,
    *,
    x_label: str = "training rows",
    y_label: str = "accuracy",
) -> Path:
    """Draw figures against rows or steps; returns the path. curves: name -> {x: the figures of all draws at x}.

    The line is the mean over draws, the band one standard deviation (of a sample) to either side, a dot one draw. x is
    logarithmic where it spans a factor of 20. Raises FtjaxError without curves and for a curve without figures.
    """
    if not curves:
        raise FtjaxError("learning curve: expected one curve or more; found none")
    for name, points in curves.items():
        if not points or not all(len(figures) for figures in points.values()):
            raise FtjaxError(f"learning curve {name!r}: expected one figure or more at each x; found {dict(points)}")
    figure, axes = new_axes(7.5, 4.5)
    every = sorted({x for points in curves.values() for x in points})
    for i, (name, points) in enumerate(curves.items()):
        x = sorted(points)
        colour = COLOURS[i % len(COLOURS)]
        mean = np.array([np.mean(points[at]) for at in x])
        spread = np.array([np.std(points[at], ddof=1) if len(points[at]) > 1 else 0.0 for at in x])
        axes.plot(x, mean, "o-", color=colour, linewidth=2, markersize=5, label=name, zorder=3)
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
        for at in x:
            axes.plot([at] * len(points[at]), points[at], ".", color=colour, alpha=0.45, markersize=5)
    if every[0] > 0 and every[-1] >= 20 * every[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(every) <= 12:
        axes.set_xticks(every)
    axes.xaxis.set_major_formatter("{x:,g}")
    draws = {len(figures) for points in curves.values() for figures in points.values()}
    of = f"{min(draws)}" if len(draws) == 1 else f"{min(draws)} to {max(draws)}"
    axes.set(xlabel=x_label, ylabel=y_label)
    if draws != {1}:
        axes.set_title(f"Mean and standard deviation of {of} draws")
    if len(curves) > 1:
        axes.legend(frameon=False)
    plain(axes)
    return saved(figure, path)


def new_axes(width: float, height: float, rows: int = 1, **how):
    """A figure, inches, and its axes; no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, **how)


def plain(axes):
    """A faint grid, and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _shortened(name: str) -> str:
    """As it stands in a file: no mathematics in `$`, and no longer than an axis can bear."""
    name = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"
    return name.replace("$", r"\$")


def saved(figure, path) -> Path:
    """Write the PNG file; returns its path."""
    figure.savefig(path, dpi=150)
    return Path(path)
