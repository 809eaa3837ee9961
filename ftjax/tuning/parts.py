"""Training parts of a model as they are: its last layers, biases, norms, head, or what a pattern names.

L layers. The blocks below the lowest trained one are a stack of their own, `layers`, and the others `top_layers` (see
ftjax.models.transformer): no backward pass enters the lower stack, and so steps get cheaper the fewer layers are
trained. Where nothing but what stands behind the blocks is trained, or something in or before the lowest of them, all
of them stay in `layers`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError, nearest
from ftjax.hub import families
from ftjax.models.transformer import BEHIND
from ftjax.tree import flatten, unflatten
from ftjax.tuning.base import Method, register
from ftjax.tuning.head import PEFT_TASKS, has_labels, saved_modules
from ftjax.tuning.parts_peft import as_biases, as_modules, carries_parts, parts_of_peft

# ---- which parameters: (path, tensor name, layer or None, spec) -> whether it is trained --------------------------


def in_last_layers(path, name, layer, spec):
    """The last `tuning.layers` blocks, and what `tuning.layers_with` names."""
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
    return path.endswith("/bias")


def is_norm(path, name, layer, spec):
    """Scale and bias of every norm."""
    return path.split("/")[-2].endswith("norm")


def is_head(path, name, layer, spec):
    """The head; one over labels every rule trains, see `chosen`."""
    return path.startswith("lm_head/")


def matches(path, name, layer, spec):
    """What one of `tuning.pattern` matches as a whole: a tensor's name in the model's files, or our path."""
    return any(pattern.fullmatch(text) for pattern in _compiled(tuple(spec.tuning.pattern)) for text in (name, path))


@functools.cache
def _compiled(patterns: tuple[str, ...]) -> list[re.Pattern]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise FtjaxError(f"tuning.pattern: {error.pattern!r} is not a regular expression: {error}") from None


def chosen(rule: Callable, spec) -> dict[str, np.ndarray]:
    """Path -> for each of its layers whether it is trained, (L,) bool, or (1,) where it is not stacked; those with any.

    A tied model's head counts as a parameter of its own, and is one once trained; patterns must say `lm_head` for it.
    Raises FtjaxError where nothing is trained.
    """
    tied = spec.model.tied and rule is matches and not any("lm_head" in p for p in spec.tuning.pattern)
    names = families.tensor_names(spec.family, dataclasses.replace(spec.model, tied=tied))
    found = {}
    for path, (tensors, _) in names.items():
        layers = range(len(tensors)) if path.startswith("layers/") else (None,)
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
    some = [tensors[-1] for tensors, _ in names.values()]
    return (
        f"tuning.pattern: no parameter is matched; a pattern must match a whole name such as {some[0]}, {some[1]} or "
        f"{list(names)[1]}"
    )


# ---- the tree in two: what is trained, and the rest ---------------------------------------------------------------


def lower_layers(parts: dict[str, np.ndarray], spec) -> int:
    """How many blocks at the bottom lie apart because nothing in or before them is trained; 0: the stack is whole."""
    before = [path for path in parts if not path.startswith(("layers/", *BEHIND))]
    lowest = [int(np.argmax(hits)) for path, hits in parts.items() if path.startswith("layers/")]
    return 0 if before else min(lowest, default=0)


def placed(path: str, hits: np.ndarray, lower: int) -> tuple[str, np.ndarray]:
    """Path and hits of a parameter -> those of its upper part, which is all of it where the stack is whole."""
    if not (lower and path.startswith("layers/")):
        return path, hits
    return f"top_{path}", hits[lower:]


def init(key, base, spec, rule):
    """The parameters that `rule` names are trained, from where they are.

    Of a stacked parameter that is trained in some layers of its stack only, `trained` holds those layers, and `frozen`
    the whole stack, in which they are replaced.
    """
    parts = chosen(rule, spec)
    lower = lower_layers(parts, spec)
    if "lm_head/kernel" in parts and "lm_head" not in base:
        base = base | {"lm_head": {"kernel": base["embed"]["embedding"]}}
    trained, frozen = {}, {}
    for path, leaf in flatten(base).items():
        hits = parts.get(path, np.zeros(spec.model.layers if path.startswith("layers/") else 1, bool))
        if lower and path.startswith("layers/"):
            frozen[path], leaf = leaf[:lower], leaf[lower:]
        path, hits = placed(path, hits, lower)
        if hits.all():
            trained[path] = leaf
            continue
        frozen[path] = leaf
        if hits.any():
            trained[path] = leaf[np.flatnonzero(hits)]
    return unflatten(trained), unflatten(frozen)


def variables(trained, frozen, spec, rule):
    """A model's parameters, in two stacks where the lower blocks are frozen."""
    parts = chosen(rule, spec)
    lower = lower_layers(parts, spec)
    params, leaves = flatten(frozen), flatten(trained)
    for path, hits in (placed(path, hits, lower) for path, hits in parts.items()):
        x = leaves[path]
        params[path] = x if hits.all() else params[path].astype(x.dtype).at[np.flatnonzero(hits)].set(x)
    return {"params": unflatten(params)}


