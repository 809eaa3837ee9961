"""IA3 (Liu et al. 2022): trained vectors that scale keys, values and the hidden layer of the feed-forward.

The output of a target is scaled, bias included, or, for the last map of a feed-forward, its input. L layers. The
vectors of a stacked map are stacked too. In layers that are not targets they have no effect and no gradient.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub.families import shapes
from ftjax.hub.peft import PREFIX, refuse_variants
from ftjax.models.layers import ADAPTERS, Adapter
from ftjax.models.transformer import parameter_axes
from ftjax.tree import flatten, unflatten
from ftjax.tuning.base import Method, Spec, register
from ftjax.tuning.targets import by_module, fan_in_fan_out, module_names, peft_targets, select, without_embeddings

# Path of a map -> what of it is scaled, where `tuning.targets` names nothing: keys, values and hidden layers, as in the
# paper; GPT-2's one map for queries, keys and values is scaled as a whole, as PEFT does it.
TARGETS = {f"layers/{part}/{name}_proj": "output" for part in ("attn", "global") for name in "kv"}
TARGETS |= {"layers/attn/c_attn": "output", "layers/mlp/down_proj": "input", "layers/wide/down_proj": "input"}
NONE = ("none",)  # tuning.feedforward: no target's input is scaled
KEYS = {"feedforward_modules", "init_ia3_weights"}  # of an IA3 adapter_config.json


def before(x, leaves, rng):
    """x · l."""
    return (x * leaves["input"]).astype(x.dtype) if "input" in leaves else x


def after(x, y, kernel, bias, leaves, rng):
    """y · l."""
    return (y * leaves["output"]).astype(y.dtype) if "output" in leaves else y


ADAPTERS["ia3"] = Adapter(before, after)


def scaled(spec: Spec) -> dict[str, list[bool]]:
    """{`PATH/ia3/input` or `PATH/ia3/output`: for each layer, whether it is scaled}."""
    names, model = without_embeddings(spec.names), spec.model
    usual = tuple(m for path in TARGETS if path in names for m in module_names(path, names[path], model))
    chosen = select(names, model, tuple(spec.tuning.targets) or usual, saved=tuple(spec.tuning.modules_to_save))
    feedforward = tuple(spec.tuning.feedforward)
    if feedforward == NONE:
        inputs = {}
    elif feedforward:
        inputs = select({path: names[path] for path in chosen}, model, feedforward, "tuning.feedforward")
    else:
        inputs = {path: hits for path, hits in chosen.items() if TARGETS.get(path) == "input"}
    out = {}
    for path, hits in chosen.items():
        first = inputs.get(path, [False] * len(hits))
        out[f"{path}/ia3/input"] = [hit and i for hit, i in zip(hits, first, strict=True)]
        out[f"{path}/ia3/output"] = [hit and not i for hit, i in zip(hits, first, strict=True)]
    return {leaf: hits for leaf, hits in out.items() if any(hits)}


def init(key, base, spec):
    """Ones: training starts from the base model's logits."""
    params, trained = flatten(base), {}
    for leaf in scaled(spec):
        *stack, out, in_ = params[leaf.rsplit("/", 2)[0] + "/kernel"].shape
        trained[leaf] = jnp.ones((*stack, in_ if leaf.endswith("input") else out))
    return unflatten(trained), base


def variables(trained, frozen, spec):
    """The base's parameters, and the vectors in the `adapter` collection. They are ones in layers that are not
    targets."""
    return {"params": frozen, "adapter": unflatten(_effective(trained, spec))}


def _effective(trained, spec):
    leaves = flatten(trained)
    return {
        leaf: jnp.where(np.array(hits)[:, None], leaves[leaf], 1.0) if leaves[leaf].ndim == 2 else leaves[leaf]
        for leaf, hits in scaled(spec).items()
    }


