"""LoRA (Hu et al. 2021): W x + s B A x with A (R, in), B (out, R), s = alpha / rank; W frozen.

For an embedding table (V, D), W is the transpose: A (R, V), B (D, R). L layers, R rank. Adapters of stacked maps are
stacked too. A layer whose rank is below R, or that is not a target, has zeros in the rest of its A and B. Their
gradients are zero as well, so they stay zero.

If the initial BA is a part of W (`tuning.init` pissa, olora), W itself is not changed. Instead the initial adapter is
subtracted: W x + s B A x - s B₀ A₀ x. `frozen` then holds A₀ and B₀ beside the parameters.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub.families import EXPERTS, kernel_shape
from ftjax.models.layers import ADAPTERS, Adapter, project, project_groups
from ftjax.models.quantised import dequantised
from ftjax.models.transformer import parameter_axes
from ftjax.tree import flatten, unflatten
from ftjax.tuning.base import Method, Spec, register
from ftjax.tuning.lora_init import EMBEDDING, INITS, draw, draw_experts
from ftjax.tuning.lora_peft import divisor, lora_from_peft, lora_to_peft
from ftjax.tuning.targets import EMBEDDINGS, by_pattern, check_patterns, module_names, select


def update(x, leaves, rng):
    """s · (x Aᵀ) Bᵀ, with dropout on x if `leaves` holds a rate and a random key is given."""
    if "dropout" in leaves and rng is not None:
        keep = 1.0 - leaves["dropout"]
        x = jnp.where(jax.random.bernoulli(rng, keep, x.shape), x / keep, 0).astype(x.dtype)
    low = project(x, leaves["a"].astype(x.dtype)) * leaves["scale"].astype(x.dtype)
    return project(low, leaves["b"].astype(x.dtype))


def lookup(ids, y, leaves):
    """y + s · Aᵀ[ids] Bᵀ."""
    low = jnp.take(leaves["a"].T, ids, axis=0, mode="clip").astype(y.dtype) * leaves["scale"].astype(y.dtype)
    return y + project(low, leaves["b"].astype(y.dtype))


def leaf_axes(out, in_):
    """A is split like the kernel's input axis and B like its output axis. Ranks are too small to split."""
    return {"a": (None, in_), "b": (out, None)}


def grouped(x, leaves, sizes):
    """s · (x Aᵀ) Bᵀ, with A (E, R, in) and B (E, out, R) of the expert of each row of x (N, in)."""
    low = project_groups(x, leaves["a"].astype(x.dtype), sizes) * leaves["scale"].astype(x.dtype)
    return project_groups(low, leaves["b"].astype(x.dtype), sizes)


ADAPTERS["lora"] = Adapter(
    after=lambda x, y, kernel, bias, leaves, rng: y + update(x, leaves, rng), grouped=grouped, lookup=lookup,
    axes=leaf_axes,
)  # fmt: skip
ADAPTERS["lora_initial"] = Adapter(
    after=lambda x, y, kernel, bias, leaves, rng: y - update(x, leaves, rng), axes=leaf_axes
)