def merge(trained, frozen, spec, rule):
    """The plain model: both stacks in one, in the wider of their dtypes."""
    params = dict(variables(trained, frozen, spec, rule)["params"])
    if "top_layers" in params:
        top = params.pop("top_layers")
        params["layers"] = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), params["layers"], top)
    return params


def layer_ids(path, spec, rule):
    """The layers that a trained leaf holds, in its order."""
    return np.flatnonzero(chosen(rule, spec)[path.removeprefix("top_")])


def to_peft(trained, frozen, spec, rule, form):
    """PEFT's LORA of nothing, that carries what was trained: see parts_peft."""
    config, tensors = form(chosen(rule, spec), merge(trained, frozen, spec, rule), spec)
    if has_labels(spec):
        head = tuple(saved_modules(spec))
        others = [name for name in config["modules_to_save"] or () if not name.startswith(head)]
        config |= {"task_type": PEFT_TASKS[spec.model.head.task], "modules_to_save": sorted((*others, *head))}
    return config, tensors


def from_peft(adapter_config, tensors, base, spec):
    """What a LoRA carries beside changes of its own, of which it must have none; `tuning.pattern` names it."""
    named = parts_of_peft(tensors)
    fields = {"pattern": tuple(re.escape(name) for name in named)}
    tuning = spec.tuning.copy_and_resolve_references()
    tuning.update(fields)
    spec = spec._replace(tuning=tuning)
    shapes, _ = jax.eval_shape(lambda base: init(None, base, spec, matches), base)
    parts, trained = chosen(matches, spec), flatten(shapes)
    tied = spec.model.tied and "lm_head/kernel" not in parts
    stored = families.tensor_names(spec.family, dataclasses.replace(spec.model, tied=tied))
    for path, hits in parts.items():
        names, transposed = stored[path]
        layers = [named.pop(names[layer]) for layer in np.flatnonzero(hits)]
        layers = [np.asarray(x.T if transposed else x, np.float32) for x in layers]
        x = np.stack(layers) if path.startswith("layers/") else layers[0]
        place, _ = placed(path, hits, lower_layers(parts, spec))
        if x.shape != trained[place].shape:
            raise FtjaxError(f"adapter tensors of {path}: shape {x.shape}, expected {trained[place].shape}")
        trained[place] = x
    if named:
        known = [name for names, _ in stored.values() for name in names]
        name = next(iter(named))
        raise FtjaxError(f"adapter tensor {name}: this model has no such parameter{nearest(name, known)}")
    return unflatten(trained), fields


def method(rule: Callable, lr: float, form: Callable | None = None, **fields) -> Method:
    """A row of METHODS that trains what `rule` names; form: how PEFT carries it, None where it cannot."""
    bound = {f.__name__: functools.partial(f, rule=rule) for f in (init, variables, merge, layer_ids)}
    form = form and functools.partial(to_peft, rule=rule, form=form)
    return Method(**bound, to_peft=form, lr=lr, own_head=True, **fields)


# Learning rates: of a few tried on CommonGen, the starter model of 260,000 parameters learned best with 1e-3 in its
# last layers, 5e-3 in its norms and 1e-3 in its head; wider models want less for matrices (Yang et al. 2022, muP).
register("last_layers", method(in_last_layers, 3e-4, as_modules))
register("bitfit", method(is_bias, 1e-3, as_biases))  # what its authors' run_glue.py takes by default, with AdamW
register("norms", method(is_norm, 2e-3, as_modules))
register("head", method(is_head, 1e-3, as_modules))
register("pattern", method(matches, 3e-4, peft_type="LORA", peft_variant=carries_parts, from_peft=from_peft))
