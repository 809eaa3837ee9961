"""One way in for everything that holds a language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ftjax import cpus
from ftjax.errors import FtjaxError
from ftjax.hub import fingerprint, peft, pooling, resolve, tokenizer
from ftjax.lm import LM, open_base
from ftjax.training.run_folder import open_run, read_record
from ftjax.tuning import METHODS
from ftjax.tuning import adapters as peft_adapters


def load(
    path: str | Path,
    *,
    adapters: dict[str, str | Path] | None = None,
    revision: str = "",
    dtype: str = "auto",
    checkpoint: str | int = "best",
    quantise: str = "",
) -> LM:
    """Load a model directory, hub name, PEFT adapter directory (with its base) or run folder of `ftjax train`.

    Args:
        path: the directory or hub name.
        adapters: name -> PEFT adapter directory or hub name, for a base model: read beside it, for `LM.with_adapter`,
            each with the tokenizer and chat template that it brings. The LM itself stays the base.
        revision: branch, tag or commit of a hub name.
        dtype: of computation and storage: `float32`, `bfloat16` or `auto` (bfloat16 on GPU and TPU, float32 on CPU).
        checkpoint: of a run folder: `best`, `last` or a step that it keeps.
        quantise: kernels of the blocks as `int8`, `nf4` or `none`; empty: as in the run, or `none`.

    Raises:
        FtjaxError: for a path that is none of these, and for an adapter or run whose base has not the files that it was
            trained on.
    """
    cpus.offer()
    run = read_record(path) is not None
    folder = Path(path) if run else resolve.resolve(path, revision)
    whole = run or (folder / peft.CONFIG).is_file()
    if whole and adapters:
        raise FtjaxError(f"{path}: adapters go on a base model, and this holds one of its own; name the base instead")
    if run:
        source, _ = open_run(path, dtype, checkpoint, quantise)
        return source.base.applied(METHODS[source.method].variables(source.trained, source.frozen, source.spec))
    if whole:
        return _load_adapter(folder, dtype, quantise)
    lm, spec = open_base(folder, dtype, quantise=quantise)
    beside = {}
    for name, at in (adapters or {}).items():
        at = resolve.resolve(at)
        fingerprint.check_adapter(at, folder)
        adapter = peft_adapters.read(at)
        _, labels = peft_adapters.task(at, adapter, folder) or ("", ())
        if labels and not lm.labels:
            raise FtjaxError(f"{at}: this adapter brings a head over labels, which {path} lacks; name it as the model")
        beside[name] = lm.applied(peft_adapters.variables(adapter, lm.params, spec)).reading(at)
    return dataclasses.replace(lm, adapters=beside)


def _load_adapter(folder: Path, dtype: str, quantise: str) -> LM:
    adapter = peft_adapters.read(folder)
    _, adapter_config, _ = adapter
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise FtjaxError(
            f"{folder / peft.CONFIG}: base_model_name_or_path is missing; it says what the adapter goes on"
        )
    kept, key = fingerprint.of_adapter(folder), f"base_model_name_or_path in {folder / peft.CONFIG}"
    base = fingerprint.find(kept, folder, base, adapter_config.get("revision") or "", key)
    task = peft_adapters.task(folder, adapter, base)
    own = folder if tokenizer.has_tokenizer(folder) else None
    lm, spec = open_base(base, dtype, quantise=quantise, task=task, tokenizer_folder=own)
    lm.pooling = pooling.read(folder) or lm.pooling
    return lm.applied(peft_adapters.variables(adapter, lm.params, spec)).reading(folder)
