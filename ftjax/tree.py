"""Nested dicts of arrays seen as flat tables of slash-separated paths."""

from __future__ import annotations


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": x}} -> {"a/b": x}, in the tree's order."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        flat |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return flat


def unflatten(flat: dict) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def map_paths(f, tree: dict) -> dict:
    """Tree of f(path, leaf)."""
    return unflatten({path: f(path, leaf) for path, leaf in flatten(tree).items()})
