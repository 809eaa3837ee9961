"""Everything that must be known of a run before any weights are read. All errors in its config, its model's files and
its rows are found here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax import config as configs
from ftjax import cpus, tasks
from ftjax.data import chat_templates
from ftjax.data.batches import Batches, Poisson
from ftjax.data.prepare import Data, Part, prepare
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge
from ftjax.evaluation.metrics import METRICS, find
from ftjax.hub import families, fingerprint, resolve, weights
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import LM, compute_dtype, with_tokens
from ftjax.progress import counted, doing
from ftjax.training import auto_mesh, export, privacy, sharding
from ftjax.training import program as programs
from ftjax.training.run_folder import base_folder
from ftjax.training.selection import Selection, selection
from ftjax.tree import flatten
from ftjax.tuning import METHODS, Method, Spec, ignored
from ftjax.tuning.adapters import Start
from ftjax.tuning.whole import without_form

VALIDATIONS = 10  # number of validations of a run, unless the config sets an interval
FEWEST = 4  # least number of them before rows are left out, so that the best of several can be chosen
LEAST_ROWS = 200  # least number of validation rows
SHARE = 0.2  # of the training's arithmetic for validations, unless the config sets their rows or interval


@dataclasses.dataclass(frozen=True)
class Base:
    """The files of the model that a run starts from, checked.

    Attributes:
        folder: Directory of the model.
        tokenizer_folder: That of the tokenizer, where it is another one.
        tokenizer: The tokenizer in the model's directory.
        chat_tokenizer: The tokenizer with the chat template that the rows were rendered by.
        ends: Ids of the tokens that end an answer.
        initial_adapter: The adapter that training starts from, or None.
        formats: Formats of the export.
        dtype: Dtype of computation.
        spec: The model and its tuning; without the head of the task, until the rows are read.
        pool: Which states the task's head reads.
        label_names: Those that the model's config gives.
    """

    folder: Path
    tokenizer_folder: Path | None
    tokenizer: Any
    chat_tokenizer: Any
    ends: tuple[int, ...]
    initial_adapter: Start | None
    formats: tuple[str, ...]
    dtype: Any
    spec: Spec
    pool: str
    label_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a run and their batches.

    Attributes:
        batches: Of the training rows.
        rows: Rows of a training batch.
        eval_rows: Rows of a validation batch.
        steps: Number of steps.
        batch: batch(examples, rows, ...) -> Batches in the same layout.
        secret: Of a private run, see privacy.secret_of.
        tokens: Tokens of all steps.
    """

    batches: Batches
    rows: int
    eval_rows: int
    steps: int
    batch: Callable[..., Batches]
    secret: str = dataclasses.field(repr=False)
    tokens: float


@dataclasses.dataclass(frozen=True)
class Job(Base, Steps):
    """A run that can be started.

    Attributes:
        config: The config with defaults, labels and mesh filled in.
        base_record: The record of the model's files, see fingerprint.record.
        data: The rows.
        mesh: The devices.
        validation: {source: its validation batches}.
        eval_every: Steps between validations.
        save_every: Steps between checkpoints.
        selection: The score that the best checkpoint is chosen by.
    """

    config: Any
    base_record: dict
    data: Data
    mesh: Any
    validation: dict[str, Batches]
    eval_every: int
    save_every: int
    selection: Selection

    @property
    def method(self) -> Method:
        """The row of METHODS."""
        return METHODS[self.config.tuning.method]

    @property
    def task(self) -> tasks.Task:
        """The task of task.kind."""
        return tasks.find(self.config.task.kind)

    @property
    def updates(self) -> int:
        """Steps that a collected batch is for; see Task.updates."""
        return self.task.updates(self.config)

    @property
    def generates(self) -> bool:
        """Whether the model continues texts, so that it can be scored by generated answers."""
        return self.task.head == "causal"

    @property
    def virtual(self) -> int:
        """Number of virtual tokens before every segment."""
        return self.method.virtual_tokens(self.spec)

    @property
    def longest(self) -> int:
        """Tokens of the longest batch, virtual tokens included."""
        collected = self.task.longest(self.config, self.data) if self.task.collect else 0
        return max(collected, *(T for _, T, _ in self.batches.shapes())) + self.virtual

    @functools.cached_property
    def settings(self) -> dict:
        """All settings that the scores before and after training depend on, see compare.settings."""
        part = getattr(self.data, self.config.evaluate.compare_on)
        return compare.settings(self.chat_tokenizer, self.ends, part, self.data.max_length, self.config)

    def lm(self, model) -> LM:
        """An LM without parameters, for functions that receive the variables separately."""
        return LM(model, None, {}, self.chat_tokenizer, self.folder, self.ends, tokenizer_folder=self.tokenizer_folder)