def ranks(spec: Spec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{path of each target: (ranks, int; scales, float32)}, each (L,), or (1,) if the map is not stacked."""
    tuning, model = spec.tuning, spec.model
    out, adapted = {}, []
    targets = tuple(tuning.targets) or ("all-linear",)
    chosen = select(spec.names, model, targets, saved=tuple(tuning.modules_to_save))
    for path, hits in chosen.items():
        rank, scale = [], []
        for module, hit in zip(module_names(path, spec.names[path], model), hits, strict=True):
            r = by_pattern(tuning.rank_pattern, module, tuning.rank, "tuning.rank_pattern")
            alpha = by_pattern(tuning.alpha_pattern, module, tuning.alpha, "tuning.alpha_pattern")
            adapted += [module] * hit
            rank.append(r if hit else 0)
            scale.append(alpha / divisor(r, tuning.rslora) if hit else 0.0)
        out[path] = np.array(rank), np.array(scale, np.float32)
    if tuning.dropout and any(path.startswith(EXPERTS) for path in out):
        raise FtjaxError("tuning.dropout: adapters of experts have no dropout, as in peft; set it to 0")
    for key in ("rank_pattern", "alpha_pattern"):
        check_patterns(tuning[key], adapted, f"tuning.{key}")
    return out


def init(key, base, spec):
    """Initialise A and B as `tuning.init` says. The initial logits are those of the base model."""
    params, trained, initial = flatten(base), {}, {}
    for path, (rank, scale) in ranks(spec).items():
        start = EMBEDDING if path in EMBEDDINGS else INITS[spec.tuning.init]
        if path.startswith(EXPERTS):
            a, b = draw_experts(key, path, kernel_shape(path, spec.model), rank, scale, start)
        else:
            kernel = _kernel(params, path)
            a, b = draw(key, path, kernel if kernel.ndim == 3 else kernel[None], rank, scale, start)
            a, b = (a, b) if kernel.ndim == 3 else (a[0], b[0])
        trained |= {f"{path}/lora/a": a, f"{path}/lora/b": b}
        if start.residual:
            initial |= {f"{path}/lora_initial/a": a, f"{path}/lora_initial/b": b}
    return unflatten(trained), unflatten(params | initial) if initial else base


def variables(trained, frozen, spec):
    """The base's parameters, and A, B, scale and dropout rate in the `adapter` collection."""
    params, initial = split(frozen)
    adapter = flatten(trained) | initial
    for path, (_, scale) in ranks(spec).items():
        per_layer = jnp.asarray(scale if path.startswith("layers/") else scale[0])
        adapter[f"{path}/lora/scale"] = per_layer
        if f"{path}/lora_initial/a" in adapter:
            adapter[f"{path}/lora_initial/scale"] = per_layer
        if spec.tuning.dropout:
            adapter[f"{path}/lora/dropout"] = jnp.full_like(per_layer, spec.tuning.dropout)
    return {"params": unflatten(params), "adapter": unflatten(adapter)}


@jax.jit
def _changed(kernel, b, a, scale, *first):
    """W + s (B A - B0 A0). first: B0 and A0, where the base holds them. Compiled once for all kernels of a shape."""
    change = (b @ a - first[0] @ first[1] if first else b @ a) * scale
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def merge(trained, frozen, spec):
    """W + s B A, added in float32 and stored in W's dtype. If the table of a tied head changes, the head gets the old
    table as its own."""
    (params, initial), adapter = split(frozen), flatten(trained)
    for path, (_, scale) in ranks(spec).items():
        if path.startswith(EXPERTS):
            change = adapter[f"{path}/lora/b"] @ adapter[f"{path}/lora/a"] * scale[:, None, None, None]
            name = path.removeprefix(EXPERTS)
            parts = (name,) if f"layers/mlp/{name}/experts" in params else ("gate_proj", "up_proj")
            for part, own in zip(parts, jnp.split(change, len(parts), axis=2), strict=True):
                kernel = params[f"layers/mlp/{part}/experts"]
                params[f"layers/mlp/{part}/experts"] = (kernel.astype(jnp.float32) + own).astype(kernel.dtype)
            continue
        kernel = _kernel(params, path)
        first = [initial[f"{path}/lora_initial/{leaf}"] for leaf in "ba" if f"{path}/lora_initial/{leaf}" in initial]
        scale = scale[:, None, None] if kernel.ndim == 3 else scale[0]
        kernel = _changed(kernel, adapter[f"{path}/lora/b"], adapter[f"{path}/lora/a"], scale, *first)
        if path == "embed" and spec.model.shares_table:
            params.setdefault("lm_head/kernel", params["embed/embedding"])
        leaf, value = ("embedding", kernel.T) if path in EMBEDDINGS else ("kernel", kernel)
        params[f"{path}/{leaf}"] = value
    return unflatten(params)


def split(frozen):
    """Split `frozen` into the base's parameters and the initial adapters, {path: array} each."""
    flat = flatten(frozen)
    initial = {path: x for path, x in flat.items() if "/lora_initial/" in path}
    return {path: x for path, x in flat.items() if path not in initial}, initial


def _kernel(params, path):
    """The kernel (out, in) at `path`, or (L, out, in) if it is stacked."""
    return dequantised(params[f"{path}/embedding"]).T if path in EMBEDDINGS else params[f"{path}/kernel"]


def axes(path):
    """As `leaf_axes`, with the layer axis of stacked maps."""
    if "/lora" not in path:
        return parameter_axes(path)
    module, _, leaf = path.rsplit("/", 2)
    if module in EMBEDDINGS:
        in_, out = parameter_axes(f"{module}/embedding")
        stack = []
    elif module.startswith(EXPERTS):
        *stack, out, in_ = parameter_axes(f"layers/mlp/{module.removeprefix(EXPERTS)}/experts")
    else:
        *stack, out, in_ = parameter_axes(f"{module}/kernel")
    return *stack, *leaf_axes(out, in_)[leaf]


def lr_scale(path, optim):
    """LoRA+ (Hayou et al. 2024): B learns `optim.lora_plus` times as fast as A; on embeddings both learn as A does."""
    return optim.lora_plus if path.endswith("/lora/b") and path.split("/")[0] not in EMBEDDINGS else 1.0


def to_peft(trained, frozen, spec):
    """PEFT's LORA. If an initial adapter is subtracted, the rank is doubled, so that the adapter fits the unchanged
    base."""
    return lora_to_peft(trained, ranks(spec), spec.names, spec.model, spec.tuning.rslora, split(frozen)[1])


def from_peft(adapter_config, tensors, base, spec):
    """Read a PEFT LORA. The rank and alpha of each module become patterns."""
    trained, found = lora_from_peft(adapter_config, tensors, spec.names, spec.model, base)
    rslora = bool(adapter_config.get("use_rslora"))
    rank_of, alpha_of = {}, {}
    for path, (rank, scale) in found.items():
        modules = module_names(path, spec.names[path], spec.model)
        used = [(module, int(r), float(s)) for module, r, s in zip(modules, rank, scale, strict=True) if r]
        rank_of |= {module: r for module, r, _ in used}
        alpha_of |= {module: divisor(r, rslora) * s for module, r, s in used}
    fields = {
        "targets": tuple(rank_of),
        "rank_pattern": tuple((re.escape(module), r) for module, r in rank_of.items()),
        "alpha_pattern": tuple((re.escape(module), alpha) for module, alpha in alpha_of.items()),
        "rslora": rslora,
        "init": "default",  # training starts from its tensors
    }
    return trained, fields


TAKES = ("rank", "alpha", "dropout", "targets", "modules_to_save", "rslora", "init", "rank_pattern", "alpha_pattern")
register(
    "lora",
    Method(
        init=init,
        variables=variables,
        merge=merge,
        to_peft=to_peft,
        from_peft=from_peft,
        peft_type="LORA",
        axes=axes,
        frozen_axes=axes,
        start=lambda frozen: unflatten(split(frozen)[1]),
        lr_scale=lr_scale,
        takes=TAKES,
        lr=2e-4,  # QLoRA's for 7B to 13B, and ten times full training's, as LoRA wants (Schulman et al. 2025)
        batch_size=16,  # small batches: LoRA loses to full training as batches grow (same source)
    ),
)
