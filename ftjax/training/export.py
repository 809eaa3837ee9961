"""Write what a run trained as a directory that PyTorch loads: a PEFT adapter, or a whole model."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tasks
from ftjax.data import chat_templates
from ftjax.errors import FtjaxError, nearest
from ftjax.hub import families, peft, pooling, resolve, weights
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import run_pooling
from ftjax.models.quantised import dequantised
from ftjax.training import privacy
from ftjax.training.run_folder import LOCK, WRITTEN, Trained, open_run
from ftjax.tree import flatten, map_paths, not_finite
from ftjax.tuning import METHODS
from ftjax.tuning.whole import without_form

# Task of a head without a task_type in PEFT -> what adapter_config.json has instead of CAUSAL_LM.
TASK_TYPES = {"none": {"task_type": "FEATURE_EXTRACTION"}, "masked": {"task_type": None}}


def resolve_format(method: str, format: str, form: families.Form | None = None, trained=()) -> str:
    """The format that `auto` stands for: `adapter` if PEFT has a form for what is trained, else `full`. Other names are
    checked.

    Args:
        method: A tuning method.
        format: auto, adapter, merged or full.
        form: The model's head type; adapters need a matching PEFT class.
        trained: Paths of the trained parameters.

    Raises:
        FtjaxError: If the method cannot be written in this format.
    """
    row = METHODS[method]
    adapts = row.to_peft and not (form and form.beside) and not without_form(trained)
    if format == "auto":
        format = "adapter" if adapts else "full"
    able = [f for f, f_able in (("adapter", adapts), ("merged", row.merge), ("full", row.merge)) if f_able]
    if format in ("merged", "full") and not row.merge:
        raise FtjaxError(
            f"export format {format!r}: no plain model has the logits of {method}; set export.formats to ('adapter',)"
        )
    if format not in able:
        why = f"; PEFT has no form for the trained {lost[0]}" if (lost := without_form(trained)) else ""
        raise FtjaxError(
            f"export format {format!r}: {method} can be written as {' or '.join(able)}{nearest(format, able)}{why}"
        )
    return format


def write(source: Trained, out: str | Path, format: str, *, dtype: str = "auto") -> dict:
    """Write `source` to the folder `out`, whole or not at all, with the tokenizer and chat template of the run.

    If there are several processes, all of them must call this function; the first one writes.

    Args:
        source: What was trained.
        out: The directory to write.
        format: `adapter`, `merged` or `full` (both a whole model), or `auto`.
        dtype: Type of a whole model's tensors; `auto`: the base model's.

    Returns:
        As `export`. The merge difference includes rounding to the stored dtype.

    Raises:
        FtjaxError: If `out` is the folder of the base model, if a trained value is NaN or infinite, or if the method
            cannot be written in this format.
    """
    config, base, out = source.config, source.base, Path(out)
    resolve.check_out(out, base.folder)
    if bad := not_finite(source.trained):
        raise FtjaxError(
            f"{out}: not written: {bad[0]} of the checkpoint holds values that are NaN or infinite; export another one"
        )
    form = families.form_of(source.spec.family, source.spec.model.head)
    format = resolve_format(config.tuning.method, format, form, flatten(source.trained))
    report: dict[str, Any] = {"format": format, "path": str(out)}
    kept = dict(source.base_record)
    if kept:
        kept["relative"] = os.path.relpath(kept["path"], out)
    record = {"config": config.to_dict(), "base": kept} | ({"privacy": source.privacy} if source.privacy else {})
    record |= {"recipe": base.recipe} if base.recipe else {}
    shared = {
        "record": record, "labels": config.task.labels, "problem": tasks.find(config.task.kind).problem,
        "beside": functools.partial(_beside, source=source),
    }  # fmt: skip
    if format == "adapter":
        # Arrays on several hosts are gathered, except those of the base, which no adapter holds.
        params = families.shapes(source.spec.model)
        frozen = map_paths(lambda path, x: x if path in params else weights.whole(x), source.frozen)
        trained = jax.tree.map(weights.whole, source.trained)
        if jax.process_index() == 0:
            adapter_config, tensors = source.method.to_peft(trained, frozen, source.spec)
            adapter_config |= TASK_TYPES.get(source.spec.model.head.task, {})
            adapter_config |= {"revision": kept["revision"]} if kept.get("revision") else {}
            own = base.tokenizer_folder or base.folder
            peft.write_adapter(out, tensors, adapter_config, own, source.base_name, **shared)
        if (kind := config.model.quantise) != "none":
            merged = "; a merged model has those of the training" if source.method.merge else ""
            report["note"] = f"trained on a base in {kind}; on the base as its files hold it, its logits differ{merged}"
        return report
    params = dequantised(source.method.merge(source.trained, source.frozen, source.spec))
    dtype = weights.stored_dtype(base.folder) if dtype == "auto" else dtype
    if source.frozen:
        report["merge_difference"] = found = _merge_difference(source, params, dtype)
        report["note"] = f"its logits differ from the adapted model's by at most {found:.1e}"
    ends = (*base.end_tokens, *chat_templates.ends_of_run(config, base.tokenizer))
    weights.write_model(
        out, params, base.folder, source.spec.family, source.spec.model, max_length=config.data.max_length,
        dtype=dtype, shard_size=config.export.shard_size, end_tokens=ends, tokenizer_folder=base.tokenizer_folder,
        **shared,
    )  # fmt: skip
    return report


def _beside(out: Path, source: Trained) -> None:
    """Write the files beside the weights: the chat template, how vectors of texts are made, and the privacy."""
    config, shape = source.config, source.spec.model
    if source.privacy:
        (out / "README.md").write_text(privacy.card(source.privacy, source.base_name))
    if chat_template := chat_templates.of_run(config, source.base.tokenizer):
        tokenizers.write_chat_template(out, chat_template)
    if config.task.kind == "embed":
        pooling.write(out, run_pooling(config, shape.max_positions), shape.width)


def _merge_difference(source: Trained, params: dict, dtype: str) -> float:
    """Largest |merged - adapted| logit on one row of spread-out token ids, the merged weights as `dtype` holds them."""
    shape = source.spec.model
    tokens = np.linspace(0, shape.vocab_size - 1, min(64, shape.max_positions)).astype(np.int32)[None]

    @jax.jit
    def difference(params, trained, frozen):
        stored = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
        adapted = source.method.variables(trained, frozen, source.spec)
        apply = source.base.model.apply
        return jnp.max(jnp.abs(apply({"params": stored}, tokens) - apply(adapted, tokens)))

    return float(difference(params, source.trained, source.frozen))


def export(
    run: str | Path, out: str | Path, format: str = "auto", *, checkpoint: str = "best", dtype: str = "auto"
) -> dict[str, Any]:
    """Write what a run trained as a directory that PyTorch loads.

    Args:
        run: The run folder.
        out: The directory to write, whole or not at all.
        format: `adapter` (PEFT), `merged` or `full` (a whole model); `auto`: the adapter if the method has one.
        checkpoint: `best` or `last`.
        dtype: Type of a whole model's tensors: `float32`, `bfloat16`, `float16`; `auto`: the base model's.

    Returns:
        {"format", "path"}, for a merged model "merge_difference": the largest difference between its logits and those
        of the model with the adapter, on a probe; and "note", what a person should know of its logits, if anything.

    Raises:
        FtjaxError: If `run` is not a run folder, if the method cannot be written in this format, or if `out` holds
            files that no export wrote, or is what the run itself writes to.
    """
    resolve.check_out(out)
    inside = os.path.relpath(os.path.realpath(out), os.path.realpath(run)).split(os.sep)[0]
    if inside in (pattern.split("/")[0] for pattern in (*WRITTEN, LOCK)):
        raise FtjaxError(
            f"{out}: the run itself uses {inside} in its folder; choose another one, such as {run}/adapter"
        )
    source = open_run(run, checkpoint=checkpoint)
    form = families.form_of(source.spec.family, source.spec.model.head)
    found = resolve_format(source.config.tuning.method, format, form, flatten(source.trained))
    if dtype != "auto" and found == "adapter":
        raise FtjaxError(
            f"dtype: {dtype} is of a whole model, and an adapter keeps the dtype it was trained in; leave it out"
        )
    return write(source, out, format, dtype=dtype)
