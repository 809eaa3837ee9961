"""What all contenders of a comparison share: the held-out rows, the base, and how models are opened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import assets, tasks
from ftjax import config as configs
from ftjax.data import chat_templates, read
from ftjax.data.prepare import Data, fingerprint, prepare
from ftjax.data.template import Rendered, asked, before_answer
from ftjax.data.tokenise import reference
from ftjax.errors import FtjaxError
from ftjax.evaluation.compare import need_rows
from ftjax.evaluation.loss import read_documents
from ftjax.hub import families, peft, resolve
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import LM, open_base
from ftjax.loading import load, shape_of
from ftjax.training.program import with_task
from ftjax.training.run_folder import RUN
from ftjax.verdict.baselines import Library
from ftjax.verdict.contenders import Contender

READING = ("data.", "model.", "task.")  # settings of a contender by which its model may read labelled rows differently


class Question(NamedTuple):
    """A question, and the answers of all rows that ask it; `row` is the first of them, at index `at` of the part."""

    rendered: Rendered
    references: list[str]
    row: dict
    at: int


def questions(part, tokenizer, end: str = "", most: int = 0) -> list[Question]:
    """The distinct questions of a part, each with the answers of all rows that ask it.

    Args:
        part: A Part of ftjax.data.prepare.
        tokenizer, end: See ftjax.data.tokenise.reference.
        most: Number of questions, the first ones; 0: all.

    Raises:
        FtjaxError: If a row of plain text has no prompt.
    """
    found: dict[str, Question] = {}
    for at, (rendered, row) in enumerate(part.each()):
        before = before_answer(rendered.messages or ())
        key = json.dumps([rendered.prompt, before, rendered.tools, rendered.template])
        if rendered.messages is None and not rendered.prompt:
            raise FtjaxError("compare: rows of plain text have no question; set data.prompt and data.completion")
        question = found.setdefault(key, Question(rendered, [], row, at))
        question.references.append(reference(rendered, tokenizer, end=end))
    return list(found.values())[: most or None]


class Setting(NamedTuple):
    """What all contenders share. For labelled tasks `questions` is empty and `base` is None."""

    config: object
    folder: Path  # folder of the runs
    data: Data
    questions: list[Question]
    library: Library
    base: LM | None
    documents: list[str]  # general text, on which forgetting is measured
    sensitive: dict[str, list[Rendered]]  # `unsafe`, `harmless` -> prompts
    read_by: tuple = ()  # what the tokens of labelled rows depend on, see `read_by`


def setting(config, folder: Path) -> Setting:
    """Read the rows and the base. Raises FtjaxError if the part of evaluate.compare_on has no rows."""
    comp, on = config.compare, config.evaluate.compare_on
    causal = config.task.kind == "causal"
    if causal:
        base = open_model("", config)
        data, by = prepare(config, base.tokenizer, base.max_tokens), ()
    else:
        base, (data, reader) = None, _labelled_data(config)
        by = read_by(*reader)
    part = getattr(data, on)
    need_rows(part, on)
    forgetting = causal and config.evaluate.forgetting
    return Setting(
        config,
        folder,
        data,
        questions(part, base.tokenizer, config.data.end, config.evaluate.compare_rows) if causal else [],
        Library(config, data.train),
        base,
        read_documents(assets.resolve(config.evaluate.forgetting)) if forgetting else [],
        {n: _asked(comp[n], f"compare.{n}", config.data) for n in ("unsafe", "harmless") if causal and comp[n]},
        by,
    )


def read_by(tokenizer, labels: tuple[str, ...], max_tokens: int, pool: str) -> tuple:
    """All that the tokens of labelled rows depend on besides the config."""
    return fingerprint(tokenizer), tuple(labels), max_tokens, pool


def _labelled_data(config) -> tuple[Data, tuple]:
    """Labelled rows, encoded as for training the config's own model, and the arguments of `read_by` for them."""
    folder = resolve.resolve_model(config.model.path, config.model.revision)
    family, shape = families.read_config(folder)
    known = families.label_names(folder) if shape.head.task == tasks.find(config.task.kind).head else ()
    pool = with_task(config, family, shape, folder, 1).head.pool
    tokenizer, _ = tokenizers.of_run(config, folder)
    data = prepare(config, tokenizer, shape.max_positions, pool=pool, known=known)
    return data, (tokenizer, data.labels, shape.max_positions, pool)


def rows_for(lm: LM, setting: Setting) -> Data:
    """The labelled rows as a model reads them. Raises FtjaxError as `rows_by`."""
    return rows_by(setting, lm.tokenizer, lm.labels, lm.max_tokens, lm.model.config.head.pool)


