"""A training run, from config to files, in the order in which things happen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from ftjax import config as configs
from ftjax.data import chat_templates, labelled
from ftjax.data.batches import Batches, ahead, loader
from ftjax.data.prepare import prepare
from ftjax.data.preview import show
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.evaluation.plot import plot_losses
from ftjax.files import replace_text, write_jsonl
from ftjax.hub import families, resolve, tokenizer, weights
from ftjax.lm import LM, compute_dtype
from ftjax.models.quantised import is_quantised
from ftjax.objectives import TASKS
from ftjax.training import auto_mesh, export, features, hosts, sharding
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.flops import PEAKS, flops_per_token
from ftjax.training.program import build, check_method, check_new_head, check_rows, fill_defaults, placed, with_task
from ftjax.training.report import Metrics, Progress, read_metrics
from ftjax.training.run_folder import RUN, Trained, base_name, claim
from ftjax.tuning import METHODS, Spec
from ftjax.tuning.adapters import Start

VALIDATIONS = 10  # a run, where the config does not say how often
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
    started = time.perf_counter()
    first = hosts.start()  # of several processes, one speaks and writes for all
    say = say if first else (lambda text: None)

    # ---- what is asked for -----------------------------------------------------------------------------------------
    config = configs.copy(config)
    configs.validate(config)
    fill_defaults(config)
    method = METHODS[config.tuning.method]
    formats = [export.resolve_format(config.tuning.method, f) for f in config.export.formats]
    if config.log.compilation_cache:
        use_compilation_cache()

    # ---- the model and its tokenizer, no weights yet ---------------------------------------------------------------
    folder = resolve.resolve(config.model.path, config.model.revision)
    family, shape = families.read_config(folder)
    check_method(config, family, shape)
    words = tokenizer.load_tokenizer(folder)
    tokenizer.check_vocab(words, shape.vocab_size)
    chatty = chat_templates.installed(config, words)
    ends = tokenizer.end_tokens(folder, chatty, config.data.end)
    if config.tuning.prompt_init == "text":
        config.tuning.prompt_ids = tuple(words(config.tuning.prompt_text)["input_ids"])
    dtype = compute_dtype(config.model.dtype)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)

    given = Start(config.tuning) if config.tuning.init_from else None
    if given:
        given.fill(spec)

    # ---- data: everything that can be wrong with it is found here, before the devices are used ---------------------
    virtual = method.virtual_tokens(spec)
    task = TASKS[config.task.kind]
    generates = task.head == "causal"
    pool = families.with_head(family, shape, task.head, 1, folder).head.pool
    known = families.label_names(folder) if shape.head.task == task.head else ()
    data = prepare(config, words, shape.max_positions - virtual, pool=pool, known=known)
    config.task.labels = data.labels
    shape = with_task(config, family, shape, folder, len(data.labels))
    spec = spec._replace(model=shape, names=families.linear_names(family, shape))
    if chosen := auto_mesh.settle(config, spec, auto_mesh.here(), data.max_length, dtype):
        say(chosen)
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    rows, ways = config.train.batch_size, sharding.row_ways(mesh)
    batch = functools.partial(
        Batches, max_length=data.max_length, packing=config.data.packing, buckets=config.data.buckets, seed=config.seed,
        ways=mesh.shape["sequence"], **labelled.layout(config, words),
    )  # fmt: skip
    drawn, weights_of_classes = judge.by_class(config, data)
    batches = batch(data.train.examples, rows, class_weights=weights_of_classes, **drawn)
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(batches)))
    eval_every = config.train.eval_every or max(1, steps // VALIDATIONS)
    save_every = config.train.save_every or eval_every
    eval_rows = -(-(config.evaluate.batch_size or rows) // ways) * ways
    validation = {}  # by source
    for index, name in enumerate(data.sources):
        held_out = data.validation.of_source(index)[: config.evaluate.rows or None]
        if len(held_out):
            validation[name] = batch(held_out, eval_rows, shuffle=False)

    going_on = hosts.from_first(lambda: claim(config, folder, data.fingerprint))
    run_dir = Path(config.run_dir)
    hosts.check_shared(run_dir / RUN)
    say(show(data, words, packing=config.data.packing))
    if data.gone and first:
        write_jsonl(run_dir / "removed.jsonl", data.removed())

    with jax.set_mesh(mesh), contextlib.ExitStack() as opened:
        # ---- weights, straight to where they belong ----------------------------------------------------------------
        program = build(config, spec, mesh, dtype, steps)
        model, applied = program.model, program.variables
        base = weights.read_params(
            folder, family, shape, program.base_places, lambda path: program.read_dtype, quantise=program.quantise,
            new_head=None if generates else jax.random.key(config.seed),
        )  # fmt: skip
        if not generates and (new := weights.head_is_new(folder, family, shape)):
            check_new_head(new, program.trained, config)
            say(f"new, and trained whole: {', '.join(new)}")
        made_elsewhere = given.trained(base, spec, program.trained) if given else None
        with warnings.catch_warnings():
            # Kernels of a stack that is cut in two come back in other shapes than they are given away in.
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            trained, frozen = program.begin(jax.random.key(config.seed), base)
        if given:
            made_elsewhere = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), made_elsewhere, program.trained)
            trained = jax.device_put(made_elsewhere, program.trained_places)
        del base  # given away: what is frozen of it now lies in `frozen`, the rest in `trained`
        fixed = frozen if generates and "lm_head" not in trained else {}
        for token, alike in indistinct_ends(fixed, data.train.examples).items():
            say(
                f"warning: answers end with {words.convert_ids_to_tokens(token)!r}, whose row of the frozen head is "
                f"that of {alike} other tokens: it was never pretrained, and cannot be learned now. Set data.end to a "
                "token that was"
            )
        state = program.init_state(trained)
        del trained  # the state's own from here on

        def validate(trained) -> dict[str, float]:
            """`val_loss` over all sources, and `val_loss/NAME` of each where there are several."""
            local = sharding.local_rows(mesh, eval_rows)
            loss = functools.partial(
                sums, model, applied(trained, frozen), kind=config.task.kind, **task.always(config)
            )
            found = {}
            for name, held_out in validation.items():
                feed = loader(held_out, 0, len(held_out), config.data.workers, local)
                found[name] = evaluate_loss(loss, (sharding.place_batch(b, mesh, eval_rows, local) for b in feed))
            tokens = sum(f["tokens"] for f in found.values())
            each = {f"val_loss/{name}": f["loss"] for name, f in found.items()} if len(data.sources) > 1 else {}
            return {"val_loss": sum(f["loss"] * f["tokens"] for f in found.values()) / tokens} | each

        def measure(variables):
            lm = LM(model, None, {}, chatty, folder, ends)
            return compare.measure(lm, variables, data, config)

        # ---- the state before, and the state to go on from ---------------------------------------------------------
        before = None
        if config.evaluate.compare and generates:
            before_file = run_dir / "before.json"
            before = hosts.from_first(lambda: json.loads(before_file.read_text()) if before_file.exists() else None)
            if before is None:
                untuned = applied(state.trained, frozen)
                # Virtual tokens change the logits before they are trained: the model without them is the one to beat.
                before = measure({"params": untuned["params"]} if virtual else untuned)
                if first:
                    replace_text(before_file, json.dumps(before))
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

        # ---- training ----------------------------------------------------------------------------------------------
        trained_count, total_count = _count(program.trained), _count(program.base)
        share = trained_count / _count((program.trained, program.frozen))
        say(
            f"training {trained_count:,} of {total_count:,} parameters ({share:.2%}), {config.tuning.method}, "
            f"{steps:,} steps of {rows} rows, {len(batches):,} steps an epoch, learning rate {config.optim.lr:g}, "
            f"{'mesh ' + ' x '.join(f'{k}={n}' for k, n in mesh.shape.items() if n > 1) if mesh.size > 1 else 'one'} "
            f"{jax.devices()[0].device_kind}"
        )
        peak = PEAKS.get(jax.devices()[0].device_kind)
        length = max(T for _, T, _ in batches.shapes()) + virtual
        flops = flops_per_token(shape, program.base, program.trained, program.frozen, length)
        if features.usable(config, program.trained, steps, len(batches)):
            keep = functools.partial(
                features.Features, model=model, variables=applied(state.trained, frozen), mesh=mesh, folder=run_dir
            )
            batches, flops = keep(batches), features.flops_per_token(program.trained)
            validation = {name: keep(held_out) for name, held_out in validation.items()}
        progress = Progress(steps, resumed_from, flops, peak * mesh.size if peak else None)
        metrics = opened.enter_context(contextlib.closing(Metrics(run_dir, config, resumed_from))) if first else None
        opened.push(hosts.end_together)  # before what is open is closed, which waits for all processes
        local = sharding.local_rows(mesh, rows)
        shares = rows / (local.stop - local.start)  # of a batch, of which this process has one
        feed = loader(batches, resumed_from, steps - resumed_from, config.data.workers, local)
        place = functools.partial(sharding.place_batch, mesh=mesh, rows=rows, local=local)
        # The next batches are on their way to the devices while a step runs.
        feed = ahead(((place(b), int(shares * np.count_nonzero(b["segment_ids"]))) for b in feed), PLACED)
        stop = config.train.patience > 0 and stale >= config.train.patience
        step, loss, late = resumed_from, float("nan"), None

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
            state, report = program.step(state, frozen, arrays)
            step += 1
            progress.count(tokens)
            # Numbers are read when the next step is already running, so that the device never waits for the host.
            if late:
                tell(*late)
            validated = validation and (step % eval_every == 0 or step == steps)
            preempted = hosts.preempted(step)
            saved = step % save_every == 0 or step == steps or preempted
            late = (step, report) if step % config.train.log_every == 0 or validated or saved else None
            if validated or saved:  # never validate or keep a state before its loss is known to be a number
                tell(*late)
                late = None
            val_loss = None
            if validated:
                losses = validate(state.averaged)
                val_loss = losses["val_loss"]
                better = best is None or val_loss < best
                best, stale = (val_loss, 0) if better else (best, stale + 1)
                saved = saved or better
                note(step, losses)
                stop = config.train.patience > 0 and stale >= config.train.patience
            if saved or stop:
                record = {"config": config.to_dict(), "step": step, "best": best, "stale": stale}
                record["seconds"] = spent + time.perf_counter() - started
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
        del state
        files = {"metrics": str(run_dir / "metrics.jsonl"), "checkpoints": str(run_dir / "checkpoints")}
        lm = LM(model, None, {}, chatty, folder, ends)
        source = Trained(config.tuning.method, trained, frozen, spec, lm, base_name(config, folder), config.to_dict())
        for format in dict.fromkeys(formats):
            written = export.write(
                source, run_dir / format, format, dtype=config.export.dtype, shard_size=config.export.shard_size
            )
            files[format] = written["path"]
            if "merge_difference" in written:
                drift = written["merge_difference"]
                say(f"merged model: its logits differ from the adapted one's by at most {drift:.1e}")
        results = None
        if not generates:
            found = judge.finish(run_dir, model, applied(trained, frozen), data, config, words)
            results = hosts.from_first(lambda: found.results)
            say(found.text)
            files |= found.files
        elif config.evaluate.compare:
            after = measure(applied(trained, frozen))
            seconds = spent + time.perf_counter() - started
            results = hosts.from_first(lambda: compare.write_results(run_dir, before, after, seconds))
            say(compare.table(before, after, seconds))
            say(compare.side_by_side(before, after, config.evaluate.samples))
            files |= {"results": str(run_dir / "results.json"), "samples": str(run_dir / "samples.jsonl")}

    if data.gone:
        files["left out"] = str(run_dir / "removed.jsonl")
    history = read_metrics(run_dir)
    files["loss curve"] = hosts.from_first(lambda: str(plot_losses(history, run_dir / "loss.png")))
    result = Result(
        run_dir=str(run_dir), steps=step, resumed_from=resumed_from, stopped_early=stopped_early,
        train_loss=next((row["loss"] for row in reversed(history) if "loss" in row), loss), val_loss=best,
        best_step=best_step, seconds=spent + time.perf_counter() - started, results=results, files=files,
    )  # fmt: skip
    say(summary(result, config))
    return result


def indistinct_ends(frozen: dict, examples) -> dict[int, int]:
    """Last tokens of examples -> how many other tokens have the same row in a frozen head, where any has.

    Tokens that pretraining never met keep rows all alike, so that a frozen head gives them one and the same logit.
    """
    head = frozen.get("lm_head", {}).get("kernel", frozen.get("embed", {}).get("embedding"))
    if head is None:
        return {}
    found = {}
    for token in examples.ends():
        row = head[token]
        alike = int(jax.numpy.sum(jax.numpy.all(jax.numpy.abs(head - row) <= 1e-3 * jax.numpy.abs(row).max(), axis=1)))
        found |= {token: alike - 1} if alike > 1 else {}
    return found


def summary(result: Result, config) -> str:
    """The last lines of a run: what it reached, the files it wrote, and the commands that come next."""
    val = "" if result.val_loss is None else f", best validation loss {result.val_loss:.4f} at step {result.best_step}"
    whole = "full" if config.tuning.method == "full" else "merged" if METHODS[config.tuning.method].merge else "adapter"
    lines = [f"{result.steps:,} steps in {result.seconds:.0f} s, training loss {result.train_loss:.4f}{val}"]
    lines += [f"  {name:<12} {path}" for name, path in result.files.items()]
    says = [f"  ftjax predict --model {result.run_dir} --data FILE"] if TASKS[config.task.kind].judged else []
    if config.task.kind == "causal":
        says = [f"  ftjax generate --model {result.run_dir} --prompt '...'"]
    lines += [
        "next:",
        *says,
        f"  ftjax evaluate --model {result.run_dir} --data FILE",
        f"  ftjax export --run {result.run_dir} --out DIR --format {whole}",
    ]
    return "\n".join(lines)


def use_compilation_cache() -> None:
    """Keep compiled programs across runs, where JAX can: a run is never worse off without."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftjax" / "xla"
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _count(shapes) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes, is_leaf=is_quantised))
