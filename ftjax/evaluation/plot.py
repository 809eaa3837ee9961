"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def plot_losses(history: list[dict], path: str | Path) -> Path:
    """Draw rows of metrics.jsonl, {"step", "loss"} and {"step", "val_loss"} among them, into a PNG; returns its path.

    The training loss faint as logged and bold as a running mean over about a twentieth of the run; the validation loss
    with its lowest point named. A loss that is not finite is left out of the line, which then has a gap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, val = _series(history, "loss"), _series(history, "val_loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = train
    if len(steps):
        smooth = _running_mean(losses, max(1, len(losses) // 20))
        axes.plot(steps, losses, color="#4477aa", alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color="#4477aa", linewidth=2, label="training")
    steps, losses = val
    if len(steps):
        axes.plot(steps, losses, "o-", color="#cc6633", linewidth=1.5, markersize=4, label="validation")
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        label = f"best validation: {losses[best]:.4f} at step {steps[best]:,}"
        axes.plot(steps[best], losses[best], "*", color="#aa3311", markersize=14, label=label, zorder=3)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a trained token)", title="Loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(train[0]) or len(val[0]):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _series(history, name) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["step"], row[name]) for row in history if name in row]
    values = np.array([np.nan if v is None else v for _, v in rows], float)
    return np.array([s for s, _ in rows], int), np.where(np.isfinite(values), values, np.nan)


def _running_mean(x: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` values around each, fewer at the ends; NaN do not count."""
    there, place = np.isfinite(x), np.arange(len(x))
    sums, counts = (np.concatenate([[0.0], np.cumsum(a)]) for a in (np.where(there, x, 0.0), there))
    first, end = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(x))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])
