"""The start of a run: from weight files to the state before the first step, and the scores before training."""

from __future__ import annotations

import functools
import math
import re
import warnings
from pathlib import Path

import jax
import numpy as np

from ftjax import seals
from ftjax.data.batches import loader
from ftjax.evaluation import compare
from ftjax.evaluation.loss import evaluate_loss, sums
from ftjax.files import replace_json
from ftjax.foreign import read_json
from ftjax.hub import families, weights
from ftjax.models.quantised import dequantised
from ftjax.objectives import hidden
from ftjax.progress import doing
from ftjax.training import hosts, selection, sharding
from ftjax.training.job import Job
from ftjax.training.program import Program, check_new_head
from ftjax.training.run_folder import keep_start
from ftjax.tree import flatten


def first_state(job: Job, program: Program, say) -> tuple:
    """(State, frozen) before the first step. Weights are read directly to the devices that hold them.

    Raises FtjaxError for weights that do not fit the model or are not finite, and for a new head that would not be
    trained.
    """
    config, spec = job.config, job.spec
    with doing("reading the model's weights"):
        base = weights.read_params(
            job.folder, spec.family, spec.model, program.base_places, lambda path: program.read_dtype,
            quantise=program.quantise, new_head=None if job.generates else jax.random.key(config.seed), given_away=True,
            new_rows=config.seed,
        )  # fmt: skip
        weights.check_finite(job.folder, base, spec.family, spec.model)
    if not job.generates:
        new = weights.head_is_new(job.folder, spec.family, spec.model)
        check_new_head(new, program.trained, config)
        for line in about_head(job, new):
            say(line)
    for line in (*about_experts(spec.model, program.trained), *about_noise(job)):
        say(line)
    start, (expected, _) = job.initial_adapter, hidden.divided(program.trained)
    made_elsewhere = start.trained(base, spec, expected) if start else None
    with warnings.catch_warnings():
        # Kernels of a stack that is split in two are donated in one shape and returned in others.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        trained, frozen = program.begin(jax.random.key(config.seed), base)
    frozen = keep_start(job.method, frozen, Path(config.run_dir))
    del base  # donated: its frozen parameters are in `frozen` now, the others in `trained`
    if start:
        places, _ = hidden.divided(program.trained_places)
        made_elsewhere = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), made_elsewhere, expected)
        trained = trained | jax.device_put(made_elsewhere, places)
    rest = "lm_head" not in trained or config.tuning.token_ids  # of a head of which rows are trained, the others
    fixed = frozen if job.generates and rest else {}
    for token, alike in indistinct_ends(fixed, job.data.train.examples).items():
        if token in config.tuning.token_ids:
            continue  # its row is trained
        say(
            f"warning: answers end with {job.tokenizer.convert_ids_to_tokens(token)!r}, whose row of the frozen head "
            f"is that of {alike} other tokens: it was never pretrained, and cannot be learned now. Set data.end to a "
            "token that was"
        )
    return program.init_state(trained), frozen


def about_experts(shape, trained: dict) -> list[str]:
    """Lines that warn of a model's experts, and of dense parts that have no adapters, if they are not trained.

    trained: tree of the trained parameters.
    """
    shared = (
        "warning: the dense feed-forward parts beside the experts, or in layers without experts, are not trained: they "
        "get no adapter, because peft takes their names for those of experts; full and last_layers train them"
    )
    paths, there = flatten(trained), any(path.startswith(families.DENSE) for path in families.shapes(shape))
    lines = [shared] * (there and not any(path.removeprefix("top_").startswith(families.DENSE) for path in paths))
    own = any(path.endswith("/experts") or path.startswith(families.EXPERTS) for path in paths)
    if not shape.experts or own:
        return lines
    sizes = {path: math.prod(size) for path, size in families.shapes(shape).items()}
    share = sum(size for path, size in sizes.items() if path.endswith("/experts")) / sum(sizes.values())
    return [
        *lines,
        f"warning: the experts, {share:.0%} of the model's parameters, and their routers are not trained. Add "
        "gate_up_proj and down_proj to tuning.targets for LoRA on the experts; full and last_layers train all of them",
    ]


def about_noise(job: Job) -> list[str]:
    """A line about the dropout and noise of config.json, which transformers applies and this run does not."""
    file = job.folder / "config.json"
    hf = families.text_part(read_json(file), job.spec.family, str(file))
    kinds = "dropout|pdrop|jitter" if job.config.train.dropout is None else "jitter"
    found = ", ".join(f"{key} = {rate}" for key, rate in hf.items() if re.search(kinds, key) and rate)
    return [f"no effect: {found} of config.json; a run has the dropout of train.dropout alone"] if found else []


