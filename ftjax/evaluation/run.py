"""Evaluate, predict and answer with any model that `ftjax.load` reads: the verbs `evaluate`, `predict`, `generate`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import cpus, tasks, user_code
from ftjax.data import read
from ftjax.data.batches import Batches
from ftjax.data.prepare import Data, given, prepare
from ftjax.data.preview import too_long
from ftjax.data.template import Rendered, asked, fill, parse
from ftjax.data.tokenise import encode_prompts
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare, judge
from ftjax.evaluation.best import continued
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.hub import fingerprint, resolve
from ftjax.lm import LM, PREDICTS, recipe_in, stream_ids
from ftjax.loading import load
from ftjax.progress import doing
from ftjax.training.features import Features, reference
from ftjax.training.job import named_files
from ftjax.training.run_folder import read_record, run_config


def evaluate(
    model: str | LM,
    data: str | None = None,
    config: ConfigDict | None = None,
    *,
    overrides: Sequence[str] = (),
    generate: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate a model on rows.

    Every given row is rendered and tokenised, and nothing else is done to it: no cleaning, no augmentation, no limit.
    Code that a run folder names (a metric, an augmentation) is not run unless `config` or `overrides` name it.

    Args:
        model: An LM, or anything that ftjax.load reads.
        data: Rows, as `data.train` takes them; None: the test part of the config's own data.
        config: How rows are read and answered; None: the run's own config if `model` is a run folder, else the
            defaults, with the recipe of an exported or loaded model (LM.recipe).
        overrides: Texts `dotted.key=value` that change the config.
        generate: Also answer each distinct prompt once, and score the answers by `evaluate.metrics`.
        say: Called with each line for a person.

    Returns:
        `loss` (nats per trained token), `perplexity`, `accuracy` and `tokens`; for preferences the means of
        objectives.preference.sums and the number of `pairs`; with `generate` also the scores, and the answers as
        `samples`. For a model with a head over labels: the report of ftjax.evaluation.labelled.

    Raises:
        FtjaxError: If the model, the rows or the config cannot be used.
    """
    config = _config(model, config, overrides, data, say)
    if not isinstance(model, LM):
        _check_others(model, config)
    lm = model if isinstance(model, LM) else load(model)
    prepared = _rows(lm, data, config, say, overrides)
    task = tasks.find(config.task.kind)
    if generate and (lm.kind != "causal" or task.measure and config.task.environment):
        of = "plays whole episodes of task.environment" if lm.kind == "causal" else f"has the task {lm.kind}"
        raise FtjaxError(f"evaluate: --generate answers every prompt once, and this model {of}; leave it out")
    if lm.kind != "causal":
        return judge.judge(lm, prepared.test, prepared, config)
    if task.measure:
        measured = task.measure(lm, lm.variables, prepared.test, config)
        return measured | (_answers(lm, prepared, config) if generate else {})
    rows = config.evaluate.batch_size or config.train.batch_size or 16
    plain = Batches(
        prepared.test.examples, rows, prepared.max_length, buckets=config.data.buckets, shuffle=False,
        **task.layout(config, lm.tokenizer),
    )  # fmt: skip
    batches: Batches | Features = plain
    once = task.once(config)
    if once and task.texts == 2:  # a student is scored without its teacher
        compute = reference(config.task.reference, config.model.dtype, once, lm.tokenizer)
        batches = Features(plain, "reference", compute, (), np.float32)
    with cpus.dealt(lm.variables, rows, lm.model.config.width) as variables:
        loss = functools.partial(sums, lm.model, variables, kind=config.task.kind, **task.always(config))
        report: dict[str, Any] = evaluate_loss(loss, (batches[i] for i in range(len(batches))))
    if task.texts == 2:  # the loss is not that of tokens
        del report["perplexity"]
        report["pairs"] = report.pop("tokens")
    return report | (_answers(lm, prepared, config) if generate else {})


def _answers(lm: LM, prepared: Data, config) -> dict:
    """The scores of generated answers, and the answers as `samples`."""
    scores, samples = compare.by_source(lm, lm.variables, prepared.test.desirable(), config)
    return scores | {"samples": samples}


