"""LoRA (Hu et al. 2021): W x + s B A x with A (R, in), B (out, R), s = alpha / rank; W frozen.

L layers, R rank. Adapters of stacked maps are stacked too. A layer whose rank is below R, or that is not a target at
all, keeps the rest of its A and B at zero: their gradients are then zero as well, and stay so.
"""

from __future__ import annotations

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.models.decoder import parameter_axes
from ftjax.models.layers import ADAPTERS, Adapter, project
from ftjax.tree import flatten, unflatten
from ftjax.tuning.base import Method, Spec, register
from ftjax.tuning.lora_peft import lora_from_peft, lora_to_peft
from ftjax.tuning.targets import by_pattern, check_patterns, module_names, select


def apply(x, y, kernel, bias, leaves, rng):
    """y + s · (x Aᵀ) Bᵀ, with dropout on x where `leaves` holds a rate and a key is given."""
    if "dropout" in leaves and rng is not None:
        keep = 1.0 - leaves["dropout"]
        x = jnp.where(jax.random.bernoulli(rng, keep, x.shape), x / keep, 0).astype(x.dtype)
    low = project(x, leaves["a"].astype(x.dtype)) * leaves["scale"].astype(x.dtype)
    return y + project(low, leaves["b"].astype(x.dtype))


ADAPTERS["lora"] = Adapter(after=apply)


def ranks(spec: Spec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Path of each target -> its rank (int) and scale (float32), each (L,), or (1,) where it is not stacked."""
    tuning, layers = spec.tuning, spec.model.layers
    out, adapted = {}, []
    for path, hits in select(spec.names, layers, tuple(tuning.targets)).items():
        rank, scale = [], []
        for module, hit in zip(module_names(path, spec.names[path], layers), hits, strict=True):
            r = by_pattern(tuning.rank_pattern, module, tuning.rank, "tuning.rank_pattern")
            alpha = by_pattern(tuning.alpha_pattern, module, tuning.alpha, "tuning.alpha_pattern")
            if r < 1:
                raise FtjaxError(f"tuning.rank: {module} would get rank {r}; expected at least 1")
            adapted += [module] * hit
            rank.append(r if hit else 0)
            scale.append(alpha / r if hit else 0.0)
        out[path] = np.array(rank), np.array(scale, np.float32)
    for key in ("rank_pattern", "alpha_pattern"):
        check_patterns(tuning[key], adapted, f"tuning.{key}")
    return out


def init(key, base, spec):
    """A as PEFT draws it, uniform in ±1/sqrt(in); B zero, so that training starts from the base model's logits."""
    kernels, trained = flatten(base), {}
    for path, (rank, _) in ranks(spec).items():
        shape = kernels[f"{path}/kernel"].shape
        stack, (out, in_), R = shape[:-2], shape[-2:], int(rank.max())
        # The key depends on the path alone: choosing other targets leaves this one's start as it was.
        a = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), (*stack, R, in_), minval=-1.0)
        used = (np.arange(R) < rank[:, None]).reshape(*stack, R, 1)
        trained[f"{path}/lora/a"] = jnp.where(used, a * in_**-0.5, 0.0)
        trained[f"{path}/lora/b"] = jnp.zeros((*stack, out, R))
    return unflatten(trained), base


def variables(trained, frozen, spec):
    """The base's parameters, and A, B, scale and dropout rate in the `adapter` collection."""
    adapter = flatten(trained)
    for path, (_, scale) in ranks(spec).items():
        per_layer = scale if path.startswith("layers/") else scale[0]
        adapter[f"{path}/lora/scale"] = jnp.asarray(per_layer)
        if spec.tuning.dropout:
            adapter[f"{path}/lora/dropout"] = jnp.full_like(per_layer, spec.tuning.dropout)
    return {"params": frozen, "adapter": unflatten(adapter)}


def merge(trained, frozen, spec):
    """W + s B A, summed in float32 and stored as W was."""
    params, adapter = flatten(frozen), flatten(trained)
    for path, (_, scale) in ranks(spec).items():
        kernel = params[f"{path}/kernel"]
        s = scale.reshape(-1, *(1,) * 2) if kernel.ndim == 3 else scale[0]
        update = s * (adapter[f"{path}/lora/b"] @ adapter[f"{path}/lora/a"])
        params[f"{path}/kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return unflatten(params)


def axes(path):
    """A is split as the kernel's input axis is, B as its output axis; ranks are too small to split."""
    module, leaf = path.rsplit("/lora/", 1)
    *stack, out, in_ = parameter_axes(f"{module}/kernel")
    return (*stack, None, in_) if leaf == "a" else (*stack, out, None)


def to_peft(trained, frozen, spec):
    """PEFT's LORA."""
    return lora_to_peft(trained, ranks(spec), spec.names)


def from_peft(adapter_config, tensors, base, spec):
    """A PEFT LORA, rank and alpha of each of its modules spelled out as patterns."""
    trained, found = lora_from_peft(adapter_config, tensors, spec.names, spec.model, base)
    rank_of, alpha_of = {}, {}
    for path, (rank, scale) in found.items():
        modules = module_names(path, spec.names[path], spec.model.layers)
        used = [(module, int(r), float(s)) for module, r, s in zip(modules, rank, scale, strict=True) if r]
        rank_of |= {module: r for module, r, _ in used}
        alpha_of |= {module: r * s for module, r, s in used}
    fields = {
        "targets": tuple(rank_of),
        "rank_pattern": tuple((re.escape(module), r) for module, r in rank_of.items()),
        "alpha_pattern": tuple((re.escape(module), alpha) for module, alpha in alpha_of.items()),
    }
    return trained, fields


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
        lr=2e-4,  # QLoRA's for 7B to 13B, and ten times full training's, as LoRA wants (Schulman et al. 2025)
        batch_size=16,  # small batches: LoRA loses to full training as batches grow (same source)
    ),
)
