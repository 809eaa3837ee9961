"""Arrays on a mesh: the mesh itself, and the shardings of parameters, optimizer state and batches."""

from __future__ import annotations

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ftjax.errors import FtjaxError
from ftjax.models.axes import MESH_AXES, batch_axes, by_rows, spec
from ftjax.models.quantised import Quantised
from ftjax.models.transformer import parameter_axes
from ftjax.tree import flatten, map_paths

TYPES = (AxisType.Auto,) * len(MESH_AXES)


def mesh_sizes(config, count: int) -> dict[str, int]:
    """{axis: its size} of a mesh over `count` devices. An axis of -1 takes the devices that the others leave.

    Args:
        config: config.mesh; an axis that it lacks has the size 1.
        count: Number of devices.

    Raises:
        FtjaxError: If the sizes do not multiply to the number of devices, or if two of them are -1.
    """
    asked = {axis: config.get(axis, 1) for axis in MESH_AXES}
    given = [n for n in asked.values() if n != -1]
    rest = count // max(math.prod(given), 1)
    sizes = {axis: rest if n == -1 else n for axis, n in asked.items()}
    if math.prod(sizes.values()) != count or min(sizes.values()) < 1 or len(asked) - len(given) > 1:
        listed = ", ".join(f"{axis}={n}" for axis, n in asked.items())
        raise FtjaxError(f"mesh: {listed} does not multiply to the {count} devices here; set one axis to -1")
    return sizes


def make_mesh(config, devices=None) -> jax.sharding.Mesh:
    """A mesh with MESH_AXES over all devices, see `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    shape = list(mesh_sizes(config, len(devices)).values())
    # An axis of 8 on a slice of 4 x 4 takes half of one side.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, MESH_AXES, axis_types=TYPES)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices, which is enough for shapes and shardings."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES, axis_types=TYPES)


def parameter_shardings(shapes: dict, config, mesh, axes=parameter_axes) -> dict:
    """Tree of NamedSharding for a tree of shapes. `axes(path)` returns the logical axes of a leaf."""

    def place(leaf, names):
        # Heads are cut between heads, never through one; codes and scales of a quantised kernel are fewer than its
        # columns.
        units = {"heads": config.heads, "kv_heads": config.kv_heads}
        sizes = tuple(math.gcd(units.get(name, size), size) for name, size in zip(names, leaf.shape, strict=True))
        return NamedSharding(mesh, spec(names, sizes, mesh))

    def place_all(path, leaf):
        return leaf.map(place, axes(path)) if isinstance(leaf, Quantised) else place(leaf, axes(path))

    return map_paths(place_all, shapes)


def optimizer_shardings(optimizer, shapes: dict, shardings: dict, mesh):
    """Shardings of the optimizer's state: moments as their parameters, counters and factored moments replicated.

    Match an optimizer leaf to the parameter whose path is a suffix of the leaf's path and whose shape is equal.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes_by_path, shardings_by_path = flatten(shapes), flatten(shardings)

    def place(keys, leaf):
        names = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)]
        for start in range(len(names)):
            path = "/".join(names[start:])
            if path in shapes_by_path and shapes_by_path[path].shape == leaf.shape:
                return shardings_by_path[path]
        return everywhere

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, shapes))


def row_ways(mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return by_rows(mesh.shape)


def local_rows(mesh, rows: int) -> slice:
    """The rows of a batch that this process must build: from the first to the last row of its devices."""
    sharding = NamedSharding(mesh, spec(("batch",), (rows,), mesh))
    spans = [index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map((rows,)).values()]
    return slice(min(start for start, _ in spans), max(stop for _, stop in spans))


def place_batch(batch: dict, mesh, rows: int, local: slice) -> dict:
    """Put a batch on the devices, split over the mesh by rows and tokens.

    Args:
        batch: {name: host array of the rows `local`}.
        mesh: The devices.
        rows: Rows of the whole batch.
        local: The rows that this process has.
    """

    def place(name, x):
        shape = (rows, *x.shape[1:])
        sharding = batch_sharding(mesh, name, shape)

        def part(index):
            start, stop, _ = index[0].indices(rows)
            return x[start - local.start : stop - local.start, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(name, x) for name, x in batch.items()}


def batch_sharding(mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of the array `name` of a batch."""
    return NamedSharding(mesh, spec(batch_axes(name, len(shape)), shape, mesh))
