"""VeRA (Kopiczko et al. 2024): W x + b ⊙ B (d ⊙ A x); A and B random, frozen and not stored; b and d are trained.

L layers, R rank. This file is all that the method is: what a method of one's own looks like.
"""

import zlib

import jax
import jax.numpy as jnp

from ftjax.models.layers import ADAPTERS, Adapter, project
from ftjax.tree import flatten, unflatten
from ftjax.tuning.base import Method, register
from ftjax.tuning.targets import select


def targets(spec):
    return select(spec.names, spec.model, tuple(spec.tuning.targets) or ("all-linear",))


def projections(path, kernel, spec):
    """A (L, R, in) and B (L, out, R) of a stacked kernel, drawn from its path alone."""
    *stack, out, in_ = kernel.shape
    a, b = jax.random.split(jax.random.key(zlib.crc32(path.encode())))
    R = spec.tuning.rank
    return jax.random.normal(a, (*stack, R, in_)) * in_**-0.5, jax.random.normal(b, (*stack, out, R)) * R**-0.5


def init(key, base, spec):
    kernels = flatten(base)
    shapes = {path: kernels[f"{path}/kernel"].shape for path in targets(spec)}
    trained = {f"{path}/vera/d": jnp.full((*s[:-2], spec.tuning.rank), 0.1) for path, s in shapes.items()}
    return unflatten(trained | {f"{path}/vera/b": jnp.zeros(s[:-1]) for path, s in shapes.items()}), base


def variables(trained, frozen, spec):
    adapter, kernels = flatten(trained), flatten(frozen)
    for path in targets(spec):
        adapter[f"{path}/vera/A"], adapter[f"{path}/vera/B"] = projections(path, kernels[f"{path}/kernel"], spec)
    return {"params": frozen, "adapter": unflatten(adapter)}


def merge(trained, frozen, spec):
    params, leaves = flatten(frozen), flatten(trained)
    for path in targets(spec):
        a, b = projections(path, params[f"{path}/kernel"], spec)
        scaled = leaves[f"{path}/vera/b"][..., None] * b * leaves[f"{path}/vera/d"][..., None, :]
        params[f"{path}/kernel"] += scaled @ a
    return unflatten(params)


ADAPTERS["vera"] = Adapter(
    after=lambda x, y, kernel, bias, v, rng: y + v["b"] * project(v["d"] * project(x, v["A"]), v["B"]),
)
register("vera", Method(init=init, variables=variables, merge=merge, axes=lambda path: (None, None), lr=1e-2))
