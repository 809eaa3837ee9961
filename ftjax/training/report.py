"""What a run says while it runs: metrics.jsonl, TensorBoard, Weights & Biases, and the live line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ftjax.errors import FtjaxError
from ftjax.files import replace_text

METRICS = "metrics.jsonl"


class Metrics:
    """Writes one row of scalars a call to every sink. After a resume, rows past the restored step are taken back."""

    def __init__(self, run_dir: Path, config, start_step: int):
        self.path = run_dir / METRICS
        kept = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", buffering=1)
        self.sinks = []
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
            self.sinks.append((lambda name, value, step: writer.add_scalar(name, value, step), writer.close))
        if config.log.wandb:
            try:
                import wandb
            except ImportError:
                raise FtjaxError("log.wandb: Weights & Biases is not installed; pip install wandb") from None
            run = wandb.init(project=config.log.wandb, dir=str(run_dir), name=run_dir.name, config=config.to_dict())
            self.sinks.append((lambda name, value, step: run.log({name: value}, step=step), run.finish))

    def write(self, step: int, values: dict) -> None:
        """values: name -> number."""
        self.file.write(json.dumps({"step": step} | values) + "\n")
        for write, _ in self.sinks:
            for name, value in values.items():
                write(name, value, step)

    def close(self) -> None:
        """Flush every sink."""
        self.file.close()
        for _, close in self.sinks:
            close()


def read_metrics(run_dir: str | Path) -> list[dict]:
    """Rows of a run's metrics.jsonl, in order; a last line that a kill cut short is left out."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line end is empty, or was cut short


class Progress:
    """The live line: rewritten in place on a terminal, one line at each validation elsewhere."""

    def __init__(self, steps: int, start_step: int, flops_per_token: float, peak: float | None, stream=None):
        self.steps, self.flops, self.peak = steps, flops_per_token, peak
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.begin, self.first = None, start_step
        self.tokens = 0
        self.val_loss = None

    def count(self, tokens: int) -> None:
        """One more step of so many real tokens was started; the clock starts behind the first, which compiles."""
        if self.begin is None:
            self.begin, self.first = time.perf_counter(), self.first + 1
        else:
            self.tokens += tokens

    def rates(self, step: int) -> dict:
        """{"tokens_per_second", "mfu" where the peak is known, "seconds_left"}."""
        seconds = time.perf_counter() - (self.begin or time.perf_counter())
        if seconds <= 0 or self.tokens == 0:
            return {}
        speed = self.tokens / seconds
        out = {"tokens_per_second": speed, "seconds_left": seconds / max(step - self.first, 1) * (self.steps - step)}
        return out | ({"mfu": speed * self.flops / self.peak} if self.peak else {})

    def show(self, step: int, values: dict, final: bool = False) -> None:
        """values: loss, lr, grad_norm and maybe val_loss."""
        validated = "val_loss" in values
        self.val_loss = values.get("val_loss", self.val_loss)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        if "loss" in values:
            parts += [f"loss {values['loss']:.4f}"]
        if self.val_loss is not None:
            parts += [f"val {self.val_loss:.4f}"]
        if "loss" in values:
            parts += [f"lr {values['lr']:.2e}", f"grad {values['grad_norm']:.2f}"]
        rates = self.rates(step)
        if rates:
            parts += [f"{rates['tokens_per_second']:,.0f} tokens/s"]
            parts += [f"MFU {rates['mfu']:.1%}"] if "mfu" in rates else []
            parts += [f"{_clock(rates['seconds_left'])} left"]
        line = "  ".join(parts)
        if self.live:
            self.stream.write(f"\r\033[K{line}" + ("\n" if validated or final else ""))
        elif validated or final:
            self.stream.write(line + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