def prepared(config, say, recorded: int = 0) -> Job:
    """Check a config, its model's files and its rows, and return the Job. The config is not changed.

    Args:
        config: Of the run.
        say: Called with each line of the report for a person.
        recorded: Number of devices with which the run began; 0 for a new run.

    Raises:
        FtjaxError: For anything in the config, the model's files or the rows that cannot be used.
    """
    config = checked(config, say)
    base = opened(config, say)
    data, base = rows_of(config, base)
    mesh = devices(config, base.spec, data, base.dtype, say, recorded)
    steps = scheduled(config, data, mesh, base.tokenizer)
    if config.optim.warmup >= 1 and config.optim.warmup > steps.steps:
        say(
            f"optim.warmup={config.optim.warmup:g} is more than the {counted(steps.steps, 'step')} of the run: the "
            "learning rate rises over all of them, and reaches its peak at the last"
        )
    held_out, eval_every = validated(config, data, steps, say)
    validation = {}
    for index, name in enumerate(data.sources):
        if len(examples := held_out.of_source(index)):
            validation[name] = steps.batch(examples, steps.eval_rows, shuffle=False)
    for source in configs.sources(config):
        for name in source.config.evaluate.metrics:
            check_metric(config, name)
    figures = judge.check(config, data, base.tokenizer)
    virtual = METHODS[config.tuning.method].virtual_tokens(base.spec)
    select = selection(config, held_out, figures, base.chat_tokenizer, base.spec.model, virtual)
    task = tasks.find(config.task.kind)
    lengths = sorted({T for _, T, _ in steps.batches.shapes()})
    if task.collect:
        lengths = [data.max_length if config.data.packing else task.longest(config, data)]
    if chosen := programs.check_attention(config, base.spec, mesh, base.dtype, lengths):
        say(chosen)
    start = base.initial_adapter and base.initial_adapter.folder
    record = fingerprint.record(base.folder, config.model.path, base.tokenizer_folder, start, named_files(config))
    return Job(
        **vars(base), **vars(steps), config=config, base_record=record, data=data, mesh=mesh,
        validation=validation, eval_every=eval_every,
        save_every=rounded_up(config, config.train.save_every) or eval_every, selection=select,
    )  # fmt: skip


def checked(config, say):
    """A copy of a config, with the defaults of its task and method filled in."""
    config = configs.copy(config)
    configs.validate(config)
    programs.fill_defaults(config)
    privacy.check(config)
    if config.optim.ewc and not config.data.earlier:
        raise FtjaxError(
            'data.earlier: optim.ewc needs rows of earlier stages, such as ({"train": "earlier.jsonl"},); found none. '
            "A run of several stages fills it in"
        )
    if unread := ignored(config.tuning):
        say(f"no effect with tuning.method={config.tuning.method}: {', '.join(unread)}")
    for line in configs.idle(config):
        say(line)
    return config


def opened(config, say) -> Base:
    """Check the model's files, the initial adapter and the formats of the export. The config gets what they decide."""
    method, folder = METHODS[config.tuning.method], base_folder(config)
    family, shape = families.read_config(folder)
    programs.check_method(config, family, shape)
    programs.with_teacher(config, shape)
    initial_adapter = Start(config.tuning) if config.tuning.init_from else None
    own = initial_adapter.folder if initial_adapter and tokenizers.has_tokenizer(initial_adapter.folder) else None
    tokenizer, read = tokenizers.of_run(config, own or folder, folder)
    own = None if read == folder else read
    files, shape = shape.vocab_size, with_tokens(config, shape, tokenizer)
    if ids := config.tuning.token_ids:
        say(
            f"new tokens: {len(ids)} rows of a table of embeddings are trained, {shape.vocab_size - files} of them "
            f"new; for PEFT, resize the base first: base.resize_token_embeddings({shape.vocab_size})"
        )
    brought = tokenizers.chat_template(initial_adapter.folder) if initial_adapter and not own else ""
    if brought not in ("", tokenizer.chat_template):
        raise FtjaxError(
            f"tuning.init_from: {initial_adapter.folder} brings a chat template without a tokenizer. Copy the "
            f"tokenizer files of {folder} beside it, or remove the template if rows should not be rendered by it"
        )
    chat_tokenizer = chat_templates.installed(config, tokenizer)
    ends = tokenizers.end_tokens(folder, chat_tokenizer, chat_templates.ends_of_run(config, tokenizer))
    if config.tuning.prompt_init == "text":
        config.tuning.prompt_ids = tuple(tokenizer(config.tuning.prompt_text)["input_ids"])
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    if initial_adapter:
        fingerprint.check_adapter(initial_adapter.folder, folder)
        initial_adapter.fill(spec)
    head = programs.with_task(config, family, shape, folder, 1).head
    form = families.form_of(family, head)
    trained = {}
    if without_form(families.shapes(shape)):
        start = functools.partial(method.init, jax.random.key(0), spec=spec)
        trained = flatten(jax.eval_shape(start, weights.param_shapes(shape))[0])
    formats = tuple(export.resolve_format(config.tuning.method, f, form, trained) for f in config.export.formats)
    for format in formats:
        resolve.check_out(Path(config.run_dir) / format)
    known = families.label_names(folder) if shape.head.task == head.task else ()
    return Base(
        folder, own, tokenizer, chat_tokenizer, ends, initial_adapter, formats, compute_dtype(config.model.dtype),
        spec, head.pool, known,
    )  # fmt: skip


