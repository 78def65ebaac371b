"""Which axis of which parameter is sharded over which axis of the mesh.

A mesh is `common_jax.mesh.make_mesh`'s: data, fsdp, tensor. Matrices that read the residual stream
(q, k, v, gate, up, head) are sharded by columns over "tensor", those that write to it (o, down) by
rows, so that a block sums over devices twice; the other side of each is sharded over "fsdp" and
gathered when used. So is each expert's of a mixture. Layers (axis 0) are never sharded: the scan
runs over them. An axis whose size the mesh's does not divide stays whole.

Legend: B batch.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from common_jax.mesh import AXES, batch_sharding, put

__all__ = [
    "batch_width",
    "gathered",
    "mesh_of",
    "place",
    "placement",
    "put_rows",
    "shardings",
]

# (end of a parameter's path, axes of the mesh for its last dimensions); the first match counts.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/table", ("tensor", "fsdp")),
    (r"positions/table", (None, "fsdp")),
    (r"(q|k|v|gate|up|head)/kernel", ("fsdp", "tensor")),
    (r"(q|k|v|gate|up|head)/bias", ("tensor",)),
    (r"router/(kernel|a)", ("fsdp", None)),
    (r"(q|k|v|gate|up|head)/a", ("fsdp", None)),
    (r"(q|k|v|gate|up|head)/b", (None, "tensor")),
    (r"(o|down)/kernel", ("tensor", "fsdp")),
    (r"(o|down)/a", ("tensor", None)),
    (r"(o|down)/b", (None, "fsdp")),
)


def placement(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(path, shape) -> where that parameter lives on `mesh`.

    A path is "layers/attention/q/kernel" with or without a prefix such as "tuned" or "lora", so
    that pairs, gradients and optimizer states follow the same rules.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        for pattern, axes in _RULES:
            if re.search(rf"(^|/){pattern}$", path) and len(shape) >= len(axes):
                axes = (None,) * (len(shape) - len(axes)) + axes
                fits = (
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, shape, strict=True)
                )
                return NamedSharding(mesh, PartitionSpec(*fits))
        return NamedSharding(mesh, PartitionSpec())

    return sharding


def gathered(
    path: str, parameter: Shaped[Array, "..."], mesh: Mesh | None
) -> Shaped[Array, "..."]:
    """A parameter whole along fsdp, as a matrix is while it is used; along tensor as it lies.

    The compiler does so by itself for products, but not for lookups in a table: rows that are cut
    by fsdp would be made, and cut anew by the batch's rows, for which it copies them all.
    """
    if mesh is None:
        return parameter
    axes = placement(mesh)(path, parameter.shape).spec
    where = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
    return jax.lax.with_sharding_constraint(parameter, NamedSharding(mesh, where))


def shardings(tree: PyTree[Any], mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every leaf of a tree of parameters (or of `jax.ShapeDtypeStruct`)."""
    where = placement(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: where(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape),
        tree,
    )


def place(tree: PyTree[Shaped[Array, "..."]], mesh: Mesh) -> PyTree[Shaped[Array, "..."]]:
    """A tree of parameters, such as a `Pair`, moved to its shards."""
    return put(tree, shardings(tree, mesh))


def batch_width(mesh: Mesh | None) -> int:
    """How many shards a batch has: a number of rows that it divides leaves no device idle."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in AXES[:2])


def put_rows(rows: PyTree[Any], mesh: Mesh | None) -> PyTree[Any]:
    """A tree of arrays [B, ...], sharded over data and fsdp; without a mesh as they are."""
    if mesh is None:
        return rows
    return jax.tree.map(lambda x: put(x, batch_sharding(mesh, x.shape[0])), rows)


def mesh_of(tree: PyTree[Any]) -> Mesh | None:
    """The mesh of `make_mesh` that a tree's arrays are spread over; None on one device."""
    for leaf in jax.tree.leaves(tree):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
            if where.mesh.size > 1 and where.mesh.axis_names == AXES:
                return where.mesh
    return None
