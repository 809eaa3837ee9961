"""What a run is, found out before any weights are read: whatever can be wrong with its config, its model's files and
its rows is told here."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from ftjax import config as configs
from ftjax.data import chat_templates, labelled
from ftjax.data.batches import Batches
from ftjax.data.prepare import Data, prepare
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge
from ftjax.hub import families, fingerprint, resolve, tokenizer
from ftjax.lm import LM, compute_dtype
from ftjax.objectives import TASKS, Task
from ftjax.training import auto_mesh, export, sharding
from ftjax.training.program import check_attention, check_method, check_remat, check_rows, fill_defaults, with_task
from ftjax.training.run_folder import base_folder
from ftjax.tuning import METHODS, Method, Spec
from ftjax.tuning.adapters import Start

VALIDATIONS = 10  # a run, where the config does not say how often


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that can be started.

    config: with defaults, labels and mesh filled in; words: the tokenizer as its directory has it; chatty: with the
    chat template that the rows were shown by; ends: ids that end an answer; given: an adapter to begin with; formats:
    of what is exported; validation: batches by source; rows, eval_rows: of a batch.
    """

    config: Any
    folder: Path  # of the model
    base: dict  # its record, see fingerprint.record
    tokenizer_folder: Path | None  # where that is not `folder`
    spec: Spec
    dtype: Any  # of computation
    words: Any
    chatty: Any
    ends: tuple[int, ...]
    given: Start | None
    formats: tuple[str, ...]
    data: Data
    mesh: Any
    batches: Batches
    validation: dict[str, Batches]
    rows: int
    eval_rows: int
    steps: int
    eval_every: int
    save_every: int

    @property
    def method(self) -> Method:
        """The row of METHODS."""
        return METHODS[self.config.tuning.method]

    @property
    def task(self) -> Task:
        """The row of TASKS."""
        return TASKS[self.config.task.kind]

    @property
    def generates(self) -> bool:
        """Whether the model continues texts, rather than saying something of them."""
        return self.task.head == "causal"

    @property
    def virtual(self) -> int:
        """Virtual tokens before every segment."""
        return self.method.virtual_tokens(self.spec)

    @property
    def longest(self) -> int:
        """Tokens of the longest batch, virtual ones among them."""
        return max(T for _, T, _ in self.batches.shapes()) + self.virtual

    @functools.cached_property
    def settings(self) -> dict:
        """All that figures before and after training depend on, see compare.settings."""
        part = getattr(self.data, self.config.evaluate.compare_on)
        return compare.settings(self.chatty, self.ends, part, self.data.max_length, self.config)

    def lm(self, model) -> LM:
        """An LM without parameters, for functions that receive the variables separately."""
        return LM(model, None, {}, self.chatty, self.folder, self.ends, tokenizer_folder=self.tokenizer_folder)


def prepared(config, say) -> Job:
    """The Job of a config, which stays as it is. say: called with lines for a person.

    Raises FtjaxError for anything in the config, the model's files or the rows that cannot be used.
    """
    config = configs.copy(config)
    configs.validate(config)
    fill_defaults(config)
    method = METHODS[config.tuning.method]

    folder = base_folder(config)
    family, shape = families.read_config(folder)
    check_method(config, family, shape)
    given = Start(config.tuning) if config.tuning.init_from else None
    own = given.folder if given and tokenizer.has_tokenizer(given.folder) else None
    words = tokenizer.load_tokenizer(own or folder, folder)
    tokenizer.check_vocab(words, shape.vocab_size)
    if given and not own and tokenizer.chat_template(given.folder) not in ("", words.chat_template):
        raise FtjaxError(
            f"tuning.init_from: {given.folder} brings a chat template without a tokenizer. Copy the tokenizer files of "
            f"{folder} beside it, or remove the template if rows are not to be shown by it"
        )
    chatty = chat_templates.installed(config, words)
    ends = tokenizer.end_tokens(folder, chatty, chat_templates.ends_of_run(config, words))
    if config.tuning.prompt_init == "text":
        config.tuning.prompt_ids = tuple(words(config.tuning.prompt_text)["input_ids"])
    dtype = compute_dtype(config.model.dtype)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    if given:
        fingerprint.check_adapter(given.folder, folder)
        given.fill(spec)
    head = with_task(config, family, shape, folder, 1).head
    form = families.form_of(family, head)
    formats = tuple(export.resolve_format(config.tuning.method, f, form) for f in config.export.formats)
    for format in formats:
        resolve.check_out(Path(config.run_dir) / format)

    known = families.label_names(folder) if shape.head.task == head.task else ()
    longest = shape.max_positions - method.virtual_tokens(spec)
    data = prepare(config, words, longest, pool=head.pool, known=known)
    config.task.labels = data.labels
    shape = with_task(config, family, shape, folder, len(data.labels))
    spec = spec._replace(model=shape, names=families.linear_names(family, shape))

    if chosen := auto_mesh.settle(config, spec, auto_mesh.here(), data.max_length, dtype):
        say(chosen)
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    if chosen := auto_mesh.settle_remat(config, spec, auto_mesh.here(), mesh.shape, data.max_length, dtype):
        say(chosen)
    check_remat(config, mesh.devices.flat[0])
    rows, ways = config.train.batch_size, sharding.row_ways(mesh)
    eval_rows = -(-(config.evaluate.batch_size or rows) // ways) * ways
    batch = functools.partial(
        Batches, max_length=data.max_length, packing=config.data.packing, buckets=config.data.buckets, seed=config.seed,
        ways=mesh.shape["sequence"], **labelled.layout(config, words),
    )  # fmt: skip
    drawn, weights_of_classes = judge.by_class(config, data)
    batches = batch(data.train.examples, rows, class_weights=weights_of_classes, **drawn)
    validation = {}
    for index, name in enumerate(data.sources):
        held_out = data.validation.of_source(index)[: config.evaluate.rows or None]
        if len(held_out):
            validation[name] = batch(held_out, eval_rows, shuffle=False)
    lengths = sorted({T for _, T, _ in batches.shapes()})
    if chosen := check_attention(config, spec, mesh, dtype, lengths):
        say(chosen)
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(batches)))
    eval_every = config.train.eval_every or max(1, steps // VALIDATIONS)
    base = fingerprint.record(folder, config.model.path, own, given and given.folder)
    return Job(
        config, folder, base, own, spec, dtype, words, chatty, ends, given, formats, data, mesh, batches, validation,
        rows, eval_rows, steps, eval_every, config.train.save_every or eval_every,
    )  # fmt: skip
