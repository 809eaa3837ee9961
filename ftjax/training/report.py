"""The report of a run while it trains: metrics.jsonl, TensorBoard, Weights & Biases, and the live line."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ftjax import seals
from ftjax.errors import FtjaxError
from ftjax.files import as_json, replace_text
from ftjax.foreign import listed, mapped, maybe, number, parse_json, read_text, string, whole
from ftjax.progress import clock, columns, doing

METRICS_FILE = "metrics.jsonl"
ROW = mapped(maybe(number()), step=whole(), rows=listed(string), load=maybe(listed(number())))  # a line of it


class Metrics:
    """Writes rows of numbers to every sink. After a resume, rows after the restored step are removed."""

    def __init__(self, run_dir: Path, config, start_step: int, known: str = "", say=print):
        """known: what `digest` was at start_step, empty where that is not known; say: called with a line for a person
        where the rows up to there are others."""
        self.path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        replace_text(self.path, "".join(as_json(row) + "\n" for row in kept))
        if known and self.digest() != known:
            say(f"warning: {self.path}: the rows up to step {start_step:,} are not those that the run wrote")
        self.sinks = []
        if config.log.tensorboard:
            writer = _tensorboard().SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
            self.sinks.append((lambda name, value, step: writer.add_scalar(name, value, step), writer.close))
        if config.log.wandb:
            try:
                import wandb
            except ImportError:
                raise FtjaxError("log.wandb: Weights & Biases is not installed; pip install wandb") from None
            run = wandb.init(project=config.log.wandb, dir=str(run_dir), name=run_dir.name, config=config.to_dict())
            self.sinks.append((lambda name, value, step: run.log({name: value}, step=step), run.finish))

    def digest(self) -> str:
        """Of the rows so far."""
        return seals.digest(self.path.read_bytes())

    def write(self, step: int, values: dict) -> None:
        """Write one row. values: {name: number, or None if it is undefined}. Lists go to the file alone: "rows", names
        of rows of data, and "load", shares of experts."""
        with self.path.open("a") as file:
            file.write(as_json({"step": step} | values) + "\n")
        for write, _ in self.sinks:
            for name, value in values.items():
                if value is not None and not isinstance(value, list):
                    write(name, value, step)

    def close(self) -> None:
        """Flush every sink."""
        for _, close in self.sinks:
            close()


def _tensorboard():
    """tensorboardX, without torch: it imports torch wherever that is installed, which takes a second and 250 MB."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import tensorboardX
    finally:
        if absent:
            del sys.modules["torch"]
    return tensorboardX


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, in order. An incomplete last line, left by a kill, is ignored."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = read_text(path).split("\n")
    rows = []
    for i, line in enumerate(lines[:-1], 1):  # what follows the last line end is empty, or was cut short
        row = parse_json(line, f"{path} line {i}; mend the line, or delete it")
        if expected := ROW(row) or ("an object with a step" if "step" not in row else ""):
            raise FtjaxError(f"{path} line {i}: expected {expected}; found {line[:100]!r}. Mend the line, or delete it")
        rows.append(row)
    return rows


class Progress:
    """The line that shows how far a run is: rewritten in place on a terminal, one line for each logged step
    elsewhere."""

    def __init__(self, steps: int, start_step: int, flops_per_token: float, peak: float | None, stream=None):
        self.steps, self.flops, self.peak = steps, flops_per_token, peak
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.begin, self.first = None, start_step
        self.tokens, self.apart = 0, 0.0
        self.validated, self.open = "", False

    def count(self, tokens: int) -> None:
        """Count a step that was started, with its number of real tokens. The clock starts after the first step, which
        compiles."""
        if self.begin is None:
            self.begin, self.first = time.perf_counter(), self.first + 1
        else:
            self.tokens += tokens

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Time spent in this block is not counted for the speed of training. what: names the work, such as
        "validating"."""
        begin, counted = time.perf_counter(), self.begin is not None
        with doing(what):
            yield
        if counted:
            self.apart += time.perf_counter() - begin

    def rates(self, step: int) -> dict:
        """{"tokens_per_second" of training alone, "mfu" if the peak is known, "seconds_left" of the whole run}."""
        seconds = time.perf_counter() - (self.begin or time.perf_counter())
        if seconds - self.apart <= 0 or self.tokens == 0:
            return {}
        speed = self.tokens / (seconds - self.apart)
        out = {"tokens_per_second": speed, "seconds_left": seconds / max(step - self.first, 1) * (self.steps - step)}
        return out | ({"mfu": speed * self.flops / self.peak} if self.peak else {})

    def show(self, step: int, values: dict) -> None:
        """Show the loss, lr and grad_norm of a step, or the results of a validation, whose names begin with `val_`."""
        found = [f"{name.removeprefix('val_')} {_figure(x)}" for name, x in values.items() if name.startswith("val_")]
        if found:
            self.validated = f"val {'  '.join(found[:2]).removeprefix('loss ')}"
        # What is first in `spared` is left out first where the terminal is too narrow.
        spared = ["mfu", "tokens_per_second", "grad_norm", "lr", "val"]
        parts = {"step": f"step {step:>{len(str(self.steps))}}/{self.steps}"}
        if "loss" in values:
            parts["loss"] = f"loss {_figure(values['loss'])}"
        if found or self.live and self.validated:  # a line in a file only has figures of its own step
            parts["val"] = self.validated
        if "loss" in values:
            parts |= {"lr": f"lr {values['lr']:.2e}", "grad_norm": f"grad {values['grad_norm']:.2f}"}
        if "epsilon" in values:
            parts["epsilon"] = f"epsilon {values['epsilon']:.3f}"
        rates = self.rates(step)
        if rates:
            parts["tokens_per_second"] = f"{rates['tokens_per_second']:,.0f} tokens/s"
            parts |= {"mfu": f"MFU {rates['mfu']:.1%}"} if "mfu" in rates else {}
            parts["left"] = f"{clock(rates['seconds_left'])} left"
        if self.live:
            room = columns(self.stream)
            while len("  ".join(parts.values())) > room and spared:
                parts.pop(spared.pop(0), None)
            self.stream.write(f"\r\033[K{'  '.join(parts.values())[:room]}" + ("\n" if found else ""))
            self.open = not found
        else:
            self.stream.write("  ".join(parts.values()) + "\n")
        self.stream.flush()

    def end(self) -> None:
        """End the live line, so that the next output begins on a line of its own."""
        if self.open:
            self.stream.write("\n")
            self.stream.flush()
            self.open = False


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
