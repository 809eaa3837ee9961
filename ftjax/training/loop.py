"""A training run, from config to files, in the order in which things happen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from ftjax import config as configs
from ftjax.data.batches import ahead, loader
from ftjax.data.preview import show
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge
from ftjax.evaluation.plot import plot_losses
from ftjax.files import write_jsonl
from ftjax.models.quantised import is_quantised
from ftjax.objectives import TASKS
from ftjax.training import export, features, hosts, sharding
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.compiling import trim_after_compiling, use_compilation_cache
from ftjax.training.flops import PEAKS, flops_per_token
from ftjax.training.job import Job, prepared
from ftjax.training.profile import Profiler
from ftjax.training.program import Program, build, placed
from ftjax.training.report import Metrics, Progress, read_metrics
from ftjax.training.run_folder import RUN, Trained, base_name, claim, keep_tokenizer, locked
from ftjax.training.start import first_state, untuned, validate
from ftjax.tuning import METHODS

PLACED = 2  # batches on the devices beside the one in use


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to. Losses are in nats a trained token.

    steps: taken in all; resumed_from: 0 for a new run; stopped_early: patience ran out; best_step, val_loss: the lowest
    validation loss (None without validation rows); seconds: of all starts that worked on the run, as far as they were
    kept; results: before and after, where `evaluate.compare` is on; files: name -> path of what was written.
    """

    run_dir: str
    steps: int
    resumed_from: int
    stopped_early: bool
    train_loss: float
    val_loss: float | None
    best_step: int
    seconds: float
    results: dict | None
    files: dict[str, str]


