"""The contenders of a comparison: what each is, and how each scores on the same held-out rows.

N rows that are asked, S seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import assets
from ftjax import config as configs
from ftjax.data import chat_templates, read
from ftjax.data.prepare import Data, prepare
from ftjax.data.template import Rendered, asked, reference
from ftjax.data.tokenise import encode_prompts
from ftjax.errors import FtjaxError, nearest
from ftjax.evaluation import compare, judge
from ftjax.evaluation.loss import read_documents, sums, text_loss
from ftjax.evaluation.said import Asked
from ftjax.hub import families, resolve, tokenizer
from ftjax.lm import LM, continue_ids, open_base
from ftjax.loading import load
from ftjax.objectives import TASKS
from ftjax.training.program import with_task
from ftjax.training.report import read_metrics
from ftjax.training.run_folder import RUN
from ftjax.verdict import cost
from ftjax.verdict.baselines import PROMPTS, Library, Prompting, fitted
from ftjax.verdict.forgetting import divergence
from ftjax.verdict.safeguards import refusals
from ftjax.verdict.sweep import sweep

MAJORITY = "majority"
LABELLED = {"classify": "accuracy", "multilabel": "subset_accuracy"}  # task.kind -> what a row's score is called


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    kind: prompt (the config's model as it is) | majority | model (read from `source`) | tuned (with `settings`).
    """

    name: str
    kind: str
    how: Prompting = Prompting()
    shots: int = 0
    source: str = ""
    settings: dict = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Its folder's name beside those of others."""
        return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in self.name)

    def config(self, base):
        """A copy of a config with this contender's settings."""
        c = configs.copy(base)
        configs.override(c, [f"{key}={value!r}" for key, value in self.settings.items()])
        return c


def parse(config) -> list[Contender]:
    """config.compare.contenders. Raises FtjaxError for what cannot be one, before anything is run."""
    entries, found = config.compare.contenders, []
    if config.task.kind != "causal" and config.task.kind not in LABELLED:
        raise FtjaxError(f"compare: task.kind {config.task.kind}; expected causal or {', '.join(LABELLED)}")
    for number, entry in enumerate(entries, 1):
        said = f"compare.contenders entry {number}"
        contender = _named(entry, config, said) if isinstance(entry, str) else _described(entry, config, said)
        if contender.kind == "tuned":
            try:
                contender.config(config)
            except FtjaxError as error:
                raise FtjaxError(f"{said}: {str(error).removeprefix('--config.')}") from None
        if config.task.kind == "causal" and contender.kind == MAJORITY:
            raise FtjaxError(f"{said}: {MAJORITY} is of labels, and task.kind is causal")
        if config.task.kind != "causal" and (contender.kind == "prompt" or contender.how != Prompting()):
            raise FtjaxError(
                f"{said}: {contender.name!r} asks by a prompt, which is for task.kind causal; for labels there are "
                f"{MAJORITY}, runs, and what is trained"
            )
        found.append(contender)
    folders = [contender.folder for contender in found]
    twice = next((c.name for c in found if folders.count(c.folder) > 1), None)
    if twice:
        raise FtjaxError(f'compare.contenders: two are called {twice!r}; give each a "name" of its own')
    if len(found) < 2:
        raise FtjaxError(f"compare.contenders: expected two or more; found {len(found)}")
    return found


def _named(name: str, config, said: str) -> Contender:
    if name in PROMPTS:
        return Contender(name, "prompt", PROMPTS[name], config.compare.shots)
    if name == MAJORITY:
        return Contender(name, MAJORITY)
    source = name.removeprefix("run:")
    if not (Path(source).exists() or "/" in source or source.startswith(assets.PREFIX)):
        raise FtjaxError(
            f"{said}: {name!r}{nearest(name, [*PROMPTS, MAJORITY])}; expected one of {', '.join(PROMPTS)}, {MAJORITY}, "
            'a folder, a hub name, or a dict with a "name"'
        )
    return Contender(source, "model", source=source)