def about_head(job: Job, new: list[str]) -> list[str]:
    """Lines that say which modules of the head are newly initialised and why, and what happens to the labels of a head
    that is kept.

    new: the modules of the head that are not read from the model's files.
    """
    own, head = families.read_config(job.folder)[1].head, job.spec.model.head
    if new:
        other = f" (the model's own is for {own.labels} labels, and the run has {head.labels})"
        return [f"new, and trained whole: {', '.join(new)}{other if own.labels and 'head/out' in new else ''}"]
    known, names = families.label_names(job.folder), tuple(job.config.task.labels)
    unnamed = tuple(f"LABEL_{i}" for i in range(len(known)))
    if own.task != head.task or known in (names, unnamed):
        return []
    return [
        f"warning: the model's head has the labels {', '.join(known)}, and the run starts from it with "
        f"{', '.join(names)} in their places"
    ]


def indistinct_ends(frozen: dict, examples) -> dict[int, int]:
    """Last tokens of examples that a frozen head cannot tell from others: {token id: number of other tokens with the
    same row}.

    Tokens that never occurred in pretraining may have equal rows in the head, so that a frozen head gives them equal
    logits.
    """
    head = frozen.get("lm_head", {}).get("kernel", frozen.get("embed", {}).get("embedding"))
    if head is None:
        return {}
    head, found = dequantised(head), {}
    for token in examples.ends():
        alike = int(_alike(head, token))
        found |= {token: alike - 1} if alike > 1 else {}
    return found


@jax.jit  # one program, and no copy of the head
def _alike(head, token):
    """Number of rows of a head (V, D) that equal the row of a token to a thousandth of its largest value, itself
    included."""
    apart = jax.numpy.abs(head - head[token]).max(axis=1)
    return jax.numpy.sum(apart <= 1e-3 * jax.numpy.abs(head[token]).max())


def untuned(job: Job, program: Program, trained: dict, frozen: dict, say) -> dict | None:
    """Scores and answers before training, if the config asks for them, else None. They are kept in the run folder with
    their settings, and are measured again if these differ."""
    if not (job.config.evaluate.compare and job.generates):
        return None
    file = Path(job.config.run_dir) / "before.json"
    again = "the model before training is measured again"
    kept, there = hosts.from_first(lambda: [seals.opened(file), file.exists()])
    if kept:
        changed = [key for key, value in job.settings.items() if kept["settings"].get(key) != value]
        if not changed:
            return kept["measured"]
        say(f"{file}: was measured with another {', '.join(changed)}; {again}")
    elif there:
        say(f"{file}: is damaged, or an earlier version wrote it; {again}")
    variables = program.variables(trained, frozen)
    # Untrained virtual tokens change the logits, so the model without them is measured.
    variables = {"params": variables["params"]} if job.virtual else variables
    with doing("answering with the model as it is, before training"):
        before = compare.measure(job.lm(program.model), variables, job.data, job.config)
    if jax.process_index() == 0:
        replace_json(file, seals.sealed({"settings": job.settings, "measured": before}))
    return before


def validate(job: Job, program: Program, variables: dict, validation: dict) -> dict[str, float]:
    """Validate a model.

    Args:
        job: The run.
        program: The compiled functions.
        variables: Flax variables of the model.
        validation: {source: batches}, which may carry hidden states, see ftjax.training.features.

    Returns:
        `val_loss`, `accuracy` where the task has one, and the task's further means as `val_NAME` over all sources. If
        there are several sources, also `val_loss/NAME` and `val_accuracy/NAME` of each, and the mean and the greatest
        of these losses as `val_mean_loss` and `val_worst_loss`.
    """
    local = sharding.local_rows(job.mesh, job.eval_rows)
    kind = job.config.task.kind
    loss = functools.partial(sums, program.model, variables, kind=kind, **job.task.always(job.config))
    if job.task.measure:
        found = job.task.measure(job.lm(program.model), variables, job.selection.part, job.config)
        return {f"val_{name}": x for name, x in found.items() if name != "answers"}
    found = {}
    for name, held_out in validation.items():
        feed = loader(held_out, 0, len(held_out), job.config.data.workers, local)
        found[name] = evaluate_loss(loss, (sharding.place_batch(b, job.mesh, job.eval_rows, local) for b in feed))
    tokens = sum(f["tokens"] for f in found.values())
    each = {}
    if len(job.data.sources) > 1:
        each = {f"val_{key}/{name}": f[key] for name, f in found.items() for key in ("loss", "accuracy") if key in f}
        losses = [f["loss"] for f in found.values()]
        each |= dict(zip(selection.OF_SOURCES, (sum(losses) / len(losses), max(losses))))
    names = next(iter(found.values())).keys() - {"tokens", "perplexity"}
    mean = {name: sum(f[name] * f["tokens"] for f in found.values()) / tokens for name in sorted(names)}
    accuracy, loss = mean.pop("accuracy"), mean.pop("loss")
    more = {f"val_{name}": x for name, x in {"accuracy": accuracy, **mean}.items()} if mean else {}
    return {"val_loss": loss, "accuracy": accuracy} | more | each
