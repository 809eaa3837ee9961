"""PEFT adapter directories <-> arrays by name. The files of ftjax.tuning interpret the names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401  gives numpy, and so safetensors, the name `bfloat16`
import numpy as np
from safetensors.numpy import save_file

from ftjax.errors import FtjaxError
from ftjax.foreign import either, flag, listed, mapped, maybe, number, read_json, read_tensors, string, whole
from ftjax.hub.families import names_of_labels
from ftjax.hub.resolve import check_written, new_folder, write_json
from ftjax.hub.tokenizer import copy_tokenizer

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"  # after a module's name: the rows of trainable_token_indices
CONFIG, WEIGHTS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
# Fields of adapter_config.json that the files of ftjax.tuning read.
NAMES = maybe(listed(string))
IDS = listed(whole())
FIELDS = {
    "peft_type": string,
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "bias"), maybe(string)),
    "r": whole(1),
    "lora_alpha": number(),
    "rank_pattern": maybe(mapped(whole(1))),
    "alpha_pattern": maybe(mapped(number())),
    **dict.fromkeys(("use_rslora", "use_dora"), maybe(flag)),
    "init_lora_weights": maybe(either(flag, string)),
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), either(string, NAMES)),
    "layers_pattern": either(string, NAMES),
    "layers_to_transform": maybe(either(whole(), IDS)),
    **dict.fromkeys(("target_parameters", "modules_to_save"), NAMES),
    "trainable_token_indices": maybe(either(IDS, mapped(IDS))),
    "num_transformer_submodules": maybe(whole()),
}


# Keys of an adapter_config.json that change nothing that an adapter of modules computes.
KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "runtime_config"),
}


def refuse_variants(adapter_config: dict, known: set[str], method: str) -> None:
    """Raise FtjaxError for keys that are set and that are neither in KNOWN nor in `known`: they describe a variant.

    Args:
        adapter_config: The content of adapter_config.json.
        known: Keys of the method itself.
        method: PEFT's name of the method.
    """
    for key, value in adapter_config.items():
        if key not in KNOWN | known and value and (key, value) != ("bias", "none"):
            raise FtjaxError(f"{CONFIG}: {key} = {value!r} is a variant of {method} that ftjax does not support")


def refuse_other_tasks(adapter_config: dict) -> None:
    """Raise FtjaxError for a soft prompt of a model with an encoder and a decoder, and for one that PEFT ignores."""
    if adapter_config.get("num_transformer_submodules") not in (1, None):
        raise FtjaxError(f"{CONFIG}: num_transformer_submodules is for models with encoder and decoder; expected 1")
    if not adapter_config.get("task_type"):
        raise FtjaxError(
            f"{CONFIG}: task_type is missing, and PEFT computes the base model without its soft prompt then; set it to "
            "the task of the model, such as CAUSAL_LM"
        )


def checked(x: np.ndarray | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of an adapter.

    Args:
        x: The tensor; None: the file does not have it.
        name: Its name in the file.
        shape: The shape that it must have.

    Raises:
        FtjaxError: If it is missing or has another shape.
    """
    if x is None:
        raise FtjaxError(f"adapter tensor {name} is missing")
    if x.shape != shape:
        raise FtjaxError(f"adapter tensor {name} has shape {x.shape}, expected {shape}")
    return x


def read_adapter(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The adapter_config.json of a PEFT adapter directory, and {name: tensor} as stored.

    Raises FtjaxError if a file is missing, malformed, or differs from its checksum.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, **FIELDS)
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which may run code, and is not read)"
        raise FtjaxError(
            f"{folder}: no {WEIGHTS}{pickled if (folder / 'adapter_model.bin').is_file() else ''}; to convert, "
            "where peft is installed: load it with PeftModel.from_pretrained and save it with save_pretrained"
        )
    check_written(folder, [CONFIG, WEIGHTS])
    return config, read_tensors(folder / WEIGHTS)


def write_adapter(
    out: Path,
    tensors: dict[str, np.ndarray],
    adapter_config: dict,
    tokenizer_folder: Path | None,
    base_name: str,
    *,
    record: dict | None = None,
    labels: tuple[str, ...] = (),
    problem: str = "",
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a PEFT adapter directory. If it fails, nothing is written.

    Args:
        out: The directory.
        tensors: {PEFT's name: tensor}.
        adapter_config: The fields that the tuning method determines (`peft_type`, `r`, ...).
        tokenizer_folder: Directory whose tokenizer and chat template are copied; None: none are.
        base_name: Hub name or path of the base model.
        record: See `new_folder`.
        labels: Names of a head's labels, in the order of their ids. PEFT has no field for them, so they are written to
            a file of their own.
        problem: See weights.write_model. It is written to the same file.
        beside: beside(folder) writes further files into the directory.
    """
    shared = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "inference_mode": True}
    with new_folder(out, record) as folder:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        write_json(folder / CONFIG, shared | adapter_config)
        if labels:
            write_json(folder / LABELS, names_of_labels(labels) | {"problem_type": problem})
        if tokenizer_folder:
            copy_tokenizer(tokenizer_folder, folder)
        beside(folder)
