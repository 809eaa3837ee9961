"""Nested dicts of arrays seen as flat tables of slash-separated paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def flatten(tree: dict) -> dict:
    """{"a": {"b": x}} -> {"a/b": x}, in the tree's order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    return traverse_util.unflatten_dict(flat, sep="/")


def map_paths(f, tree: dict) -> dict:
    """Tree of f(path, leaf)."""
    return unflatten({path: f(path, leaf) for path, leaf in flatten(tree).items()})


def not_finite(tree) -> list[str]:
    """The paths of a tree's floating-point leaves that hold a value which is NaN or infinite."""
    leaves = [(p, leaf) for p, leaf in jax.tree.leaves_with_path(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    values = [leaf for _, leaf in leaves]
    if jax.default_backend() == "cpu" and jax.process_count() == 1 and sum(x.size for x in values) < 1 << 24:
        good = [np.isfinite(np.asarray(x)).all() for x in values]  # before a program for these shapes would be compiled
    else:
        good = jax.device_get(_all_finite(values))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [path for path, fine in zip(paths, good, strict=True) if not fine]


@jax.jit
def _all_finite(leaves):
    return [jnp.isfinite(leaf).all() for leaf in leaves]
