"""Evaluating and answering with any model that `ftjax.load` reads: what the verbs `evaluate` and `generate` do."""

from __future__ import annotations

import functools

from ftjax import config as configs
from ftjax.data import read
from ftjax.data.batches import Batches
from ftjax.data.prepare import prepare
from ftjax.data.template import Rendered, asked, fill, parse
from ftjax.data.tokenise import encode_prompts
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge, said
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.lm import LM, continue_ids
from ftjax.loading import load
from ftjax.training.run_folder import read_record, run_config


def evaluate(model: str | LM, data: str | None = None, config=None, *, overrides=(), generate: bool = False) -> dict:
    """`loss` (nats a trained token), `perplexity`, `accuracy` and `tokens` on rows; with `generate` the scores of
    `evaluate.metrics` on one answer to each distinct prompt too, and the answers as `samples`.

    model: anything that ftjax.load reads, or an LM; data: rows as data.train takes them, None: the test part of the
    config's own data; config: how rows are read and answered, None: the run's own where `model` is a run folder, else
    the defaults; overrides: `dotted.key=value` on top. Raises FtjaxError for input that cannot be used.
    """
    config = _config(model, config, overrides)
    lm = model if isinstance(model, LM) else load(model)
    prepared, part = _rows(lm, data, config)
    if not len(part):
        raise FtjaxError("evaluate: the config's data has no test part; name rows with --data")
    if lm.kind != "causal":
        return judge.judge(lm, part, prepared, config)
    rows = config.evaluate.batch_size or config.train.batch_size or 16
    batches = Batches(part.examples, rows, prepared.max_length, buckets=config.data.buckets, shuffle=False)
    loss = functools.partial(sums, lm.model, lm.variables, head_chunk=config.model.head_chunk)
    report = evaluate_loss(loss, (batches[i] for i in range(len(batches))))
    if generate:
        scores, samples = compare.answers(lm, lm.variables, part, config)
        report |= scores | {"samples": samples}
    return report


def _rows(lm: LM, data: str | None, config, truths: bool = True):
    """(Data, the part of it that is asked for): rows as the model's task has them."""
    if data:
        config.data.update(train=data, validation="", test="", mixture=(), split=(1.0, 0.0, 0.0), limit=0)
    if lm.kind != "causal":
        config.task.update(kind=lm.kind, labels=lm.labels)
        if lm.kind == "embed":
            config.task.pool = lm.pooling.pool
            config.data.max_length = 2 * lm.pooling.max_length or config.data.max_length
    if not truths:
        config.data.update(label="", stratify="")
    prepared = prepare(config, lm.tokenizer, lm.max_tokens, pool=lm.model.config.head.pool, truths=truths)
    return prepared, prepared.train if data else prepared.test


def predict(model: str | LM, data: str, config=None, *, overrides=()) -> list[dict]:
    """What a model says of rows, a record of each: {"row", "text", "prediction", "probabilities"} with a head over
    labels of texts; for the other kinds of tasks see `say` or `lines` in ftjax.evaluation's tagged, spans and vectors.

    model, data, config, overrides: see `evaluate`; rows need no labels. Raises FtjaxError for a model that
    continues texts.
    """
    config = _config(model, config, overrides)
    lm = model if isinstance(model, LM) else load(model)
    if lm.kind == "causal":
        raise FtjaxError("predict: this model predicts the next token; `ftjax generate` continues texts")
    prepared, part = _rows(lm, data, config, truths=False)
    return judge.predict(lm, part, prepared, config)


def _config(model, config, overrides):
    if config is None:
        run = not isinstance(model, LM) and read_record(model) is not None
        config = run_config(model) if run else configs.default()
    config = configs.copy(config)
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
