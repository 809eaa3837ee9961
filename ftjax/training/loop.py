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
from ftjax import cpus
from ftjax import progress as signs
from ftjax.data.batches import ahead, loader
from ftjax.data.preview import show
from ftjax.errors import NotFinite
from ftjax.evaluation import compare, judge
from ftjax.evaluation.loss import sums
from ftjax.evaluation.plot import plot_losses
from ftjax.files import write_jsonl
from ftjax.models.quantised import is_quantised
from ftjax.objectives import TASKS
from ftjax.progress import doing
from ftjax.training import export, features, finite, hosts, selection, sharding
from ftjax.training.checkpoint import FOLDER, Checkpoints
from ftjax.training.compiling import trim_after_compiling, use_compilation_cache
from ftjax.training.flops import PEAKS, flops_per_token
from ftjax.training.job import Job, prepared
from ftjax.training.profile import Profiler
from ftjax.training.program import Program, build, placed
from ftjax.training.report import Metrics, Progress, read_metrics
from ftjax.training.run_folder import RUN, Trained, base_name, claim, keep_tokenizer, locked, recorded_devices
from ftjax.training.start import first_state, untuned, validate
from ftjax.tuning import METHODS

PLACED = 2  # batches on the devices beside the one in use
UNREAD = 100  # steps whose numbers may wait on the devices


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to. Losses are in nats a trained token.

    steps: taken in all; resumed_from: 0 for a new run; stopped_early: patience ran out; best_step: of the checkpoint
    that `train.select` chose; best: that figure there, None where it was never defined; val_loss: the validation loss
    there (None without validation rows); seconds: of all starts that worked on the run, as far as they were kept;
    results: before and after, where `evaluate.compare` is on; files: name -> path of what was written.
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
    results: dict | None
    files: dict[str, str]


@hosts.together
def train(config, say=print) -> Result:
    """Run `config` (see ftjax.config.default), or go on with the run that `config.run_dir` holds.

    say: called with lines for a person. Raises FtjaxError for anything in the config or the data that cannot be used,
    NotFinite where the loss, the gradient norm, the validation loss or what is trained is NaN or infinite, and
    KeyboardInterrupt, with what is saved as its text, after Ctrl-C.
    """
    configs.validate(config)
    claimed = []
    try:
        return _train(config, say, claimed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved_so_far(*claimed)) from None


def saved_so_far(run_dir: Path | None = None, steps: int = 0) -> str:
    """What a run that was stopped has saved, by what lies on disk; run_dir: None before the folder was claimed."""
    if run_dir is None:
        return "stopped before the run began; nothing was written"
    kept = [int(path.name) for path in (run_dir / FOLDER).glob("*") if path.name.isdigit()]
    if not kept:
        return f"stopped; {run_dir} holds no checkpoint yet, and the same command starts at step 0"
    if max(kept) < steps:
        return (
            f"stopped; the last checkpoint is that of step {max(kept):,} of {steps:,}, where the same command goes on"
        )
    return f"stopped; all {steps:,} steps are trained and saved, and the same command does what is left after them"