def rows_of(config, base: Base) -> tuple[Data, Base]:
    """Read and encode the rows. Returns them, and the Base whose spec has the head for their labels.

    The config records how they were read, so that rows that are given later are read by the same columns and labels
    and not by what is guessed.
    """
    task, shape, family = tasks.find(config.task.kind), base.spec.model, base.spec.family
    longest = shape.max_positions - METHODS[config.tuning.method].virtual_tokens(base.spec)
    with doing("reading and tokenising rows"):
        data = prepare(config, base.tokenizer, longest, pool=base.pool, known=base.label_names)
    if data.labels and not (config.task.labels or base.label_names) and config.task.labels_as == "auto":
        config.task.labels_as = "names"
    config.task.labels = data.labels
    if task.encode:
        recipes = [piece.recipe for part in (data.train, data.validation, data.test) for piece in part.pieces]
        for group, key in (config.task, "text"), (config.task, "pair"), (config.data, "label"):
            read = {getattr(recipe, key) for recipe in recipes}
            group[key] = read.pop() if len(read) == 1 else group[key]  # files and sources may name it differently
    shape = programs.with_task(config, family, shape, base.folder, len(data.labels))
    task.check(config, METHODS[config.tuning.method], base.spec, data)
    spec = base.spec._replace(model=shape, names=families.linear_names(family, shape))
    return data, dataclasses.replace(base, spec=spec)


def devices(config, spec: Spec, data: Data, dtype, say, recorded: int):
    """The mesh of a run. The config gets its sizes and the settings of the program that depend on them.

    Args:
        config: Of the run.
        spec: The model with its head.
        data: The rows.
        dtype: Of computation.
        say: Called with each line for a person.
        recorded: Number of devices with which the run began; 0 for a new run.
    """
    T = data.max_length if config.data.packing else float(data.train.examples.length.mean())
    count = auto_mesh.cpu_devices(config, spec, T, dtype, recorded)
    machine = auto_mesh.here(count)
    if chosen := auto_mesh.settle(config, spec, machine, data.max_length, dtype):
        say(chosen)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:count] if count < jax.device_count() else None)
    programs.check_rows(config, mesh, spec.model)
    if cpus.offered() and mesh.size > 1:
        say(f"{mesh.size} CPU devices on {cpus.cores()} cores share the rows; mesh.data=1 takes one device")
    if recorded not in (0, mesh.size):
        say(
            f"the run began with {recorded} devices and goes on with {mesh.size}: sums over rows are taken in another "
            "order, so its figures may differ in the last bits from here on"
        )
    if changed := auto_mesh.settle_unroll(config, mesh.devices.flat[0]):
        say(changed)
    if chosen := auto_mesh.settle_remat(config, spec, machine, mesh.shape, data.max_length, dtype):
        say(chosen)
    programs.check_remat(config, mesh.devices.flat[0])
    return mesh


