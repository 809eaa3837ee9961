"""The linear maps that an adapter is applied to, by names and patterns with the same meaning as in PEFT.

An embedding table counts as a linear map of one-hot ids: (D, V), the transpose of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ftjax.config import regular_expression
from ftjax.errors import FtjaxError, nearest
from ftjax.foreign import limited
from ftjax.hub.families import EXPERTS, FAMILIES
from ftjax.hub.peft import CONFIG, PREFIX
from ftjax.models.config import ModelConfig, layers_with

EMBEDDINGS = ("embed", "pos_embed", "type_embed", "inputs_embed")  # paths of tables that are read by index


def module_names(path: str, template: str, config: ModelConfig) -> list[str]:
    """Hugging Face module names of one of our linear maps: one for each layer that has it if it is stacked, else one.

    Args:
        path: The map's path.
        template: Its name, with `{l}` for the layer.
        config: The model's shape.
    """
    return [template.format(l=i) for i in layers_with(config, path)] if path.startswith("layers/") else [template]


class OfModule(NamedTuple):
    """A tensor of an adapter in PEFT's files, and where its module is in the model."""

    name: str  # in the files
    module: str
    end: str  # what follows the module in the name
    path: str  # of the map
    layer: int  # index among the layers that have the map; 0 if it is not stacked
    value: np.ndarray


def by_module(
    adapter_config: dict, tensors: dict[str, np.ndarray], ends: tuple[str, ...], names: dict[str, str],
    config: ModelConfig, wrapped: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[OfModule]:  # fmt: skip
    """Find the modules of an adapter's tensors.

    Args:
        adapter_config: The content of adapter_config.json.
        tensors: {name in PEFT's files: tensor}.
        ends: What may follow a module in a name; the first two are those that an error names.
        names: {path: template of module names}.
        config: The model's shape.
        wrapped: {name of a module in the files: the parameter in it that has the adapter}, for experts.

    Raises:
        FtjaxError: For a tensor with another name, for one of a module that the model does not have, and for one of a
            module that `adapter_config` does not select, which PEFT ignores.
    """
    places = {m: (path, i) for path, name in names.items() for i, m in enumerate(module_names(path, name, config))}
    for name, x in tensors.items():
        if not name.startswith(PREFIX):
            raise FtjaxError(f"adapter tensor {name}: expected the prefix {PREFIX!r}; PEFT would ignore it")
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        if end is None:
            expected = " or ".join(f"MODULE.{end}" for end in ends[:2])
            raise FtjaxError(f"adapter tensor {name}: expected {expected}")
        module = name.removeprefix(PREFIX).removesuffix(f".{end}")
        module = wrapped.get(module, module)
        if module not in places:
            tied = "; its head is tied: the table of embeddings itself" * (module == "lm_head")
            raise FtjaxError(
                f"adapter tensor {name}: this model has no linear map {module!r}{tied or nearest(module, places)}"
            )
        if not places[module][0].startswith(EXPERTS) and not _selects(adapter_config, module, places[module][0]):
            raise FtjaxError(
                f"adapter tensor {name}: target_modules, exclude_modules and layers_to_transform of {CONFIG} do not "
                f"select {module}, and PEFT ignores tensors of such modules; add it to target_modules, or remove the "
                "tensor"
            )
        yield OfModule(name, module, end, *places[module], x)


def _selects(adapter_config: dict, module: str, path: str) -> bool:
    """Whether an adapter_config.json selects a module, by the rule of PEFT's `check_target_module_exists`."""

    def named(key):
        found = adapter_config.get(key) or ()
        if isinstance(found, str):
            return regular_expression(found, f"{CONFIG}: {key}").fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in found)

    targets, layers = adapter_config.get("target_modules"), adapter_config.get("layers_to_transform")
    with limited(f"{CONFIG}: target_modules"):
        if named("exclude_modules"):
            return False
        if isinstance(targets, str):
            every = targets.lower() == "all-linear"
            return path not in (*EMBEDDINGS, "lm_head") if every else named("target_modules")
        if layers in (None, []) or not named("target_modules"):
            return named("target_modules")
        within = adapter_config.get("layers_pattern") or ()
        within = [rf"(?:^|.*?\.){each}" for each in ([within] if isinstance(within, str) else within)]
        found = (
            regular_expression(rf"{each}\.(\d+)\.", f"{CONFIG}: layers_pattern").match(module)
            for each in within or [r".*?\.[^.]*"]
        )
        index = next((int(match[1]) for match in found if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def saves(entry: str, tensor: str) -> bool:
    """Whether an entry of PEFT's `modules_to_save` selects a tensor, by its name in the model's files.

    It does if the name of the tensor's module, or of a module around it, ends in the entry, such as `norm` for
    `model.layers.0.input_layernorm`. Beyond PEFT's meaning, an entry can be the end of a bias's own name.
    """
    parts = tensor.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + (parts[-1] == "bias"))]
    return any(name.endswith(entry) for name in around)


