"""Train the contenders that need it, and measure how all of them answer the same held-out rows.

N held-out rows, S seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax import config as configs
from ftjax import tasks
from ftjax.data.tokenise import encode_prompts
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare
from ftjax.evaluation.best import continued
from ftjax.evaluation.loss import sums, text_loss
from ftjax.evaluation.metrics import find, mean
from ftjax.evaluation.outputs import Asked
from ftjax.evaluation.support import unsupported_rate
from ftjax.lm import LM
from ftjax.loading import load
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.program import count
from ftjax.training.report import read_metrics
from ftjax.training.run_folder import read_record, run_config
from ftjax.verdict import cost
from ftjax.verdict.baselines import fitted
from ftjax.verdict.contenders import MAJORITY, Contender
from ftjax.verdict.forgetting import divergence
from ftjax.verdict.safeguards import refusals
from ftjax.verdict.setting import Setting, as_text, held_out_labels, labels, open_model, rows_for
from ftjax.verdict.sweep import run_joules, sweep


@dataclasses.dataclass
class Run:
    """A run folder with its resolved config, the rows of its metrics.jsonl, and whether the run has finished."""

    path: str
    config: object
    history: list[dict]
    finished: bool = True


class Passed(NamedTuple):
    """A checkpoint during a run: its mean scores, and its loss on general text in nats per token."""

    step: int
    scores: dict[str, float]
    forgetting: float


@dataclasses.dataclass
class Measured:
    """The measurements of one contender.

    `runs` has one entry for each trained seed, in order. `failed` has a line for each seed that ended without a model.
    """

    contender: Contender
    scores: dict[str, np.ndarray]  # metric -> scores (S, N)
    answers: list[str]  # of the first seed
    cost: cost.Cost
    runs: list[Run] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    forgetting: list[float] = dataclasses.field(default_factory=list)  # of each model, nats per token
    refused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # `unsafe`, `harmless` -> (models, rows)
    divergence: float | None = None  # KL of the first model from the base on its own answers, nats per token
    way: list[Passed] = dataclasses.field(default_factory=list)  # checkpoints of the first run, if it keeps several
    unsupported: float | None = None  # share of sentences that the prompt's passages do not support
    shortened: int = 0  # prompts that lost an example or a passage
    chat_unused: bool = False  # the model has a chat template, but rows are plain text


class General(NamedTuple):
    """Measurements of a model that are independent of the task: its loss on general text (nats per token), and its
    refusals."""

    forgetting: float | None
    refused: dict[str, np.ndarray]


def measure(contender: Contender, setting: Setting, known: dict[str, General], say: Callable = print) -> Measured:
    """Train a contender if needed, and measure its answers to all questions.

    Args:
        contender: The contender.
        setting: What all contenders share.
        known: {source: General} of models that were measured before. Added to.
        say: Called with each line for a person.

    Returns:
        The Measured.

    Raises:
        FtjaxError: If every run of the contender failed.
    """
    if contender.kind == MAJORITY:
        return _majority(contender, setting)
    config, asked = setting.config, len(setting.questions) or len(held_out_labels(setting))
    sources, seeds, failed = _models(contender, setting, say)
    done, out, opened = [], None, {}
    for source, seed in zip(sources, seeds, strict=True):
        if source not in opened:  # hold one model in memory at a time
            opened = {source: open_model(source, config) if source else setting.base}
        lm = opened[source]
        say(f"{contender.name}, seed {seed}: {asked:,} rows")
        scores, texts, spent, shortened = answer(contender, setting, lm, seed)
        done.append((scores, spent))
        if source not in known:
            known[source] = _general(lm, setting)
        if out is None:
            plain = bool(setting.questions) and setting.questions[0].rendered.messages is None
            chat = plain and bool(lm.tokenizer.chat_template)
            out = Measured(contender, {}, texts, None, failed=failed, shortened=shortened, chat_unused=chat)
            out.unsupported = _unsupported(contender, setting, texts)
            out.divergence = _divergence(lm, setting, texts) if source and setting.base else None
    models = dict.fromkeys(sources)
    out.runs = [run for run in map(open_run, models) if run]
    out.scores = {name: np.stack([scores[name] for scores, _ in done]) for name in done[0][0]}
    out.forgetting = [known[s].forgetting for s in models if known[s].forgetting is not None]
    out.refused = {name: np.stack([known[s].refused[name] for s in models]) for name in setting.sensitive}
    if contender.kind == "tuned" and setting.documents:
        out.way = _way(contender, setting, sources[0], seeds[0], say)
    out.cost = _cost(out.runs, lm, setting, [spent for _, spent in done])
    return out


def _models(contender: Contender, setting: Setting, say: Callable) -> tuple[list[str], list[int], list[str]]:
    """(sources, the seed of each, a line for each run that failed) of the models that answer for a contender."""
    comp, seeds = setting.config.compare, range(setting.config.seed, setting.config.seed + setting.config.compare.seeds)
    if contender.kind != "tuned":
        drawn = contender.how.shots and not contender.how.near and contender.shots
        drawn = drawn or contender.answering(setting.config).generate.temperature > 0
        seeds = list(seeds if drawn else seeds[:1])
        return [contender.source] * len(seeds), seeds, []
    say(f"{contender.name}: {comp.seeds} runs")
    outcomes = sweep(train_config(contender, setting), (), comp.seeds, briefly(say))
    failed = [f"seed {o.seed}: {o.failed}" for o in outcomes if o.failed]
    ended = [o for o in outcomes if not o.failed]
    if not ended:
        raise FtjaxError(f"{contender.name}: all its runs failed; the first reason: {failed[0]}")
    return [o.run_dir for o in ended], [o.seed for o in ended], failed


def briefly(say: Callable) -> Callable:
    """A `say` that leaves out texts of several lines, because the run's folder holds them too."""
    return lambda text: say(text) if "\n" not in text else None


