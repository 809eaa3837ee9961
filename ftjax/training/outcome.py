"""What a run leaves behind, and what it says before and after training."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ftjax import tasks
from ftjax.evaluation import compare, judge
from ftjax.lm import recipe_of
from ftjax.objectives import hidden
from ftjax.progress import counted, doing
from ftjax.training import export, hosts, selection
from ftjax.training.job import Job
from ftjax.training.program import Program, count, total
from ftjax.training.run_folder import Trained
from ftjax.tuning import METHODS


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """The result of a training run. Losses are in nats per trained token.

    Attributes:
        run_dir: The run folder; `ftjax.load(result.run_dir)` opens the trained model.
        steps: Optimizer steps taken, in all starts of the run.
        resumed_from: Step at which this start resumed the run; 0: it began it.
        stopped_early: Whether training ended because `train.patience` ran out.
        train_loss: The last training loss; NaN if none was logged.
        val_loss: Validation loss at `best_step`; None without validation rows.
        best_step: Step of the checkpoint that `train.select` chose.
        best: Value of `train.select` at `best_step`; None if it was undefined at every validation.
        seconds: Wall-clock time of all starts of the run.
        results: Scores before and after training, or the report on held-out rows; None where nothing was evaluated.
        privacy: {"epsilon", "delta", ...} of the exported parameters; None without private training.
        files: {name: path} of what was written.
        history: The rows of metrics.jsonl in order: dicts with `step`, and `loss`, `accuracy`, `grad_norm` and `lr` of
            a logged training step, or `val_loss` of a validation.
    """

    run_dir: str
    steps: int
    resumed_from: int
    stopped_early: bool
    train_loss: float
    val_loss: float | None
    best_step: int
    best: float | None
    seconds: float
    results: dict[str, Any] | None
    files: dict[str, str]
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    privacy: dict[str, Any] | None = None

    def __repr__(self) -> str:
        val = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f} at step {self.best_step:,}"
        return f"<Result {self.run_dir}: {self.steps:,} steps, training loss {self.train_loss:.4f}{val}>"


def description(job: Job, program: Program) -> str:
    """One line that says what is about to be trained."""
    trained, whole = count(program.trained), total(program)
    sizes = [f"{axis}={n}" for axis, n in job.mesh.shape.items() if n > 1]
    return (
        f"training {trained:,} of {whole:,} parameters ({trained / whole:.2%}), {job.config.tuning.method}, "
        f"{counted(job.steps, 'step')} of {counted(job.rows, 'row')}, {counted(len(job.batches), 'step')} an epoch, "
        f"learning rate {job.config.optim.lr:g}, "
        f"{'mesh ' + ' x '.join(sizes) if sizes else 'one'} {jax.devices()[0].device_kind}"
    )


def exported(
    job: Job, program: Program, trained: dict, frozen: dict, say, guarantee: dict | None, results: dict | None
) -> dict[str, str]:
    """Write the trained model in every format of `export.formats`.

    Args:
        job: The run.
        program: The compiled functions.
        trained: Tree of trained parameters.
        frozen: Tree of frozen parameters.
        say: Called with lines for a person.
        guarantee: "privacy" of privacy.record, or None.
        results: The scores of the model, see `evaluated`.

    Returns:
        {format: folder}.
    """
    config, files = job.config, {}
    own, _ = hidden.divided(trained)
    recipe = recipe_of(config, (results or {}).get("thresholds"))
    lm = dataclasses.replace(job.lm(program.model), recipe=recipe)
    source = Trained(own, frozen, job.spec, lm, config, job.base_record, guarantee)
    for format in dict.fromkeys(job.formats):
        out = Path(config.run_dir) / format
        with doing(f"writing {out}"):
            written = export.write(source, out, format, dtype=config.export.dtype)
        files[format] = written["path"]
        if "note" in written:
            say(f"{format}: {written['note']}")
    return files


def evaluated(job: Job, program: Program, variables: dict, before: dict | None, seconds: Callable, say) -> tuple:
    """Evaluate the trained model on held-out rows, if the config asks for it.

    Args:
        job: The run.
        program: The compiled functions.
        variables: Flax variables of the trained model.
        before: The same measurement before training; None where `evaluate.compare` is off.
        seconds: Returns the time of the run so far.
        say: Called with lines for a person.

    Returns:
        (results, {name: path} of the written files).
    """
    run_dir, config = Path(job.config.run_dir), job.config
    if not job.generates:
        with doing("judging the model on held-out rows"):
            found = judge.finish(run_dir, program.model, variables, job.data, config, job.tokenizer)
        say(found.text)
        return hosts.from_first(lambda: found.results), found.files
    if before is None:
        return None, {}
    with doing("answering with the tuned model"):
        after = compare.measure(job.lm(program.model), variables, job.data, config)
    took = seconds()
    results = hosts.from_first(lambda: compare.write_results(run_dir, before, after, took, job.settings))
    say(compare.table(before, after, took, config.model.quantise))
    say(compare.side_by_side(before, after, config.evaluate.samples))
    return results, {"results": str(run_dir / "results.json"), "samples": str(run_dir / "samples.jsonl")}


def summary(result: Result, config, chat: bool) -> str:
    """The last lines of a run: the losses it reached, the files it wrote, and the commands that may come next.

    Args:
        result: The run's result.
        config: The run's config.
        chat: Whether the rows are conversations.
    """
    val = "" if result.val_loss is None else f", best validation loss {result.val_loss:.4f} at step {result.best_step}"
    if config.train.select != selection.LOSS and result.best is not None:
        val = f", best {config.train.select} {result.best:.4f} at step {result.best_step}"
        val += f", where the validation loss is {result.val_loss:.4f}"
    whole = "full" if config.tuning.method == "full" else "merged" if METHODS[config.tuning.method].merge else "adapter"
    lines = [f"{counted(result.steps, 'step')} in {result.seconds:.0f} s, training loss {result.train_loss:.4f}{val}"]
    if kept := result.privacy:
        lines.append(
            f"epsilon {kept['epsilon']:.3f} at delta {kept['delta']:g}, by the {kept['accountant']} accountant"
        )
    lines += [f"  {name:<12} {path}" for name, path in result.files.items()]
    run = shlex.quote(str(result.run_dir))
    task = tasks.find(config.task.kind)
    lines += ["next:"]
    if task.head == "causal":
        lines += [f"  ftjax generate --model {run}{' --chat' * chat} --prompt '...'"]
    elif task.judged:
        lines += [f"  ftjax predict --model {run} --data FILE"]
    lines += [f"  ftjax evaluate --model {run} --data FILE", f"  ftjax export --run {run} --out DIR --format {whole}"]
    return "\n".join(lines)