@hosts.together
def train(config, say=print) -> Result:
    """Run `config` (see ftjax.config.default), or go on with the run that `config.run_dir` holds.

    say: called with lines for a person. Raises FtjaxError for anything in the config or the data that cannot be used.
    """
    configs.validate(config)
    started = time.perf_counter()
    first = hosts.start()  # of several processes, one speaks and writes for all
    say = say if first else (lambda text: None)
    trim_after_compiling()
    if config.log.compilation_cache:
        use_compilation_cache()

    job = prepared(config, say)
    config, data, mesh, rows, steps = job.config, job.data, job.mesh, job.rows, job.steps
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as opened:
        if first:
            opened.enter_context(locked(run_dir))
        going_on = hosts.from_first(lambda: claim(config, job.base, data.fingerprint))
        hosts.check_shared(run_dir / RUN)
        if first and job.tokenizer_folder:
            keep_tokenizer(run_dir, job.tokenizer_folder)
        say(show(data, job.words, packing=config.data.packing))
        if data.gone and first:
            write_jsonl(run_dir / "removed.jsonl", data.removed())

        opened.enter_context(jax.set_mesh(mesh))
        program = build(config, job.spec, mesh, job.dtype, steps)
        state, frozen = first_state(job, program, say)
        before = untuned(job, program, state.trained, frozen, say)

        # ---- the state to go on from -------------------------------------------------------------------------------
        # Closed on every way out: an error or Ctrl-C leaves whole files too.
        checkpoints = opened.enter_context(contextlib.closing(Checkpoints(run_dir, config.train.keep)))
        resumed_from, best, stale, spent = checkpoints.latest() or 0, None, 0, 0.0
        if resumed_from:
            abstract = placed(state, program.state_places)
            del state  # before the one of the checkpoint comes in: they are of one size
            state = checkpoints.state(resumed_from, abstract)
            record = checkpoints.record(resumed_from)
            best, stale, spent = record["best"], record["stale"], record["seconds"]
            say(f"{run_dir}: going on after step {resumed_from} of {steps}")
        elif going_on:
            say(f"{run_dir}: the run was stopped before its first checkpoint; starting at step 0")

        # ---- batches on their way to the devices -------------------------------------------------------------------
        say(description(job, program))
        batches, validation = job.batches, job.validation
        flops = flops_per_token(job.spec.model, program.base, program.trained, program.frozen, job.longest)
        if features.usable(config, program.trained, steps, len(batches)):
            keep = functools.partial(
                features.Features, model=program.model, variables=program.variables(state.trained, frozen), mesh=mesh,
                folder=run_dir,
            )  # fmt: skip
            batches, flops = keep(batches), features.flops_per_token(program.trained)
            validation = {name: keep(held_out) for name, held_out in validation.items()}
        local = sharding.local_rows(mesh, rows)
        shares = rows / (local.stop - local.start)  # of a batch, of which this process has one
        feed = loader(batches, resumed_from, steps - resumed_from, config.data.workers, local)
        place = functools.partial(sharding.place_batch, mesh=mesh, rows=rows, local=local)
        # The next batches are on their way to the devices while a step runs.
        feed = ahead(((place(b), int(shares * np.count_nonzero(b["segment_ids"]))) for b in feed), PLACED)

        # ---- training ----------------------------------------------------------------------------------------------
        peak = PEAKS.get(jax.devices()[0].device_kind)
        progress = Progress(steps, resumed_from, flops, peak * mesh.size if peak else None)
        metrics = opened.enter_context(contextlib.closing(Metrics(run_dir, config, resumed_from))) if first else None
        opened.push(hosts.end_together)  # before what is open is closed, which waits for all processes
        profiled = config.log.profile if first else ""
        take_step = Profiler(program.step, profiled, run_dir, resumed_from, steps, say)
        opened.callback(take_step.close)
        stop = config.train.patience > 0 and stale >= config.train.patience
        step, loss, late = resumed_from, float("nan"), None

        def seconds() -> float:
            return spent + time.perf_counter() - started

        def note(step, values):
            if first:
                metrics.write(step, values)
                progress.show(step, values)

        def tell(step, report):
            """Read a step's numbers, which the device has finished by now, and refuse to go on without a loss."""
            nonlocal loss
            values = {name: float(report[name]) for name in ("loss", "accuracy", "grad_norm")}
            loss = values["loss"]
            if not math.isfinite(loss):
                raise FtjaxError(
                    f"the loss became {loss} between step {step - config.train.log_every + 1} and step {step}. A lower "
                    "optim.lr or a longer optim.warmup helps most often; the checkpoints before are whole"
                )
            note(step, values | {"lr": float(program.rate(step - 1))} | progress.rates(step))

        while step < steps and not stop:
            arrays, tokens = next(feed)
            state, report = take_step(state, frozen, arrays)
            step += 1
            progress.count(tokens)
            # Numbers are read when the next step is already running, so that the device never waits for the host.
            if late:
                tell(*late)
            validated = validation and (step % job.eval_every == 0 or step == steps)
            preempted = hosts.preempted(step)
            saved = step % job.save_every == 0 or step == steps or preempted
            late = (step, report) if step % config.train.log_every == 0 or validated or saved else None
            if validated or saved:  # never validate or keep a state before its loss is known to be a number
                tell(*late)
                late = None
            val_loss = None
            if validated:
                losses = validate(job, program, program.variables(state.averaged, frozen), validation)
                val_loss = losses["val_loss"]
                better = best is None or val_loss < best
                best, stale = (val_loss, 0) if better else (best, stale + 1)
                saved = saved or better
                note(step, losses)
                stop = config.train.patience > 0 and stale >= config.train.patience
            if saved or stop:
                record = {"config": config.to_dict(), "step": step, "best": best, "stale": stale, "seconds": seconds()}
                checkpoints.save(state, record, val_loss)
            if preempted and step < steps:
                checkpoints.manager.wait_until_finished()
                raise KeyboardInterrupt  # the same command goes on from here
        stopped_early = step < steps
        if stopped_early:
            say(f"stopped at step {step}: {stale} validations without a better loss (train.patience)")
        checkpoints.manager.wait_until_finished()

        # ---- what came of it ---------------------------------------------------------------------------------------
        best_step = checkpoints.best() or step
        kept = best_step if config.export.checkpoint == "best" else step
        trained = state.averaged
        if kept != step:
            abstract = placed(jax.eval_shape(lambda x: x, trained), program.trained_places)
            trained = checkpoints.trained(kept, abstract, ema=config.train.ema > 0)
        files = {"metrics": str(run_dir / "metrics.jsonl"), "checkpoints": str(run_dir / "checkpoints")}
        files |= take_step.finish(state)
        del state
        files |= exported(job, program, trained, frozen, say)
        results, told = judged(job, program, program.variables(trained, frozen), before, seconds, say)

    files |= told
    if data.gone:
        files["left out"] = str(run_dir / "removed.jsonl")
    history = read_metrics(run_dir)
    files["loss curve"] = hosts.from_first(lambda: str(plot_losses(history, run_dir / "loss.png")))
    result = Result(
        run_dir=str(run_dir), steps=step, resumed_from=resumed_from, stopped_early=stopped_early,
        train_loss=next((row["loss"] for row in reversed(history) if "loss" in row), loss), val_loss=best,
        best_step=best_step, seconds=seconds(), results=results, files=files,
    )  # fmt: skip
    chat = job.generates and job.data.train.rendered(0).messages is not None
    say(summary(result, config, chat))
    return result


