"""Which linear maps an adapter goes on, with the meaning that PEFT gives to names and patterns.

L layers.
"""

from __future__ import annotations

import re

from ftjax.errors import FtjaxError, nearest


def module_names(path: str, template: str, layers: int) -> list[str]:
    """Hugging Face module names of one of our linear maps: one a layer if it is stacked, else one."""
    return [template.format(l=i) for i in range(layers)] if path.startswith("layers/") else [template]


def select(names: dict[str, str], layers: int, targets: tuple[str, ...]) -> dict[str, list[bool]]:
    """Path -> for each of its modules whether `targets` selects it; paths without any are left out.

    names: path -> template of module names. A target is `all-linear` (every linear map in the blocks), `re:PATTERN`
    (must match a whole module name), or a name that equals a module's or its last parts (`q_proj`, `mlp.c_proj`).
    Raises FtjaxError for a target that selects nothing.
    """
    chosen, used = {}, set()
    for path, template in names.items():
        modules = module_names(path, template, layers)
        hits = [[t for t in targets if _matches(t, module, path)] for module in modules]
        used.update(t for hit in hits for t in hit)
        if any(hits):
            chosen[path] = [bool(hit) for hit in hits]
    for target in targets:
        if target not in used:
            tails = sorted({template.rsplit(".", 1)[-1] for template in names.values()})
            raise FtjaxError(
                f"tuning.targets: {target!r} matches no linear map of this model{nearest(target, tails)}; "
                f"it has {', '.join(tails)}; `all-linear` takes all of its blocks"
            )
    return chosen


def _matches(target: str, module: str, path: str) -> bool:
    if target == "all-linear":
        return path.startswith("layers/")
    if target.startswith("re:"):
        return _compile(target[3:], "tuning.targets").fullmatch(module) is not None
    return module == target or module.endswith("." + target)


def by_pattern(patterns, module: str, default, key: str):
    """The value of the first (pattern, value) whose pattern PEFT would take for `module`, else the default.

    PEFT matches a pattern at the end of a module name, behind a dot or at its start.
    """
    for pattern, value in patterns:
        if _compile(rf"(.*\.)?({pattern})$", key).match(module):
            return value
    return default


def check_patterns(patterns, modules: list[str], key: str) -> None:
    """Raises FtjaxError for a pattern that matches none of the adapted `modules`, by the rule of `by_pattern`."""
    for pattern, _ in patterns:
        if not any(by_pattern(((pattern, True),), module, False, key) for module in modules):
            tails = sorted({module.rsplit(".", 1)[-1] for module in modules})
            raise FtjaxError(
                f"{key}: {pattern!r} matches no module that tuning.targets selects{nearest(pattern, tails)}; "
                f"it selects {', '.join(tails)}"
            )


def _compile(pattern: str, key: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FtjaxError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
