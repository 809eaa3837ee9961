"""Functions that are written for the part of one device and state their own communication, where the compiler finds no
good plan.

Along the mesh axes that it names, a function gets its device's own part; along the others it is compiled as usual. B
rows, T tokens, M positions that are read, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ftjax.models.axes import BY_ROWS, PARAMETER_AXES, split, ways, whole
from ftjax.models.quantised import Quantised, is_quantised

ALL = (*BY_ROWS, "sequence")  # mesh axes that rows and tokens are split over
ROWS = PartitionSpec(BY_ROWS, "sequence")  # of what is (B, T)
EMBED = ("fsdp", "sequence")  # that weights are split over


def mesh_that_cuts(*names: str):
    """The mesh in force if its axes split anything and the surrounding code is not by device already; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and not mesh.manual_axes and ways(mesh, *names) > 1 else None


def by_device(f, mesh, names, in_specs, out_specs):
    """Apply f to the part of each device along the mesh axes `names`; along the other axes it is compiled as usual."""
    return jax.shard_map(
        f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=frozenset(names), check_vma=False
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: jax.Array, names, dim: int, dtype) -> jax.Array:
    """Concatenate the parts of x of all devices along the mesh axes `names`, along `dim`, in dtype. Its gradients are
    summed in float32."""
    # The gathered axis is moved to the front, because TPUs sum the gradient of a gather along a minor axis as a whole.
    return jnp.moveaxis(jax.lax.all_gather(jnp.moveaxis(x.astype(dtype), dim, 0), names, tiled=True), 0, dim)


def _gather_bwd(names, dim, dtype, like, g):
    total = jnp.moveaxis(g.astype(jnp.float32), dim, 0)
    return (jnp.moveaxis(jax.lax.psum_scatter(total, names, tiled=True), 0, dim).astype(like.dtype),)


gather.defvjp(lambda x, *how: (gather(x, *how), jnp.zeros((), x.dtype)), _gather_bwd)