def _rows(lm: LM, data: str | None, config, say, overrides: Sequence[str], truths: bool = True) -> Data:
    """The rows to evaluate, as the part `test` of a Data, encoded for the model's task."""
    kind = config.task.kind
    if any(text.startswith("task.kind=") for text in overrides) and kind != lm.kind:
        if lm.kind != "causal" or tasks.find(kind).head != "causal":
            raise FtjaxError(f"task.kind: the model has the task {lm.kind}, found {kind!r}; leave task.kind out")
    if lm.kind != "causal":
        labels = lm.labels or tuple(f"LABEL_{i}" for i in range(lm.model.config.head.labels))  # as transformers does
        config.task.update(kind=lm.kind, labels=labels)
        if lm.kind == "embed":
            config.task.pool = lm.pooling.pool
            config.data.max_length = 2 * lm.pooling.max_length or config.data.max_length
    pool = lm.model.config.head.pool
    if data:
        config.data.mixture = ()  # the rows are of none of its sources
        if not truths:
            config.data.label = ""
        prepared = given(config, data, lm.tokenizer, lm.max_tokens, truths=truths, pool=pool)
    else:
        prepared = prepare(config, lm.tokenizer, lm.max_tokens, parts=("test",), pool=pool)
    if not len(prepared.test):
        raise FtjaxError("evaluate: the config has no test rows; name rows with --data, or set data.test")
    for line in [*prepared.notes, *(line for r in prepared.test.reports.values() for line in too_long(r))]:
        say(line)
    return prepared


