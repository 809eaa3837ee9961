"""Evaluating and answering with any model that `ftjax.load` reads: what the verbs `evaluate` and `generate` do."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ftjax import config as configs
from ftjax import cpus, user_code
from ftjax.data import read
from ftjax.data.batches import Batches
from ftjax.data.prepare import Data, given, prepare
from ftjax.data.preview import too_long
from ftjax.data.template import Rendered, asked, fill, parse
from ftjax.data.tokenise import encode_prompts
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge, said
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.lm import LM, continue_ids
from ftjax.loading import load
from ftjax.training.run_folder import read_record, run_config


def evaluate(
    model: str | LM,
    data: str | None = None,
    config=None,
    *,
    overrides=(),
    generate: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Measure a model on rows.

    Rows that are given are only rendered and tokenised, all of them: what a run did to its training rows (cleaning,
    augmentation, limits) is not done to them. Code that a run folder names, a metric or an augmentation, is not run
    unless `config` or `overrides` name it.

    Args:
        model: anything that ftjax.load reads, or an LM.
        data: rows as data.train takes them; None: the test part of the config's own data.
        config: how rows are read and answered; None: the run's own where `model` is a run folder, else the defaults.
        overrides: `dotted.key=value` on top.
        generate: also answer each distinct prompt once, and score the answers by evaluate.metrics.
        say: called with lines for a person.

    Returns:
        `loss` (nats a trained token), `perplexity`, `accuracy` and `tokens`; with `generate` the scores too, and the
        answers as `samples`; of a model for labels the report of evaluation.labelled.

    Raises:
        FtjaxError: for input that cannot be used.
    """
    config = _config(model, config, overrides, data, say)
    lm = model if isinstance(model, LM) else load(model)
    prepared = _rows(lm, data, config, say)
    if lm.kind != "causal":
        return judge.judge(lm, prepared.test, prepared, config)
    rows = config.evaluate.batch_size or config.train.batch_size or 16
    batches = Batches(prepared.test.examples, rows, prepared.max_length, buckets=config.data.buckets, shuffle=False)
    with cpus.dealt(lm.variables, rows, lm.model.config.width) as variables:
        loss = functools.partial(sums, lm.model, variables, head_chunk=config.model.head_chunk)
        report = evaluate_loss(loss, (batches[i] for i in range(len(batches))))
    if generate:
        scores, samples = compare.answers(lm, lm.variables, prepared.test, config)
        report |= scores | {"samples": samples}
    return report


def _rows(lm: LM, data: str | None, config, say, truths: bool = True) -> Data:
    """Data whose part `test` holds the rows that are asked for, as the model's task has them."""
    if lm.kind != "causal":
        labels = lm.labels or tuple(f"LABEL_{i}" for i in range(lm.model.config.head.labels))  # as transformers does
        config.task.update(kind=lm.kind, labels=labels)
        if lm.kind == "embed":
            config.task.pool = lm.pooling.pool
            config.data.max_length = 2 * lm.pooling.max_length or config.data.max_length
    how = {"pool": lm.model.config.head.pool}
    if data:
        if not truths:
            config.data.label = ""
        prepared = given(config, data, lm.tokenizer, lm.max_tokens, truths=truths, **how)
    else:
        prepared = prepare(config, lm.tokenizer, lm.max_tokens, parts=("test",), **how)
    if not len(prepared.test):
        raise FtjaxError("evaluate: the config's data has no test part; name rows with --data")
    for line in [*prepared.notes, *(line for r in prepared.test.reports.values() for line in too_long(r))]:
        say(line)
    return prepared


def predict(model: str | LM, data: str, config=None, *, overrides=(), say: Callable[[str], None] = print) -> list[dict]:
    """What a model says of rows, a record of each in order: {"row", "text", "prediction", "probabilities"} with a head
    over labels of texts; for the other kinds of tasks see `say` or `lines` in ftjax.evaluation's tagged, spans and
    vectors.

    Args:
        model: anything that ftjax.load reads, or an LM.
        data: rows, as for `evaluate`; they need no labels.
        config: see `evaluate`.
        overrides: see `evaluate`.
        say: called with lines for a person.

    Raises:
        FtjaxError: for a model that continues texts, and for input that cannot be used.
    """
    config = _config(model, config, overrides, data, say)
    lm = model if isinstance(model, LM) else load(model)
    if lm.kind == "causal":
        raise FtjaxError("predict: this model predicts the next token; `ftjax generate` continues texts")
    prepared = _rows(lm, data, config, say, truths=False)
    return judge.predict(lm, prepared.test, prepared, config)


def _config(model, config, overrides, data: str | None = None, say=None):
    """A copy of the config that is asked for, or of the run's own without the code that it names."""
    if config is None and not isinstance(model, LM) and read_record(model) is not None:
        config = run_config(model)
        left = user_code.not_named_by(overrides, config.to_dict())
        if left and say:
            say(f"{model} names functions that are not run, since you did not name them: {user_code.told(left)}")
        config.evaluate.metrics = tuple(name for name in config.evaluate.metrics if ":" not in name)
        if data:
            config.evaluate.compare_rows = 0  # how many of its own rows the run answered
    config = configs.default() if config is None else configs.copy(config)
    configs.override(config, overrides)
    return config


def figures(report: dict) -> str:
    """A report of `evaluate` as lines for the terminal."""
    return said.text(report)


def answer(
    model: str | LM,
    prompts: list[str] = (),
    file: str | None = None,
    *,
    template: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    stop: tuple[str, ...] = (),
    **sampling,
) -> list[dict]:
    """One {"prompt", "completion"} for each of `prompts` and then for each row of `file`.

    file: rows with a column `prompt`, with `messages` or `conversations` (through the chat template, without an
    answer at their end), or with the columns of `template`; a run folder brings the template that it was trained with.
    chat: every prompt is what a user says, shown by the chat template; so it is where the run's `data.template` is
    set. sampling: see generate.generate.
    """
    config = _config(model, None, ())
    lm = model if isinstance(model, LM) else load(model)
    data = config.data

    def prompt(text: str, place: str = "--prompt") -> Rendered:
        if chat or data.template:
            return asked({"prompt": text}, place, data.template, data.system)
        return Rendered(prompt=text)

    rendered = [prompt(text) for text in prompts]
    if file:
        rows = read.read(file, "--prompts")
        places = [f"{file} row {i}" for i in range(1, len(rows) + 1)]
        before = template or data.prompt
        if not before and {"messages", "conversations"} & set(rows.column_names):
            rendered += [asked(row, place, data.template, data.system) for row, place in zip(rows, places)]
        else:
            only = rows.column_names == ["text"]
            parts = parse(before or ("{text}" if only else "{prompt}"), "--template")
            rendered += [prompt(fill(parts, row, place), place) for row, place in zip(rows, places)]
    ids = [i.tolist() for i in encode_prompts(rendered, lm.tokenizer, end=data.end, goes_on=True)]
    texts = continue_ids(lm, lm.variables, ids, max_new_tokens=max_new_tokens, stop=stop, **sampling)
    shown = [
        r.prompt if r.messages is None else t for r, t in zip(rendered, lm.tokenizer.batch_decode(ids), strict=True)
    ]
    return [{"prompt": p, "completion": c} for p, c in zip(shown, texts, strict=True)]
