"""The one table that says how logical axes lie on the mesh, and the constraint that models put on activations.

Data parallelism, FSDP, tensor parallelism and their mixes differ in this table and in the mesh's shape alone.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes that split it
RULES = {
    "batch": ("data", "fsdp"),  # rows
    "embed": ("fsdp",),  # D of weights; activations keep it whole and are named None there
    "heads": ("tensor",),  # H * d
    "kv_heads": ("tensor",),  # K * d
    "hidden": ("tensor",),  # F
    "vocab": ("tensor",),  # V
}


def spec(axes: tuple[str | None, ...], sizes: tuple[int, ...], mesh) -> PartitionSpec:
    """Logical axes and how many equal parts each dimension can be cut into at most -> PartitionSpec on `mesh`.

    A dimension that its mesh axes do not divide stays whole: correct on every mesh, and split where it can be.
    """
    out = []
    for axis, size in zip(axes, sizes, strict=True):
        names = tuple(n for n in RULES.get(axis, ()) if n in mesh.axis_names and mesh.shape[n] > 1)
        ways = 1
        for n in names:
            ways *= mesh.shape[n]
        out.append(names if names and size % ways == 0 else None)
    return PartitionSpec(*out)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell XLA how an activation lies on the mesh in force; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
