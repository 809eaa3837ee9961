"""`ftjax.load`: the one way to open a model, whatever kind of directory or name holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ftjax.errors import FtjaxError
from ftjax.foreign import read_json
from ftjax.hub import families, fingerprint, peft, pooling, resolve
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import LM, open_base, recipe_in
from ftjax.models.config import ModelConfig
from ftjax.training.run_folder import base_of_run, open_run, read_record, run_config
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
    """Load a language model.

        lm = ftjax.load("Qwen/Qwen3-0.6B")
        lm.generate(["Once upon a time"], max_new_tokens=32)

    Args:
        path: A model directory, a name on the Hugging Face hub, a PEFT adapter directory (its config names the base,
            which is loaded too), a run folder of `ftjax train`, or `builtin:` and the name of a model that comes with
            ftjax.
        adapters: {name: PEFT adapter directory or hub name}, for a `path` that is a base model. They are loaded beside
            it, each with its own tokenizer and chat template if it has them. The returned LM computes the base model;
            `LM.with_adapter(name)` returns it with an adapter.
        revision: Branch, tag or commit of a hub name; empty: its default branch.
        dtype: Type of computation and of the loaded parameters: `float32`, `bfloat16`, or `auto`, which is bfloat16 on
            GPU and TPU and float32 on CPU.
        checkpoint: Which checkpoint of a run folder: `best`, `last`, or the number of a step that the run kept.
        quantise: Number format of the kernels of the blocks: `int8`, `nf4` or `none`. Empty: as the run was trained,
            and `none` for everything else.

    Returns:
        An LM: `generate`, `logits`, `embed`, `with_adapter`.

    Raises:
        FtjaxError: If `path` is none of these, or if an adapter or run belongs to a base with other files.
    """
    run = read_record(path) is not None
    folder = Path(path) if run else resolve.resolve(str(path), revision)
    whole = run or (folder / peft.CONFIG).is_file()
    if whole and adapters:
        raise FtjaxError(
            f"{path}: adapters need a base model, and this one has an adapter already; name its base instead"
        )
    if run:
        source = open_run(path, dtype, checkpoint, quantise)
        return source.base.applied(source.method.variables(source.trained, source.frozen, source.spec))
    if whole:
        return _load_adapter(folder, dtype, quantise)
    lm, spec = open_base(folder, dtype, quantise=quantise)
    lm.recipe = recipe_in(folder)
    beside = {}
    for name, at in (adapters or {}).items():
        at = resolve.resolve(str(at))
        fingerprint.check_adapter(at, folder)
        adapter = peft_adapters.read(at)
        _, labels = peft_adapters.task(at, adapter, folder) or ("", ())
        if labels and not lm.labels:
            raise FtjaxError(
                f"{at}: this adapter has a head over labels, which {path} lacks; pass the adapter itself as the model"
            )
        beside[name] = lm.applied(peft_adapters.variables(adapter, lm.params, spec)).reading(at)
    return dataclasses.replace(lm, adapters=beside)


def shape_of(path: str | Path) -> ModelConfig:
    """The ModelConfig of the base of the model that `load` opens. No weights are read. Raises FtjaxError as `load`."""
    if read_record(path) is not None:
        folder, _ = base_of_run(Path(path), run_config(path))
    else:
        folder = resolve.resolve(str(path))
        folder = base_of_adapter(folder) if (folder / peft.CONFIG).is_file() else folder
    return families.read_config(folder)[1]


def base_of_adapter(folder: Path) -> Path:
    """The directory of the base of a PEFT adapter. Raises FtjaxError if it is not found, or has changed."""
    adapter_config = read_json(folder / peft.CONFIG, **peft.FIELDS)
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise FtjaxError(
            f"{folder / peft.CONFIG}: base_model_name_or_path is missing; it names the base model of the adapter"
        )
    kept, key = fingerprint.of_adapter(folder), f"base_model_name_or_path in {folder / peft.CONFIG}"
    return fingerprint.find(kept, folder, base, adapter_config.get("revision") or "", key)


def _load_adapter(folder: Path, dtype: str, quantise: str) -> LM:
    adapter, base = peft_adapters.read(folder), base_of_adapter(folder)
    task = peft_adapters.task(folder, adapter, base)
    own = folder if tokenizers.has_tokenizer(folder) else None
    lm, spec = open_base(base, dtype, quantise=quantise, task=task, tokenizer_folder=own)
    lm.pooling = pooling.read(folder) or lm.pooling
    return lm.applied(peft_adapters.variables(adapter, lm.params, spec)).reading(folder)