def train_config(contender: Contender, setting: Setting):
    """The config of a contender's runs.

    `evaluate` (but its rows and batch_size), `generate` and `export` have fixed values, because what is trained does
    not depend on them. The comparison of other metrics then needs no new training.
    """
    c, plain = contender.config(setting.config), configs.default()
    c.run_dir = str(setting.folder / contender.folder)
    plain.evaluate.update(rows=c.evaluate.rows, batch_size=c.evaluate.batch_size)
    c.evaluate, c.generate = plain.evaluate, plain.generate
    c.export.formats = ()
    return c


def open_run(source: str) -> Run | None:
    """The run in a folder; None if the source is not a run folder."""
    if not source or (record := read_record(source)) is None:
        return None
    starts = record.get("starts") or [{"ended": "finished"}]  # an earlier version wrote none
    return Run(source, run_config(source), read_metrics(source), any(one.get("ended") == "finished" for one in starts))


def answer(contender: Contender, setting: Setting, lm: LM, seed: int):
    """Let a model answer as the contender does.

    Args:
        contender: The contender, which decides the prompts.
        setting: What all contenders share.
        lm: The model.
        seed: Seed of drawn examples and of sampling.

    Returns:
        ({metric: scores (N,)}, answers as texts, fields of Cost, number of prompts that were shortened).
    """
    return (_labelled if setting.config.task.kind != "causal" else _answered)(contender, setting, lm, seed)


def _answered(contender: Contender, setting: Setting, lm: LM, seed: int):
    """`answer` by generation."""
    config, comp = contender.answering(setting.config), setting.config.compare
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
    part, at = getattr(setting.data, config.evaluate.compare_on), [q.at for q in setting.questions]

    def chosen(few: Sequence[int]) -> dict[int, str]:
        """The answers to some prompts that are chosen among labels, by their place in `few`."""
        ids = [prompts.ids[n] for n in few]
        return compare.ranked(lm, lm.variables, part, [at[n] for n in few], ids, config)

    known = chosen(range(len(at)))
    _, samples = compare.answered(lm, lm.variables, prompts.ids, references, asked_of, config, until, known)
    scores = {n: _counted(n, [s["scores"][n] for s in samples]) for n in config.evaluate.metrics}
    texts = [s["prediction"] for s in samples]
    tried = float(np.mean([len(part.recipe(i).labels) or 1 for i in at]))
    return scores, texts, cost.request(lm, prompts.ids, texts, config, chosen, tried), prompts.shortened


def _counted(name: str, scores: list[float | None]) -> np.ndarray:
    """Scores (N,) of a metric. An answer without a score gets the worst one, so that contenders share all rows."""
    worst = find(name).worst
    if worst is None and None in scores:
        raise FtjaxError(
            f"evaluate.metrics: {name} returned no score for row {scores.index(None) + 1}; a comparison needs one for "
            "each row"
        )
    return np.array([worst if score is None else score for score in scores], float)


def _unsupported(contender: Contender, setting: Setting, texts: list[str]) -> float | None:
    """Mean share of an answer's sentences that its passages do not support; None without passages."""
    if not contender.how.passages:
        return None
    context = setting.library.context([q.rendered for q in setting.questions], contender.how)
    return mean(unsupported_rate(t, "\n".join(c)) for t, c in zip(texts, context, strict=True))


def _labelled(contender: Contender, setting: Setting, lm: LM, seed: int):
    """`answer` for rows with labels."""
    config, data = configs.copy(setting.config), rows_for(lm, setting)
    config.task.labels, part = lm.labels, getattr(data, config.evaluate.compare_on)
    whole = Asked(lm.model, lm.variables, lm.tokenizer, data, part, config)
    judge = tasks.find(config.task.kind).judge
    records = judge.lines(whole, judge.predict(whole))[: config.evaluate.compare_rows or None]
    right = np.array([record["prediction"] == record["label"] for record in records], float)
    examples = part.examples
    few = cost.middle(examples.length.tolist(), config.evaluate.batch_size or config.train.batch_size or 16)
    batch = whole._replace(part=dataclasses.replace(part, examples=examples.select(np.array(few))))
    judge.predict(batch)  # compile before the time is taken
    tokens = float(examples.length.mean())
    spent = cost.timed(lambda: judge.predict(batch), len(few))
    spent |= {"prompt_tokens": tokens, "request_flops": cost.forward_flops(lm, tokens)}
    return {tasks.find(config.task.kind).right: right}, [as_text(r["prediction"]) for r in records], spent, 0


