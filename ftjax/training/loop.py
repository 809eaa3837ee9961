"""A training run, from config to files, in the order in which things happen."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import cpus, stops, user_code
from ftjax import progress as signs
from ftjax.data import canaries
from ftjax.data.preview import show
from ftjax.errors import FtjaxError, NotFinite, of_disk
from ftjax.evaluation.loss import sums
from ftjax.evaluation.pictures import plot_losses
from ftjax.files import replace_json, write_jsonl
from ftjax.progress import doing
from ftjax.training import features, finite, fisher, hosts, privacy, provenance, selection
from ftjax.training.checkpoint import Checkpoints, steps_in
from ftjax.training.compiling import trim_after_compiling, use_compilation_cache
from ftjax.training.feed import Feed
from ftjax.training.flops import PEAKS, flops_per_token
from ftjax.training.job import Job, prepared
from ftjax.training.outcome import Result, description, evaluated, exported, summary
from ftjax.training.profile import Profiler
from ftjax.training.program import Program, build, placed
from ftjax.training.report import Metrics, Progress, read_metrics
from ftjax.training.run_folder import RUN, check_record, claim, keep_tokenizer, locked, recorded_devices
from ftjax.training.start import first_state, untuned, validate
from ftjax.training.step import COUNTS, State
from ftjax.tree import not_finite

UNREAD = 100  # most steps whose losses are still on the devices
AHEAD = 2  # most steps that are queued on the devices, so that a signal is heard soon where steps take long


@hosts.together()
@user_code.held()
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
        if isinstance(error, FtjaxError) or not (reason := of_disk(error)):
            raise
        raise FtjaxError(
            f"{reason}. Nothing that was whole in {config.run_dir} is lost, and the same command goes on once this is "
            "mended"
        ) from error


def saved_so_far(run_dir: Path | None = None, steps: int = 0) -> str:
    """A sentence that says what a stopped run has saved on disk; run_dir: None before the folder was claimed."""
    if run_dir is None:
        return "stopped before the run began; nothing was written"
    kept = steps_in(run_dir)
    if not kept:
        return f"stopped; {run_dir} holds no checkpoint yet, and the same command starts at step 0"
    if kept[-1] < steps:
        return f"stopped; the last checkpoint is that of step {kept[-1]:,} of {steps:,}, where the same command goes on"
    return f"stopped; all {steps:,} steps are trained and saved, and the same command does what is left after them"


def _train(config: ConfigDict, say: Callable[[str], None], claimed: list) -> Result:
    """Do what `train` does; append the run folder and the number of steps to `claimed` once the folder is locked."""
    standing = Standing()
    first = hosts.start()  # of several processes, one speaks and writes for all
    say = say if first else (lambda text: None)
    signs.quiet = not first
    trim_after_compiling()
    if config.log.compilation_cache:
        use_compilation_cache()

    recorded = recorded_devices(config)
    cpus.offer(recorded)
    job = prepared(config, say, recorded)
    config, run_dir = job.config, Path(job.config.run_dir)
    with contextlib.ExitStack() as opened:
        if jax.process_count() == 1:  # JAX hears of a SIGTERM for several processes
            opened.enter_context(stops.listening())
        begun = entered(job, say, claimed, opened)
        opened.enter_context(jax.set_mesh(job.mesh))
        program = build(config, job.spec, job.mesh, job.dtype, job.steps)
        state, frozen = first_state(job, program, say)
        before = untuned(job, program, state.trained, frozen, say)

        # Closed in any case, so that an error or Ctrl-C leaves complete files.
        checkpoints = opened.enter_context(contextlib.closing(Checkpoints(run_dir, config.train.keep, say=say)))
        known = ""  # digest of the metrics
        if latest := checkpoints.latest():
            abstract = placed(state, program.state_places)
            del state  # before the checkpoint's state, which is as large, is read
            state, known = resumed(job, checkpoints, latest, abstract, standing, say)
        elif begun:
            say(f"{run_dir}: the run was stopped before its first checkpoint; starting at step 0")
        resumed_from = standing.step

        if config.optim.ewc and not resumed_from:
            with doing("weighing the parameters by the rows of earlier stages"):
                state = fisher.weighed(job, program, state, frozen)

        say(description(job, program))
        training = Training(job, program, state.trained, frozen, checkpoints, standing, known, say, opened)
        state = training.run(state)
        checkpoints.wait()

        # ---- the results -------------------------------------------------------------------------------------------
        best_step = checkpoints.best() or standing.step
        kept = best_step if config.export.checkpoint == "best" else standing.step
        trained = state.averaged
        if kept != standing.step:
            abstract = placed(trained, program.trained_places)
            trained = checkpoints.trained(kept, abstract, ema=config.train.ema > 0)
        files = {"metrics": str(run_dir / "metrics.jsonl"), "checkpoints": str(run_dir / "checkpoints")}
        files |= training.take_step.finish(state)
        del state
        guarantee = privacy.record(config, training.rate_of_rows, kept)
        variables = program.variables(trained, frozen)
        results, written = evaluated(job, program, variables, before, lambda: standing.seconds, say)
        files |= exported(job, program, trained, frozen, say, guarantee.get("privacy"), results)
        if first and guarantee:
            provenance.note(run_dir / RUN, **guarantee)
            if "results" in written:
                replace_json(Path(written["results"]), (results or {}) | guarantee)

    files |= written
    if job.data.gone:
        files["left out"] = str(run_dir / "removed.jsonl")
    history = read_metrics(run_dir)
    files["loss curve"] = hosts.from_first(lambda: str(plot_losses(history, run_dir / "loss.png")))
    train_loss = next((row["loss"] for row in reversed(history) if row.get("loss") is not None), math.nan)
    result = Result(
        run_dir=str(run_dir), steps=standing.step, resumed_from=resumed_from, stopped_early=standing.step < job.steps,
        train_loss=train_loss, val_loss=standing.best_loss, best_step=best_step,
        best=job.selection.rank(standing.best), seconds=standing.seconds, results=results, files=files,
        history=history, privacy=guarantee.get("privacy"),
    )  # fmt: skip
    chat = job.generates and job.data.train.rendered(0).messages is not None
    say(summary(result, config, chat))
    if doubt := finite.doubt(standing.first, history, not job.task.collect):
        say(f"warning: {doubt}")
        if first:
            provenance.note(run_dir / RUN, doubt=doubt)
    return result


def entered(job: Job, say, claimed: list, opened: contextlib.ExitStack) -> bool:
    """Lock the run folder until `opened` is closed, and write what belongs there before training.

    Args:
        job: The run.
        say: Called with lines for a person.
        claimed: Gets the run folder and the number of steps.
        opened: Closed at the end of the run.

    Returns:
        Whether the folder held this run already.
    """
    run_dir, first = Path(job.config.run_dir), jax.process_index() == 0
    if first:
        opened.enter_context(locked(run_dir))
    begun = hosts.from_first(lambda: claim(job.config, job.base_record, job.data.fingerprint, job.mesh.size))
    claimed += run_dir, job.steps
    if first:
        opened.enter_context(provenance.recorded(run_dir / RUN))
    hosts.check_shared(run_dir / RUN)
    if job.secret:
        privacy.keep_secret(run_dir, job.secret, begun)
    if first and job.tokenizer_folder:
        keep_tokenizer(run_dir, job.tokenizer_folder)
    say(show(job.data, job.tokenizer, packing=job.config.data.packing))
    if job.data.gone and first:
        write_jsonl(run_dir / "removed.jsonl", job.data.removed())
    if job.data.canaries and first:
        write_jsonl(run_dir / canaries.FILE, job.data.canaries)
    return begun


def resumed(job: Job, checkpoints: Checkpoints, step: int, abstract, standing: Standing, say) -> tuple[State, str]:
    """Go on from a checkpoint.

    Args:
        job: The run.
        checkpoints: Of the run folder.
        step: Step of the checkpoint.
        abstract: A State of jax.ShapeDtypeStruct with shardings.
        standing: Gets how far the run is.
        say: Called with lines for a person.

    Returns:
        (the State of the checkpoint, the digest of the metrics up to there; empty where it is not known).
    """
    state, record, run_dir = checkpoints.state(step, abstract), checkpoints.record(step), Path(job.config.run_dir)
    check_record(job.config, record, run_dir, step)
    standing.restore(record, step, checkpoints.steps())
    if job.validation and not standing.ended(job):
        selection.check_same(job.config, configs.flat(configs.from_dict(record["config"])), str(run_dir))
    say(f"{run_dir}: going on after step {standing.step} of {job.steps}")
    if jax.process_index() == 0 and standing.skipped:
        provenance.note(run_dir / RUN, skipped=standing.skipped)
    return state, record.get("metrics", "")


@dataclasses.dataclass
class Standing:
    """How far a run is and how it did so far. The record of each checkpoint holds it.

    Attributes:
        step: Optimizer steps taken.
        best: The score of the best checkpoint so far as a rank, see Selection.rank; None: there is none.
        best_loss: Validation loss of that checkpoint.
        stale: Number of validations since then.
        skipped: The bad steps: {"step", "rows", "why"}, with train.on_bad_step=rewind also "back_to".
        good: Step of the checkpoint that train.on_bad_step=rewind goes back to.
        first: The loss of the first step, before any update; None: unknown.
        spent: Seconds of earlier starts.
        started: When this start began, by time.perf_counter.
    """

    step: int = 0
    best: float | None = None
    best_loss: float | None = None
    stale: int = 0
    skipped: list[dict] = dataclasses.field(default_factory=list)
    good: int = 0
    first: float | None = None
    spent: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Of all starts so far."""
        return self.spent + time.perf_counter() - self.started

    def ended(self, job: Job) -> bool:
        """Whether all steps are taken, or train.patience ended the run: so many validations were not better."""
        return self.step >= job.steps or 0 < job.config.train.patience <= self.stale

    def restore(self, record: dict, step: int, whole: list[int]) -> None:
        """Take what a checkpoint recorded. step: of the checkpoint; whole: steps of all undamaged ones."""
        self.step, self.stale, self.spent = step, record["stale"], record["seconds"]
        self.best, self.best_loss = record["best"], record.get("best_loss")
        if "best_loss" not in record and self.best is not None:  # from before `train.select`: its best is a loss
            self.best, self.best_loss = -self.best, self.best
        self.skipped, self.good = record.get("skipped", []), record.get("good", step)
        self.good, self.first = self.good if self.good in whole else step, record.get("first")

    def record(self) -> dict:
        """What the next checkpoint records. Its lists are copies, because it is written in the background."""
        found = {"step": self.step, "best": self.best, "best_loss": self.best_loss, "stale": self.stale}
        found |= {"seconds": self.seconds, "good": self.good, "first": self.first}
        return found | ({"skipped": [*self.skipped]} if self.skipped else {})