def predict(
    model: str | LM,
    data: str,
    config: ConfigDict | None = None,
    *,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Predict the labels, tags, answers or vectors of rows.

    Args:
        model: An LM, or anything that ftjax.load reads, with a task other than `causal`.
        data: Rows, as for `evaluate`; they need no labels.
        config: See `evaluate`.
        overrides: See `evaluate`.
        say: Called with each line for a person.

    Returns:
        A dict for each row, in order: {"row", "text", "prediction", "probabilities"} for labels of texts; see `say` or
        `lines` in ftjax.tasks' modules tag, span and embed for the other tasks.

    Raises:
        FtjaxError: If the model's task is `causal`, or if the rows or the config cannot be used.
    """
    config = _config(model, config, overrides, data, say)
    lm = model if isinstance(model, LM) else load(model)
    if lm.kind == "causal":
        raise FtjaxError("predict: this model has the task causal (it continues text); use `ftjax generate`")
    prepared = _rows(lm, data, config, say, overrides, truths=False)
    return judge.predict(lm, prepared.test, prepared, config)


def _config(model, config, overrides, data: str | None = None, say=None):
    """A copy of the given config with overrides; without one, the run's own, less the code that it names."""
    if config is None and not isinstance(model, LM) and read_record(model) is not None:
        config = run_config(model)
        left = user_code.not_named_by(overrides, config.to_dict())
        if left and say:
            say(
                f"{model} names functions that are not run, because your command does not name them: "
                f"{user_code.listed(left)}"
            )
        without = lambda names: tuple(name for name in names if ":" not in name)  # noqa: E731
        config.evaluate.metrics, key = without(config.evaluate.metrics), "evaluate.metrics"
        config.data.mixture = [one | ({key: without(one[key])} if key in one else {}) for one in config.data.mixture]
        config.task.rewards = without(config.task.rewards)
        config.task.environment = ""
        if data:
            config.evaluate.compare_rows = 0  # how many of its own rows the run answered
    if config is None:  # an export, or a loaded model, predicts as the run that trained it
        recipe = model.recipe if isinstance(model, LM) else recipe_in(resolve.resolve(str(model)))
        config = configs.from_dict({key: value for key, value in recipe.items() if key in PREDICTS})
    config = configs.copy(config)
    configs.override(config, overrides)
    return config


def _check_others(model, config) -> None:
    """Raise FtjaxError if a reference or reward model that an evaluation of a run reads has changed since its
    training."""
    task, record = tasks.find(config.task.kind), read_record(model)
    kept = record["base"].get("others") if record and (task.measure or task.texts == 2 and task.once(config)) else None
    if not kept:
        return
    used = named_files(config).values()
    named = {key: name for key, name in named_files(run_config(model)).items() if name in used}
    kept = {file: digest for file, digest in kept.items() if file.split("/")[0] in named}
    if changes := fingerprint.changes({"others": kept}, {"others": fingerprint.of_named(named)}):
        raise FtjaxError(
            f"{model}: {'; '.join(changes)}, so that figures would not be those of the training. Put back the files "
            "of the training, or name others by an override"
        )


def _shared(config) -> tuple[ConfigDict, dict[str, dict[str, str]]]:
    """The `data` group of a config, with what all its sources have in common where a source may have its own prompt,
    template, system message or end; and {field: {source: value}} of those fields in which they differ. Then the system
    message is that of the group, which is for all conversations without one, and the others are empty."""
    data, sources = configs.copy(config).data, configs.sources(config)
    differing: dict[str, dict[str, str]] = {}
    for field in ("prompt", "template", "system", "end"):
        values = {source.name: source.data[field] for source in sources}
        same = len(set(values.values())) == 1
        if same:
            data[field] = next(iter(values.values()))
        elif field != "system":
            differing[field], data[field] = values, ""
    return data, differing


def answer(
    model: str | LM,
    prompts: Sequence[str] = (),
    file: str | None = None,
    *,
    template: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    stop: tuple[str, ...] = (),
    **sampling: Any,
) -> list[dict[str, str]]:
    """Answer prompts.

    Args:
        model: An LM, or anything that ftjax.load reads, whose task is `causal`.
        prompts: Texts.
        file: A file of rows with a column `prompt`, with `messages` or `conversations` (which must not end in an
            answer), or with the columns of `template`.
        template: Template of the prompt over the columns of `file`; None: that of the run, if `model` is a run folder.
        chat: Render each prompt by the chat template, as the message of a user. This is also done for a run whose
            `data.template` is set.
        max_new_tokens: Most tokens of an answer.
        stop: As in LM.generate.
        sampling: `best_of` and `reward`, see ftjax.evaluation.best; the others see ftjax.decoding.generate.

    Returns:
        {"prompt", "completion"} for each of `prompts`, and then for each row of `file`.
    """
    lm, ids, shown = _asked(model, prompts, file, template, chat)
    texts = continued(lm, lm.variables, ids, max_new_tokens=max_new_tokens, stop=stop, **sampling)
    return [{"prompt": p, "completion": c} for p, c in zip(shown, texts, strict=True)]


def stream_answer(
    model: str | LM, prompt: str, *, chat: bool = False, max_new_tokens: int = 64, **sampling: Any
) -> tuple[str, Iterator[str]]:
    """Answer one prompt, and hand out the answer while it is made.

    Args:
        model: As in `answer`.
        prompt: A text.
        chat: As in `answer`.
        max_new_tokens: Most tokens of the answer.
        sampling: `stop`, see LM.generate; the others see ftjax.decoding.generate.

    Returns:
        `prompt` and the pieces of `completion` of `answer`. The first piece is computed already.
    """
    lm, (ids,), (shown,) = _asked(model, [prompt], None, None, chat)
    pieces = stream_ids(lm, lm.variables, ids, max_new_tokens=max_new_tokens, **sampling)
    with doing("answering 1 prompt"):
        first = next(pieces, "")
    return shown, itertools.chain([first], pieces)


def _asked(model, prompts: Sequence[str], file: str | None, template: str | None, chat: bool):
    """The model, the token ids of all prompts and their texts as the model reads them; see `answer`."""
    config = _config(model, None, ())
    lm = model if isinstance(model, LM) else load(model)
    data, differing = _shared(config)

    def same(name: str) -> None:
        if name in differing:
            values = "; ".join(f"{source}: {value!r}" for source, value in differing[name].items())
            advice = "; name one by --template" if name == "prompt" else "; answer with LM.generate in Python"
            raise FtjaxError(f"generate: the sources of this run have several values of data.{name} ({values}){advice}")

    def prompt(text: str, place: str = "--prompt") -> Rendered:
        if chat or data.template:
            same("template")
            return asked({"prompt": text}, place, data.template, data.system)
        return Rendered(prompt=text)

    rendered = [prompt(text) for text in prompts]
    places = ["--prompt"] * len(prompts) if len(prompts) == 1 else [f"--prompt {n + 1}" for n in range(len(prompts))]
    if file:
        table = read.read_table(file, "--prompts")
        rows = [(row, table.place(i)) for i, row in enumerate(table)]
        places += [place for _, place in rows]
        before = template or data.prompt
        if not before and {"messages", "conversations"} & set(table.columns):
            same("template")
            rendered += [asked(row, place, data.template, data.system) for row, place in rows]
        else:
            if not template:
                same("prompt")
            only = table.columns == ["text"]
            parts = parse(before or ("{text}" if only else "{prompt}"), "--template", table.columns)
            rendered += [prompt(fill(parts, row, place), place) for row, place in rows]
    ids = [i.tolist() for i in encode_prompts(rendered, lm.tokenizer, places.__getitem__, data.end, True)]
    texts = lm.tokenizer.batch_decode(ids)
    return lm, ids, [r.prompt if r.messages is None else t for r, t in zip(rendered, texts, strict=True)]
