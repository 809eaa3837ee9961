"""One way in for everything that holds a language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from ftjax.errors import FtjaxError
from ftjax.hub import peft, resolve, tokenizer
from ftjax.lm import LM, open_base
from ftjax.training.run_folder import RUN, open_run
from ftjax.tuning import METHODS, of_peft


def load(
    path: str | Path, *, revision: str = "", dtype: str = "auto", checkpoint: str = "best", quantise: str = ""
) -> LM:
    """A model directory, hub name, PEFT adapter directory (with its base) or run folder of `ftjax train` -> LM.

    dtype: compute and storage, `float32`, `bfloat16` or `auto` (bfloat16 on GPU and TPU, float32 on CPU); checkpoint:
    of a run folder, `best` or `last`; quantise: kernels of the blocks as `int8`, `nf4` or `none`, empty: as in the run,
    or `none`. Raises FtjaxError for anything that is none of these.
    """
    if (Path(path) / RUN).is_file():
        source, _ = open_run(path, dtype, checkpoint, quantise)
        return _with(source.base, METHODS[source.method].variables(source.trained, source.frozen, source.spec))
    folder = resolve.resolve(path, revision)
    if (folder / peft.CONFIG).is_file():
        return _load_adapter(folder, dtype, quantise)
    return open_base(folder, dtype, quantise=quantise)[0]


def _load_adapter(folder: Path, dtype: str, quantise: str) -> LM:
    adapter_config, tensors = peft.read_adapter(folder)
    kind = adapter_config.get("peft_type")
    method = of_peft(adapter_config)
    if method is None:
        known = ", ".join(dict.fromkeys(m.peft_type for m in METHODS.values() if m.peft_type))
        raise FtjaxError(f"{folder / peft.CONFIG}: peft_type {kind!r} is not supported; known: {known}")
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise FtjaxError(
            f"{folder / peft.CONFIG}: base_model_name_or_path is missing; it says what the adapter goes on"
        )
    lm, spec = open_base(resolve.resolve(base, adapter_config.get("revision") or ""), dtype, quantise=quantise)
    text = tokenizer.chat_template(folder)
    if text:  # of the adapter's own training; the base may have none, or another
        lm.tokenizer.chat_template = text
        lm = dataclasses.replace(lm, end_tokens=tokenizer.end_tokens(lm.folder, lm.tokenizer))
    trained, fields = method.from_peft(adapter_config, tensors, lm.params, spec)
    spec.tuning.update(fields)
    _, frozen = method.init(jax.random.key(0), lm.params, spec)
    return _with(lm, method.variables(jax.tree.map(jnp.asarray, trained), frozen, spec))


def _with(lm: LM, variables: dict) -> LM:
    return dataclasses.replace(lm, params=variables["params"], adapter=variables.get("adapter", {}))
