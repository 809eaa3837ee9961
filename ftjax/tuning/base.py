"""The interface of a tuning method: pure functions and defaults. A new method is one file that ends in `register`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax import config as configs
from ftjax.hub.families import Family
from ftjax.hub.peft import PREFIX
from ftjax.models.config import ModelConfig, layers_with
from ftjax.models.transformer import parameter_axes
from ftjax.tree import flatten, unflatten
from ftjax.tuning.whole import with_whole


class Spec(NamedTuple):
    """All that a method may know besides arrays."""

    model: ModelConfig
    names: dict[str, str]  # path of a linear map or embedding in our tree -> its Hugging Face module, `{l}`: the layer
    tuning: Any  # config.tuning
    family: Family | None = None  # the row of its names on disk


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Attributes:
        init: init(key, base, spec) -> (trained, frozen): two trees, of which `trained` is differentiated and optimized.
        variables: variables(trained, frozen, spec) -> the Flax variables that the model is applied to.
        merge: merge(trained, frozen, spec) -> parameters of a plain model with the same logits; None if there is no
            such model.
        to_peft: to_peft(trained, frozen, spec) -> (adapter_config, {name: tensor}) in PEFT's format; None if PEFT has
            none.
        from_peft: from_peft(adapter_config, tensors, base, spec) -> (trained, the fields of config.tuning that describe
            it).
        peft_type: Name of the method in adapter_config.json.
        virtual_tokens: virtual_tokens(spec) -> number of tokens before every row.
        axes: axes(path) -> logical axes of a trained leaf, see ftjax.models.axes.
        lr_scale: lr_scale(path, config.optim) -> factor of the learning rate of the trained leaf at `path`.
        layer_ids: layer_ids(path, spec) -> the layers (n,) that a stacked trained leaf holds.
        takes: The fields of config.tuning, without `tuning.`, that the method reads; None: unknown.
    """

    init: Callable
    variables: Callable
    merge: Callable | None = None
    to_peft: Callable | None = None
    from_peft: Callable | None = None
    peft_type: str = ""
    peft_prefix: str = PREFIX  # what PEFT's files put before the names of the base's own parameters
    peft_variant: Callable[[dict], bool] | None = None  # which adapter_configs of a shared peft_type; None: the rest
    virtual_tokens: Callable[[Spec], int] = lambda spec: 0
    axes: Callable[[str], tuple] = parameter_axes
    frozen_axes: Callable[[str], tuple] = parameter_axes  # the same of a frozen leaf
    lr_scale: Callable[[str, Any], float] = lambda path, optim: 1.0
    layer_ids: Callable[[str, Spec], Any] = lambda path, spec: np.array(layers_with(spec.model, path))
    start: Callable[[dict], dict] = lambda frozen: {}  # the part of `frozen` that was computed from the base. A run
    # stores it, because another dtype or device would compute other values
    causal_only: bool = False  # whether it needs a model in which no token sees later ones
    of_parameters: bool = False  # whether it trains only the model's own parameters, see whole.py
    takes: tuple[str, ...] | None = None
    lr: float = 2e-4  # default peak learning rate
    batch_size: int = 16  # default rows a step


METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Add a method to METHODS under the name of `tuning.method`."""
    METHODS[name] = method if method.of_parameters else with_whole(method)


def begun(method: Method, key, base: dict, spec: Spec) -> tuple[dict, dict]:
    """What a run began with, for trained values that lie in a file: (shapes of `trained`, `frozen`), see Method.init.

    The values of `trained` are not computed, and what `frozen` has of the base is not copied.
    """
    found: dict[str, Any] = {}

    def computed(key, base):
        found["trained"], frozen = method.init(key, base, spec)
        given, flat = flatten(base), flatten(frozen)
        found["kept"] = [path for path, x in flat.items() if x is given.get(path)]
        return {path: x for path, x in flat.items() if x is not given.get(path)}

    program = jax.jit(computed).trace(key, base)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found["trained"])
    given = flatten(base)
    made = program.lower().compile()(key, base) if program.out_info else {}
    return shapes, unflatten({path: given[path] for path in found["kept"]} | made)


def ignored(tuning) -> list[str]:
    """Fields of config.tuning that are not at their defaults and that only other methods read."""
    takes = METHODS[tuning.method].takes
    others = {key for method in METHODS.values() for key in method.takes or ()} - set(takes or ())
    usual = configs.default().tuning
    return [f"tuning.{key}" for key in sorted(others) if takes is not None and tuning[key] != usual[key]]


def of_peft(adapter_config: dict) -> Method | None:
    """The method that an adapter_config.json describes. A variant that recognises it comes before the plain method."""
    kind = adapter_config.get("peft_type")
    able = [m for m in METHODS.values() if kind and m.peft_type == kind]
    variants = [m for m in able if m.peft_variant and m.peft_variant(adapter_config)]
    return next(iter(variants + [m for m in able if m.peft_variant is None]), None)