def rounded_up(config, steps: int) -> int:
    """A number of steps, rounded up to a multiple of those for one collected batch, at which a run validates and
    saves."""
    updates = tasks.find(config.task.kind).updates(config)
    return -(-steps // updates) * updates


def scheduled(config, data: Data, mesh, tokenizer) -> Steps:
    """How many steps a run takes, and the batches of its rows. For a private run, the config gets its noise."""
    rows, ways, task = config.train.batch_size, sharding.row_ways(mesh), tasks.find(config.task.kind)
    eval_rows = -(-(config.evaluate.batch_size or rows) // ways) * ways
    layout = dict(
        max_length=data.max_length, packing=config.data.packing and not task.collect,
        buckets=1 if task.collect else config.data.buckets,  # prompts of a rollout are of all lengths
        seed=config.seed, ways=mesh.shape["sequence"], **task.layout(config, tokenizer),
    )  # fmt: skip
    batch = functools.partial(Batches, **layout)
    drawn, weights_of_classes = judge.by_class(config, data)
    copies, updates = task.copies(config), task.updates(config)
    batches = batch(data.train.examples, rows // copies, class_weights=weights_of_classes, **drawn)
    unit, epoch, secret = None, len(batches), ""
    if config.privacy.epsilon and config.privacy.unit:  # train.batch_size counts persons, and so does an epoch
        unit = privacy.units(config.privacy.unit, data.train)
        epoch = math.ceil(len(np.unique(unit)) / rows)
    steps = rounded_up(config, config.train.steps or max(1, math.ceil(config.train.epochs * epoch) * updates))
    if config.privacy.epsilon:
        privacy.settle(config, data.train, steps)
        secret = privacy.secret_of(config)
        layout["seed"] = privacy.number_of(secret, "draws")
        multiple = 8 * ways * config.train.accumulate  # so that rows can be computed in groups of several sizes
        batches = Poisson(
            data.train.examples, rows, steps=steps, multiple=multiple, unit=unit, most=config.privacy.unit_most,
            **layout,
        )  # fmt: skip
        rows = batches.batch_size
    tokens = steps * copies * data.train.examples.length.sum() / len(batches)
    return Steps(batches, rows, eval_rows, steps, batch, secret, tokens)


def validated(config, data: Data, steps: Steps, say) -> tuple[Part, int]:
    """The validation rows that a run uses, and the number of steps between validations."""
    validations, most = bounds(config, data.validation, steps.tokens)
    held_out = chosen_rows(config, data, most)
    eval_every = rounded_up(config, config.train.eval_every or max(1, steps.steps // validations))
    if len(held_out) < len(data.validation) and most or validations < VALIDATIONS:
        used, there = (int(part.numbers[-1]) + 1 for part in (held_out, data.validation))
        say(
            f"validation: {used:,} of {there:,} rows every {counted(eval_every, 'step')}, so "
            "that it takes about a fifth of the training at most; train.eval_every or evaluate.rows set it otherwise"
        )
    return held_out, eval_every


def named_files(config) -> dict[str, str]:
    """{key: name} of the models and functions, beside the base, that decide how a config trains."""
    rewards = {f"task.rewards[{i}]": name for i, name in enumerate(config.task.rewards)}
    named = {f"task.{name}": config.task[name] for name in ("reference", "environment")} | rewards
    return {key: name for key, name in named.items() if name and name not in METRICS}


def bounds(config, held_out: Part, trained: float) -> tuple[int, int]:
    """How often a run validates, and on how many rows of all sources (0: on all).

    If the config sets neither `train.eval_every` nor `evaluate.rows`, all validations together take at most about SHARE
    of the training's arithmetic, by counts of tokens: a forward pass is a third of a training step. First there are
    fewer validations, down to FEWEST, then fewer rows, down to LEAST_ROWS.

    Args:
        config: The whole config.
        held_out: All validation rows.
        trained: Number of tokens of all training steps.
    """
    if config.train.eval_every or config.evaluate.rows or not len(held_out):
        return VALIDATIONS, 0
    once, count = float(held_out.examples.length.sum()) / 3, int(held_out.numbers[-1]) + 1
    validations = min(VALIDATIONS, max(FEWEST, int(SHARE * trained / once)))
    rows = int(count * SHARE * trained / (validations * once))
    return validations, 0 if rows >= count else max(LEAST_ROWS, rows)


def chosen_rows(config, data: Data, most: int) -> Part:
    """The validation rows that a run uses: the first `evaluate.rows` of each source, or `most` rows spread over all.

    A row that is split into several examples is used with all of them, so that it can be scored.
    """
    part = data.validation
    if not len(part):
        return part
    number = part.numbers
    if 0 < most <= number[-1]:
        return part.select(np.flatnonzero(np.isin(number, np.linspace(0, number[-1], most).astype(int))))
    first = np.array([number[part.source == i].min(initial=len(part)) for i in range(len(data.sources))])
    return part.select(np.flatnonzero(number - first[part.source] < (config.evaluate.rows or len(part))))


def check_metric(config, name: str) -> None:
    """Raise FtjaxError if `evaluate.metrics` names a metric that does not exist."""
    judged = tasks.find(config.task.kind).judged
    if judged and name not in METRICS and ":" not in name:
        raise FtjaxError(
            f"evaluate.metrics: {name!r} is not a metric of generated answers, which this field is for. All scores of "
            f"task.kind {config.task.kind} are reported; to choose the checkpoint by one of them, set train.select"
        )
    find(name)
