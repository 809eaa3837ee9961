"""A training run, from config to files, in the order in which things happen."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import cpus, stops, tasks
from ftjax import progress as signs
from ftjax.data.batches import ahead, loader
from ftjax.data.preview import show
from ftjax.errors import FtjaxError, NotFinite, of_disk
from ftjax.evaluation import compare, judge
from ftjax.evaluation.loss import sums
from ftjax.evaluation.pictures import plot_losses
from ftjax.files import replace_json, write_jsonl
from ftjax.models.quantised import is_quantised
from ftjax.progress import counted, doing
from ftjax.training import export, features, finite, fisher, hosts, privacy, provenance, selection, sharding
from ftjax.training.checkpoint import FOLDER, Checkpoints
from ftjax.training.compiling import trim_after_compiling, use_compilation_cache
from ftjax.training.flops import PEAKS, flops_per_token
from ftjax.training.job import Job, prepared
from ftjax.training.profile import Profiler
from ftjax.training.program import Program, build, placed
from ftjax.training.report import Metrics, Progress, read_metrics
from ftjax.training.run_folder import (
    RUN,
    Trained,
    base_name,
    check_record,
    claim,
    keep_tokenizer,
    locked,
    recorded_devices,
)
from ftjax.training.start import first_state, untuned, validate
from ftjax.training.step import COUNTS
from ftjax.tree import not_finite
from ftjax.tuning import METHODS

PLACED = 2  # batches that wait on the devices for the next steps
UNREAD = 100  # most steps whose losses are still on the devices


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


@hosts.together
def train(config: ConfigDict, say: Callable[[str], None] = print) -> Result:
    """Train as `config` says, or resume the run in the folder `config.run_dir`.

        config = ftjax.config.default()
        config.data.train = "rows.jsonl"
        result = ftjax.train(config)

    Args:
        config: From `ftjax.config.default()`, `load()` or `from_dict()`. It is not changed.
        say: Called with each line of the report for a person; `lambda line: None` silences it.

    Returns:
        The Result: losses, the run folder, the files in it.

    Raises:
        FtjaxError: If something in the config or the data cannot be used. It is a NotFinite if the loss, the gradient
            norm, the validation loss or a trained parameter is NaN or infinite.
        KeyboardInterrupt: After Ctrl-C; its text says what is saved.
    """
    configs.validate(config)
    if config.stages:
        raise FtjaxError("stages: only `ftjax train` and ftjax.train run stages one after another; empty it here")
    claimed: list[Any] = []
    try:
        return _train(config, say, claimed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved_so_far(*claimed)) from None
    except Exception as error:
        if isinstance(error, FtjaxError) or not (told := of_disk(error)):
            raise
        raise FtjaxError(
            f"{told}. Nothing that was whole in {config.run_dir} is lost, and the same command goes on once this is "
            "mended"
        ) from error


def saved_so_far(run_dir: Path | None = None, steps: int = 0) -> str:
    """A sentence that says what a stopped run has saved on disk; run_dir: None before the folder was claimed."""
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


def _train(config: ConfigDict, say: Callable[[str], None], claimed: list) -> Result:
    """Do what `train` does; append the run folder and the number of steps to `claimed` once the folder is locked."""
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
        alone = jax.process_count() == 1  # JAX hears of a SIGTERM for several processes
        if alone:
            opened.enter_context(stops.listening())
        if first:
            opened.enter_context(locked(run_dir))
        going_on = hosts.from_first(lambda: claim(config, job.base, data.fingerprint, mesh.size))
        claimed += run_dir, steps
        if first:
            opened.enter_context(provenance.recorded(run_dir / RUN))
        hosts.check_shared(run_dir / RUN)
        if first and job.tokenizer_folder:
            keep_tokenizer(run_dir, job.tokenizer_folder)
        say(show(data, job.tokenizer, packing=config.data.packing))
        if data.gone and first:
            write_jsonl(run_dir / "removed.jsonl", data.removed())

        opened.enter_context(jax.set_mesh(mesh))
        program = build(config, job.spec, mesh, job.dtype, steps)
        state, frozen = first_state(job, program, say)
        before = untuned(job, program, state.trained, frozen, say)

        # ---- the state to go on from -------------------------------------------------------------------------------
        # Closed in any case, so that an error or Ctrl-C leaves complete files.
        checkpoints = opened.enter_context(contextlib.closing(Checkpoints(run_dir, config.train.keep, say=say)))
        # best: the selected score as a rank; best_loss: the validation loss; both of the best checkpoint so far
        resumed_from, best, best_loss, stale, spent = checkpoints.latest() or 0, None, None, 0, 0.0
        skipped: list[dict] = []  # the bad steps: {"step", "rows", "why"}, with train.on_bad_step=rewind also "back_to"
        rewinds, good = config.train.on_bad_step == "rewind", 0  # good: step of the checkpoint to go back to
        if resumed_from:
            abstract = placed(state, program.state_places)
            del state  # before the checkpoint's state, which is as large, is read
            state = checkpoints.state(resumed_from, abstract)
            record = checkpoints.record(resumed_from)
            check_record(config, record, run_dir, resumed_from)
            best, stale, spent = record["best"], record["stale"], record["seconds"]
            skipped, good = record.get("skipped", []), record.get("good", resumed_from)
            good = good if good in checkpoints.steps() else resumed_from  # it was damaged
            checkpoints.pinned = good if rewinds else 0
            if "best_loss" in record:
                best_loss = record["best_loss"]
            elif best is not None:  # a run from before `train.select`: its best is a loss
                best, best_loss = -best, best
            say(f"{run_dir}: going on after step {resumed_from} of {steps}")
            if first and skipped:
                provenance.note(run_dir / RUN, skipped=skipped)
        elif going_on:
            say(f"{run_dir}: the run was stopped before its first checkpoint; starting at step 0")

        if config.optim.ewc and not resumed_from:
            with doing("weighing the parameters by the rows of earlier stages"):
                state = fisher.weighed(job, program, state, frozen)

        # ---- batches on their way to the devices -------------------------------------------------------------------
        say(description(job, program))
        batches, validation = job.batches, job.validation
        rate_of_rows = getattr(batches, "rate", 0.0)  # probability with which a private step draws an example
        sizes, passes = (program.base, program.trained, program.frozen), job.task.passes(config)
        flops = flops_per_token(job.spec.model, *sizes, job.longest, passes)
        keep, own = features.keeper(job, program, state.trained, frozen)
        if keep:
            with doing("computing what is the same in every epoch"):
                batches, flops = keep(batches), own or flops
                validation = {name: keep(held_out) for name, held_out in validation.items()}
        local = sharding.local_rows(mesh, rows)
        shares = rows / (local.stop - local.start)  # of a batch, of which this process has one
        place = functools.partial(sharding.place_batch, mesh=mesh, rows=rows, local=local)

        def fed(start: int):
            """The batches after step `start`. The next ones are on their way to the devices while a step runs."""
            feed = loader(batches, start, steps - start, config.data.workers, local)
            return ahead(((place(b), int(shares * np.count_nonzero(b["segment_ids"]))) for b in feed), PLACED)

        placed_ahead = fed(resumed_from)
        made: collections.deque = collections.deque()  # batches of the next steps, where they depend on the state

        # ---- training ----------------------------------------------------------------------------------------------
        peak = PEAKS.get(jax.devices()[0].device_kind)
        progress = Progress(steps, resumed_from, flops, peak * mesh.size if peak else None)
        opened.callback(progress.end)  # an error has a line of its own
        metrics = None
        if first:
            metrics = Metrics(run_dir, config, resumed_from, record.get("metrics", "") if resumed_from else "", say)
            opened.enter_context(contextlib.closing(metrics))
        opened.push(hosts.end_together)  # before the open files are closed, which waits for all processes
        profiled = config.log.profile if first else ""
        take_step = Profiler(program.step, profiled, run_dir, resumed_from, steps, say)
        opened.callback(take_step.close)
        stop = config.train.patience > 0 and stale >= config.train.patience
        step, loss, shapes = resumed_from, None, set()
        unread: list[tuple[int, Any]] = []  # (step, report) of steps whose numbers have not been read
        due = False  # whether to read them at the next step

        def seconds() -> float:
            return spent + time.perf_counter() - started

        def note(step, values):
            if first:
                metrics.write(step, values)
                progress.show(step, values)

        def read(log: bool) -> int:
            """Read the numbers of steps that the device has finished by now, and refuse any that is not finite. Returns
            the bad step from which the run must go back, or 0."""
            nonlocal loss
            for at, report in jax.device_get(unread):
                values: dict[str, float | None] = {
                    name: float(figure) for name, figure in report.items() if name not in COUNTS
                }
                if not report["tokens"]:  # every row of the batch has the weight 0
                    values = dict.fromkeys(values) | {"grad_norm": values["grad_norm"]}
                bad, left_out = bool(report.get("bad", False)), int(report.get("skipped", 0))
                with kept_so_far():
                    rate, decay = float(program.rate(max(at - 2, 0))), config.optim.weight_decay
                    if not bad or config.train.on_bad_step == "stop":
                        places = functools.partial(places_of, at)
                        finite.check_step(at, values, loss, rate, decay, places, report["norms"])
                    if bad:
                        leave_out(at, values, report)
                if bad and rewinds:
                    unread.clear()
                    return at
                loss = loss if values["loss"] is None or bad else values["loss"]
            unread.clear()
            if log and not bad:  # a step that is left out has a line of its own
                values |= {"lr": float(program.rate(at - 1 - left_out))} | privacy.spent(config, rate_of_rows, at)
                note(at, values | progress.rates(at))
            return 0

        def collected(state) -> tuple:
            """The next batch of a task whose batches depend on the state, and its number of tokens."""
            if not made:
                assert job.task.collect
                n = step // job.updates
                with progress.aside("drawing answers"):
                    lm, variables = job.lm(program.model), program.variables(state.trained, frozen)
                    found = job.task.collect(lm, variables, data, config, n, np.concatenate(batches.rows(n)))
                made.extend(found.batches)
                if found.noted and metrics:
                    metrics.write(step + 1, found.noted)
            batch = made.popleft()
            rows = len(batch["tokens"])
            own = sharding.local_rows(mesh, rows)
            arrays = sharding.place_batch({name: x[own] for name, x in batch.items()}, mesh, rows, own)
            return arrays, np.count_nonzero(batch["segment_ids"])

        def places_of(at: int) -> list[str]:
            """The names of the rows of a step's batch."""
            members = np.concatenate(job.batches.rows((at - 1) // job.updates))
            return list(dict.fromkeys(data.train.place(int(i)) for i in members))

        def leave_out(at: int, values: dict, report: dict) -> None:
            """Record a bad step, which the device left out, and say which rows it had."""
            places, back = places_of(at), {}
            if rewinds:
                back = {"back_to": good}
                report |= {"in_a_row": 1 + sum(entry["back_to"] == good for entry in skipped)}
            told = finite.check_bad(at, values, places, report, config, loss, good)
            skipped.append({"step": at, "rows": places, "why": told.partition(". ")[0]} | back)
            if metrics:
                progress.end()
                say(told)
                metrics.write(at, {"skipped": len(skipped), "rows": places} | back)
                provenance.note(run_dir / RUN, skipped=skipped)

        @contextlib.contextmanager
        def kept_so_far():
            """Add to an error for numbers that are not finite which checkpoint is left."""
            try:
                yield
            except NotFinite as error:
                checkpoints.wait()
                left = checkpoints.best()
                kept = "There is no checkpoint" if left is None else f"The best checkpoint is that of step {left:,}"
                raise NotFinite(f"{str(error).rstrip('.')}. {kept}; the run is not finished") from None

        def check_state(state):
            """Refuse to keep what would be of no use to anyone."""
            if not_finite((state.trained, state.averaged)):
                raise NotFinite(f"step {step}: its update made values of what is trained NaN or infinite. {lower()}")
            if not validation and step == steps:  # no validation and no further step would show it
                left_out = {entry["step"] for entry in skipped}
                good = next((i for i in range(len(batches)) if i + 1 not in left_out), 0)
                batch = arrays if job.task.collect else place(batches.get(good, local))
                variables = program.variables(state.averaged, frozen)
                _, _, found = sums(program.model, variables, batch, kind=config.task.kind, **job.task.always(config))
                if not math.isfinite(found["loss"]):
                    raise NotFinite(f"step {step}: after its update, the loss is {found['loss']}. {lower()}")

        def lower() -> str:
            return finite.advice(float(program.rate(max(step - 1, 0))), config.optim.weight_decay)

        noted = opened.enter_context(contextlib.ExitStack())
        noted.enter_context(stops.held(alone))
        while step < steps and not stop:
            arrays, tokens = collected(state) if job.task.collect else next(placed_ahead)
            new = arrays["tokens"].shape not in shapes
            shapes.add(arrays["tokens"].shape)
            with contextlib.ExitStack() as compiling:
                if new:
                    compiling.enter_context(progress.aside("compiling the training step"))
                if step == resumed_from:  # there is nothing to save yet
                    compiling.enter_context(stops.held(False))
                state, report = take_step(state, frozen, arrays)
            step += 1
            progress.count(tokens)
            # Numbers are read when the next step is already running, so that the device never waits for the host.
            bad_at = read(log=(step - 1) % config.train.log_every == 0) if due and unread else 0
            if not bad_at:
                unread.append((step, report))
            due = step % config.train.log_every == 0 or len(unread) >= UNREAD
            validated = validation and (step % job.eval_every == 0 or step == steps)
            preempted = (hosts.preempted(step) or bool(stops.heard)) and step % job.updates == 0
            saved = step % job.save_every == 0 or step == steps
            whole = validated or saved or preempted  # a state is kept only after its loss is known to be finite
            if (whole or job.task.collect and step % job.updates == 0) and not bad_at:
                bad_at = read(log=whole or step % config.train.log_every == 0)
                due = False
            if bad_at:
                checkpoints.wait()
                abstract = placed(state, program.state_places)
                del state, report  # before the checkpoint's state, which is as large, is read
                state = checkpoints.rewound(good, bad_at, abstract)
                if bad_at < step:
                    step, placed_ahead = bad_at, fed(bad_at)
                    validated = saved = due = False
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
                note(step, found | {name: x for name, x in losses.items() if name.startswith("val_")})
                # A private run selects no checkpoint: the validation rows may be private too.
                rank = None if config.privacy.epsilon else select.rank(figure)
                better = rank is not None and (best is None or rank > best)
                best, best_loss, stale = (rank, losses["val_loss"], 0) if better else (best, best_loss, stale + 1)
                saved = saved or better
                stop = config.train.patience > 0 and stale >= config.train.patience
            if saved and not bad_at:  # not at a moment when the run was stopped, so that a resumed run goes back as far
                good = step
                checkpoints.pinned = step if rewinds else 0
            if saved or stop or preempted:
                with kept_so_far():
                    check_state(state)
                record = {"config": config.to_dict(), "step": step, "best": best, "best_loss": best_loss}
                record |= {"metrics": metrics.digest()} if metrics else {}
                record |= {"good": good} if rewinds else {}
                record |= privacy.record(config, rate_of_rows, step)
                record |= {"skipped": [*skipped]} if skipped else {}  # a copy, because it is written in the background
                checkpoints.save(state, record | {"stale": stale, "seconds": seconds()}, rank)
            if preempted and step < steps:
                checkpoints.wait()
                raise KeyboardInterrupt  # the same command goes on from here
        noted.close()
        if alone and stops.heard:  # in the last step
            raise KeyboardInterrupt
        progress.end()
        stopped_early = step < steps
        if stopped_early:
            say(f"stopped at step {step}: {stale} validations without a better {select.name} (train.patience)")
        if validation and best is None and not config.privacy.epsilon:
            say(f"warning: {select.name} was undefined at every validation, so that the last step counts as the best")
        checkpoints.wait()

        # ---- the results -------------------------------------------------------------------------------------------
        best_step = checkpoints.best() or step
        kept = best_step if config.export.checkpoint == "best" else step
        trained = state.averaged
        if kept != step:
            abstract = placed(jax.eval_shape(lambda x: x, trained), program.trained_places)
            trained = checkpoints.trained(kept, abstract, ema=config.train.ema > 0)
        files = {"metrics": str(run_dir / "metrics.jsonl"), "checkpoints": str(run_dir / "checkpoints")}
        files |= take_step.finish(state)
        del state
        guarantee = privacy.record(config, rate_of_rows, kept)
        files |= exported(job, program, trained, frozen, say, guarantee.get("privacy"))
        results, told = judged(job, program, program.variables(trained, frozen), before, seconds, say)
        if first and guarantee:
            provenance.note(run_dir / RUN, **guarantee)
            if "results" in told:
                replace_json(Path(told["results"]), (results or {}) | guarantee)

    files |= told
    if data.gone:
        files["left out"] = str(run_dir / "removed.jsonl")
    history = read_metrics(run_dir)
    files["loss curve"] = hosts.from_first(lambda: str(plot_losses(history, run_dir / "loss.png")))
    train_loss = next((row["loss"] for row in reversed(history) if row.get("loss") is not None), math.nan)
    result = Result(
        run_dir=str(run_dir), steps=step, resumed_from=resumed_from, stopped_early=stopped_early,
        train_loss=train_loss, val_loss=best_loss, best_step=best_step, best=select.rank(best), seconds=seconds(),
        results=results, files=files, history=history, privacy=guarantee.get("privacy"),
    )  # fmt: skip
    chat = job.generates and job.data.train.rendered(0).messages is not None
    say(summary(result, config, chat))
    return result


def description(job: Job, program: Program) -> str:
    """One line that says what is about to be trained."""
    trained, total = _count(program.trained), _count(program.base)
    share = trained / _count((program.trained, program.frozen))
    sizes = [f"{axis}={n}" for axis, n in job.mesh.shape.items() if n > 1]
    return (
        f"training {trained:,} of {total:,} parameters ({share:.2%}), {job.config.tuning.method}, "
        f"{counted(job.steps, 'step')} of {counted(job.rows, 'row')}, {counted(len(job.batches), 'step')} an epoch, "
        f"learning rate {job.config.optim.lr:g}, "
        f"{'mesh ' + ' x '.join(sizes) if sizes else 'one'} {jax.devices()[0].device_kind}"
    )


def exported(job: Job, program: Program, trained: dict, frozen: dict, say, guarantee: dict | None) -> dict[str, str]:
    """Write the trained model in every format of `export.formats`.

    Args:
        job: The run.
        program: The compiled functions.
        trained: Tree of trained parameters.
        frozen: Tree of frozen parameters.
        say: Called with lines for a person.
        guarantee: "privacy" of privacy.record, or None.

    Returns:
        {format: folder}.
    """
    config, files = job.config, {}
    source = Trained(
        config.tuning.method, trained, frozen, job.spec, job.lm(program.model), base_name(config, job.folder),
        config.to_dict(), job.base, guarantee,
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
    say(compare.table(before, after, took))
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
    says = [f"  ftjax predict --model {run} --data FILE"] if tasks.find(config.task.kind).judged else []
    if tasks.find(config.task.kind).head == "causal":
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