def merge(trained, frozen, spec):
    """Scale the columns of W if the input is scaled, or its rows and the bias if the output is. Dtypes stay the
    same."""
    params = flatten(frozen)
    for leaf, scale in _effective(trained, spec).items():
        path = leaf.rsplit("/", 2)[0]
        kernel, of_input = params[f"{path}/kernel"], leaf.endswith("input")
        factors = scale[..., None, :] if of_input else scale[..., None]
        params[f"{path}/kernel"] = (kernel.astype(jnp.float32) * factors).astype(kernel.dtype)
        if f"{path}/bias" in params and not of_input:
            bias = params[f"{path}/bias"]
            params[f"{path}/bias"] = (bias * scale).astype(bias.dtype)
    return unflatten(params)


def axes(path):
    """Split like the kernel's axis of the same name."""
    module, _, leaf = path.rsplit("/", 2)
    *stack, out, in_ = parameter_axes(f"{module}/kernel")
    return (*stack, in_ if leaf == "input" else out)


def to_peft(trained, frozen, spec):
    """PEFT's IA3: `ia3_l` is (1, in) for the modules in `feedforward_modules`, and (out, 1) for the others."""
    leaves, tensors, chosen, inputs = flatten(trained), {}, {}, {}
    for leaf, hits in scaled(spec).items():
        path, _, side = leaf.rsplit("/", 2)
        vectors = np.asarray(leaves[leaf], np.float32).reshape(len(hits), -1)
        for module, hit, vector in zip(module_names(path, spec.names[path], spec.model), hits, vectors, strict=True):
            if hit:
                tensors[f"{PREFIX}{module}.ia3_l"] = vector[None] if side == "input" else vector[:, None]
        chosen[path] = [a or b for a, b in zip(chosen.get(path, hits), hits, strict=True)]
        if side == "input":
            inputs[path] = hits
    feedforward = peft_targets(inputs, spec.names, spec.model)
    config = {
        "peft_type": "IA3",
        # PEFT needs modules whose input is scaled under the same names in both lists.
        "target_modules": sorted({*peft_targets(chosen, spec.names, spec.model), *feedforward}),
        "feedforward_modules": feedforward,
        "fan_in_fan_out": fan_in_fan_out(chosen, spec.names),
        "modules_to_save": None,
        "init_ia3_weights": True,
    }
    return config, tensors


def from_peft(adapter_config, tensors, base, spec):
    """Read a PEFT IA3. The shape of a vector says which side of its module is scaled."""
    refuse_variants(adapter_config, KEYS, "IA3")
    names, expected, model = without_embeddings(spec.names), shapes(spec.model), spec.model
    found, sides = {}, {"input": [], "output": []}
    for name, module, _, path, layer, x in by_module(adapter_config, tensors, ("ia3_l",), names, model):
        out, in_ = expected[f"{path}/kernel"][-2:]
        side = {(1, in_): "input", (out, 1): "output"}.get(x.shape)
        if side is None:
            raise FtjaxError(f"adapter tensor {name} has shape {x.shape}, expected {(out, 1)} or {(1, in_)}")
        count = len(module_names(path, names[path], model))
        rows = found.setdefault(f"{path}/ia3/{side}", np.ones((count, x.size), np.float32))
        rows[layer] = np.asarray(x, np.float32).reshape(-1)
        sides[side].append(module)
    if not found:
        raise FtjaxError("the adapter has no IA3 tensors")
    trained = {leaf: rows if leaf.startswith("layers/") else rows[0] for leaf, rows in found.items()}
    fields = {"targets": (*sides["output"], *sides["input"]), "feedforward": tuple(sides["input"]) or NONE}
    return unflatten(trained), fields


register(
    "ia3",
    Method(
        init=init,
        variables=variables,
        merge=merge,
        to_peft=to_peft,
        from_peft=from_peft,
        peft_type="IA3",
        axes=axes,
        takes=("targets", "feedforward", "modules_to_save"),
        lr=3e-3,  # the paper's, its recipe T-Few: 1,000 steps of 8 rows
        batch_size=8,  # the same
    ),
)
