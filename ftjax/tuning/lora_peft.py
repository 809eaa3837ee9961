"""Convert between LoRA's tensors in PEFT's files and our adapter tree. Facts about the files are from peft 0.21.

L layers, R rank. In our tree adapters of stacked maps are stacked: a (L, R, in), b (L, out, R), with R the largest rank
of the layers. A layer of smaller rank, or without an adapter (rank 0), has zeros in the rest. For an embedding table
(V, D), `in` is V and `out` is D. Adapters of E experts are a (L, E, R, in) and b (L, E, out, R).
"""

from __future__ import annotations

import math
import re
from collections import Counter

import jax
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub.families import EXPERTS, kernel_shape
from ftjax.hub.peft import CONFIG, PREFIX, checked, refuse_variants
from ftjax.models.config import ModelConfig, layers_with
from ftjax.models.quantised import holds
from ftjax.tree import flatten, unflatten
from ftjax.tuning.targets import EMBEDDINGS, OfModule, by_module, by_pattern, fan_in_fan_out, module_names, peft_targets

# Keys of a LoRA adapter_config.json that need no variant of LoRA.
LORA_KEYS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "lora_dropout"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "eva_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# The initialisations that do not change the base model's weights.
LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
ORDER = ("gate_up_proj", "down_proj")  # the parameters of experts in the order in which their class has them
# Ends of the names of A and B: of a map that is multiplied with, and of a table of embeddings.
SUFFIXES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
COPY = "base_layer.weight"  # of a copy of the base's own weight beside an adapter
ENDS = (*SUFFIXES[0], *SUFFIXES[1], COPY)
# A tensor of the module of one expert, which transformers 4 has, and {its map: those that share one adapter with it}.
EXPERT = re.compile(r"(.*)\.(mlp|block_sparse_moe)\.experts\.\d+\.(w[123]|(?:gate|up|down)_proj)\.lora_[AB]\.weight")
PARTNERS = {"gate_proj": ("up_proj",), "w1": ("w3",), "down_proj": (), "w2": ()}


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
        initial: {path: array} of initial adapters that are subtracted: BA - B₀A₀ is one adapter of twice the rank.

    Returns:
        (adapter_config, {name in PEFT's files: tensor, float32}).
    """
    leaves, start, tensors, rank_of, alpha_of = flatten(adapter), initial or {}, {}, {}, {}
    # PEFT wraps the parameters of experts in the order of ORDER: the first has the second's wrapper around its own.
    outer = ranks.get(f"{EXPERTS}{ORDER[1]}", (np.zeros(shape.layers),))[0]
    for path, (rank, scale) in ranks.items():
        first, second = SUFFIXES[path in EMBEDDINGS]
        a, b = (_stack(leaves[f"{path}/lora/{n}"], path) for n in "ab")
        if subtracted := f"{path}/lora_initial/a" in start:
            a0, b0 = (_stack(start[f"{path}/lora_initial/{n}"], path) for n in "ab")
        for layer, module in enumerate(module_names(path, names[path], shape)):
            r, wrapper = int(rank[layer]), module
            if not r:
                continue
            rows, columns = a[layer, ..., :r, :], b[layer, ..., :r]
            if path.startswith(EXPERTS):
                wrapper, name = module.rsplit(".", 1)
                if name == ORDER[0] and outer[layer]:
                    wrapper += ".base_layer"
                rows, columns = rows.reshape(-1, a.shape[-1]), columns.transpose(1, 2, 0).reshape(b.shape[-2], -1)
            if subtracted:
                rows = np.concatenate([rows, a0[layer, :r]])
                columns = np.concatenate([columns, -b0[layer, :, :r]], axis=1)
                r = 2 * r
            tensors |= {f"{PREFIX}{wrapper}.{first}": rows, f"{PREFIX}{wrapper}.{second}": columns}
            rank_of[module] = r
            alpha_of[module] = _plain(float(scale[layer]) * divisor(r, rslora))
    r, rank_pattern = _pattern(rank_of)
    alpha, alpha_pattern = _pattern(alpha_of)
    experts, maps = {}, {}
    for path, (rank, _) in ranks.items():
        (experts if path.startswith(EXPERTS) else maps)[path] = (rank > 0).tolist()
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    config = lora_config(r, alpha, peft_targets(maps, names, shape), **patterns)
    config |= {"fan_in_fan_out": fan_in_fan_out(maps, names), "use_rslora": rslora}
    if experts:
        config["target_parameters"] = peft_targets(experts, names, shape)
    return config, tensors


def lora_config(rank: float, alpha: float, modules: list[str], **patterns: dict) -> dict:
    """The fields of an adapter_config.json for a plain LoRA.

    Args:
        rank: Rank of most modules.
        alpha: Their alpha.
        modules: `target_modules`.
        patterns: `rank_pattern` and `alpha_pattern`, for modules that differ.
    """
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        **patterns,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


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
    adapter_config, tensors = _joined(adapter_config, tensors, config)
    wrapped = _of_experts(adapter_config, names, config)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for tensor in by_module(adapter_config, tensors, ENDS, names, config, wrapped):
        if tensor.end == COPY:
            _check_copy(tensor, base)
        else:
            pairs.setdefault(tensor.module, {})[tensor.end] = np.asarray(tensor.value, np.float32)
    if not pairs:
        raise FtjaxError("the adapter has no LoRA tensors")

    flat, ranks = {}, {}
    for path, name in names.items():
        modules, suffixes = module_names(path, name, config), SUFFIXES[path in EMBEDDINGS]
        used = {layer: pairs[module] for layer, module in enumerate(modules) if module in pairs}
        if not used:
            continue
        *lead, out, in_ = kernel_shape(path, config)
        experts = tuple(lead[1:]) if path.startswith(EXPERTS) else ()
        rank, scale = np.zeros(len(modules), int), np.zeros(len(modules), np.float32)
        for layer, pair in used.items():
            rank[layer], scale[layer] = _rank_and_scale(adapter_config, modules[layer])
            rows = math.prod(experts) * int(rank[layer])
            for suffix, shape in zip(suffixes, ((rows, in_), (out, rows)), strict=True):
                checked(pair.get(suffix), f"{PREFIX}{modules[layer]}.{suffix}", shape)
        a = np.zeros((len(modules), *experts, rank.max(), in_), np.float32)
        b = np.zeros((len(modules), *experts, out, rank.max()), np.float32)
        for layer, pair in used.items():
            r, (one, two) = rank[layer], (pair[suffix] for suffix in suffixes)
            if experts:
                one, two = one.reshape(*experts, r, in_), two.reshape(out, r, *experts).transpose(2, 0, 1)
            a[layer, ..., :r, :], b[layer, ..., :r] = one, two
        stacked = path.startswith("layers/")
        flat[f"{path}/lora/a"], flat[f"{path}/lora/b"] = (a, b) if stacked else (a[0], b[0])
        ranks[path] = rank, scale
    return unflatten(flat), ranks


def _joined(adapter_config: dict, tensors: dict[str, np.ndarray], config: ModelConfig) -> tuple[dict, dict]:
    """An adapter with a module for each expert, as PEFT writes it with transformers 4, in the form for parameters.

    As in PEFT with transformers 5, gates and what they multiply become one adapter: A has the rows of both, and B is
    block-diagonal.
    """
    found = sorted({match.groups() for name in tensors if (match := EXPERT.fullmatch(name))})
    if not found:
        return adapter_config, tensors
    if variant := next((k for k in ("use_rslora", "rank_pattern", "alpha_pattern") if adapter_config.get(k)), ""):
        raise FtjaxError(f"{CONFIG}: {variant} is not supported for an adapter with a module for each expert")
    out, r, D, F = dict(tensors), adapter_config.get("r", 8), config.width, config.hidden

    def take(place: str, half: str, shape: tuple[int, int]) -> np.ndarray:
        names = [f"{place.format(e=e)}.lora_{half}.weight" for e in range(config.experts)]
        return np.stack([checked(out.pop(name, None), name, shape) for name in names])

    for layer, part, name in found if config.experts else ():
        if name not in PARTNERS:
            continue  # taken with its gate
        places = [f"{layer}.{part}.experts.{{e}}.{each}" for each in (name, *PARTNERS[name])]
        parameter, in_, size = (ORDER[0], D, F) if PARTNERS[name] else (ORDER[1], F, D)
        a = np.concatenate([take(place, "A", (r, in_)) for place in places], axis=1)
        b = np.zeros((config.experts, size * len(places), a.shape[1]), np.float32)
        for i, place in enumerate(places):
            b[:, i * size : (i + 1) * size, i * r : (i + 1) * r] = take(place, "B", (size, r))
        out[f"{layer}.mlp.experts.{parameter}.lora_A.weight"] = a.reshape(-1, in_)
        out[f"{layer}.mlp.experts.{parameter}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
    twice = {"rank_pattern": {ORDER[0]: 2 * r}, "alpha_pattern": {ORDER[0]: 2 * adapter_config.get("lora_alpha", 8)}}
    return adapter_config | twice, out


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
            f"{CONFIG}: target_parameters has {unknown[0]!r}, which names no parameter of this model's experts, and "
            "ftjax supports no others; PEFT's all-linear adds the router, so train with named modules instead"
        )
    return out


def _refuse_variants(config: dict) -> None:
    refuse_variants(config, LORA_KEYS, "LoRA")
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


def _check_copy(copy: OfModule, base: dict | None) -> None:
    leaves = flatten(base or {})
    kernel = next((leaves[p] for p in (f"{copy.path}/kernel", f"{copy.path}/embedding") if p in leaves), None)
    if kernel is None:
        raise FtjaxError(
            f"adapter tensor {copy.name}: a copy of the base's weight, which needs the base to compare with"
        )
    kernel = kernel[copy.layer] if copy.path.startswith("layers/") else kernel
    if not jax.jit(holds)(kernel, copy.value):
        raise FtjaxError(f"adapter tensor {copy.name} differs from the base's own weight: it was made for another base")


def _pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and a pattern for each module that has another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {re.escape(module): value for module, value in values.items() if value != common}


def _plain(x: float) -> float | int:
    """The number without the rounding of float32, as an int if it is whole, because PEFT's field is an int."""
    x = float(f"{x:.6g}")
    return int(x) if x == int(x) else x
