"""DoRA (Liu et al. 2024): W' = m · (W + s B A) / ‖W + s B A‖, the norm taken over each output's row; W frozen.

m (out,) is trained and starts as the row norms of W, so that W' = W. A and B are those of LoRA, with the same targets,
ranks, scales and initialisations. No gradient flows through the norm (section 4.3 of the paper). Dropout acts on the
update by A and B; PEFT also drops a part of W x. L layers, R rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub.families import EXPERTS
from ftjax.hub.peft import CONFIG, PREFIX, checked
from ftjax.models.layers import ADAPTERS, Adapter
from ftjax.models.transformer import parameter_axes
from ftjax.tree import flatten, unflatten
from ftjax.tuning import lora
from ftjax.tuning.base import Method, register
from ftjax.tuning.lora_init import INITS
from ftjax.tuning.targets import EMBEDDINGS, module_names

SUFFIX = ".lora_magnitude_vector"  # in PEFT's files, without `.weight`
TINY = 1e-12  # a row of zeros has a norm of zero


def row_norms(kernel, a, b, scale):
    """‖W + s B A‖ of each row (out,), float32, from W Aᵀ and A Aᵀ, without computing the sum (out, in).

    ‖w + s b A‖² = ‖w‖² + 2 s (W Aᵀ) · b + s² b (A Aᵀ) · b.
    """

    def dot(x, y):
        return jnp.matmul(x, y, precision="highest", preferred_element_type=jnp.float32)

    squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-1)
    across = jnp.sum(dot(kernel, a.T.astype(kernel.dtype)) * b, axis=-1)
    low = jnp.sum(dot(b, dot(a, a.T)) * b, axis=-1)
    return jnp.sqrt(jnp.maximum(squares + 2 * scale * across + scale**2 * low, TINY**2))


def apply(x, y, kernel, bias, leaves, rng):
    """m / ‖W + s B A‖ · (y - bias + s B A x) + bias. A layer whose scale is zero is not a target and stays
    unchanged."""
    norms = row_norms(kernel, *jax.lax.stop_gradient((leaves["a"], leaves["b"])), leaves["scale"])
    gain = jnp.where(leaves["scale"] > 0, leaves["magnitude"] / norms, 1.0).astype(y.dtype)
    bias = 0 if bias is None else bias.astype(y.dtype)
    return gain * (y - bias + lora.update(x, leaves, rng)) + bias


ADAPTERS["dora"] = Adapter(after=apply, axes=lora.leaf_axes)


def init(key, base, spec):
    """LoRA's A and B, and the row norms of W."""
    if INITS[spec.tuning.init].residual:
        plain = ", ".join(name for name, row in INITS.items() if not row.residual)
        raise FtjaxError(f"tuning.init: {spec.tuning.init} changes W, which dora needs unchanged; use one of {plain}")
    _refuse_tables_and_experts(lora.ranks(spec))
    trained, frozen = lora.init(key, base, spec)
    params, trained = flatten(base), flatten(trained)
    for path, (rank, _) in lora.ranks(spec).items():
        kernel = params[f"{path}/kernel"]
        stack = kernel if kernel.ndim == 3 else kernel[None]
        # One layer after another: no more than one kernel in float32 at a time.
        norms = jax.lax.map(
            lambda layer, stack=stack: jnp.linalg.norm(stack[layer].astype(jnp.float32), axis=-1), jnp.arange(len(rank))
        )
        norms = jnp.where(rank[:, None] > 0, norms, 0.0)
        trained[f"{path}/lora/magnitude"] = norms if kernel.ndim == 3 else norms[0]
    return unflatten(trained), frozen


def variables(trained, frozen, spec):
    """As LoRA's, in the `adapter` collection under `dora`."""
    out = lora.variables(trained, frozen, spec)
    adapter = {path.replace("/lora/", "/dora/"): x for path, x in flatten(out["adapter"]).items()}
    return {"params": out["params"], "adapter": unflatten(adapter)}