def _majority(contender: Contender, setting: Setting) -> Measured:
    """Predict the most common label of train for every row."""
    config, data = setting.config, setting.data
    counts = Counter(labels(data, data.train))
    best = max(counts, key=counts.get)
    right = np.array([label == best for label in held_out_labels(setting)], float)
    return Measured(contender, {tasks.find(config.task.kind).right: right[None]}, [best] * len(right), cost.Cost(0))


def _general(lm: LM, setting: Setting) -> General:
    """Loss on general text, if the vocabulary has the base's size, and refusals of the sensitive prompts."""
    config, loss, refused = setting.config, None, {}
    if setting.documents and lm.model.config.vocab_size == setting.base.model.config.vocab_size:
        losses = functools.partial(sums, lm.model, lm.variables, head_chunk=config.model.head_chunk)
        rows = config.evaluate.batch_size or config.train.batch_size or 16
        loss = text_loss(losses, lm.tokenizer, setting.documents, max_positions=lm.max_tokens, batch_size=rows)["loss"]
    for name, rendered in setting.sensitive.items():
        ids = [i.tolist() for i in encode_prompts(rendered, lm.tokenizer, end=config.data.end)]
        refused[name] = refusals(continued(lm, lm.variables, ids, seed=config.seed, **config.generate.to_dict()))
    return General(loss, refused)


def _way(contender: Contender, setting: Setting, source: str, seed: int, say: Callable) -> list[Passed]:
    """Scores and forgetting of every checkpoint of a run; none if the config keeps only the latest and the best."""
    if setting.config.train.keep < 2:
        return []
    saved = Checkpoints(source, read_only=True)
    steps, found = saved.steps(), []
    saved.close()
    for step in steps:
        say(f"{contender.name}, seed {seed}, step {step}")
        lm = load(source, dtype=setting.config.model.dtype, checkpoint=step)
        general = _general(lm, setting)
        if general.forgetting is not None:
            scores = answer(contender, setting, lm, seed)[0]
            found.append(Passed(step, {name: float(x.mean()) for name, x in scores.items()}, general.forgetting))
    return found


def _divergence(lm: LM, setting: Setting, texts: list[str]) -> float | None:
    """KL(model || base) in nats per token, on the model's answers to the first `compare.divergence` questions. None if
    that is 0, if the vocabulary has another size than the base's, or if no answer has a token."""
    most = setting.config.compare.divergence
    if lm.model.config.vocab_size != setting.base.model.config.vocab_size or not most:
        return None
    asked = [q.rendered for q in setting.questions[:most]]
    prompts = encode_prompts(asked, lm.tokenizer, end=setting.config.data.end)
    answer_ids = lm.tokenizer(texts[:most], add_special_tokens=False)["input_ids"]
    pairs = [(p.tolist(), ids) for p, ids in zip(prompts, answer_ids) if ids]
    found = divergence(lm, setting.base, pairs, head_chunk=setting.config.model.head_chunk)
    return float(found.kl.sum() / found.tokens.sum()) if found.tokens.sum() else None


def _cost(runs: list[Run], lm: LM, setting: Setting, spent: list[dict]) -> cost.Cost:
    """The mean cost over runs and seeds. lm: the last of the contender's models."""
    fields = {name: _mean([s[name] for s in spent]) for name in spent[0]}
    if runs:
        examples = setting.data.train.examples
        steps = [run.history[-1]["step"] if run.history else 0 for run in runs]
        each = [cost.training(run.config, len(lm.labels), examples, n) for run, n in zip(runs, steps)]
        fields["trained"] = each[0][0]
        fields["stored"] = each[0][0] * np.dtype(lm.model.dtype).itemsize
        fields["train_flops"] = float(np.mean([flops for _, flops in each]))
        tokens = [n * run.config.train.batch_size * float(np.mean(examples.length)) for run, n in zip(runs, steps)]
        whole = [cost.run_seconds(run.path) for run in runs]
        taken = [cost.steps_seconds(run.history, n, s) for run, n, s in zip(runs, tokens, whole)]
        fields |= {"train_tokens": float(np.mean(tokens)), "run_seconds": float(np.mean(whole))}
        fields["train_seconds"] = float(np.mean(taken))
        fields["train_joules"] = _mean([run_joules(run.path) for run in runs])
    return cost.Cost(count(lm.params), **fields)


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))
