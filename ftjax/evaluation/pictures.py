"""Pictures of a report of ftjax.evaluation.labelled and of a run's losses, as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ftjax.files import replacing

BLUE, RED, GREY = "#4477aa", "#aa3311", "#888888"
NUMBERED = 25  # classes up to which every cell shows its count
NAMED = 60  # classes up to which every class is named
LONGEST = 24  # most characters of a class's name on an axis


def confusion_picture(report: dict, path: str | Path) -> Path:
    """Draw the confusion matrix of a `single_label` report. Returns the path.

    The colour of a cell is its share of the rows with that label, on a scale that separates small shares. Its number is
    the count. Above 25 classes the counts are left out, and above 60 only every second, third, ... class is named.
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
    """Draw a `single_label` report's accuracy against its confidence. Returns the path.

    The upper part has a dot for each bin of confidence, whose size shows the number of rows, and the diagonal of a
    calibrated model. The lower part shows the number of rows.
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
    axes.legend(frameon=False, loc="upper left")
    below.bar(low, rows, width=width, align="edge", color=BLUE, alpha=0.6)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="rows")
    for each in (axes, below):
        plain(each)
    return saved(figure, path)


def plot_losses(history: list[dict], path: str | Path) -> Path:
    """Draw the losses in rows of metrics.jsonl, {"step", "loss"} and {"step", "val_loss"}, and `val_loss/NAME` of the
    sources of a mixture, into a PNG file. Returns its path.

    The training loss is faint as logged, and bold as a running mean over about a twentieth of the run. The lowest
    validation loss is marked. A loss that is not finite leaves a gap in its line.
    """
    figure, axes = new_axes(8, 4.5)
    steps, losses = series(history, "loss")
    if len(steps):
        smooth = _running_mean(losses, max(1, len(losses) // 20))
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color=BLUE, linewidth=2, label="training")
    steps, losses = series(history, "val_loss")
    if len(steps):
        axes.plot(steps, losses, "o-", color="#cc6633", linewidth=1.5, markersize=4, label="validation")
    for name in dict.fromkeys(key for row in history for key in row if key.startswith("val_loss/")):
        axes.plot(*series(history, name), ".--", linewidth=1, label=f"validation of {_shortened(name[9:])}")
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        label = f"best validation: {losses[best]:.4f} at step {steps[best]:,}"
        axes.plot(steps[best], losses[best], "*", color=RED, markersize=14, label=label, zorder=3)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a trained token)", title="Loss")
    if axes.get_legend_handles_labels()[0]:
        # A fixed place: matplotlib warns where it searches for the best one for more than a second.
        axes.legend(frameon=False, loc="upper right")
    plain(axes)
    return saved(figure, path)


def series(history: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a figure in rows of metrics.jsonl. A value that is not finite is NaN, a gap in its line."""
    rows = [(row["step"], row[name]) for row in history if name in row]
    values = np.array([np.nan if v is None else v for _, v in rows], float)
    return np.array([s for s, _ in rows], int), np.where(np.isfinite(values), values, np.nan)


def _running_mean(x: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` values around each value, over fewer at the ends, without NaN."""
    there, around = np.isfinite(x), np.ones(2 * (width // 2) + 1)
    sums, counts = (np.convolve(a, around, "same") for a in (np.where(there, x, 0.0), there))
    return np.divide(sums, counts, out=np.full(len(x), np.nan), where=counts > 0)


def new_axes(width: float, height: float, rows: int = 1, **how):
    """A figure of the given size in inches, and its axes. It opens no window and changes no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, **how)


def plain(axes):
    """Draw a faint grid, and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def escaped(name: str) -> str:
    """The name with `$` escaped, so that matplotlib does not read it as mathematics."""
    return name.replace("$", r"\$")


def _shortened(name: str) -> str:
    """A class's name for an axis."""
    return escaped(name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}")


def saved(figure, path) -> Path:
    """Write the PNG file whole, so that a full disk leaves the old one. Returns its path."""
    path = Path(path)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=150, format="png")
    return path