def description(job: Job, program: Program) -> str:
    """What is about to be trained, in a line."""
    trained, total = _count(program.trained), _count(program.base)
    share = trained / _count((program.trained, program.frozen))
    sizes = [f"{axis}={n}" for axis, n in job.mesh.shape.items() if n > 1]
    return (
        f"training {trained:,} of {total:,} parameters ({share:.2%}), {job.config.tuning.method}, {job.steps:,} steps "
        f"of {job.rows} rows, {len(job.batches):,} steps an epoch, learning rate {job.config.optim.lr:g}, "
        f"{'mesh ' + ' x '.join(sizes) if sizes else 'one'} {jax.devices()[0].device_kind}"
    )


def exported(job: Job, program: Program, trained: dict, frozen: dict, say) -> dict[str, str]:
    """Write the result in every format that is asked for; format -> folder."""
    config, files = job.config, {}
    source = Trained(
        config.tuning.method, trained, frozen, job.spec, job.lm(program.model), base_name(config, job.folder),
        config.to_dict(), job.base,
    )  # fmt: skip
    for format in dict.fromkeys(job.formats):
        out = Path(config.run_dir) / format
        written = export.write(source, out, format, dtype=config.export.dtype, shard_size=config.export.shard_size)
        files[format] = written["path"]
        if "merge_difference" in written:
            say(f"merged model: its logits differ from the adapted one's by at most {written['merge_difference']:.1e}")
    return files


def judged(job: Job, program: Program, variables: dict, before: dict | None, seconds: Callable, say) -> tuple:
    """(results, files by name) of the model on held-out rows, where it is to be judged; seconds() of the whole run."""
    run_dir, config = Path(job.config.run_dir), job.config
    if not job.generates:
        found = judge.finish(run_dir, program.model, variables, job.data, config, job.words)
        say(found.text)
        return hosts.from_first(lambda: found.results), found.files
    if not config.evaluate.compare:
        return None, {}
    after = compare.measure(job.lm(program.model), variables, job.data, config)
    took = seconds()
    results = hosts.from_first(lambda: compare.write_results(run_dir, before, after, took, job.settings))
    say(compare.table(before, after, took))
    say(compare.side_by_side(before, after, config.evaluate.samples))
    return results, {"results": str(run_dir / "results.json"), "samples": str(run_dir / "samples.jsonl")}


def summary(result: Result, config, chat: bool) -> str:
    """The last lines of a run: what it reached, the files it wrote, and the commands that come next.

    Args:
        result: Of the run.
        config: Of the run.
        chat: Whether its rows are conversations.
    """
    val = "" if result.val_loss is None else f", best validation loss {result.val_loss:.4f} at step {result.best_step}"
    whole = "full" if config.tuning.method == "full" else "merged" if METHODS[config.tuning.method].merge else "adapter"
    lines = [f"{result.steps:,} steps in {result.seconds:.0f} s, training loss {result.train_loss:.4f}{val}"]
    lines += [f"  {name:<12} {path}" for name, path in result.files.items()]
    run = shlex.quote(str(result.run_dir))
    says = [f"  ftjax predict --model {run} --data FILE"] if TASKS[config.task.kind].judged else []
    if config.task.kind == "causal":
        says = [f"  ftjax generate --model {run}{' --chat' * chat} --prompt '...'"]
    lines += [
        "next:",
        *says,
        f"  ftjax evaluate --model {run} --data FILE",
        f"  ftjax export --run {run} --out DIR --format {whole}",
    ]
    return "\n".join(lines)


def _count(shapes) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes, is_leaf=is_quantised))