def _train(config, say, claimed: list) -> Result:
    """As `train`; claimed: gets the run's folder and its number of steps once the folder is the run's."""
    started = time.perf_counter()
    first = hosts.start()  # of several processes, one speaks and writes for all
    say = say if first else (lambda text: None)
    signs.quiet = not first
    trim_after_compiling()
    if config.log.compilation_cache:
        use_compilation_cache()

    recorded = recorded_devices(config)
    cpus.offer(recorded)
    job = prepared(config, say, recorded)
    config, data, mesh, rows, steps = job.config, job.data, job.mesh, job.rows, job.steps
    select = job.selection
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as opened:
        if first:
            opened.enter_context(locked(run_dir))
        going_on = hosts.from_first(lambda: claim(config, job.base, data.fingerprint, mesh.size))
        claimed += run_dir, steps
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
        # best: the selected figure as a rank, and the validation loss, of the best checkpoint so far
        resumed_from, best, best_loss, stale, spent = checkpoints.latest() or 0, None, None, 0, 0.0
        if resumed_from:
            abstract = placed(state, program.state_places)
            del state  # before the one of the checkpoint comes in: they are of one size
            state = checkpoints.state(resumed_from, abstract)
            record = checkpoints.record(resumed_from)
            best, stale, spent = record["best"], record["stale"], record["seconds"]
            if "best_loss" in record:
                best_loss = record["best_loss"]
            elif best is not None:  # a run from before `train.select`: its best is a loss
                best, best_loss = -best, best
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
            with doing("computing the states that the head reads"):
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
        opened.callback(progress.end)  # an error has a line of its own
        metrics = opened.enter_context(contextlib.closing(Metrics(run_dir, config, resumed_from))) if first else None
        opened.push(hosts.end_together)  # before what is open is closed, which waits for all processes
        profiled = config.log.profile if first else ""
        take_step = Profiler(program.step, profiled, run_dir, resumed_from, steps, say)
        opened.callback(take_step.close)
        stop = config.train.patience > 0 and stale >= config.train.patience
        step, loss, shapes = resumed_from, None, set()
        unread, due = [], False  # (step, report) of steps whose numbers have not been read; whether to read them

        def seconds() -> float:
            return spent + time.perf_counter() - started

        def note(step, values):
            if first:
                metrics.write(step, values)
                progress.show(step, values)

        def read(log: bool):
            """Read the numbers of steps that the device has finished by now, and refuse any that is not finite."""
            nonlocal loss
            for at, report in jax.device_get(unread):
                values = {name: float(report[name]) for name in ("loss", "accuracy", "grad_norm")}
                if not report["tokens"]:  # every row of the batch has the weight 0
                    values |= {"loss": None, "accuracy": None}
                with kept_so_far():
                    finite.check_step(at, values, loss, float(program.rate(max(at - 2, 0))))
                loss = loss if values["loss"] is None else values["loss"]
            unread.clear()
            if log:
                note(at, values | {"lr": float(program.rate(at - 1))} | progress.rates(at))

        @contextlib.contextmanager
        def kept_so_far():
            """Add to an error for numbers that are not finite which checkpoint is left."""
            try:
                yield
            except NotFinite as error:
                checkpoints.manager.wait_until_finished()
                left = checkpoints.best()
                kept = "There is no checkpoint" if left is None else f"The best checkpoint is that of step {left:,}"
                raise NotFinite(f"{str(error).rstrip('.')}. {kept}; the run is not finished") from None

        def check_state(state):
            """Refuse to keep what would be of no use to anyone."""
            if finite.not_finite((state.trained, state.averaged)):
                raise NotFinite(f"step {step}: its update made values of what is trained NaN or infinite. {lower()}")
            if not validation and step == steps:  # neither a validation nor a further step will tell
                batch = place(batches.get(0, local))
                variables = program.variables(state.averaged, frozen)
                _, _, found = sums(program.model, variables, batch, kind=config.task.kind, **job.task.always(config))
                if not math.isfinite(found["loss"]):
                    raise NotFinite(f"step {step}: after its update, the loss is {found['loss']}. {lower()}")

        def lower() -> str:
            return finite.advice(float(program.rate(max(step - 1, 0))))

        while step < steps and not stop:
            arrays, tokens = next(feed)
            new = arrays["tokens"].shape not in shapes
            shapes.add(arrays["tokens"].shape)
            with progress.aside("compiling the training step") if new else contextlib.nullcontext():
                state, report = take_step(state, frozen, arrays)
            step += 1
            progress.count(tokens)
            # Numbers are read when the next step is already running, so that the device never waits for the host.
            if due:
                read(log=(step - 1) % config.train.log_every == 0)
            unread.append((step, report))
            due = step % config.train.log_every == 0 or len(unread) >= UNREAD
            validated = validation and (step % job.eval_every == 0 or step == steps)
            preempted = hosts.preempted(step)
            saved = step % job.save_every == 0 or step == steps or preempted
            if validated or saved:  # never validate or keep a state before its loss is known to be a number
                read(log=True)
                due = False
            rank = None
            if validated:
                with progress.aside(f"validating on {len(select.part):,} rows"), kept_so_far():
                    variables = program.variables(state.averaged, frozen)
                    try:
                        losses = validate(job, program, variables, validation)
                        figure = selection.measure(select, job, program.model, variables, losses)
                    except NotFinite:
                        what = "the loss, or what the model says, is NaN or infinite on validation rows"
                        raise NotFinite(f"step {step}: after its update, {what}. {lower()}") from None
                    del variables
                found = {"val_loss": losses["val_loss"], f"val_{select.name.removeprefix('val_')}": figure}
                note(step, found | {name: x for name, x in losses.items() if name.startswith("val_loss/")})
                rank = select.rank(figure)
                better = rank is not None and (best is None or rank > best)
                best, best_loss, stale = (rank, losses["val_loss"], 0) if better else (best, best_loss, stale + 1)
                saved = saved or better
                stop = config.train.patience > 0 and stale >= config.train.patience
            if saved or stop:
                with kept_so_far():
                    check_state(state)
                record = {"config": config.to_dict(), "step": step, "best": best, "best_loss": best_loss}
                checkpoints.save(state, record | {"stale": stale, "seconds": seconds()}, rank)
            if preempted and step < steps:
                checkpoints.manager.wait_until_finished()
                raise KeyboardInterrupt  # the same command goes on from here
        progress.end()
        stopped_early = step < steps
        if stopped_early:
            say(f"stopped at step {step}: {stale} validations without a better {select.name} (train.patience)")
        if validation and best is None:
            say(f"warning: {select.name} was undefined at every validation, so that the last step counts as the best")
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
    train_loss = next((row["loss"] for row in reversed(history) if row.get("loss") is not None), math.nan)
    result = Result(
        run_dir=str(run_dir), steps=step, resumed_from=resumed_from, stopped_early=stopped_early,
        train_loss=train_loss, val_loss=best_loss, best_step=best_step, best=select.rank(best), seconds=seconds(),
        results=results, files=files,
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
        with doing(f"writing {out}"):
            written = export.write(source, out, format, dtype=config.export.dtype, shard_size=config.export.shard_size)
        files[format] = written["path"]
        if "merge_difference" in written:
            say(f"merged model: its logits differ from the adapted one's by at most {written['merge_difference']:.1e}")
    return files


def judged(job: Job, program: Program, variables: dict, before: dict | None, seconds: Callable, say) -> tuple:
    """(results, files by name) of the model on held-out rows, where it is to be judged; seconds() of the whole run."""
    run_dir, config = Path(job.config.run_dir), job.config
    if not job.generates:
        with doing("judging the model on held-out rows"):
            found = judge.finish(run_dir, program.model, variables, job.data, config, job.words)
        say(found.text)
        return hosts.from_first(lambda: found.results), found.files
    if not config.evaluate.compare:
        return None, {}
    with doing("answering with the tuned model"):
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
    if config.train.select != selection.LOSS and result.best is not None:
        val = f", best {config.train.select} {result.best:.4f} at step {result.best_step}"
        val += f", where the validation loss is {result.val_loss:.4f}"
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