KEYS = ("name", "prompt", "shots", "model")


def _described(entry, config, said: str) -> Contender:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise FtjaxError(f'{said}: expected a text, or a dict with a "name"; found {entry!r}')
    wrong = next((key for key in entry if key not in KEYS and "." not in key), None)
    if wrong:
        raise FtjaxError(f"{said}: {wrong!r}{nearest(wrong, [*KEYS, *configs.flat(config)])}: no such key")
    how = entry.get("prompt", "zero-shot")
    if how not in PROMPTS:
        raise FtjaxError(f"{said}: prompt {how!r}{nearest(how, PROMPTS)}; one of {', '.join(PROMPTS)}")
    shots, source = entry.get("shots", config.compare.shots), entry.get("model", "")
    if not isinstance(shots, int) or shots < 0:
        raise FtjaxError(f"{said}: shots: expected a number of examples; found {shots!r}")
    settings = {key: value for key, value in entry.items() if key not in KEYS}
    if source and settings:
        raise FtjaxError(f'{said}: a "model" is compared as it is; {next(iter(settings))} is of what is trained')
    kind = "model" if source else "tuned" if settings or "prompt" not in entry else "prompt"
    return Contender(name, kind, PROMPTS[how], shots, source.removeprefix("run:"), settings)


# ---------------------------------------------------------------------------------------------- what is asked


class Question(NamedTuple):
    """A question, and the answers of all rows that ask it."""

    rendered: Rendered
    references: list[str]
    row: dict


def questions(part, most: int = 0) -> list[Question]:
    """The first `most` distinct questions of a part (0: all), each with the answers of all rows that ask it.

    Raises FtjaxError where rows ask nothing.
    """
    found: dict[str, Question] = {}
    for rendered, row in part.each():
        key = json.dumps([rendered.prompt, _before_answer(rendered), rendered.tools, rendered.template])
        if rendered.messages is None and not rendered.prompt:
            raise FtjaxError("compare: rows of plain text ask nothing; name their question by data.prompt")
        if key in found:
            found[key].references.append(reference(rendered))
        else:
            found[key] = Question(rendered, [reference(rendered)], row)
    return list(found.values())[: most or None]


