"""The tables that map logical axes to the mesh, and the sharding constraints that models put on activations.

Data parallelism, FSDP, tensor and sequence parallelism and their combinations differ only in these tables and in the
shape of the mesh.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from ftjax.models.quantised import Quantised

# Devices along the last axis are nearest to each other: tensor parallelism communicates most.
MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BY_ROWS = ("data", "fsdp", "expert")  # those that split the rows of a batch

# logical axis -> mesh axes that split it
RULES = {
    "batch": BY_ROWS,  # rows
    "tokens": ("sequence",),  # T of activations, and of labels
    "experts": ("expert",),  # E
    "embed": ("fsdp", "sequence"),  # D of weights; activations keep it whole and are named None there
    "heads": ("tensor",),  # H * d
    "kv_heads": ("tensor",),  # K * d
    "hidden": ("tensor",),  # F
    "vocab": ("tensor",),  # V
}

# Maps whose outputs lie one after another, such as q, k and v: cutting across them would tear heads apart.
JOINED = ("c_attn", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "gate_up_proj")
# The end of a parameter's path -> its logical axes. Stacked parameters have a layer axis before these.
PARAMETER_AXES = {
    **dict.fromkeys(("embed/embedding", "inputs_embed/embedding", "lm_head/kernel"), ("vocab", "embed")),
    **dict.fromkeys(("pos_embed/embedding", "type_embed/embedding", "router"), (None, "embed")),
    **{f"{name}/kernel": (None, "embed") for name in ("dense", "out", "shared_gate", "inputs_proj", "gate", *JOINED)},
    "q_proj/kernel": ("heads", "embed"),
    **dict.fromkeys(("k_proj/kernel", "v_proj/kernel"), ("kv_heads", "embed")),
    "o_proj/kernel": ("embed", "heads"),
    "out_proj/kernel": ("embed", None),
    **dict.fromkeys(("gate_proj/kernel", "up_proj/kernel"), ("hidden", "embed")),
    "down_proj/kernel": ("embed", "hidden"),
    **dict.fromkeys(("q_proj/bias", "sinks"), ("heads",)),
    **dict.fromkeys(("k_proj/bias", "v_proj/bias"), ("kv_heads",)),
    **dict.fromkeys(("gate_proj/bias", "up_proj/bias"), ("hidden",)),
    "gate_up_proj/experts": ("experts", None, "embed"),  # of adapters: the gate and then the other
    **dict.fromkeys(("gate_proj/experts", "up_proj/experts"), ("experts", "hidden", "embed")),
    "down_proj/experts": ("experts", "embed", "hidden"),
    **dict.fromkeys(("gate_up_proj/biases", "down_proj/biases"), ("experts", None)),
    **dict.fromkeys(("conv", "distil/kernel"), (None, None, None)),
    **dict.fromkeys(("bias", "scale", "A_log", "dt_bias"), (None,)),
}

# An array of a batch -> its logical axes; others are split by rows alone. Every device knows all places that are read.
BATCH_AXES = {name: ("batch", "tokens") for name in ("tokens", "positions", "segment_ids", "labels", "weights")}


def batch_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of the array `name` of a batch."""
    return (BATCH_AXES.get(name, ("batch",)) + (None,) * ndim)[:ndim]


def spec(axes: tuple[str | None, ...], sizes: tuple[int, ...], mesh) -> PartitionSpec:
    """The PartitionSpec of an array on `mesh`.

    A dimension that the mesh axes do not divide stays whole, which is correct on every mesh.

    Args:
        axes: Logical axes of the array.
        sizes: For each dimension, the number of equal parts that it can be cut into at most.
        mesh: The devices.
    """
    kinds, out = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)), []
    for axis, size in zip(axes, sizes, strict=True):
        # Along a manual axis an array is already the part of one device.
        names = tuple(n for n in RULES.get(axis, ()) if ways(mesh, n) > 1 and kinds[n] != AxisType.Manual)
        out.append(names if names and size % ways(mesh, *names) == 0 else None)
    return PartitionSpec(*out)


def ways(mesh, *names: str) -> int:
    """The number of parts that these mesh axes make together; axes that the mesh does not have count as 1."""
    return math.prod(mesh.shape.get(n, 1) for n in names)


def by_rows(sizes) -> int:
    """The number of parts that rows are split into. sizes: {mesh axis: size}; an axis that is missing counts as 1."""
    return math.prod(sizes.get(axis, 1) for axis in BY_ROWS)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell XLA the sharding of an activation on the mesh in force; without a mesh, do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(mesh.manual_axes) == len(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def whole(x, axes: tuple[str | None, ...] | None):
    """A parameter with logical `axes`, gathered along its embed axis for a product; None: not gathered.

    Otherwise the compiler would split the sum of the product, and add up activations over devices.
    """
    if isinstance(x, Quantised):
        return x if axes is None else x.map(lambda part, names: whole(part, names), axes)
    return _along_embed(x, axes, lambda own: None)


def split(x: jax.Array, axes: tuple[str | None, ...] | None) -> jax.Array:
    """The gradient of a parameter that `whole` gathered, summed over devices and split like the parameter."""
    return _along_embed(x, axes, lambda own: own)


def _along_embed(x, axes, place):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or axes is None or ways(mesh, *RULES["embed"]) == 1:
        return x
    own = spec(axes, x.shape, mesh)
    # The other axes stay as they come: heads, say, are cut between heads, which their number here does not tell.
    free = [place(p) if axis == "embed" else PartitionSpec.UNCONSTRAINED for axis, p in zip(axes, own, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))
