"""A head over labels: trained whole, beside whatever a method trains of the model below it.

Such a head is mostly new, and small; so every method trains it as it is, and PEFT carries it as `modules_to_save`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.hub.peft import PREFIX
from ftjax.tree import flatten, unflatten

PEFT_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}  # task of a head -> PEFT's


def has_labels(spec) -> bool:
    """Whether the model ends in a head over labels."""
    return spec.model.head.labels > 0


def split(tree: dict) -> tuple[dict, dict]:
    """A tree -> what is not of the head, and the head's part."""
    return {name: x for name, x in tree.items() if name != "head"}, tree.get("head", {})


def with_head(method: Any) -> Any:
    """The Method that trains a head over labels too, where the model has one; else it does what `method` does."""
    plain = method.axes

    def init(key, base, spec):
        if not has_labels(spec):
            return method.init(key, base, spec)
        below, head = split(base)
        trained, frozen = method.init(key, below, spec)
        return trained | {"head": head}, frozen

    def variables(trained, frozen, spec):
        below, head = split(trained)
        found = method.variables(below, frozen, spec)
        return found | {"params": found["params"] | {"head": head}} if has_labels(spec) else found

    def merge(trained, frozen, spec):
        below, head = split(trained)
        found = method.merge(below, frozen, spec)
        return found | {"head": head} if has_labels(spec) else found

    def to_peft(trained, frozen, spec):
        below, head = split(trained)
        config, tensors = method.to_peft(below, frozen, spec)
        if not has_labels(spec):
            return config, tensors
        more = {"task_type": PEFT_TASKS[spec.model.head.task], "modules_to_save": saved_modules(spec)}
        return config | more, tensors | head_tensors({"head": head}, spec)

    def from_peft(adapter_config, tensors, base, spec):
        if not has_labels(spec):
            return method.from_peft(adapter_config, tensors, base, spec)
        below, own = split(base)
        head, rest = head_of_peft(tensors, own, spec)
        trained, fields = method.from_peft(adapter_config | {"modules_to_save": None}, rest, below, spec)
        return trained | head, fields

    return dataclasses.replace(
        method,
        init=init,
        variables=variables,
        merge=method.merge and merge,
        to_peft=method.to_peft and to_peft,
        from_peft=method.from_peft and from_peft,
        axes=functools.partial(_axes, plain),
    )


def _axes(plain, path: str) -> tuple:
    from ftjax.models.transformer import parameter_axes

    return parameter_axes(path) if path.startswith("head/") else plain(path)


def saved_modules(spec) -> list[str]:
    """Names of the modules that hold the head: those outside the base as a whole, one within it by itself."""
    names = [m.name for m in families.modules(spec.family, spec.model) if m.path.split("/")[0] == "head"]
    inside = spec.family.prefix
    return sorted({name if name.startswith(inside) else name.split(".")[0] for name in names})


def head_tensors(params: dict, spec) -> dict[str, np.ndarray]:
    """PEFT's name -> tensor, float32, of every parameter of a head."""
    leaves = flatten(params)
    stored = families.tensor_names(spec.family, spec.model)
    return {f"{PREFIX}{stored[path][0][0]}": np.asarray(x, np.float32) for path, x in leaves.items()}


def head_of_peft(tensors: dict[str, np.ndarray], own: dict, spec) -> tuple[dict, dict[str, np.ndarray]]:
    """Tensors of an adapter -> the head's as a tree {"head": ...}, and the others.

    own: the head of the base, whose parameters stand in for those that the adapter does not carry: PEFT by default
    trains the last map alone, and leaves a BERT's pooler as it is. Raises FtjaxError for another shape, and where the
    last map is missing.
    """
    found, rest, own = {}, dict(tensors), flatten({"head": own})
    stored = families.tensor_names(spec.family, spec.model)
    shapes = {path: shape for path, shape in families.shapes(spec.model).items() if path.startswith("head/")}
    for path, shape in shapes.items():
        name = f"{PREFIX}{stored[path][0][0]}"
        if name in rest:
            found[path] = np.asarray(rest.pop(name), np.float32)
        elif not path.startswith("head/out/"):
            found[path] = own[path]
        if path not in found or found[path].shape != shape:
            there = f"has shape {found[path].shape}" if path in found else "is missing"
            raise FtjaxError(f"adapter tensor {name} {there}, expected {shape}: the head over labels, trained whole")
    return unflatten(found), rest