class Training:
    """The steps of a run: what they need, and what is open while they are taken.

    Attributes:
        checkpoints: Of the run folder.
        standing: How far the run is.
        validation: {source: batches of its validation rows}.
        feed: The batches of the next steps.
        progress: The line on the screen.
        metrics: metrics.jsonl; None in a process that does not write.
        take_step: The training step.
        secret: What it gets beside each batch: the key of a private run's noise.
        loss: The last loss that was read.
        unread: (step, report) of steps whose numbers are still on the devices.
        norms: Gradient norms by layer of the latest good steps that were read.
    """

    def __init__(
        self, job: Job, program: Program, trained: dict, frozen: dict, checkpoints: Checkpoints, standing: Standing,
        known: str, say: Callable[[str], None], opened: contextlib.ExitStack,
    ):  # fmt: skip
        """Open the feed of batches, the metrics and the line on the screen.

        Args:
            job: The run.
            program: Its compiled functions.
            trained: Tree of trained parameters.
            frozen: Tree of frozen parameters.
            checkpoints: Of the run folder.
            standing: How far the run is.
            known: Digest of the metrics up to there, see Metrics.
            say: Called with lines for a person.
            opened: Closed at the end of the run.
        """
        self.job, self.program, self.frozen, self.say = job, program, frozen, say
        self.checkpoints, self.standing, self.validation = checkpoints, standing, job.validation
        self.loss: float | None = None
        self.unread: list[tuple[int, Any]] = []
        self.norms: Any = collections.deque(maxlen=finite.KEPT)
        config, start, first = job.config, standing.step, jax.process_index() == 0
        run_dir, batches = Path(config.run_dir), job.batches
        sizes = program.base, program.trained, program.frozen
        flops = flops_per_token(job.spec.model, *sizes, job.longest, job.task.passes(config))
        keep, own = features.keeper(job, program, trained, frozen)
        if keep:
            with doing("computing what is the same in every epoch"):
                batches, flops = keep(batches), own or flops
                self.validation = {name: keep(held_out) for name, held_out in job.validation.items()}
        peak = PEAKS.get(jax.devices()[0].device_kind)
        self.progress = Progress(job.steps, start, flops, peak * job.mesh.size if peak else None)
        opened.callback(self.progress.end)  # an error has a line of its own
        self.metrics = Metrics(run_dir, config, start, known, say) if first else None
        if self.metrics:
            opened.callback(self.metrics.close)
        note = self.metrics.write if self.metrics else lambda step, values: None
        self.feed = Feed(job, program, frozen, batches, start, self.progress, note, features.taught(job))
        opened.enter_context(hosts.together())  # left before the open files are closed, which waits for all processes
        self.take_step = Profiler(program.step, config.log.profile if first else "", run_dir, start, job.steps, say)
        opened.callback(self.take_step.close)
        self.secret = {"key": privacy.key_of(job.secret)} if job.secret else {}
        checkpoints.pinned = standing.good if self.rewinds else 0

    @property
    def rewinds(self) -> bool:
        """Whether a bad step sends the run back to its last checkpoint."""
        return self.job.config.train.on_bad_step == "rewind"

    @property
    def rate_of_rows(self) -> float:
        """Probability with which a private step draws an example."""
        return getattr(self.job.batches, "rate", 0.0)

    def run(self, state):
        """Take the steps that are left, unless train.patience ends them earlier. Returns the last State.

        Raises:
            NotFinite: If something that must be finite is not.
            KeyboardInterrupt: After a signal, once the state is saved.
        """
        job, train, standing = self.job, self.job.config.train, self.standing
        alone, begun = jax.process_count() == 1, standing.step
        due, shapes = False, set()  # due: whether to read the numbers at the next step
        with stops.held(alone):
            while not standing.ended(job):
                arrays, tokens = self.feed.next(state)
                if len(self.unread) >= AHEAD:
                    jax.block_until_ready(self.unread[-AHEAD])
                with contextlib.ExitStack() as compiling:
                    if arrays["tokens"].shape not in shapes:
                        compiling.enter_context(self.progress.aside("compiling the training step"))
                    if standing.step == begun:  # there is nothing to save yet
                        compiling.enter_context(stops.held(False))
                    state, report = self.take_step(state, self.frozen, arrays | self.secret)
                shapes.add(arrays["tokens"].shape)
                step = standing.step = standing.step + 1
                self.progress.count(tokens)
                # Numbers are read when the next step is already running, so that the device never waits for the host.
                bad_at = self.read(log=(step - 1) % train.log_every == 0) if due and self.unread else 0
                if not bad_at:
                    self.unread.append((step, report))
                due = step % train.log_every == 0 or len(self.unread) >= UNREAD
                validated = self.validation and (step % job.eval_every == 0 or step == job.steps)
                preempted = hosts.preempted(step) and step % job.updates == 0
                saved = step % job.save_every == 0 or step == job.steps
                whole = validated or saved or preempted  # a state is kept only after its loss is known to be finite
                if (whole or job.task.collect and step % job.updates == 0) and not bad_at:
                    bad_at = self.read(log=whole or step % train.log_every == 0)
                    due = False
                if bad_at:
                    self.checkpoints.wait()
                    abstract = placed(state, self.program.state_places)
                    del state, report  # before the checkpoint's state, which is as large, is read
                    state = self.checkpoints.rewound(standing.good, bad_at, abstract)
                    if bad_at < step:
                        standing.step = bad_at
                        self.feed.go_on(bad_at)
                        validated = saved = due = False
                rank = None
                if validated:
                    rank, better = self.validated(state)
                    saved = saved or better
                if saved and not bad_at:  # not when a signal stops the run, so that a resumed run goes back as far
                    standing.good = standing.step
                    self.checkpoints.pinned = standing.good if self.rewinds else 0
                if saved or preempted or standing.ended(job):
                    self.save(state, rank)
                if preempted and standing.step < job.steps:
                    self.checkpoints.wait()
                    raise KeyboardInterrupt  # the same command goes on from here
        if alone and stops.heard:  # in the last step
            raise KeyboardInterrupt
        self.progress.end()
        name = job.selection.name
        if standing.step < job.steps:
            stale = f"{standing.stale} validations without a better {name} (train.patience)"
            self.say(f"stopped at step {standing.step}: {stale}")
        if self.validation and standing.best is None and not job.config.privacy.epsilon:
            self.say(f"warning: {name} was undefined at every validation, so that the last step counts as the best")
        return state

    def note(self, step: int, values: dict) -> None:
        """Write a row of metrics.jsonl and show it."""
        if self.metrics:
            self.metrics.write(step, values)
            self.progress.show(step, values)

    def read(self, log: bool) -> int:
        """Read the numbers of the steps that are done, and refuse any that is not finite.

        Args:
            log: Whether those of the last one are logged.

        Returns:
            The bad step from which the run must go back, or 0.
        """
        config, program, how = self.job.config, self.program, self.job.config.train.on_bad_step
        for at, report in jax.device_get(self.unread):
            values: dict[str, Any] = {name: figure.tolist() for name, figure in report.items() if name not in COUNTS}
            if not report["tokens"]:  # every row of the batch has the weight 0
                values = dict.fromkeys(values) | {"grad_norm": values["grad_norm"]}
            bad, left_out = bool(report.get("bad", False)), int(report.get("skipped", 0))
            with self.telling_what_is_kept():
                rate, decay = float(program.rate(max(at - 2, 0))), config.optim.weight_decay
                if not bad or how == "stop":
                    places = functools.partial(self.feed.places, at)
                    finite.check_step(at, values, self.loss, rate, decay, places, report["norms"])
                if bad:
                    self.leave_out(at, values, report)
            if bad and self.rewinds:
                self.unread.clear()
                return at
            if values["loss"] is not None and not bad:
                self.loss = values["loss"]
                self.standing.first = self.loss if at == 1 else self.standing.first
                self.norms.append(report["norms"])
        self.unread.clear()
        if log and not bad:  # a step that is left out has a line of its own
            values |= {"lr": float(program.rate(at - 1 - left_out))} | privacy.spent(config, self.rate_of_rows, at)
            self.note(at, values | self.progress.rates(at))
        return 0

    def leave_out(self, at: int, values: dict, report: dict) -> None:
        """Record a bad step, which the device left out, and say which rows it had."""
        standing, places, back = self.standing, self.feed.places(at), {}
        if self.rewinds:
            back = {"back_to": standing.good}
            report |= {"in_a_row": 1 + sum(entry["back_to"] == standing.good for entry in standing.skipped)}
        message = finite.check_bad(at, values, places, report, self.job.config, self.loss, standing.good)
        standing.skipped.append({"step": at, "rows": places, "why": message.partition(". ")[0]} | back)
        if self.metrics:
            self.progress.end()
            self.say(message)
            self.metrics.write(at, {"skipped": len(standing.skipped), "rows": places} | back)
            provenance.note(Path(self.job.config.run_dir) / RUN, skipped=standing.skipped)

    def validated(self, state) -> tuple[float | None, bool]:
        """Validate a state. Returns its rank, None if it has none, and whether it is the best so far."""
        job, standing, select, step = self.job, self.standing, self.job.selection, self.standing.step
        with self.progress.aside(f"validating on {len(select.part):,} rows"), self.telling_what_is_kept():
            variables = self.program.variables(state.averaged, self.frozen)
            try:
                losses = validate(job, self.program, variables, self.validation)
                figure = selection.measure(select, job, self.program.model, variables, losses)
            except NotFinite:
                what = "the loss, or what the model says, is NaN or infinite on validation rows"
                raise NotFinite(f"step {step}: after its update, {what}. {self.lower()}") from None
        found = {"val_loss": losses["val_loss"], f"val_{select.name.removeprefix('val_')}": figure}
        self.note(step, found | {name: x for name, x in losses.items() if name.startswith("val_")})
        # A private run selects no checkpoint: the validation rows may be private too.
        rank = None if job.config.privacy.epsilon else select.rank(figure)
        better = rank is not None and (standing.best is None or rank > standing.best)
        standing.stale += 1
        if better:
            standing.best, standing.best_loss, standing.stale = rank, losses["val_loss"], 0
        return rank, better

    def save(self, state, rank: float | None) -> None:
        """Start writing a checkpoint. rank: of the state; None: unknown. Raises NotFinite if it would be of no use."""
        with self.telling_what_is_kept():
            self.check(state)
        record = {"config": self.job.config.to_dict()} | self.standing.record()
        record |= {"metrics": self.metrics.digest()} if self.metrics else {}
        record |= privacy.record(self.job.config, self.rate_of_rows, self.standing.step)
        self.checkpoints.save(state, record, rank)

    def check(self, state) -> None:
        """Raise NotFinite for a state with values that are not finite, or with a loss that is not."""
        job, step = self.job, self.standing.step
        if not_finite((state.trained, state.averaged)):
            raise NotFinite(f"step {step}: its update made values of what is trained NaN or infinite. {self.lower()}")
        if not self.validation and step == job.steps:  # no validation and no further step would show it
            left_out = {entry["step"] for entry in self.standing.skipped}
            good = next((i for i in range(1, len(job.batches) + 1) if i not in left_out), 1)
            variables = self.program.variables(state.averaged, self.frozen)
            always = job.task.always(job.config)
            *_, found = sums(self.program.model, variables, self.feed.get(good), kind=job.config.task.kind, **always)
            if not math.isfinite(found["loss"]):
                raise NotFinite(f"step {step}: after its update, the loss is {found['loss']}. {self.lower()}")

    @contextlib.contextmanager
    def telling_what_is_kept(self) -> Iterator[None]:
        """Add to an error for numbers that are not finite which gradients grew, and which checkpoint is left."""
        try:
            yield
        except NotFinite as error:
            self.checkpoints.wait()
            left = self.checkpoints.best()
            kept = "There is no checkpoint" if left is None else f"The best checkpoint is that of step {left:,}"
            what = f"{str(error).rstrip('.')}.{finite.grown(self.norms)}"
            raise NotFinite(f"{what} {kept}; the run is not finished") from None

    def lower(self) -> str:
        """The likely cause of numbers that are not finite after the last step, and what to do."""
        rate = float(self.program.rate(max(self.standing.step - 1, 0)))
        return finite.advice(rate, self.job.config.optim.weight_decay)