def select(
    names: dict[str, str], config: ModelConfig, targets: tuple[str, ...], key: str = "tuning.targets",
    saved: tuple[str, ...] = (),
) -> dict[str, list[bool]]:  # fmt: skip
    """Select the maps that an adapter is applied to.

    Args:
        names: {path: template of module names}.
        config: The model's shape.
        targets: Each is `all-linear` (every linear map in the blocks, but no experts, as in PEFT), `re:PATTERN` (must
            match a whole module name),
            or a name that equals a module's or its last parts (`q_proj`, `mlp.c_proj`). Experts are named as PEFT's
            `target_parameters` are (`mlp.experts.down_proj`).
        key: The field of the config that an error names.
        saved: `tuning.modules_to_save`. Modules that are trained whole get no adapter, as in PEFT.

    Returns:
        {path: for each of its modules whether a target selects it}; paths without any are left out.

    Raises:
        FtjaxError: If a target selects nothing.
    """
    chosen, used = {}, set()
    for path, template in names.items():
        modules = module_names(path, template, config)
        hits = [[t for t in targets if _matches(t, module, path, key)] for module in modules]
        used.update(t for hit in hits for t in hit)
        whole = [any(saves(entry, f"{module}.weight") for entry in saved) for module in modules]
        hits = [[] if w else hit for w, hit in zip(whole, hits, strict=True)]
        if any(hits):
            chosen[path] = [bool(hit) for hit in hits]
    for target in targets:
        if target not in used:
            tails = sorted({template.rsplit(".", 1)[-1] for template in names.values()})
            raise FtjaxError(
                f"{key}: {target!r} matches no linear map of this model{nearest(target, tails)}; "
                f"it has {', '.join(tails)}; `all-linear` takes all of its blocks"
                + ("; its head is tied: the table of embeddings itself" * (target == "lm_head"))
            )
    if saved and not chosen:
        raise FtjaxError(
            f"{key}: tuning.modules_to_save trains whole all that {', '.join(targets)} selects; name others"
        )
    return chosen


def without_embeddings(names: dict[str, str]) -> dict[str, str]:
    """`names` without the embedding tables, which are looked up and not multiplied, and without experts."""
    return {path: name for path, name in names.items() if path not in EMBEDDINGS and not path.startswith(EXPERTS)}


def peft_targets(chosen: dict[str, list[bool]], names: dict[str, str], config: ModelConfig) -> list[str]:
    """The selected maps as PEFT's `target_modules`, or experts as its `target_parameters`.

    They are short names if all layers are selected, full names otherwise. They are full names too if the model has
    other parts, in which PEFT would find modules that end alike.

    Args:
        chosen: As `select` returns it.
        names: {path: template of module names}.
        config: The model's shape.
    """
    targets = set()
    # Maps of several paths may have one name, each in other layers.
    part = {names[path] for path in names if path in chosen and not all(chosen[path])}
    part |= {name for path, name in names.items() if path not in chosen}
    alone = not any(f.text and name.startswith(f.prefix) for f in FAMILIES.values() for name in names.values())
    for path, hits in chosen.items():
        modules = module_names(path, names[path], config)
        tail = _tail(names[path], names.values())
        # The layer's number may be the only difference between two names.
        short = alone and names[path] not in part and "{l}" not in tail
        targets |= {tail} if short else {m for m, h in zip(modules, hits) if h}
    return sorted(targets)


def fan_in_fan_out(chosen: dict[str, list[bool]], names: dict[str, str]) -> bool:
    """PEFT's flag for maps that are stored (in, out): whether one of the selected maps is."""
    adapted = {names[path] for path in chosen}
    return any(m.transposed and m.name in adapted for family in FAMILIES.values() for m in family.modules)


def _tail(name: str, names) -> str:
    """The shortest suffix of a module name that no other module of the model has, such as `q_proj` or `attn.c_proj`."""
    parts = name.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(t for t in tails if sum(other == t or other.endswith(f".{t}") for other in {*names}) == 1)


def _matches(target: str, module: str, path: str, key: str) -> bool:
    if target == "all-linear":
        return path.startswith("layers/") and not path.startswith(EXPERTS)
    if target.startswith("re:"):
        return regular_expression(target[3:], key).fullmatch(module) is not None
    return module == target or module.endswith("." + target)


def by_pattern(patterns, module: str, default, key: str):
    """The value of the first (pattern, value) whose pattern matches `module` by PEFT's rule, else the default.

    PEFT matches a pattern with the end of a module name, after a dot or from its start.
    """
    with limited(key):  # a hostile expression may take longer than the age of the universe
        for pattern, value in patterns:
            if regular_expression(rf"(.*\.)?({pattern})$", key).match(module):
                return value
    return default


def check_patterns(patterns, modules: list[str], key: str) -> None:
    """Raise FtjaxError for a pattern that matches none of the adapted `modules`, by the rule of `by_pattern`."""
    for pattern, _ in patterns:
        if not any(by_pattern(((pattern, True),), module, False, key) for module in modules):
            tails = sorted({module.rsplit(".", 1)[-1] for module in modules})
            raise FtjaxError(
                f"{key}: {pattern!r} matches no module that tuning.targets selects{nearest(pattern, tails)}; "
                f"it selects {', '.join(tails)}"
            )
