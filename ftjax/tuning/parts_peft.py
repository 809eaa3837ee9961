"""Trained parts of a model as a PEFT adapter: a LoRA that changes nothing, and beside it what was trained.

PEFT's LoRA (0.21) can carry all biases (`bias="all"`) or whole modules (`modules_to_save`). It must adapt something:
the embedding table gets a LoRA of rank 1, all zeros, since no bias and no trained module lies there. V vocabulary, D
width.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.hub.peft import PREFIX
from ftjax.tree import flatten
from ftjax.tuning.head import PEFT_TASKS


def as_biases(parts: dict[str, np.ndarray], params: dict, spec) -> tuple[dict, dict[str, np.ndarray]]:
    """(adapter_config, tensors) where all biases are trained, and nothing else."""
    config, tensors = _nothing(spec)
    return config | {"bias": "all"}, tensors | _tensors(parts, params, spec)


def as_modules(parts: dict[str, np.ndarray], params: dict, spec) -> tuple[dict, dict[str, np.ndarray]]:
    """(adapter_config, tensors) of all modules with a trained parameter, the others of these modules as they are.

    parts: path -> (L,) or (1,) bool, whether trained, see `parts.chosen`; params: the plain model after training.
    """
    modules = {}  # path of a module -> its trained layers
    for path, hits in parts.items():
        module = path.rsplit("/", 1)[0]
        modules[module] = hits | modules.get(module, False)
    whole = {path: modules[path.rsplit("/", 1)[0]] for path in flatten(params) if path.rsplit("/", 1)[0] in modules}
    config, tensors = _nothing(spec)
    saved = _tensors(whole, params, spec)
    names = sorted({name.removeprefix(PREFIX).rsplit(".", 1)[0] for name in saved})
    return config | {"modules_to_save": names}, tensors | saved


def carries_parts(adapter_config: dict) -> bool:
    """Whether the adapter_config of a LoRA says that it carries biases or whole modules, a head over labels aside."""
    head_alone = adapter_config.get("task_type") in PEFT_TASKS.values() and not (
        adapter_config.get("r") == adapter_config.get("lora_alpha") == 1 and len(adapter_config["target_modules"]) == 1
    )
    saved = adapter_config.get("modules_to_save") and not head_alone
    return adapter_config.get("bias", "none") != "none" or bool(saved)


def parts_of_peft(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of such an adapter -> those beside its LoRA, by their names in the model's files.

    Raises FtjaxError for a LoRA that changes something, and names that PEFT would ignore.
    """
    found = {}
    for name, x in tensors.items():
        if not name.startswith(PREFIX):
            raise FtjaxError(f"adapter tensor {name}: expected the prefix {PREFIX!r}; PEFT would ignore it")
        if ".lora_" not in name:
            found[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = x
        elif re.search(r"lora_(embedding_)?B", name) and np.any(x):
            raise FtjaxError(
                f"adapter tensor {name}: a LoRA that changes its module, beside biases or modules_to_save; only one of "
                "the two is read. Merge it, where peft is installed, with merge_and_unload"
            )
    return found


def _tensors(parts, params, spec) -> dict[str, np.ndarray]:
    """PEFT's name -> tensor in float32, as the model's files hold it, of the chosen layers of each parameter."""
    leaves, out = flatten(params), {}
    stored = families.tensor_names(spec.family, dataclasses.replace(spec.model, tied="lm_head/kernel" not in leaves))
    for path, hits in parts.items():
        names, transposed = stored[path]
        leaf = np.asarray(leaves[path], np.float32)
        for layer in np.flatnonzero(hits):
            x = leaf[layer] if path.startswith("layers/") else leaf
            out[f"{PREFIX}{names[layer]}"] = x.T if transposed else x
    return out


def _nothing(spec) -> tuple[dict, dict[str, np.ndarray]]:
    module, (V, D) = families.module_name("embed", spec.family, spec.model), (spec.model.vocab_size, spec.model.width)
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [module],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    zeros = {"lora_embedding_A": np.zeros((1, V), np.float32), "lora_embedding_B": np.zeros((D, 1), np.float32)}
    return config, {f"{PREFIX}{module}.{leaf}": x for leaf, x in zeros.items()}