def wide(tree):
    """Convert floats to float32. Arrays that are whole on several devices enter so, and their gradients are summed in
    float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def look_up(table: jax.Array | Quantised, ids: jax.Array, axis: str | None) -> jax.Array:
    """Rows ids (B, T) of a table (V, D) with logical axes (axis, "embed"): (B, T, D).

    Each device looks up its own columns for the tokens of all devices that share its rows, and they exchange the
    results. The table is never gathered, and its gradient is never summed as a whole. A quantised table, which is small
    and has no gradient, is gathered.
    """
    if isinstance(table, Quantised):
        return whole(table, (axis, "embed")).rows(ids)
    mesh = mesh_that_cuts("fsdp", "sequence")
    columns, dtype = PartitionSpec(None, EMBED), table.dtype
    if not mesh or _uneven(ids.shape, ROWS, mesh) or _uneven(table.shape, columns, mesh):
        return jnp.take(whole(table, (axis, "embed")), ids, axis=0, mode="clip")

    def local(table, ids):
        for name, dim in (("sequence", 1), ("fsdp", 0)):
            ids = jax.lax.all_gather(ids, name, axis=dim, tiled=True)
        y = jnp.take(table.astype(dtype), ids, axis=0, mode="clip")
        for name, dim in (("sequence", 1), ("fsdp", 0)):
            y = jax.lax.all_to_all(y, name, split_axis=dim, concat_axis=2, tiled=True)
        return y

    return by_device(local, mesh, ALL, (columns, ROWS), ROWS)(wide(table), ids)


def sum_outer(g: jax.Array, x: jax.Array, product, axes: tuple[str | None, ...] | None) -> jax.Array:
    """The gradient product(g, x) (out, in), float32, of a kernel with logical `axes`, from g (B, T, out) and x (B, T,
    in).

    Each device sums over its own tokens, and the sums are scattered as the kernel is split.
    """
    mesh = mesh_that_cuts("fsdp", "sequence")
    if not mesh or not axes or "embed" not in axes or g.ndim != 3:
        return product(g, x)
    dim = axes.index("embed")
    place = PartitionSpec(*(EMBED if i == dim else None for i in range(2)))
    if _uneven(g.shape, ROWS, mesh) or _uneven((g.shape[2], x.shape[2]), place, mesh):
        return split(product(g, x), axes)

    def local(g, x):
        total = product(x, g) if dim else product(g, x)  # embed in front, see `gather`
        total = jax.lax.psum(jax.lax.psum_scatter(total, EMBED, tiled=True), ("data", "expert"))
        return total.T if dim else total

    return by_device(local, mesh, ALL, (ROWS, ROWS), place)(g, x)


def take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """x (B, T, D) at the positions index (B, M): (B, M, D), split over devices as tokens are."""
    mesh, T, M = mesh_that_cuts("sequence"), x.shape[1], index.shape[1]
    if not mesh or T % ways(mesh, "sequence") or M % ways(mesh, "sequence"):
        return jnp.take_along_axis(x, index[..., None], axis=1)

    def local(x, index):
        place = (index - jax.lax.axis_index("sequence") * x.shape[1])[..., None]
        mine = jnp.take_along_axis(x, jnp.clip(place, 0, x.shape[1] - 1), axis=1)
        mine = jnp.where((place >= 0) & (place < x.shape[1]), mine, 0)
        mine = jax.lax.psum_scatter(mine.astype(jnp.float32), "sequence", scatter_dimension=1, tiled=True)
        return mine.astype(x.dtype)

    tokens = PartitionSpec(None, "sequence")
    return by_device(local, mesh, ("sequence",), (tokens, PartitionSpec()), tokens)(x, index)


def map_rows(f, variables: dict, arrays: tuple, rngs: dict | None, *, summed: bool = False) -> jax.Array:
    """f(variables, arrays, rngs) of arrays (B, M, ...), each device computing its own rows and positions.

    f returns (B, M, ...), or with `summed` the sums over rows and positions.

    The parts of `variables` that f reads are gathered once, however often f uses them, and their gradients are summed
    once. Of experts that are dealt to devices, f gets those of its device.
    """
    mesh = mesh_that_cuts(*ALL)
    if not mesh or _uneven(arrays[0].shape, ROWS, mesh):
        return f(variables, arrays, rngs)

    def place(x, axes):
        columns = [{"embed": EMBED, "experts": "expert"}.get(axis) for axis in axes]
        return PartitionSpec(*(c if n % ways(mesh, *_names(c)) == 0 else None for c, n in zip(columns, x.shape)))

    def place_all(keys, x):
        names = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)]
        of_adapter = ("experts",) * (x.ndim == 3)  # A and B of experts
        axes = PARAMETER_AXES.get("/".join(names[-2:]), ()) if names[0] == "params" else of_adapter
        return x.map(place, axes) if isinstance(x, Quantised) and axes else place(x, axes)

    places = jax.tree_util.tree_map_with_path(place_all, variables, is_leaf=is_quantised)
    dtypes = jax.tree.map(lambda x: x.dtype, variables)

    def whole_again(x, place, dtype):
        for dim, names in enumerate(place):
            x = gather(x, names, dim, dtype) if names == EMBED else x
        return x.astype(dtype)

    def local(variables, arrays, rngs):
        gathered = jax.tree.map(whole_again, variables, places, dtypes)
        own = jax.lax.axis_index(ALL)
        rngs = None if rngs is None else {name: jax.random.fold_in(key, own) for name, key in rngs.items()}
        found = f(gathered, arrays, rngs)
        return jax.lax.psum(found, ALL) if summed else found

    specs = places, jax.tree.map(lambda x: ROWS, arrays), jax.tree.map(lambda key: PartitionSpec(), rngs)
    return by_device(local, mesh, ALL, specs, PartitionSpec() if summed else ROWS)(wide(variables), arrays, rngs)


def _uneven(shape, places, mesh) -> bool:
    """Whether mesh axes do not divide the sizes that they should split."""
    return any(size % ways(mesh, *_names(n)) for size, n in zip(shape, places, strict=False))


def _names(place) -> tuple[str, ...]:
    return (place,) if isinstance(place, str) else place or ()