@jax.jit
def _changed(kernel, a, b, magnitude, s):
    """W' of a kernel that has an adapter, where s > 0. Compiled once for all kernels of a shape."""
    whole = kernel.astype(jnp.float32)
    total = whole + s * (b @ a)
    gain = magnitude[..., None] / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), TINY)
    return jnp.where(s > 0, gain * total, whole).astype(kernel.dtype)


def merge(trained, frozen, spec):
    """W', computed in float32 and stored as W was."""
    params, adapter = flatten(frozen), flatten(trained)
    for path, (_, scale) in lora.ranks(spec).items():
        kernel = params[f"{path}/kernel"]
        leaves = (adapter[f"{path}/lora/{leaf}"] for leaf in ("a", "b", "magnitude"))
        params[f"{path}/kernel"] = _changed(kernel, *leaves, scale[:, None, None] if kernel.ndim == 3 else scale[0])
    return unflatten(params)


def axes(path):
    """As LoRA's; magnitudes are split like the output axis of the kernel."""
    if path.endswith("/magnitude"):
        *stack, out, _ = parameter_axes(path.replace("/lora/magnitude", "/kernel"))
        return *stack, out
    return lora.axes(path)


def lr_scale(path, optim):
    """As LoRA+; magnitudes learn like B, as in PEFT."""
    return optim.lora_plus if path.endswith("/magnitude") else lora.lr_scale(path, optim)


def to_peft(trained, frozen, spec):
    """PEFT's LORA with `use_dora`."""
    adapter_config, tensors = lora.to_peft(trained, frozen, spec)
    leaves = flatten(trained)
    for path, (rank, _) in lora.ranks(spec).items():
        magnitude = np.asarray(leaves[f"{path}/lora/magnitude"], np.float32).reshape(len(rank), -1)
        for module, r, row in zip(module_names(path, spec.names[path], spec.model), rank, magnitude, strict=True):
            if r:
                tensors[f"{PREFIX}{module}{SUFFIX}"] = row
    return adapter_config | {"use_dora": True}, tensors


def from_peft(adapter_config, tensors, base, spec):
    """Read a PEFT LORA with `use_dora`. Raises FtjaxError if a module's magnitudes are missing or of another length."""
    pairs = {name: x for name, x in tensors.items() if not name.endswith(SUFFIX)}
    trained, fields = lora.from_peft(adapter_config | {"use_dora": False}, pairs, base, spec)
    if any(alpha <= 0 for _, alpha in fields["alpha_pattern"]):
        raise FtjaxError(f"{CONFIG}: lora_alpha and alpha_pattern: dora needs numbers above 0")
    leaves, adapted = flatten(trained), set(fields["targets"])
    paths = [path.removesuffix("/lora/b") for path in leaves if path.endswith("/lora/b")]
    _refuse_tables_and_experts(paths)
    for path in paths:
        b = leaves[f"{path}/lora/b"]
        modules = module_names(path, spec.names[path], spec.model)
        magnitude = np.zeros((len(modules), b.shape[-2]), np.float32)
        for layer, module in enumerate(modules):
            if module in adapted:
                name = f"{PREFIX}{module}{SUFFIX}"
                magnitude[layer] = checked(tensors.get(name), name, magnitude.shape[1:])
        leaves[f"{path}/lora/magnitude"] = magnitude if b.ndim == 3 else magnitude[0]
    return unflatten(leaves), fields


def _refuse_tables_and_experts(paths):
    if any(path.startswith(EXPERTS) for path in paths):
        raise FtjaxError("tuning.targets: dora cannot adapt experts, for which peft has no DoRA; lora can")
    if any(path in EMBEDDINGS for path in paths):
        raise FtjaxError("tuning.targets: dora cannot adapt embedding tables; lora can")


register(
    "dora",
    Method(
        init=init,
        variables=variables,
        merge=merge,
        to_peft=to_peft,
        from_peft=from_peft,
        peft_type="LORA",
        peft_variant=lambda adapter_config: bool(adapter_config.get("use_dora")),
        axes=axes,
        lr_scale=lr_scale,
        takes=lora.TAKES,
        lr=2e-4,  # of the authors' runs on LLaMA-7B and Llama-2-7B (NVlabs/DoRA, commonsense_reasoning)
        batch_size=16,  # the same
    ),
)