def _before_answer(rendered: Rendered) -> list[dict]:
    messages = list(rendered.messages or ())
    last = max((k for k, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    return messages[:last]


class Setting(NamedTuple):
    """What all contenders share. questions: empty, and base: None, for labelled tasks."""

    config: object
    folder: Path  # of the runs
    data: Data
    questions: list[Question]
    library: Library
    base: LM | None
    documents: list[str]  # general text, on which forgetting is measured
    sensitive: dict[str, list[Rendered]]  # `unsafe`, `harmless` -> what is asked


def setting(config, folder: Path) -> Setting:
    """Reads rows and the base. Raises FtjaxError for a part without rows."""
    comp, on = config.compare, config.evaluate.compare_on
    causal = config.task.kind == "causal"
    if causal:
        base = open_model("", config)
        data = prepare(config, base.tokenizer, base.max_tokens)
    else:
        base, data = None, _labelled_data(config)
    part = getattr(data, on)
    if not len(part):
        raise FtjaxError(f"evaluate.compare_on: {on} has no rows; give data.{on}, or a share of data.split")
    forgetting = causal and config.evaluate.forgetting
    return Setting(
        config,
        folder,
        data,
        questions(part, config.evaluate.compare_rows) if causal else [],
        Library(config, data.train),
        base,
        read_documents(assets.resolve(config.evaluate.forgetting)) if forgetting else [],
        {n: _asked(comp[n], f"compare.{n}", config.data) for n in ("unsafe", "harmless") if causal and comp[n]},
    )


def _labelled_data(config) -> Data:
    """Rows with labels, as training with the config's own model reads them."""
    folder = resolve.resolve(config.model.path, config.model.revision)
    family, shape = families.read_config(folder)
    known = families.label_names(folder) if shape.head.task == TASKS[config.task.kind].head else ()
    pool = with_task(config, family, shape, folder, 1).head.pool
    return prepare(config, tokenizer.load_tokenizer(folder), shape.max_positions, pool=pool, known=known)


def _asked(source: str, key: str, data) -> list[Rendered]:
    """Prompts of a file: conversations by the chat template, where the task's rows are so or the file has messages."""
    table, out = read.read_table(assets.resolve(source), key), []
    for _, rows in table.chunks():
        for row in rows:
            place = table.place(len(out))
            chat = data.template or {"messages", "conversations"} & set(row)
            if not chat and not isinstance(row.get("prompt"), str):
                raise FtjaxError(f"{place}: {key}: expected a column `prompt` or `messages`; found {', '.join(row)}")
            out.append(asked(row, place, data.template, data.system) if chat else Rendered(row["prompt"]))
    return out


def open_model(source: str, config) -> LM:
    """A model as contenders are asked: with the config's chat template and the token that ends its answers.

    source: see ftjax.load; empty: the config's own model, as it is. Raises FtjaxError for a model of another task.
    """
    if not source:
        return open_base(resolve.resolve(config.model.path, config.model.revision), config.model.dtype, config)[0]
    lm = load(source, dtype=config.model.dtype)
    if lm.kind != config.task.kind:
        raise FtjaxError(f"{source}: is a model for the task {lm.kind}; the config's task.kind is {config.task.kind}")
    if (Path(source) / RUN).is_file():
        return lm
    words = chat_templates.installed(config, lm.tokenizer)
    return dataclasses.replace(lm, tokenizer=words, end_tokens=tokenizer.end_tokens(lm.folder, words, config.data.end))


# ---------------------------------------------------------------------------------------------- what they answer


@dataclasses.dataclass
class Run:
    """A run folder: its resolved config, and its metrics.jsonl."""

    path: str
    config: object
    history: list[dict]


@dataclasses.dataclass
class Measured:
    """How one contender did. runs: of each seed that was trained, in order; failed: what is said of those that ended
    without a model."""

    contender: Contender
    scores: dict[str, np.ndarray]  # metric -> (S, N)
    answers: list[str]  # of the first seed
    cost: cost.Cost
    runs: list[Run] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    forgetting: list[float] = dataclasses.field(default_factory=list)  # nats a token, of each model
    refused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # `unsafe`, `harmless` -> (models, rows)
    divergence: float | None = None  # KL of the first model from the base on its own answers, nats a token
    shortened: int = 0  # prompts that lost an example or a passage
    chat_unused: bool = False  # the model brings a chat template, and rows are asked as plain text


class General(NamedTuple):
    """What is asked of a model beside the task."""

    forgetting: float | None
    refused: dict[str, np.ndarray]


def measure(contender: Contender, setting: Setting, known: dict[str, General], say: Callable = print) -> Measured:
    """Train where that is asked for, and answer all questions; known: of models that were measured before, by source,
    added to. Raises FtjaxError where every run of a contender failed."""
    if contender.kind == MAJORITY:
        return _majority(contender, setting)
    config, asked = setting.config, len(setting.questions) or len(held_out_labels(setting))
    sources, seeds, failed = _models(contender, setting, say)
    done, out, opened = [], None, {}
    for source, seed in zip(sources, seeds, strict=True):
        if source not in opened:  # one model at a time
            opened = {source: open_model(source, config) if source else setting.base}
        lm = opened[source]
        say(f"{contender.name}, seed {seed}: {asked:,} rows")
        answer = _labelled if config.task.kind != "causal" else _answered
        scores, texts, spent, shortened = answer(contender, setting, lm, seed)
        done.append((scores, spent))
        if source not in known:
            known[source] = _general(lm, setting)
        if out is None:
            plain = bool(setting.questions) and setting.questions[0].rendered.messages is None
            chat = plain and bool(lm.tokenizer.chat_template)
            out = Measured(contender, {}, texts, None, failed=failed, shortened=shortened, chat_unused=chat)
            out.divergence = _divergence(lm, setting, texts) if source and setting.base else None
    models = dict.fromkeys(sources)
    out.runs = [run for run in map(open_run, models) if run]
    out.scores = {name: np.stack([scores[name] for scores, _ in done]) for name in done[0][0]}
    out.forgetting = [known[s].forgetting for s in models if known[s].forgetting is not None]
    out.refused = {name: np.stack([known[s].refused[name] for s in models]) for name in setting.sensitive}
    out.cost = _cost(out.runs, lm, setting, [spent for _, spent in done])
    return out


def _models(contender: Contender, setting: Setting, say: Callable) -> tuple[list[str], list[int], list[str]]:
    """(sources, the seed of each, what is said of runs that failed) of the models that answer for a contender."""
    comp, seeds = setting.config.compare, range(setting.config.seed, setting.config.seed + setting.config.compare.seeds)
    if contender.kind != "tuned":
        drawn = contender.how.shots and not contender.how.near and contender.shots
        seeds = list(seeds if drawn or setting.config.generate.temperature > 0 else seeds[:1])
        return [contender.source] * len(seeds), seeds, []
    say(f"{contender.name}: {comp.seeds} runs")

    def brief(text: str) -> None:  # what a run says in many lines lies in its folder too
        if "\n" not in text:
            say(text)

    outcomes = sweep(_to_train(contender, setting), (), comp.seeds, brief)
    failed = [f"seed {o.seed}: {o.failed}" for o in outcomes if o.failed]
    ended = [o for o in outcomes if not o.failed]
    if not ended:
        raise FtjaxError(f"{contender.name}: every run failed; {failed[0]}")
    return [o.run_dir for o in ended], [o.seed for o in ended], failed


def _to_train(contender: Contender, setting: Setting):
    """The config of a contender's runs. What does not change what is trained is as the default has it, so that asking
    for other metrics trains nothing anew."""
    c, plain = contender.config(setting.config), configs.default()
    c.run_dir = str(setting.folder / contender.folder)
    plain.evaluate.update(rows=c.evaluate.rows, batch_size=c.evaluate.batch_size)
    c.evaluate, c.generate = plain.evaluate, plain.generate
    c.export.formats = ()
    return c


def open_run(source: str) -> Run | None:
    """A run folder; None for any other model."""
    file = Path(source) / RUN
    if not source or not file.is_file():
        return None
    return Run(source, configs.from_dict(json.loads(file.read_text())["config"]), read_metrics(source))


def _answered(contender: Contender, setting: Setting, lm: LM, seed: int):
    """(metric -> (N,), answers, fields of Cost, prompts that were shortened)"""
    config, comp = configs.copy(setting.config), setting.config.compare
    config.seed = seed
    rows = [q.rendered for q in setting.questions]
    limit = lm.max_tokens - config.generate.max_new_tokens
    prompts = fitted(
        rows, setting.library.shots(rows, contender.how, contender.shots, seed),
        setting.library.context(rows, contender.how), lm.tokenizer, limit,
        between=comp.between, context=comp.context, end=config.data.end,
    )  # fmt: skip
    until = comp.between if contender.how.shots and rows[0].messages is None else ""
    references, asked_of = [q.references for q in setting.questions], [q.row for q in setting.questions]
    _, samples = compare.answered(lm, lm.variables, prompts.ids, references, asked_of, config, until)
    scores = {n: np.array([s["scores"][n] for s in samples], float) for n in config.evaluate.metrics}
    texts = [s["prediction"] for s in samples]
    return scores, texts, cost.request(lm, prompts.ids, texts, config), prompts.shortened


def _labelled(contender: Contender, setting: Setting, lm: LM, seed: int):
    """As `_answered`, of rows with labels."""
    config = configs.copy(setting.config)
    config.task.labels = lm.labels
    data = prepare(config, lm.tokenizer, lm.max_tokens, pool=lm.model.config.head.pool)
    part = getattr(data, config.evaluate.compare_on)
    whole = Asked(lm.model, lm.variables, lm.tokenizer, data, part, config)
    records = judge.lines(whole, judge.say(whole))[: config.evaluate.compare_rows or None]
    right = np.array([record["prediction"] == record["label"] for record in records], float)
    spent = {"prompt_tokens": float(part.examples.length.mean())}
    return {LABELLED[config.task.kind]: right}, [_text(r["prediction"]) for r in records], spent, 0


def _majority(contender: Contender, setting: Setting) -> Measured:
    """Each row gets the commonest label of train."""
    config, data = setting.config, setting.data
    told = Counter(_labels(data, data.train))
    best = max(told, key=told.get)
    right = np.array([label == best for label in held_out_labels(setting)], float)
    return Measured(contender, {LABELLED[config.task.kind]: right[None]}, [best] * len(right), cost.Cost(0))


def held_out_labels(setting: Setting) -> list[str]:
    """The label of each row that is judged; several as one text."""
    config, data = setting.config, setting.data
    return _labels(data, getattr(data, config.evaluate.compare_on))[: config.evaluate.compare_rows or None]


def _labels(data: Data, part) -> list[str]:
    targets = judge.truths(part)
    if targets.ndim == 1:
        return [data.labels[int(target)] for target in targets]
    return [_text([name for name, there in zip(data.labels, target) if there > 0]) for target in targets]


def _text(label) -> str:
    return label if isinstance(label, str) else ", ".join(label)


def _general(lm: LM, setting: Setting) -> General:
    """Loss on general text, where the vocabulary is the base's; refusals."""
    config, loss, refused = setting.config, None, {}
    if setting.documents and lm.model.config.vocab_size == setting.base.model.config.vocab_size:
        told = functools.partial(sums, lm.model, lm.variables, head_chunk=config.model.head_chunk)
        rows = config.evaluate.batch_size or config.train.batch_size or 16
        loss = text_loss(told, lm.tokenizer, setting.documents, max_positions=lm.max_tokens, batch_size=rows)["loss"]
    for name, rendered in setting.sensitive.items():
        ids = [i.tolist() for i in encode_prompts(rendered, lm.tokenizer, end=config.data.end)]
        refused[name] = refusals(continue_ids(lm, lm.variables, ids, seed=config.seed, **config.generate.to_dict()))
    return General(loss, refused)


def _divergence(lm: LM, setting: Setting, texts: list[str]) -> float | None:
    """KL(model || base), a token, on the model's answers to the first questions as the base is asked them; None where
    it has other tokens than the base, or nothing to say."""
    most = setting.config.compare.divergence
    if lm.model.config.vocab_size != setting.base.model.config.vocab_size or not most:
        return None
    asked = [q.rendered for q in setting.questions[:most]]
    prompts = encode_prompts(asked, lm.tokenizer, end=setting.config.data.end)
    told = lm.tokenizer(texts[:most], add_special_tokens=False)["input_ids"]
    found = divergence(lm, setting.base, [(p.tolist(), ids) for p, ids in zip(prompts, told) if ids])
    return float(found.kl.sum() / found.tokens.sum()) if found.tokens.sum() else None


def _cost(runs: list[Run], lm: LM, setting: Setting, spent: list[dict]) -> cost.Cost:
    """lm: the last of its models."""
    fields = {name: float(np.mean([s[name] for s in spent])) for name in spent[0]}
    if runs:
        train = setting.data.train.examples
        tokens = float(np.mean(train.length))
        each = [cost.training(run.config, len(lm.labels), tokens) for run in runs]
        steps = [run.history[-1]["step"] if run.history else 0 for run in runs]
        rows = [flops * n * run.config.train.batch_size for (_, flops), n, run in zip(each, steps, runs)]
        fields["trained"] = each[0][0]
        fields["stored"] = each[0][0] * np.dtype(lm.model.dtype).itemsize
        fields["train_flops"] = float(np.mean(rows))
        fields["train_seconds"] = float(np.mean([cost.run_seconds(run.path) for run in runs]))
    return cost.Cost(cost.count(lm.params), **fields)
