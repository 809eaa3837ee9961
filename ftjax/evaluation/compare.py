"""Evaluate one state of a model on held-out rows, and show two states side by side."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np

import ftjax
from ftjax import assets, cpus, tasks, xla
from ftjax import config as configs
from ftjax.data import store
from ftjax.data.batches import Batches, by_example
from ftjax.data.prepare import Part, fingerprint
from ftjax.data.tokenise import Example, answer_of
from ftjax.decoding import check_lengths, check_settings
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite
from ftjax.evaluation.best import check_choice, continued
from ftjax.evaluation.loss import evaluate_loss, read_documents, sums, text_loss
from ftjax.evaluation.metrics import find, score
from ftjax.evaluation.tables import grid
from ftjax.files import replace_json, write_jsonl
from ftjax.hub.fingerprint import of_named
from ftjax.lm import stop_tokens
from ftjax.models.transformer import max_tokens
from ftjax.objectives.causal import log_probs
from ftjax.progress import doing

LOWER = ("perplexity", "forgetting_loss")  # figures where less is better, besides those of METRICS
OF = " of "  # between a figure and the source of a mixture that it is of
TASKS = ("mean of tasks", "worst of tasks")  # figures over all sources


def is_higher(name: str) -> bool | None:
    """Whether more of a figure of `measure` is better; None: neither."""
    of = re.match(r".*?\.py:\w+|\w*", name)[0]  # the path of a user's own metric may contain OF too
    return name in TASKS or (False if of in LOWER else find(of).higher)


def settings(tokenizer, end_tokens, part, max_length: int, config) -> dict:
    """All that the figures of one state depend on besides its parameters, as plain data for JSON.

    Args:
        tokenizer: The model's tokenizer.
        end_tokens: Ids that end an answer.
        part: The held-out rows, a Part of ftjax.data.prepare.
        max_length: Most tokens of a row.
        config: The run's config.

    Returns:
        config.evaluate, config.generate and the seed, with digests of the rows and their encoding, of the tokenizer
        with its chat template, and of the files that config.evaluate names; and the number format of a quantised base.
    """
    unused = ("compare", "rows", "samples")  # they only affect training or the display
    ev = {key: value for key, value in config.evaluate.to_dict().items() if key not in unused}
    sources = configs.sources(config)
    if config.data.mixture:
        ev["sources"] = [(one.name, [configs.flat(one.config)[key] for key in configs.OWN]) for one in sources]
    rows = [(p.digest, p.kept.tolist(), dataclasses.asdict(p.recipe)) for p in part.pieces]
    found = {
        "ftjax": ftjax.__version__, "seed": config.seed, "evaluate": ev, "generate": config.generate.to_dict(),
        "rows": store.digest(rows), "tokenizer": fingerprint(tokenizer), "end_tokens": end_tokens,
        "max_length": max_length, "files": of_named(named_files(config)),
    }  # fmt: skip
    found |= {"quantise": config.model.quantise} if config.model.quantise != "none" else {}
    return json.loads(json.dumps(found))


def named_files(config) -> dict[str, str]:
    """{key: name} of the models, functions and texts by which a config scores answers."""
    metrics = [name for one in configs.sources(config) for name in one.config.evaluate.metrics if ":" in name]
    named = {f"evaluate.metrics {name}": name for name in metrics}
    named |= {"evaluate.forgetting": config.evaluate.forgetting, "generate.reward": config.generate.reward}
    return {key: name for key, name in named.items() if name}


def measure(lm, variables, data, config) -> dict:
    """Figures of one state of a model on the part `evaluate.compare_on`, as plain data.

    Args:
        lm: An LM, for its model, tokenizer and end tokens.
        variables: The Flax variables of this state.
        data: The rows, from ftjax.data.prepare.
        config: The run's config.

    Returns:
        `perplexity` per trained token over all rows (for preferences, over the chosen answers; not for tasks whose rows
        have no answers), the scores and `samples` of `by_source` and, if `evaluate.forgetting` is set,
        `forgetting_loss` on it in nats per token. Of a mixture also `perplexity of SOURCE`.

    Raises:
        FtjaxError: If the part has no rows.
    """
    ev, part = config.evaluate, getattr(data, config.evaluate.compare_on).desirable()
    need_rows(part, ev.compare_on)
    rows = ev.batch_size or config.train.batch_size or 16
    with cpus.dealt(variables, rows, lm.model.config.width) as variables:
        loss = functools.partial(sums, lm.model, variables, head_chunk=config.model.head_chunk)
        result = {}
        apart = {f"perplexity{OF}{one.name}": of for one, of in by_name(part, config)} if config.data.mixture else {}
        for name, of in {"perplexity": part, **apart}.items() if not tasks.find(config.task.kind).collect else ():
            examples = of.examples.first_texts()
            batches = Batches(examples, rows, data.max_length, buckets=config.data.buckets, shuffle=False)
            result[name] = evaluate_loss(loss, (batches[i] for i in range(len(batches))))["perplexity"]
        scores, samples = by_source(lm, variables, part, config)
        result |= scores
        if ev.forgetting:
            documents = read_documents(assets.resolve(ev.forgetting))
            limit = max_tokens(lm.model.config, variables)
            forgetting = text_loss(loss, lm.tokenizer, documents, max_positions=limit, batch_size=rows)
            result["forgetting_loss"] = forgetting["loss"]
    return result | {"samples": samples}


def need_rows(part: Part, name: str) -> None:
    """Raise FtjaxError if the part of evaluate.compare_on, which has this name, has no rows."""
    if not len(part):
        raise FtjaxError(
            f"evaluate.compare_on: the part {name} has no rows; set data.{name}, or its share in data.split"
        )


def by_name(part, config) -> list[tuple[configs.Source, Part]]:
    """(source, its examples) of each source of a config that has any in a part."""
    of = [(one, part.select(np.flatnonzero(part.source == i))) for i, one in enumerate(configs.sources(config))]
    return [(one, own) for one, own in of if len(own)]


def by_source(lm, variables, part, config) -> tuple[dict[str, float | None], list[dict]]:
    """As `answers`, for a part with the examples of one or several sources, each scored by its own metrics.

    Args:
        lm: An LM, for its model, tokenizer and end tokens.
        variables: The Flax variables.
        part: The rows, a Part of ftjax.data.prepare.
        config: The config.

    Returns:
        The result of `answers`. Of a mixture, figures are called `METRIC of SOURCE`, and there are two more, `mean of
        tasks` and `worst of tasks`: the mean and the least of the first metric of each source, as a share of the way
        from its worst to its best value. They are None if a metric has no such bounds or a score is undefined.
    """
    if not config.data.mixture:
        return answers(lm, variables, part, config)
    figures, samples, shares = {}, [], []
    for source, of in by_name(part, config):
        if not (named := source.config.evaluate.metrics):
            continue
        found, own = answers(lm, variables, of, source.config)
        figures |= {f"{name}{OF}{source.name}": value for name, value in found.items()}
        samples += [sample | {"source": source.name} for sample in own]
        first, value = find(named[0]), found[named[0]]
        worst, best = first.worst, first.best
        shares.append(None if None in (value, best, worst) else (value - worst) / (best - worst))
    if len(shares) > 1:
        figures |= dict(zip(TASKS, [None] * 2 if None in shares else [float(np.mean(shares)), min(shares)]))
    return figures, samples


def ranked(lm, variables, part, rows: list[int], prompts: list[list[int]], config) -> dict[int, str]:
    """{index of a prompt: its answer} of the prompts of rows with data.labels. The answer is the label whose tokens,
    with the token that ends the answer, have the greatest log-probability; of equal ones the first.

    Args:
        lm: An LM, for its model and tokenizer.
        variables: The Flax variables.
        part: The rows, a Part of ftjax.data.prepare.
        rows: (N,) index in the part of a row of each prompt.
        prompts: Ids of the N prompts.
        config: The config.

    Raises:
        FtjaxError: If a prompt with an answer has more tokens than the model has positions.
    """
    examples, limit, at_once = [], max_tokens(lm.model.config, variables), config.generate.batch_size
    texts: dict[int, list[str]] = {}
    for n, (i, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if not getattr(part.recipe(i), "labels", ()):
            continue
        answers = part.recipe(i).choices(lm.tokenizer, part.row(i), part.place(i))
        texts[n] = [text for text, _ in answers]
        for _, (ids, trained, *_) in answers:
            whole = np.append(np.int32(prompt), ids[trained.argmax() :])
            examples.append(Example(whole, np.arange(len(whole)) >= len(prompt)))
            if len(whole) > limit:
                raise FtjaxError(
                    f"{part.place(i)}: the prompt with an answer of data.labels has {len(whole):,} tokens, and the "
                    f"model {limit:,} positions; shorten the prompt, or remove the row"
                )
    if not examples:
        return {}
    longest = max(len(example.ids) for example in examples)
    width, what = lm.model.config.width, f"ranking the labels of {len(texts):,} prompts"
    with doing(what), cpus.dealt(variables, at_once, width) as variables:
        found = by_example(functools.partial(_log_probs, lm.model, variables), examples, at_once, longest)
    summed = np.array([x.sum() for x in found])
    if not np.isfinite(summed).all():
        raise NotFinite(f"data.labels: the log-probability of an answer is NaN or infinite. {WEIGHTS}")
    starts = np.cumsum([0, *map(len, texts.values())])
    return {n: names[int(summed[a : a + len(names)].argmax())] for (n, names), a in zip(texts.items(), starts)}


_log_probs = xla.jit(log_probs, static_argnums=0)


def answers(lm, variables, part, config) -> tuple[dict[str, float], list[dict]]:
    """Answer each of the first `evaluate.compare_rows` distinct prompts of a part once, by `config.generate` or, where
    data.labels is set, by `ranked`, and score it.

    Args:
        lm: An LM, for its model, tokenizer and end tokens.
        variables: The Flax variables.
        part: The rows, a Part of ftjax.data.prepare.
        config: The config.

    Returns:
        (a figure for each of `evaluate.metrics`, samples {"prompt", "references", "prediction", "scores"}). The
        references are those of all rows that share the prompt.

    Raises:
        FtjaxError: If a metric is unknown.
    """
    for name in config.evaluate.metrics:
        find(name)
    groups = {}
    for i, ids in enumerate(part.prompts(lm.tokenizer)):
        groups.setdefault(tuple(ids.tolist()), []).append(i)
    groups = dict(list(groups.items())[: config.evaluate.compare_rows or None])
    prompts = [list(ids) for ids in groups]
    references = [[part.reference(i, lm.tokenizer) for i in rows] for rows in groups.values()]
    first = [rows[0] for rows in groups.values()]
    asked, known = [part.row(i) for i in first], ranked(lm, variables, part, first, prompts, config)
    return answered(lm, variables, prompts, references, asked, config, known=known)


def check_answers(part, tokenizer, config, shape, virtual: int) -> None:
    """Raise the errors of `answers` that can be found without the model's parameters.

    Args:
        part: The rows, a Part of ftjax.data.prepare.
        tokenizer: The model's tokenizer.
        config: The config.
        shape: The ModelConfig.
        virtual: Number of virtual tokens before a prompt.

    Raises:
        FtjaxError: If a setting of config.generate cannot be used, or if the answer to a prompt would exceed the
            model's positions.
    """
    how = config.generate
    check_settings(how.max_new_tokens, how.temperature, how.top_k, how.top_p, how.batch_size)
    check_choice(how.best_of, how.reward, how.temperature)
    stop_tokens(tokenizer, how.stop)
    asked = enumerate(part.prompts(tokenizer))
    prompts = [ids.tolist() for i, ids in asked if not getattr(part.recipe(i), "labels", ())]  # others are ranked
    check_lengths(shape, virtual, prompts, how.max_new_tokens)


def answered(
    lm, variables, prompts: list[list[int]], references: list[list[str]], asked: list[dict], config, until: str = "",
    known: dict[int, str] | None = None,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """As `answers`, for prompts that are already encoded.

    Args:
        lm: An LM, for its model, tokenizer and end tokens.
        variables: The Flax variables.
        prompts: Ids of N prompts.
        references: The references of each prompt.
        asked: The row of each prompt.
        config: The config.
        until: Text that ends an answer. It is removed with all that follows it; empty: none.
        known: {index of a prompt: its answer} where it is known.
    """
    known = known or {}
    others = [prompt for n, prompt in enumerate(prompts) if n not in known]
    texts = continued(lm, variables, others, seed=config.seed, **config.generate.to_dict()) if others else []
    new = (answer_of(text.split(until)[0] if until else text) for text in texts)
    predictions = [known[n] if n in known else next(new) for n in range(len(prompts))]
    shown = lm.tokenizer.batch_decode(prompts, skip_special_tokens=True)
    samples = [
        {"prompt": p, "references": r, "prediction": t, "scores": {}}
        for p, r, t in zip(shown, references, predictions, strict=True)
    ]
    figures = {}
    for name in config.evaluate.metrics:
        figures[name], scores = score(name, predictions, references, asked, config.evaluate)
        for sample, value in zip(samples, scores, strict=True):
            sample["scores"][name] = value
    return figures, samples


def _figures(measured: dict) -> dict[str, float]:
    return {name: value for name, value in measured.items() if name != "samples"}


def table(before: dict, after: dict, seconds: float, quantise: str = "none") -> str:
    """The figures of two states before and after training as text, with their difference and which way is better.

    Args:
        before, after: The results of `measure`.
        seconds: Duration of the whole run.
        quantise: Number format of the base in both states.
    """
    lines = []
    for name, old in _figures(before).items():
        new = after[name]
        higher = is_higher(name)
        arrow = {True: " ↑", False: " ↓", None: ""}[higher]
        cells = ["undefined" if value is None else f"{value:.4g}" for value in (old, new)]
        if None not in (old, new):
            verdict = "same" if new == old else "" if higher is None else "better" if (new > old) == higher else "worse"
            cells += [f"{new - old:+.4g}", verdict]
        lines.append([f"{name}{arrow}", *cells])
    n, head = len(after["samples"]), [("", 0), ("before", 1), ("after", 1), ("difference", 1), ("", 0)]
    of = "" if quantise == "none" else f"; both with the base in {quantise}"
    how = f"↑ higher is better, ↓ lower is better; {n:,} prompts answered; {seconds:.0f} s in all{of}"
    return grid(head, lines) + how


def side_by_side(before: dict, after: dict, n: int) -> str:
    """`n` prompts at even distances among the samples, each with a reference and both answers, as text."""
    pairs = spread(list(zip(before["samples"], after["samples"], strict=True)), n)
    lines = [[old["prompt"], old["references"][0], old["prediction"], new["prediction"]] for old, new in pairs]
    head = [(title, 0) for title in ("prompt", "a reference", "before", "after")]
    return grid(head, lines, parted=True).rstrip("\n")


def spread(rows: list, n: int) -> list:
    """n rows at even distances, or all rows if there are fewer."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def write_results(run_dir: str | Path, before: dict, after: dict, seconds: float, made_by: dict) -> dict:
    """Write results.json, and samples.jsonl with one line per prompt.

    Args:
        run_dir: The run folder.
        before, after: The results of `measure` for the two states.
        seconds: Duration of the whole run.
        made_by: The `settings` of both.

    Returns:
        The content of results.json: {"before", "after", "seconds", "settings"}.
    """
    results = {"before": _figures(before), "after": _figures(after), "seconds": seconds, "settings": made_by}
    lines = []
    for old, new in zip(before["samples"], after["samples"], strict=True):
        row = {"prompt": old["prompt"], "references": old["references"]}
        row |= {"before": old["prediction"], "after": new["prediction"]}
        row |= {"scores": {"before": old["scores"], "after": new["scores"]}}
        row |= {"source": old["source"]} if "source" in old else {}
        lines.append(row)
    write_jsonl(Path(run_dir) / "samples.jsonl", lines)
    replace_json(Path(run_dir) / "results.json", results)
    return results
