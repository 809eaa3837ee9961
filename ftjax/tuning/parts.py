"""Methods that train a part of the model's own parameters: its last layers, biases, norms, head, or a pattern.

L layers. The blocks below the lowest trained one are a stack of their own, `layers`, and the others are `top_layers`
(see ftjax.models.transformer). No backward pass enters the lower stack, so steps get cheaper the fewer layers are
trained. If only parameters after the blocks are trained, or some in or before the lowest block, all blocks stay in
`layers`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import regular_expression
from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.hub.peft import PREFIX
from ftjax.models.config import layers_with
from ftjax.models.transformer import BEHIND
from ftjax.tree import flatten, unflatten
from ftjax.tuning.base import Method, register
from ftjax.tuning.lora_peft import lora_config
from ftjax.tuning.whole import has_labels, put, saved, take

# ---- which parameters: (path, tensor name, layer or None, spec) -> whether it is trained --------------------------


def in_last_layers(path, name, layer, spec):
    """Whether a parameter is in the last `tuning.layers` blocks, or in a module that `tuning.layers_with` names."""
    return path.split("/")[0] in spec.tuning.layers_with if layer is None else layer >= first_layer(spec)


def first_layer(spec) -> int:
    """The lowest of the last `tuning.layers` layers. Raises FtjaxError for more layers than the model has."""
    layers, L = spec.tuning.layers, spec.model.layers
    count = max(round(layers * L), 1) if layers < 1 else int(layers)
    if count > L or (layers >= 1 and layers != count):
        raise FtjaxError(f"tuning.layers: expected a share below 1, or a whole number up to {L}; found {layers!r}")
    return L - count


def is_bias(path, name, layer, spec):
    """Every bias, those of norms among them (Ben Zaken et al. 2022, BitFit)."""
    return path.endswith(("/bias", "/biases"))


def is_norm(path, name, layer, spec):
    """Scale and bias of every norm."""
    return path.split("/")[-2].endswith("norm")


def is_head(path, name, layer, spec):
    """Whether a parameter is in the head. A head over labels is trained by every method, see `chosen`."""
    return path.startswith("lm_head/")


def matches(path, name, layer, spec):
    """Whether one of `tuning.pattern` matches the whole of a tensor's name in the model's files, or of our path."""
    patterns = [regular_expression(pattern, "tuning.pattern") for pattern in spec.tuning.pattern]
    return any(pattern.fullmatch(text) for pattern in patterns for text in (name, path))


def chosen(rule: Callable, spec) -> dict[str, np.ndarray]:
    """{path: for each layer that has it whether it is trained there}, bool, (1,) if not stacked, for paths with any
    trained layer.

    The head of a tied model counts as a parameter of its own, and becomes one when it is trained; patterns must name
    `lm_head` for it. Raises FtjaxError if nothing is trained.
    """
    tied = spec.model.tied and rule is matches and not any("lm_head" in p for p in spec.tuning.pattern)
    names = families.tensor_names(spec.family, dataclasses.replace(spec.model, tied=tied))
    found = {}
    for path, (tensors, *_) in names.items():
        layers = layers_with(spec.model, path) if path.startswith("layers/") else (None,)
        always = has_labels(spec) and path.startswith("head/")
        hits = [always or rule(path, name, layer, spec) for name, layer in zip(tensors, layers, strict=True)]
        if any(hits):
            found[path] = np.array(hits)
    if not found:
        raise FtjaxError(_nothing(rule, names))
    return found


def _nothing(rule: Callable, names: dict) -> str:
    if rule is is_bias:
        return "tuning.method: bitfit trains biases, and this model has none; try `norms`, `ia3` or `lora`"
    some = [tensors[-1] for tensors, *_ in names.values()]
    return (
        f"tuning.pattern: no parameter is matched; a pattern must match a whole name such as {some[0]}, {some[1]} or "
        f"{list(names)[1]}"
    )


# ---- the tree in two: what is trained, and the rest ---------------------------------------------------------------


def lower_layers(parts: dict[str, np.ndarray], spec) -> int:
    """Number of lowest blocks that form a stack of their own because nothing in or before them is trained; 0: one
    stack."""
    before = [path for path in parts if not path.startswith(("layers/", *BEHIND))]
    lowest = [layer_ids_of(path, hits, spec)[0] for path, hits in parts.items() if path.startswith("layers/")]
    return 0 if before else int(min(lowest, default=0))


def layer_ids_of(path: str, hits: np.ndarray, spec) -> np.ndarray:
    """The layers in which a stacked parameter is trained."""
    return np.array(layers_with(spec.model, path))[hits]


def rows_below(path: str, lower: int, spec) -> int:
    """Number of rows of a stacked parameter that belong to the `lower` lowest blocks."""
    return sum(layer < lower for layer in layers_with(spec.model, path))


def upper(parts: dict[str, np.ndarray], spec) -> dict[str, np.ndarray]:
    """`parts` by the paths of the upper stack, with its rows alone; `parts` itself if there is one stack."""
    lower = lower_layers(parts, spec)
    if not lower:
        return parts
    stacked = {path: hits for path, hits in parts.items() if path.startswith("layers/")}
    rows = {f"top_{path}": hits[rows_below(path, lower, spec) :] for path, hits in stacked.items()}
    return {path: hits for path, hits in parts.items() if path not in stacked} | rows


def init(key, base, spec, rule):
    """The parameters that `rule` selects are trained, starting from the base's values; see `whole.take`."""
    parts = chosen(rule, spec)
    lower = lower_layers(parts, spec)
    if "lm_head/kernel" in parts and "lm_head" not in base:
        base = base | {"lm_head": {"kernel": base["embed"]["embedding"]}}
    params, below = flatten(base), {}
    if lower:
        stack = {path: leaf for path, leaf in params.items() if path.startswith("layers/")}
        below = {path: leaf[: rows_below(path, lower, spec)] for path, leaf in stack.items()}
        params = {p: x for p, x in params.items() if p not in stack}
        params |= {f"top_{p}": x[rows_below(p, lower, spec) :] for p, x in stack.items()}
    trained, frozen = take(params, upper(parts, spec))
    return unflatten(trained), unflatten(below | frozen)