def rows_by(setting: Setting, tokenizer, names: tuple[str, ...], max_tokens: int, pool: str) -> Data:
    """The labelled rows as a model with this tokenizer and with labels of these names reads them.

    Raises FtjaxError for a label that the model does not have, and if its files or its labels make other held-out rows
    of them than the config's.
    """
    config = configs.copy(setting.config)
    config.task.labels = names
    if read_by(tokenizer, names, max_tokens, pool) == setting.read_by:
        return setting.data
    data = prepare(config, tokenizer, max_tokens, pool=pool)
    part, own = (getattr(of, config.evaluate.compare_on) for of in (setting.data, data))
    if any(not np.array_equal(a.kept, b.kept) for a, b in zip(part.pieces, own.pieces, strict=True)):
        raise FtjaxError("data.long: drop leaves out other held-out rows by this model's tokenizer; set it to truncate")
    for i, (truth, label) in enumerate(zip(labels(setting.data, part), labels(data, own), strict=True)):
        if truth != label:
            raise FtjaxError(
                f"{part.place(i)}: has the label {truth!r} by the names of the config's labels "
                f"({', '.join(setting.data.labels)}), and {label!r} by those of this model ({', '.join(names)}); "
                "write the names of the labels into the rows, in place of their ids"
            )
    return data


def check(contenders: Sequence[Contender], setting: Setting) -> None:
    """Raise FtjaxError for a contender whose model is not there or would be for another task, or that cannot be scored
    on labelled rows."""
    for one in contenders:
        own, kind = one.config(setting.config), setting.config.task.kind
        try:
            if one.kind == "model":
                shape_of(one.source) if setting.base else rows_for(open_model(one.source, setting.config), setting)
            elif own.task.kind != kind and not (setting.base and tasks.find(own.task.kind).head == "causal"):
                raise FtjaxError(f"task.kind: {own.task.kind}, and the comparison is of {kind}; expected the same task")
            elif not setting.base and any(key.startswith(READING) for key in one.settings):
                rows_by(setting, *_labelled_data(own)[1])
        except FtjaxError as error:
            raise FtjaxError(f"compare.contenders: {one.name}: {error}") from error


def _asked(source: str, key: str, data) -> list[Rendered]:
    """Prompts of a file. They are conversations in the chat template if `data.template` is set or a row has messages,
    else plain text."""
    table, out = read.read_table(assets.resolve(source), key), []
    for index, row in enumerate(table):
        place = table.place(index)
        chat = data.template or {"messages", "conversations"} & set(row)
        if not chat and not isinstance(row.get("prompt"), str):
            raise FtjaxError(f"{place}: {key}: expected a column `prompt` or `messages`; found {', '.join(row)}")
        out.append(asked(row, place, data.template, data.system) if chat else Rendered(row["prompt"]))
    return out


def open_model(source: str, config) -> LM:
    """Open a model to answer as contenders do: with the config's chat template and the token that ends its answers.

    source: see ftjax.load; empty: the config's own model without training. Raises FtjaxError if the model's task is
    another one.
    """
    if not source:
        return open_base(resolve.resolve_model(config.model.path, config.model.revision), config.model.dtype, config)[0]
    run = (Path(source) / RUN).is_file()
    whole = not run and not ((folder := resolve.resolve(source)) / peft.CONFIG).is_file()
    if whole:  # it gets the tokens of data.add_tokens too
        lm, _ = open_base(folder, config.model.dtype, config, quantise="none")
    else:
        lm = load(source, dtype=config.model.dtype)
    if lm.kind != config.task.kind:
        raise FtjaxError(
            f"{source} is a model for the task {lm.kind}, and task.kind is {config.task.kind}; expected the same task"
        )
    if run or whole:
        return lm
    tokenizer = chat_templates.installed(config, lm.tokenizer)
    ends = tokenizers.end_tokens(lm.folder, tokenizer, chat_templates.ends_of_run(config, lm.tokenizer))
    return dataclasses.replace(lm, tokenizer=tokenizer, end_tokens=ends)


def held_out_labels(setting: Setting) -> list[str]:
    """The label of each row that is evaluated; several labels are joined into one text."""
    config, data = setting.config, setting.data
    return labels(data, getattr(data, config.evaluate.compare_on))[: config.evaluate.compare_rows or None]


def labels(data: Data, part) -> list[str]:
    """The label of each example of a part; several labels are joined into one text."""
    targets = part.examples.targets[part.examples.first]
    if targets.ndim == 1:
        return [data.labels[int(target)] for target in targets]
    return [as_text([name for name, there in zip(data.labels, target) if there > 0]) for target in targets]


def as_text(label) -> str:
    """One label as it is; several labels with commas between them."""
    return label if isinstance(label, str) else ", ".join(label)
