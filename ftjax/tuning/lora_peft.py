"""Convert between LoRA's tensors in PEFT's files and our adapter tree. Facts about the files are from peft 0.21.

L layers, R rank. In our tree adapters of stacked maps are stacked: a (L, R, in), b (L, out, R), with R the largest rank
of the layers. A layer of smaller rank, or without an adapter (rank 0), has zeros in the rest. For an embedding table
(V, D), `in` is V and `out` is D. Adapters of E experts are a (L, E, R, in) and b (L, E, out, R).
"""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np

from ftjax.errors import FtjaxError, nearest
from ftjax.hub.families import EXPERTS, kernel_shape
from ftjax.hub.peft import CONFIG, PREFIX
from ftjax.models.config import ModelConfig, layers_with
from ftjax.tree import flatten, unflatten
from ftjax.tuning.targets import EMBEDDINGS, by_pattern, fan_in_fan_out, module_names, peft_targets

# Known keys of a LoRA adapter_config.json: any other key that is set describes a variant of LoRA.
LORA_KEYS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *(
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "lora_dropout",
    ),
    *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# The initialisations that do not change the base model's weights.
LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
ORDER = ("gate_up_proj", "down_proj")  # the parameters of experts in the order in which their class has them
# Ends of the names of A and B: of a map that is multiplied with, and of a table of embeddings.
SUFFIXES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def lora_to_peft(
    adapter: dict,
    ranks: dict[str, tuple[np.ndarray, np.ndarray]],
    names: dict[str, str],
    shape: ModelConfig,
    rslora: bool = False,
    initial: dict | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Convert our LoRA tree to PEFT's format.

    Args:
        adapter: The tree of A and B.
        ranks: {path of each adapted map: (ranks, int, 0 without an adapter; scales)}, (L,) each, or (1,) if not
            stacked.
        names: {path: module name}, see `families.linear_names`.
        shape: The ModelConfig.
        rslora: Write scales as alpha / sqrt(rank).
        initial: A tree like `adapter` that is subtracted: BA - B₀A₀ is one adapter of twice the rank.

    Returns:
        (adapter_config, {name in PEFT's files: tensor, float32}).
    """
    leaves, start, tensors, rank_of, alpha_of = flatten(adapter), flatten(initial or {}), {}, {}, {}
    for path, (rank, scale) in ranks.items():
        suffixes = SUFFIXES[path in EMBEDDINGS]
        a, b = (_stack(leaves[f"{path}/lora/{n}"], path) for n in ("a", "b"))
        if path.startswith(EXPERTS):
            outer = ranks.get(f"{EXPERTS}{ORDER[1]}", (np.zeros(len(rank)),))[0] > 0  # wraps what is wrapped already
            for layer, module in enumerate(module_names(path, names[path], shape)):
                if r := int(rank[layer]):
                    around, name = module.rsplit(".", 1)
                    inner = ".base_layer" if name == ORDER[0] and outer[layer] else ""
                    joined = a[layer, :, :r].reshape(-1, a.shape[-1]), b[layer, :, :, :r].transpose(1, 2, 0)
                    tensors[f"{PREFIX}{around}{inner}.{suffixes[0]}"] = joined[0]
                    tensors[f"{PREFIX}{around}{inner}.{suffixes[1]}"] = joined[1].reshape(b.shape[2], -1)
                    rank_of[module], alpha_of[module] = r, _plain(float(scale[layer]) * divisor(r, rslora))
            continue
        for layer, module in enumerate(module_names(path, names[path], shape)):
            if r := int(rank[layer]):
                a_rows, b_columns = [a[layer, :r]], [b[layer, :, :r]]
                if f"{path}/lora/a" in start:
                    a_rows += [_stack(start[f"{path}/lora/a"], path)[layer, :r]]
                    b_columns += [-_stack(start[f"{path}/lora/b"], path)[layer, :, :r]]
                tensors[f"{PREFIX}{module}.{suffixes[0]}"] = np.concatenate(a_rows)
                tensors[f"{PREFIX}{module}.{suffixes[1]}"] = np.concatenate(b_columns, axis=1)
                rank_of[module] = r * len(a_rows)
                alpha_of[module] = _plain(float(scale[layer]) * divisor(rank_of[module], rslora))
    chosen = {path: (rank > 0).tolist() for path, (rank, _) in ranks.items() if not path.startswith(EXPERTS)}
    experts = {path: (rank > 0).tolist() for path, (rank, _) in ranks.items() if path.startswith(EXPERTS)}
    r, rank_pattern = _pattern(rank_of)
    alpha, alpha_pattern = _pattern(alpha_of)
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": peft_targets(chosen, names, shape),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out(chosen, names),
        "use_dora": False,
        "use_rslora": rslora,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    if experts:
        config["target_parameters"] = peft_targets(experts, names, shape)
    return config, tensors


def lora_from_peft(
    adapter_config: dict,
    tensors: dict[str, np.ndarray],
    names: dict[str, str],
    config: ModelConfig,
    base: dict | None = None,
) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Convert a PEFT LoRA to our tree.

    Args:
        adapter_config: The content of adapter_config.json.
        tensors: {name: tensor}.
        names: {path: module name}, see `families.linear_names`.
        config: The ModelConfig.
        base: Parameters of the base. PEFT stores a copy of a head's own weight beside its LoRA, which must equal the
            base's.

    Returns:
        Our tree in float32, and ranks and scales as in `lora_to_peft`.

    Raises:
        FtjaxError: For variants of LoRA, and for tensors that are not of this model, incomplete or of the wrong shape.
    """
    _refuse_variants(adapter_config)
    kernels = {path: kernel_shape(path, config) for path in names}
    wrapped = _of_experts(adapter_config, names, config)
    places = {
        module: (path, layer)
        for path, name in names.items()
        for layer, module in enumerate(module_names(path, name, config))
    }
    pairs = {}
    for name, x in tensors.items():
        if not name.startswith(PREFIX):
            raise FtjaxError(f"adapter tensor {name}: expected the prefix {PREFIX!r}; PEFT would ignore it")
        match = re.fullmatch(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight)", name[len(PREFIX) :])
        if match is None:
            raise FtjaxError(f"adapter tensor {name}: expected MODULE.lora_A.weight or MODULE.lora_B.weight")
        module, suffix = match.groups()
        module = wrapped.get(module, module)
        if module not in places:
            tied = "; its head is tied: the table of embeddings itself" * (module == "lm_head")
            raise FtjaxError(
                f"adapter tensor {name}: this model has no linear map {module!r}{tied or nearest(module, places)}"
            )
        if suffix == "base_layer.weight":
            _check_copy(name, x, places[module], base)
        else:
            pairs.setdefault(module, {})[suffix] = np.asarray(x, np.float32)
    if not pairs:
        raise FtjaxError("the adapter has no LoRA tensors")

    flat, ranks = {}, {}
    for path, shape in kernels.items():
        modules = module_names(path, names[path], config)
        used = {layer: pairs[module] for layer, module in enumerate(modules) if module in pairs}
        if not used:
            continue
        rank, scale = np.zeros(len(modules), int), np.zeros(len(modules), np.float32)
        for layer, pair in used.items():
            rank[layer], scale[layer] = _rank_and_scale(adapter_config, modules[layer])
            experts = config.experts if path.startswith(EXPERTS) else 1
            _check_pair(pair, modules[layer], SUFFIXES[path in EMBEDDINGS], experts * int(rank[layer]), shape[-2:])
        R, (out, in_), lead = rank.max(), shape[-2:], shape[1:-2]
        a, b = (np.zeros((len(modules), *lead, *size), np.float32) for size in ((R, in_), (out, R)))
        for layer, pair in used.items():
            r, (one, two) = rank[layer], (pair[s] for s in SUFFIXES[path in EMBEDDINGS])
            if path.startswith(EXPERTS):
                one, two = one.reshape(*lead, r, in_), two.reshape(out, r, *lead).transpose(2, 0, 1)
            a[layer, ..., :r, :], b[layer, ..., :r] = one, two
        stacked = path.startswith("layers/")
        flat[f"{path}/lora/a"], flat[f"{path}/lora/b"] = (a, b) if stacked else (a[0], b[0])
        ranks[path] = rank, scale
    return unflatten(flat), ranks


def _of_experts(adapter_config: dict, names: dict[str, str], config: ModelConfig) -> dict[str, str]:
    """{name of a module in PEFT's files: the parameter of experts whose adapter it holds}.

    PEFT wraps the module of the experts once for each parameter, in the order of ORDER, and names no parameter.
    """
    targets, out, used = adapter_config.get("target_parameters") or (), {}, set()
    for layer in layers_with(config, EXPERTS) if targets and config.experts else ():
        parameters = [names[f"{EXPERTS}{name}"].format(l=layer) for name in ORDER]
        found = {p: t for p in parameters for t in targets if p == t or p.endswith(f".{t}")}
        used |= set(found.values())
        out |= {p.rsplit(".", 1)[0] + ".base_layer" * i: p for i, p in enumerate(reversed(found))}
    if unknown := [t for t in targets if t not in used]:
        raise FtjaxError(
            f"{CONFIG}: target_parameters has {unknown[0]!r}, which names no parameter of this model's experts; the "
            "adapter is for another model"
        )
    return out


def _refuse_variants(config: dict) -> None:
    if config.get("peft_type") != "LORA":
        raise FtjaxError(f"{CONFIG}: peft_type = {config.get('peft_type')!r}; expected 'LORA'")
    for key, value in config.items():
        if key not in LORA_KEYS and value and not (key == "bias" and value == "none"):
            raise FtjaxError(f"{CONFIG}: {key} = {value!r} is a variant of LoRA that ftjax does not support")
    if (init := config.get("init_lora_weights")) not in LORA_INITS:
        raise FtjaxError(
            f"{CONFIG}: init_lora_weights = {init!r} changes the base model's weights too, which is not supported; "
            "convert it to a plain LoRA with peft's `path_initial_model_for_weight_conversion`"
        )


def _rank_and_scale(config: dict, module: str) -> tuple[int, float]:
    def lookup(key, default):
        return by_pattern((config.get(key) or {}).items(), module, default, f"{CONFIG}: {key}")

    r = lookup("rank_pattern", config.get("r", 8))
    alpha = lookup("alpha_pattern", config.get("lora_alpha", 8))
    return r, alpha / divisor(r, bool(config.get("use_rslora")))


def divisor(rank: int, rslora: bool) -> float:
    """The number that alpha is divided by: the rank, or with rslora its root, so that updates do not shrink with the
    rank (Kalajdzievski 2023)."""
    return math.sqrt(rank) if rslora else rank


def _stack(x, path: str) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x if path.startswith("layers/") else x[None]


def _check_pair(pair: dict, module: str, suffixes: tuple[str, str], rank: int, kernel: tuple[int, int]) -> None:
    for suffix, shape in zip(suffixes, ((rank, kernel[1]), (kernel[0], rank)), strict=True):
        name = f"{PREFIX}{module}.{suffix}"
        if suffix not in pair:
            raise FtjaxError(f"adapter tensor {name} is missing")
        if pair[suffix].shape != shape:
            raise FtjaxError(f"adapter tensor {name} has shape {pair[suffix].shape}, expected {shape}")


def _check_copy(name: str, x: np.ndarray, place: tuple[str, int], base: dict | None) -> None:
    path, layer = place
    leaves = flatten(base or {})
    kernel = next((leaves[p] for p in (f"{path}/kernel", f"{path}/embedding") if p in leaves), None)
    if kernel is None:
        raise FtjaxError(f"adapter tensor {name}: a copy of the base's weight, which needs the base to compare with")
    kernel = np.asarray(kernel[layer] if path.startswith("layers/") else kernel)
    if not np.array_equal(kernel, x.astype(kernel.dtype)):
        raise FtjaxError(f"adapter tensor {name} differs from the base's own weight: it was made for another base")


def _pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and a pattern for each module that has another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {re.escape(module): value for module, value in values.items() if value != common}


def _plain(x: float) -> float | int:
    """The number without the rounding of float32, as an int if it is whole, because PEFT's field is an int."""
    x = float(f"{x:.6g}")
    return int(x) if x == int(x) else x