def variables(trained, frozen, spec, rule):
    """A model's parameters, in two stacks where the lower blocks are frozen."""
    return {"params": unflatten(put(flatten(frozen), flatten(trained), upper(chosen(rule, spec), spec)))}


def merge(trained, frozen, spec, rule):
    """The plain model: both stacks in one, in the wider of their dtypes."""
    params = dict(variables(trained, frozen, spec, rule)["params"])
    if "top_layers" in params:
        top = params.pop("top_layers")
        params["layers"] = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), params["layers"], top)
    return params


def layer_ids(path, spec, rule):
    """The layers that a trained leaf holds, in its order."""
    own = path.removeprefix("top_")
    return layer_ids_of(own, chosen(rule, spec)[own], spec)


def to_peft(trained, frozen, spec, rule):
    """The trained parameters as a PEFT LORA adapter whose own changes are zero.

    PEFT's LORA must adapt some module, so the embedding table gets a LoRA of rank 1 that is all zeros.
    """
    rows = {path.removeprefix("top_"): x for path, x in flatten(trained).items()}
    return saved(*_no_lora(spec), chosen(rule, spec), rows, spec)


def _no_lora(spec) -> tuple[dict, dict[str, np.ndarray]]:
    module, (V, D) = families.module_name("embed", spec.family, spec.model), (spec.model.vocab_size, spec.model.width)
    zeros = {"lora_embedding_A": np.zeros((1, V), np.float32), "lora_embedding_B": np.zeros((D, 1), np.float32)}
    return lora_config(1, 1, [module]), {f"{PREFIX}{module}.{leaf}": x for leaf, x in zeros.items()}


def method(rule: Callable, lr: float, exports: bool = True, takes: tuple[str, ...] = (), **fields) -> Method:
    """A row of METHODS that trains what `rule` names; exports: whether PEFT can carry it; takes: see Method."""
    bound = {f.__name__: functools.partial(f, rule=rule) for f in (init, variables, merge, layer_ids)}
    form = functools.partial(to_peft, rule=rule) if exports else None
    return Method(**bound, to_peft=form, lr=lr, of_parameters=True, takes=takes, **fields)


# Learning rates: of a few tried on CommonGen, the starter model of 260,000 parameters learned best with 1e-3 in its
# last layers, 5e-3 in its norms and 1e-3 in its head; wider models want less for matrices (Yang et al. 2022, muP).
register("last_layers", method(in_last_layers, 3e-4, takes=("layers", "layers_with")))
register("bitfit", method(is_bias, 1e-3))  # what its authors' run_glue.py takes by default, with AdamW
register("norms", method(is_norm, 2e-3))
register("head", method(is_head, 1e-3))
register("pattern", method(matches, 3e-4, exports=False, takes=("pattern",)))
